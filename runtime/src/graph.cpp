#include "graph.h"

#include <algorithm>
#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <string>

#include "error.h"
#include "model.h"

namespace qigen::runtime {
namespace {

constexpr uint64_t kLine = 64;

uint64_t lines(uint64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

struct Type {
  const char* name;
  size_t bytes;
};

// By the numbers of qigen.h.
constexpr Type kTypes[] = {
    {"", 0},
    {"float32", 4},
    {"int32", 4},
    {"int64", 8},
    {"float64", 8},
    {"float16", 2},
    {"bfloat16", 2},
    {"int8", 1},
    {"uint8", 1},
    {"int16", 2},
    {"uint16", 2},
    {"uint32", 4},
    {"uint64", 8},
    {"bool", 1},
    {"float8_e4m3fn", 1},
    {"float8_e4m3fnuz", 1},
    {"float8_e5m2", 1},
    {"float8_e5m2fnuz", 1},
    {"float8_e8m0fnu", 1},
    {"float4_e2m1fn", 1},
    {"int4", 1},
    {"uint4", 1},
    {"int2", 1},
    {"uint2", 1},
};

const Type& type_of(int32_t dtype) {
  const bool known = dtype > 0 && static_cast<size_t>(dtype) < sizeof kTypes / sizeof *kTypes;
  return kTypes[known ? dtype : 0];
}

std::string shape_text(const int64_t* shape, int32_t rank) {
  std::string text = "[";
  for (int32_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Elements of a shape; -1 if they don't fit into 63 bits or a size is negative.
int64_t elements(const int64_t* shape, int32_t rank) {
  int64_t n = 1;
  for (int32_t i = 0; i < rank; ++i) {
    if (shape[i] < 0 || __builtin_mul_overflow(n, shape[i], &n)) return -1;
  }
  return n;
}

void copy_description(const TensorDescription& from, qigen_tensor* to) {
  *to = {};
  to->name = from.name;
  to->dtype = from.dtype;
  to->rank = from.rank;
  for (int32_t i = 0; i < from.rank; ++i) to->shape[i] = std::max<int64_t>(from.shape[i], -1);
}

// The arena of one run: each buffer in the smallest gap between those that live at the same time,
// the largest first (qigen/passes/memory.py does the same for sizes that are known when compiling).
uint64_t place_buffers(const int32_t (*lifetimes)[2], const std::vector<int64_t>& bytes,
                       std::vector<int64_t>* offsets) {
  const size_t n = bytes.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return bytes[a] > bytes[b]; });
  std::vector<size_t> placed;  // by offset
  uint64_t total = 0;
  for (size_t buffer : order) {
    const auto size = static_cast<int64_t>(lines(bytes[buffer]));
    int64_t end = 0, best = -1, best_gap = INT64_MAX;
    for (size_t other : placed) {
      if (lifetimes[other][0] > lifetimes[buffer][1] || lifetimes[buffer][0] > lifetimes[other][1])
        continue;
      const int64_t gap = (*offsets)[other] - end;
      if (gap >= size && gap < best_gap) {
        best = end;
        best_gap = gap;
      }
      end = std::max(end, (*offsets)[other] + static_cast<int64_t>(lines(bytes[other])));
    }
    (*offsets)[buffer] = best >= 0 ? best : end;
    total = std::max(total, static_cast<uint64_t>((*offsets)[buffer] + size));
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), buffer,
                         [&](size_t a, size_t b) { return (*offsets)[a] < (*offsets)[b]; }),
        buffer);
  }
  return total;
}

// What the generated code calls for memory whose size only the run decides.
void* allocate_from(void* heap, uint64_t bytes) {
  try {
    return static_cast<Outputs*>(heap)->allocate(bytes);
  } catch (...) {
    return nullptr;
  }
}

}  // namespace

size_t element_bytes(int32_t dtype) { return type_of(dtype).bytes; }
const char* dtype_name(int32_t dtype) { return type_of(dtype).name; }

void* Outputs::allocate(uint64_t bytes) {
  void* memory = aligned_memory(kLine, std::max(lines(bytes), kLine));
  if (!memory) {
    throw Failure(QIGEN_NO_MEMORY, "the system refused %" PRIu64 " bytes for results", bytes);
  }
  memory_.emplace_back(memory);
  return memory;
}

Graph::Graph(const GraphDescription& description) : description_(description) {}

void Graph::get_input(int32_t index, qigen_tensor* tensor) const {
  if (index < 0 || index >= description_.n_inputs) {
    throw Failure(QIGEN_USAGE, "there is no input number %d; the model has %d", index,
                  description_.n_inputs);
  }
  copy_description(description_.inputs[index], tensor);
}

void Graph::get_output(int32_t index, qigen_tensor* tensor) const {
  if (index < 0 || index >= description_.n_outputs) {
    throw Failure(QIGEN_USAGE, "there is no output number %d; the model has %d", index,
                  description_.n_outputs);
  }
  copy_description(description_.outputs[index], tensor);
}

