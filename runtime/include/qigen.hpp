// qigen.hpp: artifacts of qigen from C++17 (header-only; opens model.so by itself, see
// qigen_loader.h).
//
//   qigen::Model model("smollm2.qgn");
//   qigen::Session session = model.session();
//   qigen::Sampler sampler = model.sampler();
//   for (int32_t token = session.next(prompt, sampler); !model.is_eos(token);
//        token = session.next({token}, sampler)) {
//     std::cout << model.token_text(token) << std::flush;
//   }
//
// Failures are thrown as qigen::Error. Models and sessions keep the library open as long as they
// live.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qigen_loader.h"

namespace qigen {

class Error : public std::runtime_error {
 public:
  Error(qigen_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  qigen_status status() const { return status_; }

 private:
  qigen_status status_;
};

struct LoadOptions {
  int threads = 0;   // 0: all usable cores
  bool pin = false;  // bind workers to cores
  int spin_us = 0;   // 0: the default, -1: never spin
};

// See qigen_sampler.
struct SamplerOptions {
  float temperature = 0;
  int top_k = 0;
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  uint64_t seed = 0;
};

namespace detail {

// A library and the model in it; shared by everything that came out of it.
class Artifact {
 public:
  Artifact(const std::string& folder, const LoadOptions& options) {
    char problem[768];
    const qigen_status status = qigen_api_open(&api, folder.c_str(), problem, sizeof problem);
    if (status != QIGEN_OK) throw Error(status, problem);
    qigen_load_options load{};
    load.struct_size = sizeof load;
    load.threads = options.threads;
    load.pin = options.pin;
    load.spin_us = options.spin_us;
    const qigen_status loaded = api.model_load(folder.c_str(), &load, &model);
    if (loaded != QIGEN_OK) {
      const Error error(loaded, api.last_error());
      qigen_api_close(&api);
      throw error;
    }
    info.struct_size = sizeof info;
    api.model_get_info(model, &info);
  }
  ~Artifact() {
    api.model_free(model);
    qigen_api_close(&api);
  }
  Artifact(const Artifact&) = delete;
  Artifact& operator=(const Artifact&) = delete;

  void check(qigen_status status) const {
    if (status != QIGEN_OK) throw Error(status, api.last_error());
  }

  qigen_api api{};
  qigen_model* model = nullptr;
  qigen_model_info info{};
};

}  // namespace detail

class Sampler;

// A sequence of tokens with its KV cache. For one thread at a time.
class Session {
 public:
  Session(Session&& other) noexcept { swap(other); }
  Session& operator=(Session&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Session() {
    if (session_) artifact_->api.session_free(session_);
  }

  // Appends tokens and writes the logits of the last one to logits[vocab]; null: not wanted.
  void eval(const int32_t* tokens, int32_t n, float* logits) {
    artifact_->check(artifact_->api.session_eval(session_, tokens, n, logits, 0));
  }

  // Appends tokens and returns the logits of the last one.
  std::vector<float> eval(const std::vector<int32_t>& tokens) {
    std::vector<float> logits(artifact_->info.vocab);
    eval(tokens.data(), static_cast<int32_t>(tokens.size()), logits.data());
    return logits;
  }

  // Appends tokens and returns the logits of every one, [tokens.size()][vocab].
  std::vector<float> eval_all(const std::vector<int32_t>& tokens) {
    std::vector<float> logits(tokens.size() * artifact_->info.vocab);
    eval_all(tokens.data(), static_cast<int32_t>(tokens.size()), logits.data());
    return logits;
  }
  void eval_all(const int32_t* tokens, int32_t n, float* logits) {
    artifact_->check(artifact_->api.session_eval(session_, tokens, n, logits, 1));
  }

  // Appends tokens and returns the next one, as sampler.sample does from the logits of the last; on
  // a GPU the logits stay there. `history`: the tokens so far (for the repetition penalty).
  int32_t next(const int32_t* tokens, int32_t n, Sampler& sampler, const int32_t* history,
               int32_t n_history);
  int32_t next(const std::vector<int32_t>& tokens, Sampler& sampler,
               const std::vector<int32_t>& history = {}) {
    return next(tokens.data(), static_cast<int32_t>(tokens.size()), sampler, history.data(),
                static_cast<int32_t>(history.size()));
  }

  int32_t position() const { return artifact_->api.session_position(session_); }

  // Forgets all tokens from `position` on.
  void rewind(int32_t position) {
    artifact_->check(artifact_->api.session_rewind(session_, position));
  }

  qigen_session* get() const { return session_; }

 private:
  friend class Model;
  Session(std::shared_ptr<const detail::Artifact> artifact, int32_t max_seq)
      : artifact_(std::move(artifact)) {
    artifact_->check(artifact_->api.session_create(artifact_->model, max_seq, &session_));
  }
  void swap(Session& other) {
    std::swap(artifact_, other.artifact_);
    std::swap(session_, other.session_);
  }

  std::shared_ptr<const detail::Artifact> artifact_;
  qigen_session* session_ = nullptr;
};

// Draws tokens; keeps the state of its generator.
class Sampler {
 public:
  // Returns a token for logits[vocab], given the tokens so far (for the repetition penalty).
  int32_t sample(const std::vector<float>& logits, const std::vector<int32_t>& history = {}) {
    return sample(logits.data(), static_cast<int32_t>(logits.size()), history.data(),
                  static_cast<int32_t>(history.size()));
  }
  int32_t sample(const float* logits, int32_t vocab, const int32_t* history, int32_t n_history) {
    int32_t token = 0;
    artifact_->check(
        artifact_->api.sample(logits, vocab, &sampler_, history, n_history, &rng_, &token));
    return token;
  }

