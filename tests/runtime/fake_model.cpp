// A model that a test can compute by itself, in place of generated code. Its logits depend on every
// token so far, on its place and on the weights, and go through the KV cache, the arena and
// barriers:
//   total(p)  = (sum over j <= p of (token[j] + 1) * (j + 1)) mod 65521
//   logits[v] = float(total * (v + 1) mod 1009) / 1009 + weights[v]
#include <cstring>

#include "qigen.h"
#include "qigen/generated.h"

#ifndef FAKE_ABI
#define FAKE_ABI QIGEN_ABI_VERSION
#endif
#ifndef FAKE_FEATURES
#define FAKE_FEATURES 0
#endif
#ifndef FAKE_UID
#define FAKE_UID 0x5a
#endif

namespace {

constexpr int kVocab = 37;
constexpr int kMaxTokens = 8;
constexpr uint64_t kArenaPerThread = 64;  // int64 partial[kMaxTokens]
constexpr uint64_t kHeader = 4096;

void step(const qigen::Step& step, int thread, int n_threads, qigen::Barrier& barrier) {
  auto cache = [&](int token) { return reinterpret_cast<int64_t*>(step.kv[token].base); };
  auto partials = [&](int t) {
    return reinterpret_cast<int64_t*>(step.arena + t * kArenaPerThread);
  };

  for (int token = thread; token < step.n_tokens; token += n_threads) {
    cache(token)[step.positions[token]] = step.tokens[token] + 1;
  }
  barrier.wait(thread);
  for (int token = 0; token < step.n_tokens; ++token) {
    int64_t sum = 0;
    for (int j = thread; j <= step.positions[token]; j += n_threads) {
      sum += cache(token)[j] * (j + 1);
    }
    partials(thread)[token] = sum;
  }
  barrier.wait(thread);
  float weights[kVocab];
  std::memcpy(weights, step.weights + kHeader, sizeof weights);
  for (int row = 0; row < step.n_logits; ++row) {
    int64_t total = 0;
    for (int t = 0; t < n_threads; ++t) total += partials(t)[step.logit_rows[row]];
    total %= 65521;
    for (int v = thread; v < kVocab; v += n_threads) {
      step.logits[row * step.logits_stride + v] =
          static_cast<float>(total * (v + 1) % 1009) / 1009.0f + weights[v];
    }
  }
  // No barrier here: the pool lets no thread begin the next step before all have returned.
}

struct Uid {
  uint8_t bytes[32];
};
constexpr Uid make_uid() {
  Uid uid{};
  for (uint8_t& byte : uid.bytes) byte = FAKE_UID;
  return uid;
}
constexpr Uid kUid = make_uid();

}  // namespace

const qigen::ModelDescription qigen::qigen_model_description = {
    /*abi=*/FAKE_ABI,
    /*name=*/"fake",
    /*isa=*/"fake-isa",
    /*kv_format=*/"i64",
    /*model_uid=*/kUid.bytes,
    /*cpu_features=*/FAKE_FEATURES,
    /*vocab=*/kVocab,
    /*max_seq=*/100,
    /*max_batch=*/4,
    /*max_tokens=*/kMaxTokens,
    /*d_model=*/1,
    /*n_layers=*/1,
    /*weights_bytes=*/8192,
    /*arena_bytes=*/0,
    /*arena_bytes_per_thread=*/kArenaPerThread,
    /*kv_bytes_per_position=*/8,
    /*step=*/step,
    /*graph=*/nullptr,
};
