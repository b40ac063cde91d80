// Runs and times generated matmul kernels side by side, in a process that may crash.
// usage: time_kernels TOTAL_BYTES THREADS CPU,CPU,.. (LIBRARY CASE)..
// A case holds the header below, what a packed weight begins with (codebooks; most have nothing),
// one row-block of it and the activation rows. The row-block is repeated for all rows, and the
// weight copied until the weights of all kernels
// together take TOTAL_BYTES (0: one copy each, which stay in the caches); every call reads the
// next copy. Commands come on standard input, answers go to standard output, a line each:
//   check I FILE   runs kernel I and writes y, float32 [m][n]                -> "at I", "done"
//   rounds R       R rounds, each of which runs every kernel once            -> "at I", then its
//                  microseconds from barrier to barrier, for each; "done"
//   stream P       reads all weights of kernel 0 P times, one sequential stream a thread
//                                                  -> "at 0", then GB/s of each time; "done"
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels.h"
#include "qigen/generated.h"

namespace {

struct Header {
  int64_t shared, row_block, x_bytes, x_stride;
  int32_t n, kblocks, m, scale_offset, zero_offset, sum_offset;
};

using Kernel = void (*)(const qg::MatmulArgs&, int, int);

struct Side {
  Kernel run;
  Header h;
  uint8_t *w, *x;
  size_t weight, copies, next;
};

// A cache line: one register with AVX-512, two with AVX2, four with SSE.
typedef uint64_t Line __attribute__((vector_size(64)));

#if defined(__x86_64__)
__attribute__((target_clones("default", "avx2", "avx512f")))
#endif
uint64_t read_lines(const Line* first, const Line* last) {
  Line sums[8] = {};  // as many loads in flight
  for (; last - first >= 8; first += 8) {
    for (int i = 0; i < 8; ++i) sums[i] += first[i];
  }
  for (; first < last; ++first) sums[0] += *first;
  for (int i = 1; i < 8; ++i) sums[0] += sums[i];
  uint64_t total = 0;
  for (size_t i = 0; i < sizeof(Line) / sizeof total; ++i) total += sums[0][i];
  return total;
}

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count();
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(3);
}

uint8_t* allocate(size_t n) {
  void* p = std::aligned_alloc(4096, (n + 16383) / 4096 * 4096);  // and pages to prefetch from
  if (!p) fail("there is not enough memory");
  return static_cast<uint8_t*>(p);
}

Side load(const char* library, const char* file, size_t total) {
  Side s{};
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) fail(dlerror());
  s.run = reinterpret_cast<Kernel>(dlsym(opened, "qigen_kernel"));
  std::FILE* f = std::fopen(file, "rb");
  if (!s.run || !f || std::fread(&s.h, sizeof s.h, 1, f) != 1) fail("a case cannot be read");
  const size_t shared = static_cast<size_t>(s.h.shared);
  const size_t block = static_cast<size_t>(s.h.row_block);
  const size_t blocks = static_cast<size_t>(s.h.n + 15) / 16;
  const size_t rows = static_cast<size_t>(s.h.x_bytes);
  s.weight = shared + block * blocks;
  s.copies = std::max<size_t>(1, total / s.weight);
  s.w = allocate(s.copies * s.weight);
  s.x = allocate(rows);
  if (std::fread(s.w, 1, shared + block, f) != shared + block ||
      std::fread(s.x, 1, rows, f) != rows)
    fail("a case is cut short");
  std::fclose(f);
  for (size_t i = 1; i < blocks; ++i) std::memcpy(s.w + shared + i * block, s.w + shared, block);
  for (size_t i = 1; i < s.copies; ++i) std::memcpy(s.w + i * s.weight, s.w, s.weight);
  return s;
}

