#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#define QIGEN_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define QIGEN_CLONES
#endif

namespace qigen {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kLine = 64;

// A cache line as a vector: one register with AVX-512, two with AVX2, four with SSE.
typedef uint64_t Line __attribute__((vector_size(kLine)));

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Reads lines [first, last); eight sums keep as many loads in flight.
QIGEN_CLONES uint64_t read_lines(const Line* first, const Line* last) {
  Line sums[8] = {};
  for (; last - first >= 8; first += 8) {
    for (int i = 0; i < 8; ++i) sums[i] += first[i];
  }
  for (; first < last; ++first) sums[0] += *first;
  for (int i = 1; i < 8; ++i) sums[0] += sums[i];
  uint64_t total = 0;
  for (size_t i = 0; i < kLine / sizeof total; ++i) total += sums[0][i];
  return total;
}

// A place where `count` threads wait for each other. They spin, so that all leave at the same time.
class Meeting {
 public:
  void wait(int count, const std::atomic<bool>& cancelled) {
    arrived_.fetch_add(1);
    while (arrived_.load() < count && !cancelled.load()) std::this_thread::yield();
  }

 private:
  std::atomic<int> arrived_{0};
};

}  // namespace

double stream_read_bytes_per_second(int threads, int64_t bytes, int repeats) {
  const int64_t lines = bytes / static_cast<int64_t>(kLine) / threads;  // of a thread
  const size_t size = static_cast<size_t>(lines) * threads * kLine;
  const std::unique_ptr<void, Free> memory(std::aligned_alloc(kLine, size));
  if (!memory) throw std::bad_alloc();
  Line* const buffer = static_cast<Line*>(memory.get());

  // All start a pass together, and the clock stops when the last one is done.
  std::vector<Meeting> starts(repeats), ends(repeats);
  std::vector<double> seconds(repeats);
  std::atomic<bool> cancelled{false};
  std::atomic<uint64_t> sink{0};  // what was read is used, so that it is read
  auto work = [&](int thread) {
    Line* const mine = buffer + thread * lines;
    std::fill(mine, mine + lines, Line{});  // each thread touches its own pages first
    for (int pass = 0; pass < repeats; ++pass) {
      starts[pass].wait(threads, cancelled);
      const auto start = Clock::now();
      sink += read_lines(mine, mine + lines);
      ends[pass].wait(threads, cancelled);
      if (thread == 0) {
        seconds[pass] = std::chrono::duration<double>(Clock::now() - start).count();
      }
    }
  };
  std::vector<std::thread> others;
  auto join = [&] {
    for (std::thread& other : others) other.join();
  };
  try {
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  } catch (...) {
    cancelled = true;
    join();
    throw;
  }
  work(0);
  join();
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  return static_cast<double>(size) / seconds[repeats / 2];
}

}  // namespace qigen
