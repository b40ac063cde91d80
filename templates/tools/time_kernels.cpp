// Runs and times generated kernels side by side, in a process that may crash: matmul kernels, which
// take row-blocks, and those of the gemm family, which share the work themselves.
// usage: time_kernels TOTAL_BYTES THREADS CPU,CPU,.. small|huge STATUS (LIBRARY CASE)..
// The word says which pages the weights lie on. STATUS is a file of 16 bytes that is kept up to date:
// int64 number of the kernel that runs, int64 calls begun. So nothing is printed while kernels run:
// whoever reads it would wake up, on a core that a thread needs.
// A case holds the header below, what its family needs, what a packed weight begins with
// (codebooks; most have nothing), one row-block of it and the activations. The row-block is
// repeated for all rows, and the weight copied until the weights of all kernels
// together take TOTAL_BYTES (0: one copy each, which stay in the caches); every call reads the
// next copy. Commands come on standard input, answers go to standard output, a line each:
//   check I FILE   runs kernel I and writes y, float32 or int32 [m][n]       -> "done"
//   rounds R       R rounds, each of which runs every kernel once            -> for each "at I",
//                  then its microseconds from barrier to barrier; "done"
//   stream P       reads all weights of kernel 0 P times, one sequential stream a thread
//                                                  -> "at 0", then GB/s of each time; "done"
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "qigen/generated.h"

namespace {

struct Header {
  int64_t gemm, shared, row_block, x_bytes;
  int32_t n, m;
};

struct MatmulHeader {
  int64_t x_stride;
  int32_t kblocks, scale_offset, zero_offset, sum_offset;
};

struct GemmHeader {
  int64_t x_pixel, x_row, x_image;
  int32_t columns, rows, images, n_taps, steps, unused;
};

// A kernel with its weights and activations.
struct Side {
  Header h;
  uint8_t *w, *x;
  size_t weight, copies, next;

  virtual ~Side() = default;
  // Elements of y from a row to the next.
  virtual int64_t y_stride() const = 0;
  // What thread `t` does of a call with the weight at `from`.
  virtual void run(const uint8_t* from, void* y, int t, int threads) const = 0;
};

struct Matmul : Side {
  void (*kernel)(const qg::MatmulArgs&, int, int);
  MatmulHeader own;

  int64_t y_stride() const override { return (h.n + 31) / 16 * 16; }
  void run(const uint8_t* from, void* y, int t, int threads) const override {
    const qg::MatmulArgs a = {from,
                              h.row_block,
                              own.kblocks,
                              h.m,
                              h.n,
                              x,
                              own.x_stride,
                              own.scale_offset,
                              own.zero_offset,
                              own.sum_offset,
                              static_cast<float*>(y),
                              y_stride(),
                              nullptr};
    const int blocks = (h.n + 15) / 16;
    kernel(a, blocks * t / threads, blocks * (t + 1) / threads);
  }
};

struct Gemm : Side {
  void (*kernel)(const qg::GemmArgs&, int, int);
  GemmHeader own;
  std::vector<int32_t> taps, zeros;  // the latter by channel, as the former's scales
  std::vector<float> ones;

