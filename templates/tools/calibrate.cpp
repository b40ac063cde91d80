// Measures what the machine table cannot know: how fast 1, 2 ... threads together read memory, one
// sequential stream each, and what a barrier of all of them costs.
// usage: calibrate THREADS MIB_PER_THREAD SECONDS
// Prints THREADS bandwidths in GB/s, the best that was seen, then the barrier in microseconds.
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "qigen/generated.h"

namespace {

double seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Sum of n words (a multiple of 32), which no compiler can leave out.
uint64_t read(const uint64_t* p, size_t n) {
  uint64_t s[32] = {};
  for (size_t i = 0; i < n; i += 32)
    for (int j = 0; j < 32; ++j) s[j] += p[i + j];
  uint64_t total = 0;
  for (uint64_t x : s) total += x;
  return total;
}

// Runs f(thread) on all threads at once.
template <class F>
void on_all(int threads, const F& f) {
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(f, t);
  f(0);
  for (std::thread& t : pool) t.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int cores = std::atoi(argv[1]);
  const size_t bytes = static_cast<size_t>(std::atoll(argv[2])) << 20;
  const double limit = std::atof(argv[3]);
  std::vector<uint64_t*> buffers;
  for (int t = 0; t < cores; ++t) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return 3;
    buffers.push_back(static_cast<uint64_t*>(p));
  }
  // every thread touches its own memory first: it comes from the thread's node
  on_all(cores, [&](int t) {
    for (size_t i = 0; i < bytes / 8; i += 8) buffers[t][i] = i;
  });
  std::vector<uint64_t> sums(16 * cores);
  for (int threads = 1; threads <= cores; ++threads) {
    double best = 0.0;
    for (const double end = seconds() + limit; seconds() < end;) {
      qigen::Barrier barrier(threads);
      double took = 0.0;
      on_all(threads, [&](int t) {
        barrier.wait(t);
        const double start = seconds();
        sums[16 * t] += read(buffers[t], bytes / 8);
        barrier.wait(t);
        if (t == 0) took = seconds() - start;
      });
      const double rate = static_cast<double>(bytes) * threads / took / 1e9;
      if (rate > best) best = rate;
    }
    std::printf("%.3f\n", best);
  }
  double fastest = 1e9;
  if (cores > 1) {
    constexpr int kRounds = 2000;
    for (const double end = seconds() + limit; seconds() < end;) {
      qigen::Barrier barrier(cores);
      on_all(cores, [&](int t) {
        barrier.wait(t);
        const double start = seconds();
        for (int i = 0; i < kRounds; ++i) barrier.wait(t);
        const double took = (seconds() - start) / kRounds;
        if (t == 0 && took < fastest) fastest = took;
      });
    }
  }
  std::printf("%.4f\n", cores > 1 ? fastest * 1e6 : 0.0);
  uint64_t total = 0;
  for (uint64_t x : sums) total += x;
  return total == 1 ? 1 : 0;  // never: the sums are used
}