Graph::Bound Graph::bind(const qigen_tensor* inputs, size_t n_inputs) const {
  Bound bound;
  bound.inputs.resize(description_.n_inputs);
  bound.symbols.assign(description_.n_symbols, -1);
  if (n_inputs != static_cast<size_t>(description_.n_inputs)) {
    throw Failure(QIGEN_BAD_INPUT, "%zu inputs are given, but the model has %d", n_inputs,
                  description_.n_inputs);
  }
  for (int32_t i = 0; i < description_.n_inputs; ++i) {
    const TensorDescription& wanted = description_.inputs[i];
    const qigen_tensor* given = nullptr;
    for (size_t j = 0; j < n_inputs; ++j) {
      if (inputs[j].name && std::strcmp(inputs[j].name, wanted.name) == 0) given = &inputs[j];
    }
    if (!given) {
      throw Failure(QIGEN_BAD_INPUT, "input %s is missing; give all inputs by name", wanted.name);
    }
    if (given->dtype != wanted.dtype) {
      throw Failure(QIGEN_BAD_INPUT, "input %s must be %s, not %s", wanted.name,
                    dtype_name(wanted.dtype),
                    *dtype_name(given->dtype) ? dtype_name(given->dtype) : "an unknown type");
    }
    if (given->rank != wanted.rank) {
      throw Failure(QIGEN_BAD_INPUT, "input %s must have %d dimensions, not %d", wanted.name,
                    wanted.rank, given->rank);
    }
    for (int32_t d = 0; d < wanted.rank; ++d) {
      const int64_t size = given->shape[d];
      const int64_t expected = wanted.shape[d];
      if (size < 0) {
        throw Failure(QIGEN_BAD_INPUT, "input %s has the shape %s; sizes must not be negative",
                      wanted.name, shape_text(given->shape, given->rank).c_str());
      }
      if (expected >= 0) {
        if (size == expected) continue;
        throw Failure(QIGEN_BAD_INPUT,
                      "dimension %d of input %s must be %" PRId64 ", not %" PRId64
                      "; compile the model with another --shape for other sizes",
                      d, wanted.name, expected, size);
      }
      const size_t s = static_cast<size_t>(-1 - expected);
      if (bound.symbols[s] >= 0 && bound.symbols[s] != size) {
        throw Failure(QIGEN_BAD_INPUT,
                      "dimension %d (%s) of input %s is %" PRId64 ", but elsewhere it is %" PRId64,
                      d, description_.symbols[s], wanted.name, size, bound.symbols[s]);
      }
      if (description_.limits[s] && size > description_.limits[s]) {
        throw Failure(QIGEN_BAD_INPUT,
                      "dimension %d (%s) of input %s is %" PRId64
                      ", but the model is compiled for at most %" PRId64
                      "; compile it with a larger --shape",
                      d, description_.symbols[s], wanted.name, size, description_.limits[s]);
      }
      bound.symbols[s] = size;
    }
    const int64_t n = elements(given->shape, given->rank);
    if (n < 0 || given->bytes != n * element_bytes(given->dtype) || (n && !given->data)) {
      throw Failure(QIGEN_BAD_INPUT, "input %s of shape %s has %zu bytes of data", wanted.name,
                    shape_text(given->shape, given->rank).c_str(), given->bytes);
    }
    bound.inputs[i] = given->data;
  }
  bound.output_shapes.resize(std::max(description_.n_outputs, 1));
  const char* problem =
      description_.plan(bound.symbols.data(), nullptr, &bound.output_shapes[0].size);
  if (problem) throw Failure(QIGEN_BAD_INPUT, "the inputs have sizes that don't fit: %s", problem);
  return bound;
}

void Graph::describe_output(const Bound& bound, int32_t index, qigen_tensor* tensor) const {
  const TensorDescription& description = description_.outputs[index];
  tensor->dtype = description.dtype;
  tensor->rank = description.rank;
  std::copy_n(bound.output_shapes[index].size, description.rank, tensor->shape);
}

void Graph::place(const std::vector<int64_t>& symbols) {
  if (!description_.lifetimes || (placed_ && placed_for_ == symbols)) return;
  std::vector<int64_t> bytes(description_.n_buffers);
  std::vector<Shape> shapes(std::max(description_.n_outputs, 1));
  description_.plan(symbols.data(), bytes.data(), &shapes[0].size);
  offsets_.assign(description_.n_buffers, 0);
  placed_ = false;
  const uint64_t total = place_buffers(description_.lifetimes, bytes, &offsets_);
  if (!arena_ || arena_->size() < total) {
    arena_.reset();
    arena_ = std::make_unique<LazyMemory>(std::max<uint64_t>(total, kLine), "arena", Pages::kHuge);
  }
  placed_for_ = symbols;
  placed_ = true;
}