  int64_t y_stride() const override { return h.n; }
  void run(const uint8_t* from, void* y, int t, int threads) const override {
    qg::GemmArgs a = {};
    a.w = from;
    a.row_block = h.row_block;
    a.x = x;
    a.x_pixel = own.x_pixel;
    a.x_row = own.x_row;
    a.x_image = own.x_image;
    a.columns = own.columns;
    a.rows = own.rows;
    a.images = own.images;
    a.taps = taps.data();
    a.n_taps = own.n_taps;
    a.steps = own.steps;
    a.n = h.n;
    a.out.y = y;
    a.out.y_pixel = h.n;
    a.out.y_row = int64_t{h.n} * own.columns;
    a.out.y_image = a.out.y_row * own.rows;
    a.out.scale = ones.data();
    a.out.init = zeros.data();
    kernel(a, t, threads);
  }
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

constexpr size_t kHugePage = size_t{2} << 20;

uint8_t* allocate(size_t n, bool huge = false) {
  const size_t page = huge ? kHugePage : 4096;
  const size_t bytes = (n + 12288 + page - 1) / page * page;  // and pages to prefetch from
  void* p = std::aligned_alloc(page, bytes);
  if (!p) fail("there is not enough memory");
  // a system that always gives huge pages is told not to, or nobody would know what was measured
  madvise(p, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return static_cast<uint8_t*>(p);
}

// What the program does, for whoever started it.
struct Status {
  std::atomic<int64_t> kernel, calls;
};

Status& open_status(const char* path) {
  const int file = open(path, O_RDWR | O_CLOEXEC);
  void* p = file < 0 ? MAP_FAILED
                     : mmap(nullptr, sizeof(Status), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (p == MAP_FAILED) fail("the status file cannot be opened");
  close(file);
  return *static_cast<Status*>(p);
}

template <class T>
void read(std::FILE* f, T* to, size_t count = 1) {
  if (std::fread(to, sizeof(T), count, f) != count) fail("a case is cut short");
}

std::unique_ptr<Side> load(const char* library, const char* file, size_t total, bool huge) {
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) fail(dlerror());
  void* kernel = dlsym(opened, "qigen_kernel");
  std::FILE* f = std::fopen(file, "rb");
  if (!kernel || !f) fail("a case cannot be read");
  Header h;
  read(f, &h);
  std::unique_ptr<Side> s;
  if (h.gemm) {
    auto side = std::make_unique<Gemm>();
    side->kernel = reinterpret_cast<decltype(side->kernel)>(kernel);
    read(f, &side->own);
    side->taps.resize(static_cast<size_t>(side->own.n_taps));
    read(f, side->taps.data(), side->taps.size());
    side->zeros.assign(static_cast<size_t>(h.n + 15), 0);
    side->ones.assign(side->zeros.size(), 1.0f);
    s = std::move(side);
  } else {
    auto side = std::make_unique<Matmul>();
    side->kernel = reinterpret_cast<decltype(side->kernel)>(kernel);
    read(f, &side->own);
    s = std::move(side);
  }
  s->h = h;
  const size_t shared = static_cast<size_t>(h.shared), block = static_cast<size_t>(h.row_block);
  const size_t blocks = static_cast<size_t>(h.n + 15) / 16;
  s->weight = shared + block * blocks;
  s->copies = std::max<size_t>(1, total / s->weight);
  s->next = 0;
  s->w = allocate(s->copies * s->weight, huge);
  s->x = allocate(static_cast<size_t>(h.x_bytes));
  read(f, s->w, shared + block);
  read(f, s->x, static_cast<size_t>(h.x_bytes));
  std::fclose(f);
  for (size_t i = 1; i < blocks; ++i) std::memcpy(s->w + shared + i * block, s->w + shared, block);
  for (size_t i = 1; i < s->copies; ++i) std::memcpy(s->w + i * s->weight, s->w, s->weight);
  return s;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 8 || argc % 2) return 2;
  const int threads = std::atoi(argv[2]);
  std::vector<int> cpus;
  for (char *at = argv[3], *next = nullptr; *at; at = *next ? next + 1 : next)
    cpus.push_back(static_cast<int>(std::strtol(at, &next, 10)));
  const size_t total =
      static_cast<size_t>(std::atoll(argv[1])) / static_cast<size_t>((argc - 6) / 2);
  const bool huge = std::strcmp(argv[4], "huge") == 0;
  Status& status = open_status(argv[5]);
  std::vector<std::unique_ptr<Side>> sides;
  for (int i = 6; i < argc; i += 2) sides.push_back(load(argv[i], argv[i + 1], total, huge));
  int64_t elements = 0;
  for (const auto& s : sides) elements = std::max(elements, s->y_stride() * s->h.m);
  const size_t y_bytes = sizeof(float) * static_cast<size_t>(elements);
  uint8_t* y = allocate(y_bytes);
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
  const auto call = [&](size_t i, int t, qigen::Barrier& barrier) {
    Side& s = *sides[i];
    const uint8_t* w = s.w + s.next * s.weight;
    if (t == 0) {
      status.kernel = static_cast<int64_t>(i);
      ++status.calls;
    }
    barrier.wait(t);
    const double start = now();
    s.run(w, y, t, threads);
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
      const Side& s = *sides[which];
      std::memset(y, 0xff, y_bytes);  // NaN
      on_all([&](int t, qigen::Barrier& barrier) { call(which, t, barrier); });
      std::FILE* f = std::fopen(path, "wb");
      if (!f) fail("a result cannot be written");
      const int64_t row = s.y_stride() * static_cast<int64_t>(sizeof(float));
      for (int i = 0; i < s.h.m; ++i)
        std::fwrite(y + i * row, sizeof(float), static_cast<size_t>(s.h.n), f);
      if (std::fclose(f)) fail("a result cannot be written");
    } else if (std::sscanf(line, "rounds %d", &rounds) == 1) {
      std::vector<std::vector<double>> times(sides.size());
      on_all([&](int t, qigen::Barrier& barrier) {
        for (int r = 0; r < rounds; ++r)
          for (size_t i = 0; i < sides.size(); ++i) {
            const double us = call(i, t, barrier);
            if (t == 0) times[i].push_back(us);
          }
      });
      for (size_t i = 0; i < sides.size(); ++i) {
        std::printf("at %zu\n", i);
        for (const double us : times[i]) std::printf("%.3f\n", us);
      }
    } else if (std::sscanf(line, "stream %d", &rounds) == 1) {
      std::printf("at 0\n");
      const Side& s = *sides[0];
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
