// Threads that live as long as their workspace and share out numbered tasks.
#pragma once

#include <cstdint>
#include <functional>

namespace negengine {

class Pool {
 public:
  Pool() = default;
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Calls task(i, thread) for every i below `tasks`, on at most `threads` threads of which the caller is number 0.
  // Tasks must not throw. Returns when all are done. Not for two callers at once.
  void run(int64_t tasks, int threads, const std::function<void(int64_t, int)>& task);

 private:
  class Team;
  Team* team_ = nullptr;
  int64_t process_ = 0;
};

}  // namespace negengine