// Needs the turn.
void Graph::step(Model& model, const Bound& bound, const std::vector<void*>& outputs,
                 Outputs* results) {
  place(bound.symbols);
  std::vector<int64_t> slots(std::max(description_.n_slots, 1));
  std::vector<void*> data(std::max(description_.n_outputs, 1));
  std::vector<Shape> shapes(std::max(description_.n_outputs, 1));
  std::atomic<const char*> failure{nullptr};
  GraphStep graph{};
  graph.inputs = bound.inputs.data();
  graph.outputs = outputs.data();
  graph.symbols = bound.symbols.data();
  graph.offsets = description_.lifetimes ? offsets_.data() : description_.offsets;
  graph.slots = slots.data();
  graph.allocate = allocate_from;
  graph.heap = results;
  graph.results = data.data();
  graph.result_shapes = &shapes[0].size;
  graph.failure = &failure;
  model.run(graph, arena_ ? arena_->data() : nullptr);
  if (const char* problem = failure.load()) throw Failure(QIGEN_BAD_INPUT, "%s", problem);
  for (int32_t i = 0; i < description_.n_outputs; ++i) {
    qigen_tensor tensor{};
    tensor.name = description_.outputs[i].name;
    describe_output(bound, i, &tensor);
    tensor.data = outputs[i];
    if (!outputs[i]) {
      tensor.data = data[i];
      std::copy_n(shapes[i].size, tensor.rank, tensor.shape);
    }
    tensor.bytes = elements(tensor.shape, tensor.rank) * element_bytes(tensor.dtype);
    results->tensors.push_back(tensor);
  }
}

Outputs Graph::call(Model& model, const qigen_tensor* inputs, size_t n_inputs) {
  const Bound bound = bind(inputs, n_inputs);
  Outputs results;
  std::vector<void*> outputs(std::max(description_.n_outputs, 1));
  for (int32_t i = 0; i < description_.n_outputs; ++i) {
    const TensorDescription& description = description_.outputs[i];
    const int64_t n = elements(bound.output_shapes[i].size, description.rank);
    if (n >= 0) outputs[i] = results.allocate(n * element_bytes(description.dtype));
  }
  Turnstile::Turn turn(turnstile_);
  step(model, bound, outputs, &results);
  return results;
}

void Graph::run(Model& model, const qigen_tensor* inputs, size_t n_inputs, qigen_tensor* outputs,
                size_t n_outputs) {
  const Bound bound = bind(inputs, n_inputs);
  Outputs own;  // outputs that are not asked for, or whose size only the run decides
  std::vector<void*> targets(std::max(description_.n_outputs, 1));
  std::vector<qigen_tensor*> asked(description_.n_outputs);
  bool compute = true;
  for (size_t j = 0; j < n_outputs; ++j) {
    int32_t index = -1;
    for (int32_t i = 0; i < description_.n_outputs; ++i) {
      if (outputs[j].name && std::strcmp(outputs[j].name, description_.outputs[i].name) == 0) {
        index = i;
      }
    }
    if (index < 0) {
      throw Failure(QIGEN_BAD_INPUT, "the model has no output %s",
                    outputs[j].name ? outputs[j].name : "without a name");
    }
    describe_output(bound, index, &outputs[j]);
    asked[index] = &outputs[j];
    compute = compute && outputs[j].data;
  }
  if (!compute) return;
  for (int32_t i = 0; i < description_.n_outputs; ++i) {
    const TensorDescription& description = description_.outputs[i];
    const int64_t n = elements(bound.output_shapes[i].size, description.rank);
    if (n < 0) continue;
    const uint64_t bytes = n * element_bytes(description.dtype);
    if (!asked[i]) {
      targets[i] = own.allocate(bytes);
    } else if (asked[i]->bytes != bytes) {
      throw Failure(QIGEN_BAD_INPUT, "output %s needs %" PRIu64 " bytes of memory but got %zu",
                    description.name, bytes, asked[i]->bytes);
    } else {
      targets[i] = asked[i]->data;
    }
  }
  Turnstile::Turn turn(turnstile_);
  step(model, bound, targets, &own);
  for (int32_t i = 0; i < description_.n_outputs; ++i) {
    if (!asked[i] || targets[i]) continue;
    const qigen_tensor& found = own.tensors[i];
    std::copy_n(found.shape, found.rank, asked[i]->shape);
    if (asked[i]->bytes < found.bytes) {
      throw Failure(QIGEN_BAD_INPUT,
                    "output %s turned out to need %zu bytes but got %zu; use qigen_model_call, "
                    "which allocates",
                    found.name, found.bytes, asked[i]->bytes);
    }
    std::memcpy(asked[i]->data, found.data, found.bytes);
    asked[i]->bytes = found.bytes;
  }
}

}  // namespace qigen::runtime
