// An open artifact and its sessions.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "device.h"
#include "graph.h"
#include "memory.h"
#include "placement.h"
#include "qigen.h"
#include "thread_pool.h"
#include "vocab.h"
#include "weights.h"

namespace qigen::runtime {

class Model {
 public:
  // Checks the generated code and the machine, in this order: ABI, processor, files. Throws
  // Failure.
  Model(const std::string& folder, const qigen_load_options& options);

  const ModelDescription& description() const { return description_; }
  const Vocabulary& vocabulary() const { return vocabulary_; }
  int threads() const { return pool_.threads(); }

  // Throws QIGEN_BAD_INPUT if a token id is outside the vocabulary.
  void check_tokens(const int32_t* tokens, int32_t n) const;

  // Runs one step on all threads; weights and arena are filled in here.
  void run(Step step);

  // Runs a step of one session and chooses the next token on the model's device, which must be
  // there.
  int32_t choose(Step step, const Sampling& sampling);

  // A graph model's run with everything but weights: `arena` is the caller's.
  void run(const GraphStep& graph, uint8_t* arena);

  // Where the steps run if not on the threads of the pool; null for the pool.
  Device* device() const { return device_.get(); }

  // The graph of a graph model; null for a language model.
  Graph* graph() const { return graph_.get(); }

  void get_info(qigen_model_info* info) const;
  void get_input(int32_t index, qigen_tensor* tensor) const;
  void get_output(int32_t index, qigen_tensor* tensor) const;

 private:
  const ModelDescription& description_;
  MappedFile weights_;
  Vocabulary vocabulary_;
  std::vector<Core> cores_;
  Load load_;
  Topology topology_;
  Placement placement_;
  ThreadPool pool_;
  PlacedWeights placed_;
  LazyMemory arena_;
  std::unique_ptr<Graph> graph_;
  std::unique_ptr<Device> device_;
};

class Session {
 public:
  // max_seq positions; 0: as many as the model has. Throws QIGEN_BAD_INPUT if that is too many.
  Session(std::shared_ptr<Model> model, int32_t max_seq);

  const std::shared_ptr<Model>& model() const { return model_; }
  int32_t position() const { return position_.load(std::memory_order_relaxed); }

  // Appends tokens; see qigen_session_eval. Needs the session in use (below).
  void eval(const int32_t* tokens, int32_t n, float* logits, bool all);
  void rewind(int32_t position);

  // See qigen_session_next; `sampler` has all fields.
  int32_t next(const int32_t* tokens, int32_t n, const qigen_sampler& sampler,
               const int32_t* history, int32_t n_history, uint64_t* rng);

  // Throws QIGEN_BAD_INPUT if n more tokens don't fit.
  void check_room(int32_t n) const;

  // Held during every change: a second thread gets QIGEN_USAGE instead of a torn KV cache.
  class Use {
   public:
    explicit Use(Session& session);
    ~Use() { session_.busy_.clear(std::memory_order_release); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Session& session_;
  };

 private:
  friend void batch_eval(Session* const* sessions, const int32_t* tokens, int32_t n, float* logits);

  // Appends tokens; with `sampling` the device chooses a token, which is returned, else 0 is.
  int32_t append(const int32_t* tokens, int32_t n, float* logits, bool all,
                 const Sampling* sampling);

  std::shared_ptr<Model> model_;
  int32_t max_seq_;
  LazyMemory memory_;          // of the host; empty if the model has a device
  DeviceCache device_memory_;  // of the device, if there is one
  KvCache kv_;
  std::atomic<int32_t> position_{0};
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

// Appends one token to each of n different sessions in one step; logits: [n][vocab].
void batch_eval(Session* const* sessions, const int32_t* tokens, int32_t n, float* logits);

// See qigen_model_run. Language models and graph models.
void run_tensors(const std::shared_ptr<Model>& model, const qigen_tensor* inputs, size_t n_inputs,
                 qigen_tensor* outputs, size_t n_outputs);

// See qigen_model_call.
Outputs call_tensors(const std::shared_ptr<Model>& model, const qigen_tensor* inputs,
                     size_t n_inputs);

}  // namespace qigen::runtime
