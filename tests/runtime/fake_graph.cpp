// A graph model that a test can compute by itself, in place of generated code. Its values go
// through the arena, slots, barriers and the heap:
//   sum[i][j]   = a[i][j] + shift[0] + weights[0]
//   totals[j]   = the column sums of b, in double: every thread sums a part of the rows
//   positive[k] = the rows i with a[i][0] > 0, in order: only the run decides how many
// for a float32 [n, 3], b float32 [n, m], shift int64 [2]. shift[1] < 0 is a problem that a kernel
// meets. n is at most 50, m at most 1000 (which `plan` finds out). With FAKE_STATIC n is 4 and m 5.
#include <cstring>

#include "qigen.h"
#include "qigen/generated.h"

namespace {

constexpr uint64_t kHeader = 4096;
constexpr int kMostThreads = 8;

struct Sizes {
  int64_t n, m;
};

Sizes sizes_of(const int64_t* symbols) {
#ifdef FAKE_STATIC
  (void)symbols;
  return {4, 5};
#else
  return {symbols[0], symbols[1]};
#endif
}

const char* plan(const int64_t* symbols, int64_t* bytes, int64_t (*shapes)[8]) {
  const Sizes s = sizes_of(symbols);
  if (s.m > 1000) return "m is larger than 1000";
  shapes[0][0] = s.n;
  shapes[0][1] = 3;
  shapes[1][0] = s.m;
  shapes[2][0] = -1;
  if (bytes) {
    bytes[0] = s.n * 8;                 // flags of the rows
    bytes[1] = kMostThreads * s.m * 8;  // parts of the totals
  }
  return nullptr;
}

float float_at(const void* data, int64_t index) {
  float value;
  std::memcpy(&value, static_cast<const char*>(data) + index * sizeof value, sizeof value);
  return value;
}

void step(const qigen::Step& step, int thread, int n_threads, qigen::Barrier& barrier) {
  const qigen::GraphStep& graph = *step.graph;
  const Sizes s = sizes_of(graph.symbols);
  const void* a = graph.inputs[0];
  const void* b = graph.inputs[1];
  int64_t shift[2];
  std::memcpy(shift, graph.inputs[2], sizeof shift);
  float weight;
  std::memcpy(&weight, step.weights + kHeader, sizeof weight);
  auto* flags = reinterpret_cast<int64_t*>(step.arena + graph.offsets[0]);
  auto* parts = reinterpret_cast<double*>(step.arena + graph.offsets[1]);

  if (shift[1] < 0 && thread == n_threads - 1) {
    const char* none = nullptr;
    graph.failure->compare_exchange_strong(none, "shift[1] is negative");
  }
  for (int64_t j = 0; j < s.m; ++j) parts[thread * s.m + j] = 0;
  for (int64_t i = thread; i < s.n; i += n_threads) {
    for (int64_t j = 0; j < 3; ++j) {
      const float sum = float_at(a, i * 3 + j) + static_cast<float>(shift[0]) + weight;
      std::memcpy(static_cast<char*>(graph.outputs[0]) + (i * 3 + j) * 4, &sum, 4);
    }
    for (int64_t j = 0; j < s.m; ++j) parts[thread * s.m + j] += float_at(b, i * s.m + j);
    flags[i] = float_at(a, i * 3) > 0;
  }
  barrier.wait(thread);
  if (thread == 0) {
    int64_t count = 0;
    for (int64_t i = 0; i < s.n; ++i) count += flags[i];
    graph.results[2] = graph.allocate(graph.heap, count * sizeof(int64_t));
    graph.result_shapes[2][0] = count;
    graph.slots[0] = graph.results[2] ? count : 0;
    for (int64_t j = 0; j < s.m; ++j) {
      double total = 0;
      for (int t = 0; t < n_threads; ++t) total += parts[t * s.m + j];
      std::memcpy(static_cast<char*>(graph.outputs[1]) + j * sizeof total, &total, sizeof total);
    }
  }
  barrier.wait(thread);
  if (thread == n_threads - 1) {
    auto* rows = static_cast<int64_t*>(graph.results[2]);
    for (int64_t i = 0, k = 0; i < s.n && k < graph.slots[0]; ++i) {
      if (flags[i]) rows[k++] = i;
    }
  }
}

#ifdef FAKE_STATIC
constexpr int64_t kN = 4, kM = 5;
constexpr int64_t kOffsets[] = {0, 64};
#else
constexpr int64_t kN = -1, kM = -2;  // symbols 0 and 1
constexpr const char* kSymbols[] = {"n", "m"};
constexpr int64_t kLimits[] = {50, 0};
constexpr int32_t kLifetimes[][2] = {{0, 1}, {0, 1}};
#endif

constexpr qigen::TensorDescription kInputs[] = {
    {"a", QIGEN_FLOAT32, 2, {kN, 3}},
    {"b", QIGEN_FLOAT32, 2, {kN, kM}},
    {"shift", QIGEN_INT64, 1, {2}},
};
constexpr qigen::TensorDescription kOutputs[] = {
    {"sum", QIGEN_FLOAT32, 2, {kN, 3}},
    {"totals", QIGEN_FLOAT64, 1, {kM}},
    {"positive", QIGEN_INT64, 1, {-1}},
};
constexpr qigen::GraphDescription kGraph = {
    /*n_inputs=*/3,
    /*n_outputs=*/3,
#ifdef FAKE_STATIC
    /*n_symbols=*/0,
#else
    /*n_symbols=*/2,
#endif
    /*n_buffers=*/2,
    /*n_slots=*/1,
    kInputs,
    kOutputs,
#ifdef FAKE_STATIC
    nullptr,
    nullptr,
    nullptr,
    kOffsets,
#else
    kSymbols,
    kLimits,
    kLifetimes,
    nullptr,
#endif
    plan,
};

struct Uid {
  uint8_t bytes[32];
};
constexpr Uid make_uid() {
  Uid uid{};
  for (uint8_t& byte : uid.bytes) byte = 0x5a;
  return uid;
}
constexpr Uid kUid = make_uid();

}  // namespace

const qigen::ModelDescription qigen::qigen_model_description = {
    /*abi=*/QIGEN_ABI_VERSION,
    /*name=*/"fake graph",
    /*isa=*/"fake-isa",
    /*kv_format=*/"",
    /*model_uid=*/kUid.bytes,
    /*cpu_features=*/0,
    /*vocab=*/0,
    /*max_seq=*/0,
    /*max_batch=*/0,
    /*max_tokens=*/0,
    /*d_model=*/0,
    /*n_layers=*/0,
    /*weights_bytes=*/8192,
#ifdef FAKE_STATIC
    /*arena_bytes=*/64 + kMostThreads * 64,
#else
    /*arena_bytes=*/0,
#endif
    /*arena_bytes_per_thread=*/0,
    /*kv_bytes_per_position=*/0,
    /*step=*/step,
    /*graph=*/&kGraph,
};
