// A model of named tensors: what its inputs say about sizes, where its values lie, one run of it.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "memory.h"
#include "qigen.h"
#include "qigen/generated.h"
#include "thread_pool.h"

namespace qigen::runtime {

class Model;

// Bytes of one element; 0 for a type that qigen.h does not have.
size_t element_bytes(int32_t dtype);
const char* dtype_name(int32_t dtype);

// Tensors and the memory they lie in.
struct Outputs {
  // 64-byte aligned memory that lives as long as this. Throws QIGEN_NO_MEMORY.
  void* allocate(uint64_t bytes);

  std::vector<qigen_tensor> tensors;

 private:
  struct Free {
    void operator()(void* memory) const { free_aligned(memory); }
  };
  std::vector<std::unique_ptr<void, Free>> memory_;
};

class Graph {
 public:
  explicit Graph(const GraphDescription& description);

  const GraphDescription& description() const { return description_; }
  void get_input(int32_t index, qigen_tensor* tensor) const;
  void get_output(int32_t index, qigen_tensor* tensor) const;

  // See qigen_model_run and qigen_model_call.
  void run(Model& model, const qigen_tensor* inputs, size_t n_inputs, qigen_tensor* outputs,
           size_t n_outputs);
  Outputs call(Model& model, const qigen_tensor* inputs, size_t n_inputs);

 private:
  struct Shape {
    int64_t size[8];
  };
  // What the inputs of one run are and what follows from them.
  struct Bound {
    std::vector<const void*> inputs;
    std::vector<int64_t> symbols;
    std::vector<Shape> output_shapes;  // -1: only the run decides
  };

  Bound bind(const qigen_tensor* inputs, size_t n_inputs) const;
  void describe_output(const Bound& bound, int32_t index, qigen_tensor* tensor) const;
  // Offsets in the arena for these symbols; grows the arena. Needs the turn.
  void place(const std::vector<int64_t>& symbols);
  void step(Model& model, const Bound& bound, const std::vector<void*>& outputs, Outputs* results);

  const GraphDescription& description_;
  Turnstile turnstile_;
  std::vector<int64_t> placed_for_;
  bool placed_ = false;
  std::vector<int64_t> offsets_;
  std::unique_ptr<LazyMemory> arena_;
};

}  // namespace qigen::runtime
