// The threads of one model. The calling thread takes part as thread 0, so one thread means no pool.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu.h"
#include "qigen/generated.h"

namespace qigen::runtime {

// Lets callers through one at a time in the order in which they came. A mutex alone isn't fair: a
// thread that evaluates token after token would take it again before the others wake.
class Turnstile {
 public:
  class Turn {
   public:
    explicit Turn(Turnstile& turnstile);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Turnstile& turnstile_;
  };

 private:
  std::mutex mutex_;
  std::condition_variable advanced_;
  uint64_t next_ticket_ = 0;
  uint64_t serving_ = 0;
};

class ThreadPool {
 public:
  using Function = void (*)(const Step&, int thread, int n_threads, Barrier&);

  static constexpr int kDefaultSpinUs = 200;

  // Where workers stay; thread 0 is the application's, and stays where that has it.
  enum class Stay { kAnywhere, kOnNode, kOnCore };

  // threads >= 1, which take the cores in their order; spin_us: how long a worker looks for the
  // next step before it sleeps.
  ThreadPool(int threads, Stay stay, int spin_us, const std::vector<Core>& cores);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Sums of the speeds of the threads before each and of all, [threads + 1]; null if all are equal.
  const int32_t* shares() const { return shares_.empty() ? nullptr : shares_.data(); }

  // Weights of each thread, which replace those of a step.
  void set_weights(const std::vector<const uint8_t*>& copies) { copies_ = copies; }

  // Runs function(step, t, threads, barrier) on all threads and returns when all have returned.
  // Waits until it is this caller's turn.
  void run(Function function, const Step& step);

 private:
  void start_workers(Stay stay, const std::vector<Core>& cores);
  void stop_workers();
  void work(int thread);
  void call(Function function, const Step& step, int thread);
  bool wait_for_job(uint32_t seen);

  const int threads_;
  const int spin_us_;
  std::vector<int32_t> shares_;
  std::vector<const uint8_t*> copies_;
  Turnstile turnstile_;
  Barrier barrier_;
  std::vector<std::thread> workers_;

  // The job, written by the caller before it raises jobs_.
  Function function_ = nullptr;
  const Step* step_ = nullptr;
  bool stop_ = false;

  alignas(128) std::atomic<uint32_t> jobs_{0};  // number of the latest job
  Watched unfinished_;                          // workers that haven't returned from it
  alignas(128) std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

}  // namespace qigen::runtime
