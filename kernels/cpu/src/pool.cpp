#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

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

// A run on somebody else's threads.
struct Work {
  const std::function<void(int64_t, int)>& task;
  const int64_t tasks;
  const int threads;
  std::atomic<int> number;
  std::atomic<int64_t> next;
};

void take_part(void* data) {
  Work& work = *static_cast<Work*>(data);
  const int thread = work.number++;
  if (thread >= work.threads) return;
  for (int64_t i; (i = work.next++) < work.tasks;) work.task(i, thread);
}

}  // namespace

class Pool::Team {
 public:
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      round_++;
    }
    begin_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void grow(int threads) {
    try {
      while (static_cast<int>(threads_.size()) + 1 < threads)
        threads_.emplace_back(&Team::work, this, static_cast<int>(threads_.size()) + 1, round_.load());
    } catch (const std::system_error&) {  // the system gives no more threads: those that there are do the work
    }
  }

  void run(int64_t tasks, int threads, const std::function<void(int64_t, int)>& task) {
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

 private:
  void take(int thread) {
    for (int64_t i; (i = next_++) < tasks_;) (*task_)(i, thread);
  }

  void work(int thread, uint64_t seen) {
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
};

void Pool::use(negengine_parallel parallel) {
  parallel_ = parallel;
  parallel_process_ = getpid();
}

Pool::~Pool() {
  if (process_ == getpid()) delete team_;  // after fork() its threads exist in the parent only
}

void Pool::run(int64_t tasks, int threads, const std::function<void(int64_t, int)>& task) {
  const int most = threads;
  threads = static_cast<int64_t>(threads) < tasks ? threads : static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i, 0);
    return;
  }
  if (parallel_ != nullptr && parallel_process_ == getpid()) {
    Work work = {task, tasks, most, {0}, {0}};
    parallel_(take_part, &work, static_cast<unsigned>(most), 0);  // always all: a runtime may end threads that are not asked for
    return;
  }
  if (process_ != getpid()) {  // a child starts its own team; the parent's has locks that nobody here will open
    team_ = new Team;
    process_ = getpid();
  }
  team_->grow(threads);
  team_->run(tasks, threads, task);
}

}  // namespace negengine
