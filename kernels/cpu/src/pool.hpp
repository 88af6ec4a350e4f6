// Threads that live as long as their workspace and share out numbered tasks.
#pragma once

#include <cstdint>
#include <functional>

#include "negengine_cpu.h"

namespace negengine {

class Pool {
 public:
  Pool() = default;
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // The threads of `parallel` from now on, in this process; null: its own.
  void use(negengine_parallel parallel);

  // Calls task(i, thread) for every i below `tasks`, on at most `threads` threads of which the caller is number 0.
  // Tasks must not throw. Returns when all are done. Not for two callers at once.
  void run(int64_t tasks, int threads, const std::function<void(int64_t, int)>& task);

 private:
  class Team;
  negengine_parallel parallel_ = nullptr;
  int64_t parallel_process_ = 0;
  Team* team_ = nullptr;
  int64_t process_ = 0;
};

}  // namespace negengine