 private:
  friend class Model;
  friend class Session;
  Sampler(std::shared_ptr<const detail::Artifact> artifact, const SamplerOptions& options)
      : artifact_(std::move(artifact)), rng_(options.seed) {
    sampler_.struct_size = sizeof sampler_;
    sampler_.temperature = options.temperature;
    sampler_.top_k = options.top_k;
    sampler_.top_p = options.top_p;
    sampler_.min_p = options.min_p;
    sampler_.repetition_penalty = options.repetition_penalty;
  }

  std::shared_ptr<const detail::Artifact> artifact_;
  qigen_sampler sampler_{};
  uint64_t rng_;
};

inline int32_t Session::next(const int32_t* tokens, int32_t n, Sampler& sampler,
                             const int32_t* history, int32_t n_history) {
  if (!artifact_->api.session_next) {  // the artifact is older than the function
    std::vector<float> logits(artifact_->info.vocab);
    eval(tokens, n, logits.data());
    return sampler.sample(logits.data(), artifact_->info.vocab, history, n_history);
  }
  int32_t token = 0;
  artifact_->check(artifact_->api.session_next(session_, tokens, n, &sampler.sampler_, history,
                                               n_history, &sampler.rng_, &token));
  return token;
}

// The outputs of Model::call. Their memory belongs to it.
class Result {
 public:
  Result(Result&& other) noexcept { swap(other); }
  Result& operator=(Result&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Result() {
    if (result_) artifact_->api.result_free(result_);
  }

  int32_t size() const { return artifact_->info.n_outputs; }
  // Output number `index`, with its data.
  qigen_tensor operator[](int32_t index) const {
    qigen_tensor tensor{};
    artifact_->check(artifact_->api.result_get(result_, index, &tensor));
    return tensor;
  }

 private:
  friend class Model;
  Result(std::shared_ptr<const detail::Artifact> artifact, const std::vector<qigen_tensor>& inputs)
      : artifact_(std::move(artifact)) {
    artifact_->check(
        artifact_->api.model_call(artifact_->model, inputs.data(), inputs.size(), &result_));
  }
  void swap(Result& other) {
    std::swap(artifact_, other.artifact_);
    std::swap(result_, other.result_);
  }

  std::shared_ptr<const detail::Artifact> artifact_;
  qigen_result* result_ = nullptr;
};

// An open artifact. Copies share it. Usable from any number of threads.
class Model {
 public:
  explicit Model(const std::string& folder, const LoadOptions& options = {})
      : artifact_(std::make_shared<const detail::Artifact>(folder, options)) {}

  const qigen_model_info& info() const { return artifact_->info; }

  // An empty session; 0: as many positions as the model has.
  Session session(int32_t max_seq = 0) const { return Session(artifact_, max_seq); }

  Sampler sampler(const SamplerOptions& options = {}) const { return Sampler(artifact_, options); }

  // Raw bytes of a token's text; valid as long as the model.
  std::string_view token_text(int32_t id) const {
    const char* bytes = nullptr;
    size_t length = 0;
    artifact_->check(artifact_->api.token_text(artifact_->model, id, &bytes, &length));
    return {bytes, length};
  }

  bool is_eos(int32_t id) const { return artifact_->api.model_is_eos(artifact_->model, id) != 0; }

  // Index of the greatest logit, the lowest of several.
  int32_t argmax(const std::vector<float>& logits) const {
    return argmax(logits.data(), static_cast<int32_t>(logits.size()));
  }
  int32_t argmax(const float* logits, int32_t vocab) const {
    return artifact_->api.argmax(logits, vocab);
  }

  // Appends tokens[i] to sessions[i], all in one step, and returns their logits, [n][vocab].
  std::vector<float> batch_eval(const std::vector<Session*>& sessions,
                                const std::vector<int32_t>& tokens) const {
    if (sessions.size() != tokens.size()) {
      throw Error(QIGEN_USAGE, "a batch needs one token for each session");
    }
    std::vector<float> logits(sessions.size() * artifact_->info.vocab);
    batch_eval(sessions, tokens.data(), logits.data());
    return logits;
  }
  void batch_eval(const std::vector<Session*>& sessions, const int32_t* tokens,
                  float* logits) const {
    std::vector<qigen_session*> handles;
    for (const Session* session : sessions) handles.push_back(session->get());
    artifact_->check(artifact_->api.batch_eval(handles.data(), tokens,
                                               static_cast<int32_t>(handles.size()), logits));
  }

  // Runs the model once on named tensors; see qigen_model_run.
  void run(const std::vector<qigen_tensor>& inputs, std::vector<qigen_tensor>* outputs) const {
    artifact_->check(artifact_->api.model_run(artifact_->model, inputs.data(), inputs.size(),
                                              outputs->data(), outputs->size()));
  }

  // Runs the model once; the library allocates the outputs. See qigen_model_call.
  Result call(const std::vector<qigen_tensor>& inputs) const { return Result(artifact_, inputs); }

  // Descriptions of the inputs and outputs of run().
  std::vector<qigen_tensor> inputs() const {
    return describe(artifact_->info.n_inputs, artifact_->api.model_get_input);
  }
  std::vector<qigen_tensor> outputs() const {
    return describe(artifact_->info.n_outputs, artifact_->api.model_get_output);
  }

 private:
  using Describe = qigen_status (*)(const qigen_model*, int32_t, qigen_tensor*);
  std::vector<qigen_tensor> describe(int32_t count, Describe function) const {
    std::vector<qigen_tensor> list(count);
    for (int32_t i = 0; i < count; ++i) {
      artifact_->check(function(artifact_->model, i, &list[i]));
    }
    return list;
  }

  std::shared_ptr<const detail::Artifact> artifact_;
};

}  // namespace qigen