qg::MatmulArgs arguments(const Side& s, size_t copy, float* y, int64_t y_stride) {
  return {
      s.w + copy * s.weight, s.h.row_block,   s.h.kblocks,    s.h.m, s.h.n,    s.x,    s.h.x_stride,
      s.h.scale_offset,      s.h.zero_offset, s.h.sum_offset, y,     y_stride, nullptr};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6 || argc % 2) return 2;
  const int threads = std::atoi(argv[2]);
  std::vector<int> cpus;
  for (char *at = argv[3], *next = nullptr; *at; at = *next ? next + 1 : next)
    cpus.push_back(static_cast<int>(std::strtol(at, &next, 10)));
  const size_t total =
      static_cast<size_t>(std::atoll(argv[1])) / static_cast<size_t>((argc - 4) / 2);
  std::vector<Side> sides;
  for (int i = 4; i < argc; i += 2) sides.push_back(load(argv[i], argv[i + 1], total));
  int64_t y_stride = 0, m = 0;
  for (const Side& s : sides) {
    y_stride = std::max<int64_t>(y_stride, (s.h.n + 31) / 16 * 16);
    m = std::max<int64_t>(m, s.h.m);
  }
  const size_t y_bytes = sizeof(float) * static_cast<size_t>(y_stride * m);
  float* y = reinterpret_cast<float*>(allocate(y_bytes));
  std::memset(y, 0, y_bytes);

  // f(thread, barrier) on all threads, each on a processor of its own
  const auto on_all = [&](const auto& f) {
    qigen::Barrier barrier(threads);
    const auto work = [&](int t) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[static_cast<size_t>(t) % cpus.size()], &set);
      pthread_setaffinity_np(pthread_self(), sizeof set, &set);
      f(t, barrier);
    };
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
    work(0);
    for (std::thread& t : pool) t.join();
  };
  // one call of a kernel; microseconds on thread 0
  const auto call = [&](Side& s, int t, qigen::Barrier& barrier) {
    const qg::MatmulArgs a = arguments(s, s.next, y, y_stride);
    const int blocks = (s.h.n + 15) / 16;
    barrier.wait(t);
    const double start = now();
    s.run(a, blocks * t / threads, blocks * (t + 1) / threads);
    barrier.wait(t);
    const double took = now() - start;
    if (t == 0) s.next = (s.next + 1) % s.copies;
    barrier.wait(t);
    return took;
  };

  // reads all copies of a weight once; microseconds on thread 0
  const auto read_all = [&](const Side& s, int t, qigen::Barrier& barrier) {
    const size_t lines = s.copies * s.weight / sizeof(Line);
    const auto at = [&](int part) {
      const Line* first = reinterpret_cast<const Line*>(s.w);
      return first + lines * static_cast<size_t>(part) / static_cast<size_t>(threads);
    };
    barrier.wait(t);
    const double start = now();
    const uint64_t sum = read_lines(at(t), at(t + 1));
    __asm__ volatile("" : : "r"(sum));  // it is wanted
    barrier.wait(t);
    return now() - start;
  };

  char line[4096], path[4000];
  size_t which = 0;
  int rounds = 0;
  std::printf("ready\n");
  std::fflush(stdout);
  while (std::fgets(line, sizeof line, stdin)) {
    if (std::sscanf(line, "check %zu %3999[^\n]", &which, path) == 2 && which < sides.size()) {
      std::printf("at %zu\n", which);
      std::fflush(stdout);
      Side& s = sides[which];
      std::memset(y, 0xff, y_bytes);  // NaN
      on_all([&](int t, qigen::Barrier& barrier) { call(s, t, barrier); });
      std::FILE* f = std::fopen(path, "wb");
      if (!f) fail("a result cannot be written");
      for (int i = 0; i < s.h.m; ++i)
        std::fwrite(y + i * y_stride, sizeof(float), static_cast<size_t>(s.h.n), f);
      if (std::fclose(f)) fail("a result cannot be written");
    } else if (std::sscanf(line, "rounds %d", &rounds) == 1) {
      on_all([&](int t, qigen::Barrier& barrier) {
        for (int r = 0; r < rounds; ++r)
          for (size_t i = 0; i < sides.size(); ++i) {
            if (t == 0) {
              std::printf("at %zu\n", i);
              std::fflush(stdout);
            }
            const double us = call(sides[i], t, barrier);
            if (t == 0) std::printf("%.3f\n", us);
          }
      });
    } else if (std::sscanf(line, "stream %d", &rounds) == 1) {
      std::printf("at 0\n");
      std::fflush(stdout);
      const Side& s = sides[0];
      on_all([&](int t, qigen::Barrier& barrier) {
        for (int r = 0; r < rounds; ++r) {
          const double us = read_all(s, t, barrier);
          const double bytes = static_cast<double>(s.copies * s.weight);
          if (t == 0) std::printf("%.3f\n", bytes / us / 1e3);
        }
      });
    } else {
      fail("an unknown command");
    }
    std::printf("done\n");
    std::fflush(stdout);
  }
  return 0;
}
