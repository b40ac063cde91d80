// What generated code and the runtime say to each other. The generated model.cpp defines
// qigen_model_description; the runtime (runtime/src) checks the machine and the weights against it
// and then calls its step function on every thread of the pool.
//
// Generated files are compiled with instruction-set flags, the runtime isn't, and both end in one
// library. A function that both emit (an inline function, a template of the standard library) would
// be merged into one copy, perhaps the one with AVX-512 code, which then runs before the processor
// was checked. So this header has only always-inlined functions, generated code keeps its helpers
// static or in an anonymous namespace and has no dynamic initialisers, and runtime objects come
// first on the link line.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef _WIN32
extern "C" __declspec(dllimport) int SwitchToThread(void);
#else
#include <sched.h>
#endif
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define QIGEN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace qigen {

// Instruction sets that a model can ask for, named as the compiler flag without -m. A bit never
// changes its meaning.
struct CpuFeature {
  static constexpr uint64_t sse3 = 1ull << 0;
  static constexpr uint64_t ssse3 = 1ull << 1;
  static constexpr uint64_t sse4_1 = 1ull << 2;
  static constexpr uint64_t sse4_2 = 1ull << 3;
  static constexpr uint64_t popcnt = 1ull << 4;
  static constexpr uint64_t avx = 1ull << 5;
  static constexpr uint64_t f16c = 1ull << 6;
  static constexpr uint64_t fma = 1ull << 7;
  static constexpr uint64_t avx2 = 1ull << 8;
  static constexpr uint64_t bmi = 1ull << 9;
  static constexpr uint64_t bmi2 = 1ull << 10;
  static constexpr uint64_t lzcnt = 1ull << 11;
  static constexpr uint64_t movbe = 1ull << 12;
  static constexpr uint64_t gfni = 1ull << 13;
  static constexpr uint64_t avxvnni = 1ull << 14;
  static constexpr uint64_t avxvnniint8 = 1ull << 15;
  static constexpr uint64_t avxifma = 1ull << 16;
  static constexpr uint64_t avx512f = 1ull << 20;
  static constexpr uint64_t avx512bw = 1ull << 21;
  static constexpr uint64_t avx512dq = 1ull << 22;
  static constexpr uint64_t avx512vl = 1ull << 23;
  static constexpr uint64_t avx512cd = 1ull << 24;
  static constexpr uint64_t avx512vbmi = 1ull << 25;
  static constexpr uint64_t avx512vbmi2 = 1ull << 26;
  static constexpr uint64_t avx512vnni = 1ull << 27;
  static constexpr uint64_t avx512bitalg = 1ull << 28;
  static constexpr uint64_t avx512vpopcntdq = 1ull << 29;
  static constexpr uint64_t avx512ifma = 1ull << 30;
  static constexpr uint64_t avx512bf16 = 1ull << 31;
  static constexpr uint64_t avx512fp16 = 1ull << 32;
  static constexpr uint64_t amx_tile = 1ull << 33;
  static constexpr uint64_t amx_int8 = 1ull << 34;
  static constexpr uint64_t amx_bf16 = 1ull << 35;
  static constexpr uint64_t neon = 1ull << 48;
  static constexpr uint64_t dotprod = 1ull << 49;
  static constexpr uint64_t i8mm = 1ull << 50;
  static constexpr uint64_t bf16 = 1ull << 51;
  static constexpr uint64_t sve = 1ull << 52;
};

// Keys and values of one session. The layout inside is the generated code's business.
struct KvCache {
  // capacity * kv_bytes_per_position + kv_bytes_per_session bytes, page aligned, zero at first
  uint8_t* base;
  int64_t capacity;  // positions, a multiple of 64
};

struct GraphStep;

// One step: n_tokens tokens go through the whole model together.
// Tokens of one session are adjacent and their positions ascend by one; a step holds either tokens
// of one session or one token each of several. 1 <= n_tokens <= max_tokens; ids and positions are
// checked.
struct Step {
  const uint8_t* weights;  // weights.bin from its first byte, page aligned
  uint8_t* arena;  // arena_bytes + n_threads * arena_bytes_per_thread bytes, 64-byte aligned
  int32_t n_tokens;
  const int32_t* tokens;      // [n_tokens]
  const int32_t* positions;   // [n_tokens]
  const KvCache* kv;          // [n_tokens], the cache of each token's session
  int32_t n_logits;           // rows whose logits are wanted; may be 0
  const int32_t* logit_rows;  // [n_logits], ascending indices of tokens
  float* logits;              // [n_logits][logits_stride], of any alignment
  int64_t logits_stride;      // in floats
  const int32_t* shares;      // [n_threads + 1] work that the threads before each get, of that of
                              // all; null: all get the same
  const GraphStep* graph;     // models of named tensors: what follows; all of the above but weights
                              // and arena is then empty
};

// One run of a model of named tensors (a graph model).
struct GraphStep {
  const void* const* inputs;  // [n_inputs], dense, of any alignment
  void* const* outputs;       // [n_outputs]; null where only the run decides the size
  const int64_t* symbols;     // [n_symbols] sizes that the inputs have
  const int64_t* offsets;     // [n_buffers] bytes in the arena
  int64_t* slots;             // [n_slots] what one thread finds out for all
  // 64-byte aligned memory that lives until the results are taken, or null if there is none.
  void* (*allocate)(void* heap, uint64_t bytes);
  void* heap;
  void** results;                     // [n_outputs] data of outputs that were null
  int64_t (*result_shapes)[8];        // [n_outputs]
  std::atomic<const char*>* failure;  // first problem that a kernel met in its inputs
};

// An input or output of a graph model. shape[i] >= 0 is a size. Below 0 it is symbol number
// -1 - shape[i] for an input; of an output it says that the sizes follow from `plan` or the run.
struct TensorDescription {
  const char* name;
  int32_t dtype;  // as in qigen.h
  int32_t rank;
  int64_t shape[8];
};

struct GraphDescription {
  int32_t n_inputs, n_outputs, n_symbols, n_buffers, n_slots;
  const TensorDescription* inputs;
  const TensorDescription* outputs;
  const char* const* symbols;  // names of the dimensions that inputs decide
  const int64_t* limits;       // largest value of each symbol; 0: none
  // Index of the first and the last node that touches each buffer; null: offsets are fixed.
  const int32_t (*lifetimes)[2];
  const int64_t* offsets;  // if fixed
  // Bytes of the buffers (null: not wanted) and shapes of the outputs for these symbols; a size
  // that only the run decides is -1. Returns the problem if the sizes make no sense, else null.
  const char* (*plan)(const int64_t* symbols, int64_t* bytes, int64_t (*output_shapes)[8]);
};

QIGEN_ALWAYS_INLINE void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Looks before a thread that waits sleeps, each after a pause of some 20 ns: about 0.1 ms, which
// the threads of a step that all run seldom wait for each other.
constexpr uint32_t kLooksBeforeSleep = 4096;

// A number that threads wait for a change of. Who has looked for long sleeps: the thread that is
// waited for has lost its core to another program and may need this one. (Elsewhere than on Linux
// it yields.) To yield after a short while is bad: beside programs that always run it gives a time
// slice away, some milliseconds, at every barrier.
class Watched {
 public:
  QIGEN_ALWAYS_INLINE uint32_t load() const { return number_.load(std::memory_order_acquire); }

  // Whoever waits sees what was written before.
  QIGEN_ALWAYS_INLINE void store(uint32_t number) {
    // In one order with sleepers_: either the sleeper finds the new number or is seen here.
    number_.store(number, std::memory_order_seq_cst);
    wake();
  }

  QIGEN_ALWAYS_INLINE void subtract(uint32_t amount) {
    if (number_.fetch_sub(amount, std::memory_order_seq_cst) == amount) wake();
  }

  // Returns once the number is another than this.
  QIGEN_ALWAYS_INLINE void wait_while(uint32_t number) {
    for (uint32_t looks = 0; load() == number; ++looks) {
      if (looks < kLooksBeforeSleep) {
        cpu_relax();
      } else {
        sleep(number);
      }
    }
  }

 private:
  QIGEN_ALWAYS_INLINE void wake() {
#ifdef __linux__
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    syscall(SYS_futex, &number_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
  }

  QIGEN_ALWAYS_INLINE void sleep(uint32_t number) {
#ifdef __linux__
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &number_, FUTEX_WAIT_PRIVATE, number, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
#elif defined(_WIN32)
    (void)number;
    SwitchToThread();
#else
    (void)number;
    sched_yield();
#endif
  }

  // Apart: those who look at the number would take this from the one who changes it.
  alignas(128) std::atomic<uint32_t> number_{0};
  alignas(128) std::atomic<int> sleepers_{0};
};

// All threads of a step meet here: what one wrote before wait(), all see after it.
// The last thread to arrive opens the next round, the others look at the number of the round.
class Barrier {
 public:
  explicit QIGEN_ALWAYS_INLINE Barrier(int threads) : threads_(threads) {}
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  QIGEN_ALWAYS_INLINE void wait(int /*thread*/) {
    if (threads_ == 1) return;
    const uint32_t round = round_.load();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      return;
    }
    round_.wait_while(round);
  }

 private:
  // Two cache lines apart: arrivals don't disturb those who already spin, and the adjacent-line
  // prefetcher doesn't bring one with the other.
  alignas(128) std::atomic<int> arrived_{0};
  Watched round_;
  const int threads_;
};

namespace runtime {
class Device;
}

// A packed matrix that every step reads from its first row to its last. The matrices of one step of
// the program (`step`, ascending) are one sequence of rows, of which each thread reads a piece.
struct Matrix {
  uint64_t offset, bytes;  // in weights.bin
  int32_t step;
};

// What the runtime has to know about the generated code.
struct ModelDescription {
  uint32_t abi;  // QIGEN_ABI_VERSION of the headers that it was generated for
  const char* name;
  const char* isa;
  const char* kv_format;
  const uint8_t* model_uid;  // 32 bytes, the same as in weights.bin
  uint64_t cpu_features;     // bits of CpuFeature
  int32_t vocab;
  int32_t max_seq;
  int32_t max_batch;   // <= max_tokens
  int32_t max_tokens;  // tokens of a step at most
  int32_t d_model;
  int32_t n_layers;
  uint64_t weights_bytes;           // of the whole file
  uint64_t arena_bytes;             // a multiple of 64
  uint64_t arena_bytes_per_thread;  // a multiple of 64
  uint64_t kv_bytes_per_position;
  // Called once by every thread of the pool with its own `thread` in 0 … n_threads-1; must not
  // throw. The logits are complete when all calls have returned.
  void (*step)(const Step&, int thread, int n_threads, Barrier&);
  const GraphDescription* graph;  // null for a language model
  const ModelDescription* next =
      nullptr;  // what to take if the machine lacks cpu_features; null: nothing
  // Of a model whose steps run on a device of its own, a GPU: opens it, or throws runtime::Failure.
  // `step` is then null, and the arena is the device's.
  runtime::Device* (*open_device)(const ModelDescription&, const uint8_t* weights) = nullptr;
  const void* device_program = nullptr;  // what open_device reads
  uint64_t kv_bytes_per_session = 0;     // what a cache takes besides its positions
  const Matrix* matrices = nullptr;  // where each thread's rows lie; null: not dealt out by rows
  int32_t n_matrices = 0;
};

// Hidden although its name begins like the exported ones.
extern "C" __attribute__((visibility("hidden"))) const ModelDescription qigen_model_description;

}  // namespace qigen
