#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "error.h"
#include "model.h"
#include "sampler.h"

namespace qigen::runtime {
namespace {

// Kernels read keys in blocks of positions, so a cache ends with a whole block.
constexpr int64_t kKvBlock = 64;

int64_t kv_capacity(int32_t max_seq) { return (max_seq + kKvBlock - 1) / kKvBlock * kKvBlock; }

int32_t checked_max_seq(const Model& model, int32_t asked) {
  if (model.graph()) {
    throw Failure(QIGEN_UNSUPPORTED,
                  "this is no language model and has no sessions; run it on its inputs instead "
                  "(qigen_model_run)");
  }
  const int32_t limit = model.description().max_seq;
  if (asked < 0 || asked > limit) {
    throw Failure(
        QIGEN_BAD_INPUT,
        "a session of %d positions is asked for, but the model is compiled for at most %d; "
        "compile it with a larger --max-seq",
        asked, limit);
  }
  return asked > 0 ? asked : limit;
}

}  // namespace

Session::Session(std::shared_ptr<Model> model, int32_t max_seq)
    : model_(std::move(model)),
      max_seq_(checked_max_seq(*model_, max_seq)),
      memory_(model_->device()
                  ? 0
                  : kv_capacity(max_seq_) * model_->description().kv_bytes_per_position +
                        model_->description().kv_bytes_per_session,
              "KV cache"),
      device_memory_(model_->device(), kv_capacity(max_seq_)),
      kv_(model_->device() ? device_memory_.cache()
                           : KvCache{memory_.data(), kv_capacity(max_seq_)}) {}

Session::Use::Use(Session& session) : session_(session) {
  if (session.busy_.test_and_set(std::memory_order_acquire)) {
    throw Failure(
        QIGEN_USAGE,
        "the session is in use, by another thread or twice in one batch; give each its own "
        "session");
  }
}

void Session::check_room(int32_t n) const {
  if (n <= max_seq_ - position()) return;
  throw Failure(
      QIGEN_BAD_INPUT,
      "%d more tokens after %d don't fit into the session's %d positions; shorten the prompt "
      "or compile the model with a larger --max-seq",
      n, position(), max_seq_);
}

void Session::eval(const int32_t* tokens, int32_t n, float* logits, bool all) {
  append(tokens, n, logits, all, nullptr);
}

int32_t Session::next(const int32_t* tokens, int32_t n, const qigen_sampler& sampler,
                      const int32_t* history, int32_t n_history, uint64_t* rng) {
  check_sampler(sampler);
  const bool penalty = sampler.repetition_penalty != 0 && sampler.repetition_penalty != 1;
  if (!model_->device() || (penalty && n_history > 0)) {
    std::vector<float> logits(model_->description().vocab);
    append(tokens, n, logits.data(), false, nullptr);
    return sample(logits.data(), model_->description().vocab, sampler, history, n_history, rng);
  }
  Sampling sampling{};
  uint64_t state = rng ? *rng : 0;
  if (sampler.temperature > 0) {
    constexpr double kLog2E = 1.4426950408889634;
    sampling.scale = static_cast<float>(kLog2E / sampler.temperature);
    sampling.top_k = sampler.top_k;
    if (sampler.top_p > 0 && sampler.top_p < 1) sampling.top_p = uint64_t(sampler.top_p * 0x1p64);
    sampling.min_weight = uint64_t(std::ceil(sampler.min_p * 0x1p40));
    sampling.random = random_bits(&state) << 11;
  }
  const int32_t token = append(tokens, n, nullptr, false, &sampling);
  if (token < 0) {
    throw Failure(QIGEN_BAD_INPUT, "no token can be chosen: the logits have no finite maximum");
  }
  if (rng) *rng = state;
  return token;
}

int32_t Session::append(const int32_t* tokens, int32_t n, float* logits, bool all,
                        const Sampling* sampling) {
  if (n <= 0) {
    throw Failure(QIGEN_BAD_INPUT, "there are %d tokens to evaluate; give at least one", n);
  }
  if (all && !logits) {
    throw Failure(QIGEN_USAGE, "logits of all tokens are asked for without memory for them");
  }
  model_->check_tokens(tokens, n);
  check_room(n);

  const ModelDescription& description = model_->description();
  const int32_t chunk = std::min(n, description.max_tokens);
  std::vector<int32_t> positions(chunk);
  std::vector<int32_t> rows(chunk);
  const std::vector<KvCache> caches(chunk, kv_);
  const int32_t first = position();
  int32_t token = 0;
  for (int32_t done = 0; done < n; done += chunk) {
    const int32_t count = std::min(chunk, n - done);
    std::iota(positions.begin(), positions.end(), first + done);
    Step step{};
    step.n_tokens = count;
    step.tokens = tokens + done;
    step.positions = positions.data();
    step.kv = caches.data();
    step.logit_rows = rows.data();
    if (all) {
      std::iota(rows.begin(), rows.end(), 0);
      step.n_logits = count;
      step.logits = logits + int64_t{done} * description.vocab;
    } else if ((logits || sampling) && done + count == n) {
      rows[0] = count - 1;
      step.n_logits = 1;
      step.logits = logits;
    }
    if (sampling && done + count == n) {
      token = model_->choose(step, *sampling);
    } else {
      model_->run(step);
    }
  }
  position_.store(first + n, std::memory_order_relaxed);
  return token;
}

void Session::rewind(int32_t position) {
  if (position < 0 || position > this->position()) {
    throw Failure(QIGEN_BAD_INPUT,
                  "can't rewind to position %d of a session with %d tokens; give 0 to %d", position,
                  this->position(), this->position());
  }
  position_.store(position, std::memory_order_relaxed);
}

void batch_eval(Session* const* sessions, const int32_t* tokens, int32_t n, float* logits) {
  Model& model = *sessions[0]->model_;
  const int32_t max_batch = model.description().max_batch;
  if (n > max_batch) {
    throw Failure(QIGEN_BAD_INPUT,
                  "a batch of %d sessions is asked for, but the model is compiled for at most %d; "
                  "compile it with a larger --max-batch",
                  n, max_batch);
  }
  // All or none: whatever fails, fails before the step.
  std::vector<std::unique_ptr<Session::Use>> uses;
  std::vector<int32_t> positions, rows;
  std::vector<KvCache> caches;
  for (int32_t i = 0; i < n; ++i) {
    Session& session = *sessions[i];
    if (session.model_.get() != &model) {
      throw Failure(QIGEN_USAGE, "session %d of the batch belongs to another model", i);
    }
    uses.push_back(std::make_unique<Session::Use>(session));
    session.check_room(1);
    positions.push_back(session.position());
    rows.push_back(i);
    caches.push_back(session.kv_);
  }
  model.check_tokens(tokens, n);

  Step step{};
  step.n_tokens = n;
  step.tokens = tokens;
  step.positions = positions.data();
  step.kv = caches.data();
  step.n_logits = n;
  step.logit_rows = rows.data();
  step.logits = logits;
  model.run(step);
  for (int32_t i = 0; i < n; ++i) {
    sessions[i]->position_.store(positions[i] + 1, std::memory_order_relaxed);
  }
}

}  // namespace qigen::runtime
