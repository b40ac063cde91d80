// A language model as a function of named tensors: input_ids -> logits.
#include <cinttypes>
#include <climits>
#include <cstring>
#include <vector>

#include "error.h"
#include "model.h"

namespace qigen::runtime {
namespace {

constexpr char kInput[] = "input_ids";
constexpr char kOutput[] = "logits";

void check_index(int32_t index, const char* what) {
  if (index == 0) return;
  throw Failure(QIGEN_USAGE, "there is no %s number %d; the model has 1", what, index);
}

// Ids of an input_ids tensor, [n] or [1, n].
std::vector<int32_t> token_ids(const qigen_tensor& tensor) {
  const bool batched = tensor.rank == 2 && tensor.shape[0] == 1;
  if (tensor.rank != 1 && !batched) {
    throw Failure(QIGEN_BAD_INPUT, "%s must have shape [n] or [1, n]; run one sequence at a time",
                  kInput);
  }
  if (tensor.dtype != QIGEN_INT32 && tensor.dtype != QIGEN_INT64) {
    throw Failure(QIGEN_BAD_INPUT, "%s must be int32 or int64", kInput);
  }
  const int64_t n = tensor.shape[tensor.rank - 1];
  const size_t size = tensor.dtype == QIGEN_INT32 ? sizeof(int32_t) : sizeof(int64_t);
  if (n < 1 || n > INT_MAX || !tensor.data || tensor.bytes != n * size) {
    throw Failure(QIGEN_BAD_INPUT, "%s has %" PRId64 " elements of %zu bytes but %zu bytes of data",
                  kInput, n, size, tensor.bytes);
  }
  std::vector<int32_t> ids(n);
  if (tensor.dtype == QIGEN_INT32) {
    std::memcpy(ids.data(), tensor.data, tensor.bytes);
    return ids;
  }
  const auto* source = static_cast<const char*>(tensor.data);
  for (int64_t i = 0; i < n; ++i) {
    int64_t id;
    std::memcpy(&id, source + i * sizeof id, sizeof id);
    // Out of range either way; -1 keeps it so after the cut to 32 bits.
    ids[i] = id < 0 || id > INT_MAX ? -1 : static_cast<int32_t>(id);
  }
  return ids;
}

}  // namespace

void Model::get_input(int32_t index, qigen_tensor* tensor) const {
  if (graph_) return graph_->get_input(index, tensor);
  check_index(index, "input");
  *tensor = {kInput, QIGEN_INT32, 2, {1, -1}, nullptr, 0};
}

void Model::get_output(int32_t index, qigen_tensor* tensor) const {
  if (graph_) return graph_->get_output(index, tensor);
  check_index(index, "output");
  *tensor = {kOutput, QIGEN_FLOAT32, 3, {1, -1, description_.vocab}, nullptr, 0};
}

void run_tensors(const std::shared_ptr<Model>& model, const qigen_tensor* inputs, size_t n_inputs,
                 qigen_tensor* outputs, size_t n_outputs) {
  if (model->graph()) return model->graph()->run(*model, inputs, n_inputs, outputs, n_outputs);
  if (n_inputs != 1 || !inputs[0].name || std::strcmp(inputs[0].name, kInput) != 0) {
    throw Failure(QIGEN_BAD_INPUT, "a language model has one input, %s; give exactly that one",
                  kInput);
  }
  if (n_outputs != 1 || !outputs[0].name || std::strcmp(outputs[0].name, kOutput) != 0) {
    throw Failure(QIGEN_BAD_INPUT, "a language model has one output, %s; ask for exactly that one",
                  kOutput);
  }
  const std::vector<int32_t> ids = token_ids(inputs[0]);
  const int64_t n = static_cast<int64_t>(ids.size());
  const int32_t vocab = model->description().vocab;
  qigen_tensor& output = outputs[0];
  output.dtype = QIGEN_FLOAT32;
  output.rank = 3;
  output.shape[0] = 1;
  output.shape[1] = n;
  output.shape[2] = vocab;
  if (!output.data) return;
  if (output.bytes != sizeof(float) * n * vocab) {
    throw Failure(QIGEN_BAD_INPUT, "%s needs %zu bytes of memory but got %zu", kOutput,
                  sizeof(float) * n * vocab, output.bytes);
  }
  model->check_tokens(ids.data(), static_cast<int32_t>(n));
  if (n > model->description().max_seq) {
    throw Failure(QIGEN_BAD_INPUT,
                  "%s has %" PRId64
                  " tokens, but the model is compiled for at most %d; compile it "
                  "with a larger --max-seq",
                  kInput, n, model->description().max_seq);
  }
  Session session(model, static_cast<int32_t>(n));
  session.eval(ids.data(), static_cast<int32_t>(n), static_cast<float*>(output.data), true);
}

Outputs call_tensors(const std::shared_ptr<Model>& model, const qigen_tensor* inputs,
                     size_t n_inputs) {
  if (model->graph()) return model->graph()->call(*model, inputs, n_inputs);
  Outputs outputs;
  qigen_tensor logits{};
  model->get_output(0, &logits);
  run_tensors(model, inputs, n_inputs, &logits, 1);
  logits.bytes = sizeof(float) * logits.shape[1] * logits.shape[2];
  logits.data = outputs.allocate(logits.bytes);
  run_tensors(model, inputs, n_inputs, &logits, 1);
  outputs.tensors.push_back(logits);
  return outputs;
}

}  // namespace qigen::runtime
