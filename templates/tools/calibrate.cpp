// Measures what the machine table cannot know of the machine at hand: read bandwidth by number of
// threads (one sequential stream each, then several), bandwidths of the caches, the cost of a barrier, and how
// many instructions of each class that the kernels use a core issues a cycle.
// usage: calibrate THREADS,THREADS,.. MIB_PER_THREAD L1_BYTES L2_BYTES L3_BYTES SECONDS
// Prints lines of "name value": read.T in GB/s of T threads together, streams.S in GB/s of all
// threads that read S streams side by side; l1, l2, l3 in GB/s of one
// thread; barrier.T in microseconds; ghz.W, rate.W.CLASS in instructions a cycle and
// latency.W.CLASS in cycles for vectors of W bits. Every value is the best that was seen, because
// others may use the machine at the same time.
#include <sys/mman.h>

#include <algorithm>
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

// Reads `streams` stretches of 36 KiB side by side, like row-blocks, then the next ones.
uint64_t read_side_by_side(const uint64_t* p, size_t n, size_t streams) {
  constexpr size_t kStretch = (36 << 10) / 8, kLine = 8;
  uint64_t s[kLine] = {};
  for (size_t first = 0; first + streams * kStretch <= n; first += streams * kStretch)
    for (size_t i = 0; i < kStretch; i += kLine)
      for (size_t r = 0; r < streams; ++r)
        for (size_t j = 0; j < kLine; ++j) s[j] += p[first + r * kStretch + i + j];
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

uint64_t sink = 0;

// GB/s of one thread that reads the same `bytes` again and again.
double cache_bandwidth(const uint64_t* p, size_t bytes, double limit) {
  const size_t words = bytes / 8 / 32 * 32;
  const size_t times = std::max<size_t>(1, (size_t{4} << 20) / bytes);
  double best = 0.0;
  for (const double end = seconds() + limit; seconds() < end;) {
    const double start = seconds();
    for (size_t i = 0; i < times; ++i) sink += read(p, words);
    best = std::max(best, 8.0 * static_cast<double>(words * times) / (seconds() - start) / 1e9);
  }
  return best;
}

// ---- issue rates ----
// A loop of kGroup instructions of one kind. Registers 14 and 15 are sources, 0 to 11 results, so
// that chains of 5 cycles at two instructions a cycle stay hidden.
constexpr int kGroup = 12;
#define QG_12(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define QG_CLOBBERS                                                                                \
  "memory", "rax", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
      "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define QG_MEASURE(name, M)                                                     \
  void name(uint8_t* buffer, long n) {                                          \
    __asm__ volatile(                                                           \
        "vxorps %%xmm14, %%xmm14, %%xmm14\n\tvxorps %%xmm15, %%xmm15, "         \
        "%%xmm15\n\t" QG_12(QG_ZERO) "1:\n\t" QG_12(M) "sub $1, %[n]\n\tjnz 1b" \
        : [n] "+r"(n)                                                           \
        : [p] "r"(buffer)                                                       \
        : "cc", QG_CLOBBERS);                                                   \
  }
#define QG_ZERO(i) "vxorps %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"

struct Measure {
  const char* name;
  void (*run)(uint8_t* buffer, long n);
};

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define QG_FMA(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define QG_LOGIC(i) "vpandd %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define QG_SHIFT(i) "vpsrld $4, %%zmm15, %%zmm" #i "\n\t"
#define QG_SHUFFLE(i) "vpshufb %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define QG_CONVERT(i) "vcvtdq2ps %%zmm15, %%zmm" #i "\n\t"
#define QG_LOAD(i) "vmovdqu64 64*" #i "(%[p]), %%zmm" #i "\n\t"
#define QG_STORE(i) "vmovdqu64 %%zmm" #i ", 64*" #i "(%[p])\n\t"
#define QG_CLOCK(i) "imul %%rax, %%rax\n\tvpandd %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define QG_FMA_CHAIN(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm0\n\t"
#define QG_LOGIC_CHAIN(i) "vpandd %%zmm0, %%zmm15, %%zmm0\n\t"
#define QG_CONVERT_CHAIN(i) "vcvtdq2ps %%zmm0, %%zmm0\n\t"
QG_MEASURE(fma512, QG_FMA)
QG_MEASURE(logic512, QG_LOGIC)
QG_MEASURE(shift512, QG_SHIFT)
QG_MEASURE(shuffle512, QG_SHUFFLE)
QG_MEASURE(convert512, QG_CONVERT)
QG_MEASURE(load512, QG_LOAD)
QG_MEASURE(store512, QG_STORE)
QG_MEASURE(clock512, QG_CLOCK)
QG_MEASURE(fma_chain512, QG_FMA_CHAIN)
QG_MEASURE(logic_chain512, QG_LOGIC_CHAIN)
QG_MEASURE(convert_chain512, QG_CONVERT_CHAIN)
#if defined(__AVX512VNNI__)
#define QG_DOT(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define QG_DOT_CHAIN(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm0\n\t"
#else
#define QG_DOT(i) "vpmaddubsw %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define QG_DOT_CHAIN(i) "vpmaddubsw %%zmm0, %%zmm15, %%zmm0\n\t"
#endif
QG_MEASURE(dot512, QG_DOT)
QG_MEASURE(dot_chain512, QG_DOT_CHAIN)
// float and integer instructions in turn: all ports that compute
#define QG_PAIR(i) QG_FMA(i) QG_LOGIC(i)
QG_MEASURE(pair512, QG_PAIR)
#undef QG_FMA
#undef QG_LOGIC
#undef QG_SHIFT
#undef QG_SHUFFLE
#undef QG_CONVERT
#undef QG_LOAD
#undef QG_STORE
#undef QG_CLOCK
#undef QG_FMA_CHAIN
#undef QG_LOGIC_CHAIN
#undef QG_CONVERT_CHAIN
#undef QG_DOT
#undef QG_DOT_CHAIN
#undef QG_PAIR
constexpr Measure kRates512[] = {{"rate.512.dot", dot512},         {"rate.512.fma", fma512},
                                 {"rate.512.logic", logic512},     {"rate.512.shift", shift512},
                                 {"rate.512.shuffle", shuffle512}, {"rate.512.convert", convert512},
                                 {"rate.512.load", load512},       {"rate.512.store", store512},
                                 {"rate.512.vector", pair512}};
constexpr Measure kChains512[] = {{"latency.512.dot", dot_chain512},
                                  {"latency.512.fma", fma_chain512},
                                  {"latency.512.logic", logic_chain512},
                                  {"latency.512.convert", convert_chain512}};
#endif

#if defined(__AVX2__) && defined(__FMA__)
#define QG_FMA(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define QG_LOGIC(i) "vpand %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define QG_SHIFT(i) "vpsrld $4, %%ymm15, %%ymm" #i "\n\t"
#define QG_SHUFFLE(i) "vpshufb %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define QG_CONVERT(i) "vcvtdq2ps %%ymm15, %%ymm" #i "\n\t"
#define QG_LOAD(i) "vmovdqu 32*" #i "(%[p]), %%ymm" #i "\n\t"
#define QG_STORE(i) "vmovdqu %%ymm" #i ", 32*" #i "(%[p])\n\t"
#define QG_CLOCK(i) "imul %%rax, %%rax\n\tvpand %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define QG_DOT(i) "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define QG_FMA_CHAIN(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm0\n\t"
#define QG_LOGIC_CHAIN(i) "vpand %%ymm0, %%ymm15, %%ymm0\n\t"
#define QG_CONVERT_CHAIN(i) "vcvtdq2ps %%ymm0, %%ymm0\n\t"
#define QG_DOT_CHAIN(i) "vpmaddubsw %%ymm0, %%ymm15, %%ymm0\n\t"
#define QG_PAIR(i) QG_FMA(i) QG_LOGIC(i)
QG_MEASURE(fma256, QG_FMA)
QG_MEASURE(logic256, QG_LOGIC)
QG_MEASURE(shift256, QG_SHIFT)
QG_MEASURE(shuffle256, QG_SHUFFLE)
QG_MEASURE(convert256, QG_CONVERT)
QG_MEASURE(load256, QG_LOAD)
QG_MEASURE(store256, QG_STORE)
QG_MEASURE(clock256, QG_CLOCK)
QG_MEASURE(dot256, QG_DOT)
QG_MEASURE(pair256, QG_PAIR)
QG_MEASURE(fma_chain256, QG_FMA_CHAIN)
QG_MEASURE(logic_chain256, QG_LOGIC_CHAIN)
QG_MEASURE(convert_chain256, QG_CONVERT_CHAIN)
QG_MEASURE(dot_chain256, QG_DOT_CHAIN)
constexpr Measure kRates256[] = {{"rate.256.dot", dot256},         {"rate.256.fma", fma256},
                                 {"rate.256.logic", logic256},     {"rate.256.shift", shift256},
                                 {"rate.256.shuffle", shuffle256}, {"rate.256.convert", convert256},
                                 {"rate.256.load", load256},       {"rate.256.store", store256},
                                 {"rate.256.vector", pair256}};
constexpr Measure kChains256[] = {{"latency.256.dot", dot_chain256},
                                  {"latency.256.fma", fma_chain256},
                                  {"latency.256.logic", logic_chain256},
                                  {"latency.256.convert", convert_chain256}};
#endif

alignas(64) uint8_t scratch[64 * kGroup];

// The shortest time of a loop of n rounds.
[[maybe_unused]] double shortest(const Measure& what, long n, double limit) {
  double best = 1e9;
  for (const double end = seconds() + limit; seconds() < end;) {
    const double start = seconds();
    what.run(scratch, n);
    best = std::min(best, seconds() - start);
  }
  return best;
}

// Prints the clock under vectors of one width, then rates and latencies. A chain of
// multiplications (additions may take no time at all) is timed beside every loop, since the clock
// may change from one to the next.
[[maybe_unused]] void issue_rates(const char* ghz, Measure clock, const Measure* rates, int n_rates,
                                  const Measure* chains, int n_chains, double limit) {
  constexpr long kRounds = 20000;
  constexpr int kMultiply = 3;  // cycles of a multiplication, on every x86 since 2008
  const double each = limit / (2 * (n_rates + n_chains));
  double fastest = 0.0;
  std::vector<double> values;
  for (int i = 0; i < n_rates + n_chains; ++i) {
    const Measure& what = i < n_rates ? rates[i] : chains[i - n_rates];
    const double cycle = shortest(clock, kRounds, each) / (kRounds * kGroup * kMultiply);
    const double instructions =
        static_cast<double>(kRounds * kGroup) * (i == n_rates - 1 ? 2 : 1);  // the pairs
    const double cycles = shortest(what, kRounds, each) / cycle;
    std::printf("%s %.3f\n", what.name,
                i < n_rates ? instructions / cycles : cycles / instructions);
    fastest = std::max(fastest, 1e-9 / cycle);
  }
  std::printf("%s %.3f\n", ghz, fastest);
}

std::vector<int> numbers(const char* text) {
  std::vector<int> found;
  for (char* next = nullptr; *text; text = *next ? next + 1 : next)
    found.push_back(static_cast<int>(std::strtol(text, &next, 10)));
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const std::vector<int> counts = numbers(argv[1]);
  const size_t bytes = static_cast<size_t>(std::atoll(argv[2])) << 20;
  const size_t caches[] = {static_cast<size_t>(std::atoll(argv[3])),
                           static_cast<size_t>(std::atoll(argv[4])),
                           static_cast<size_t>(std::atoll(argv[5]))};
  const double limit = std::atof(argv[6]);
  const int cores = counts.back();
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

  // half of the time: memory
  std::vector<uint64_t> sums(16 * cores);
  const auto bandwidth = [&](int threads, double time, const auto& read_all) {
    double best = 0.0;
    for (const double end = seconds() + time; seconds() < end;) {
      qigen::Barrier barrier(threads);
      double took = 0.0;
      on_all(threads, [&](int t) {
        barrier.wait(t);
        const double start = seconds();
        sums[16 * t] += read_all(buffers[t]);
        barrier.wait(t);
        if (t == 0) took = seconds() - start;
      });
      best = std::max(best, static_cast<double>(bytes) * threads / took / 1e9);
    }
    return best;
  };
  for (const int threads : counts) {
    const double best = bandwidth(threads, 0.38 * limit / static_cast<double>(counts.size()),
                                  [&](const uint64_t* p) { return read(p, bytes / 8); });
    std::printf("read.%d %.3f\n", threads, best);
  }
  for (const size_t streams : {1, 2, 4}) {
    const double best = bandwidth(cores, 0.04 * limit, [&](const uint64_t* p) {
      return read_side_by_side(p, bytes / 8, streams);
    });
    std::printf("streams.%zu %.3f\n", streams, best);
  }
  for (int level = 0; level < 3; ++level) {
    // most of it, but well above what the level before holds
    const size_t above = level ? 2 * caches[level - 1] : 0;
    const size_t size =
        std::min(bytes, std::max(caches[level] / 2, std::min(above, caches[level])));
    std::printf("l%d %.3f\n", level + 1, cache_bandwidth(buffers[0], size, 0.05 * limit));
  }
  if (cores > 1) {
    double fastest = 1e9;
    constexpr int kRounds = 2000;
    for (const double end = seconds() + 0.1 * limit; seconds() < end;) {
      qigen::Barrier barrier(cores);
      on_all(cores, [&](int t) {
        barrier.wait(t);
        const double start = seconds();
        for (int i = 0; i < kRounds; ++i) barrier.wait(t);
        const double took = (seconds() - start) / kRounds;
        if (t == 0 && took < fastest) fastest = took;
      });
    }
    std::printf("barrier.%d %.4f\n", cores, fastest * 1e6);
  }
#if defined(__AVX512F__) && defined(__AVX512BW__)
  issue_rates("ghz.512", {"clock", clock512}, kRates512, 9, kChains512, 4, 0.12 * limit);
#endif
#if defined(__AVX2__) && defined(__FMA__)
  issue_rates("ghz.256", {"clock", clock256}, kRates256, 9, kChains256, 4, 0.12 * limit);
#endif
  for (uint64_t x : sums) sink += x;
  return sink == 1 ? 1 : 0;  // never: the sums are used
}
