#include "pool.hpp"

#include <chrono>
#include <system_error>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

namespace negengine {
namespace {

constexpr auto kSpin = std::chrono::microseconds(30);  // phases of a call follow each other faster than a sleeper wakes

template <class Done>
bool spin(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++) {
      if (done()) return true;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

}  // namespace

Pool::~Pool() {
  grow(0);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    round_++;
  }
  begin_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::grow(int threads) {
  if (process_ != getpid()) {  // after fork() the child starts its own; the parent's cannot be joined
    if (!threads_.empty()) new std::vector<std::thread>(std::move(threads_));
    threads_.clear();
    process_ = getpid();
  }
  try {
    while (static_cast<int>(threads_.size()) + 1 < threads)
      threads_.emplace_back(&Pool::work, this, static_cast<int>(threads_.size()) + 1, round_.load());
  } catch (const std::system_error&) {  // the system gives no more threads: those that there are do the work
  }
}

void Pool::run(int64_t tasks, int threads, const std::function<void(int64_t, int)>& task) {
  threads = static_cast<int64_t>(threads) < tasks ? threads : static_cast<int>(tasks);
  if (threads > 1) grow(threads);
  if (threads <= 1 || threads_.empty()) {
    for (int64_t i = 0; i < tasks; i++) task(i, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = &task;
    tasks_ = tasks;
    next_ = 0;
    wanted_ = threads;
    busy_ = static_cast<int>(threads_.size());
    round_++;
  }
  begin_.notify_all();
  take(0);
  if (!spin([&] { return busy_ == 0; })) {
    std::unique_lock<std::mutex> lock(mutex_);
    end_.wait(lock, [&] { return busy_ == 0; });
  }
}

void Pool::take(int thread) {
  for (int64_t i; (i = next_++) < tasks_;) (*task_)(i, thread);
}

void Pool::work(int thread, uint64_t seen) {
  while (true) {
    if (!spin([&] { return round_ != seen; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      begin_.wait(lock, [&] { return round_ != seen; });
    }
    bool mine;
    {
      std::lock_guard<std::mutex> lock(mutex_);  // orders this round's fields before their use
      seen = round_;
      if (stop_) return;
      mine = thread < wanted_;
    }
    if (mine) take(thread);
    if (--busy_ == 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      end_.notify_one();
    }
  }
}

}  // namespace negengine
