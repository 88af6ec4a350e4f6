// Threads that live as long as their workspace and share out numbered tasks.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

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
  void grow(int threads);
  void work(int thread, uint64_t seen);
  void take(int thread);

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> round_{0};
  std::atomic<int> busy_{0};
  int64_t tasks_ = 0;
  int wanted_ = 0;
  bool stop_ = false;
  int64_t process_ = 0;
};

}  // namespace negengine
