#include "thread_pool.h"

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif

#include <chrono>
#include <cstdlib>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu.h"

namespace qigen::runtime {
namespace {

// Rounding and denormals as IEEE 754 has them, whatever the application set: otherwise thread 0
// could compute otherwise than the workers and results would depend on the thread count.
class DefaultFloatingPoint {
 public:
#if defined(__x86_64__)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Worker threads take no signals of the application: Ctrl-C belongs to its own threads.
class SignalsBlocked {
#ifdef _WIN32  // has no signals that go to threads
 public:
  SignalsBlocked() {}
#else
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }

 private:
  sigset_t saved_;
#endif
};

}  // namespace

Turnstile::Turn::Turn(Turnstile& turnstile) : turnstile_(turnstile) {
  std::unique_lock lock(turnstile.mutex_);
  const uint64_t ticket = turnstile.next_ticket_++;
  turnstile.advanced_.wait(lock, [&] { return turnstile.serving_ == ticket; });
}

Turnstile::Turn::~Turn() {
  bool others;
  {
    std::lock_guard lock(turnstile_.mutex_);
    others = ++turnstile_.serving_ != turnstile_.next_ticket_;
  }
  if (others) turnstile_.advanced_.notify_all();
}

ThreadPool::ThreadPool(int threads, Stay stay, int spin_us, const std::vector<Core>& cores)
    : threads_(threads), spin_us_(spin_us), barrier_(threads) {
  // Threads get work by the speed of their cores: declared by the user, or, if they stay on their
  // cores, by the system.
  std::vector<int> speeds;
  for (const Core& core : cores) speeds.push_back(core.speed);
  if (const char* declared = std::getenv("QIGEN_CORE_SPEEDS")) {
    speeds = parse_speeds(declared, threads);
  } else if (stay != Stay::kOnCore) {
    speeds.clear();
  }
  std::vector<int32_t> sums = {0};
  bool equal = true;
  for (int t = 0; t < threads && !speeds.empty(); ++t) {
    const int speed = speeds[static_cast<size_t>(t) % speeds.size()];
    equal = equal && speed == speeds.front();
    sums.push_back(sums.back() + speed);
  }
  if (!equal) shares_ = sums;
  try {
    start_workers(stay, cores);
  } catch (...) {
    stop_workers();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop_workers(); }

void ThreadPool::start_workers(Stay stay, const std::vector<Core>& cores) {
  [[maybe_unused]] SignalsBlocked blocked;
  for (int thread = 1; thread < threads_; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
    const Core& core = cores[static_cast<size_t>(thread) % cores.size()];
    if (stay == Stay::kOnCore) keep_on_cores(workers_.back(), {core.id});
    if (stay == Stay::kOnNode) keep_on_cores(workers_.back(), cores_of_node(cores, core.node));
  }
}

void ThreadPool::stop_workers() {
  {
    std::lock_guard lock(sleep_mutex_);
    stop_ = true;
    jobs_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Function function, const Step& step) {
  Turnstile::Turn turn(turnstile_);
  [[maybe_unused]] DefaultFloatingPoint floating_point;
  if (threads_ == 1) return call(function, step, 0);

  function_ = function;
  step_ = &step;
  unfinished_.store(static_cast<uint32_t>(threads_ - 1));
  // In one order with sleepers_ below: either the worker sees the new job before it sleeps or we
  // see the sleeper.
  jobs_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    {
      std::lock_guard lock(sleep_mutex_);
    }
    wake_.notify_all();
  }
  call(function, step, 0);
  while (const uint32_t left = unfinished_.load()) unfinished_.wait_while(left);
}

void ThreadPool::call(Function function, const Step& step, int thread) {
  if (copies_.empty()) return function(step, thread, threads_, barrier_);
  Step own = step;
  own.weights = copies_[static_cast<size_t>(thread)];
  function(own, thread, threads_, barrier_);
}

void ThreadPool::work(int thread) {
  [[maybe_unused]] DefaultFloatingPoint floating_point;
  for (uint32_t seen = 0;; ++seen) {
    if (!wait_for_job(seen)) return;
    call(function_, *step_, thread);
    unfinished_.subtract(1);
  }
}

// Waits until jobs_ differs from `seen`; false: the pool stops. Nobody starts a job before all
// workers have finished the one before, so no job is missed.
bool ThreadPool::wait_for_job(uint32_t seen) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::microseconds(spin_us_);
  while (jobs_.load(std::memory_order_acquire) == seen) {
    for (int i = 0; i < 16; ++i) cpu_relax();
    if (Clock::now() < end) continue;
    std::unique_lock lock(sleep_mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return jobs_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
  return !stop_;
}

}  // namespace qigen::runtime
