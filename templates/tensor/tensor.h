// Tensors of generated graph models, and what one run is to each of its threads.
//
// A kernel is a function template that takes the context, the outputs, the inputs, then attributes.
// Every thread calls it; it takes its share of the work by c.begin and c.end and must not assume
// that the others are as far as it is (c.wait() is a barrier of all threads). Data that comes from
// the user (indices, sizes) is checked: c.fail reports the first problem, and the kernel goes on
// with something harmless.
#pragma once
#include <cstddef>
#include <cstdint>

#include "qigen/generated.h"
#include "types.h"

namespace qg {
namespace {

constexpr int kMaxRank = 8;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t floordiv(int64_t a, int64_t b) {
  if (b == 0) return 0;
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
inline int64_t mod(int64_t a, int64_t b) { return a - floordiv(a, b) * b; }

// Dense and row-major. No data: the tensor is absent.
struct Tensor {
  void* data;
  int32_t rank;
  int64_t shape[kMaxRank];

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  explicit operator bool() const { return data != nullptr; }
  int64_t size() const { return count(0, rank); }
  // Elements of axes [first, last).
  int64_t count(int first, int last) const {
    int64_t n = 1;
    for (int i = first; i < last; ++i) n *= shape[i];
    return n;
  }
};

// Lists of attributes.
struct Ints {
  int32_t n;
  int64_t v[2 * kMaxRank];
  int64_t operator[](int i) const { return v[i]; }
};
struct Floats {
  int32_t n;
  double v[2 * kMaxRank];
  double operator[](int i) const { return v[i]; }
};

// Element strides of a dense tensor; with `out`, of the tensor broadcast to its shape: 0 where it
// has one element for many.
struct Strides {
  int64_t v[kMaxRank];
  int64_t operator[](int i) const { return v[i]; }
};
inline Strides strides_of(const Tensor& t) {
  Strides s = {};
  int64_t n = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    s.v[i] = n;
    n *= t.shape[i];
  }
  return s;
}
inline Strides broadcast_strides(const Tensor& t, const Tensor& out) {
  const Strides dense = strides_of(t);
  Strides s = {};
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] != 1) s.v[out.rank - t.rank + i] = dense.v[i];
  }
  return s;
}

// Multi-index of an element number, most significant axis first.
struct Index {
  int64_t v[kMaxRank];
  Index(int64_t element, const Tensor& t) {
    for (int i = t.rank - 1; i >= 0; --i) {
      v[i] = t.shape[i] ? element % t.shape[i] : 0;
      element = t.shape[i] ? element / t.shape[i] : 0;
    }
  }
  // To the next element in row-major order.
  void advance(const Tensor& t) {
    for (int i = t.rank - 1; i >= 0 && ++v[i] == t.shape[i]; --i) v[i] = 0;
  }
  int64_t offset(const Strides& s, int rank) const {
    int64_t o = 0;
    for (int i = 0; i < rank; ++i) o += v[i] * s.v[i];
    return o;
  }
};

// One run on one thread.
struct Context {
  const qigen::Step& step;
  const qigen::GraphStep& graph;
  int thread;
  int threads;
  qigen::Barrier& barrier;

  void wait() const { barrier.wait(thread); }
  // This thread's share of n items.
  int64_t begin(int64_t n) const { return n * thread / threads; }
  int64_t end(int64_t n) const { return n * (thread + 1) / threads; }

  // Reports a problem of the user's data; the first one counts.
  void fail(const char* problem) const {
    const char* none = nullptr;
    graph.failure->compare_exchange_strong(none, problem);
  }

  void* input(int i) const { return const_cast<void*>(graph.inputs[i]); }
  void* output(int i) const { return graph.outputs[i]; }
  void* buffer(int i) const { return step.arena + graph.offsets[i]; }
  void* weight(int64_t offset) const { return const_cast<uint8_t*>(step.weights) + offset; }

  // Memory of a size that only the run decides: thread 0 asks for it, all get it.
  void* heap(int slot, int64_t bytes) const {
    if (thread == 0) {
      void* memory = bytes < 0 ? nullptr : graph.allocate(graph.heap, static_cast<uint64_t>(bytes));
      if (!memory) fail("there is not enough memory for a result whose size depends on data");
      graph.slots[slot] = reinterpret_cast<int64_t>(memory);
    }
    wait();
    return reinterpret_cast<void*>(graph.slots[slot]);
  }
  // Hands a result in memory from heap() to the caller.
  void result(int index, const Tensor& t) const {
    if (thread != 0) return;
    graph.results[index] = t.data;
    for (int i = 0; i < t.rank; ++i) graph.result_shapes[index][i] = t.shape[i];
  }
};

// Memory of the threads' own: where it begins in the arena, and bytes of each.
struct Scratch {
  int64_t first, bytes;
};

// The rows of one thread, a block at a time. Nodes that treat each row by itself run over a block as
// if there were no other rows and no other thread.
class RowBlock {
 public:
  RowBlock(const Context& c, const Scratch& scratch, int64_t rows, int64_t most)
      : context{c.step, c.graph, 0, 1, c.barrier}, memory_(c.step.arena + scratch.first + c.thread * scratch.bytes), most_(most) {
    constexpr int64_t kTile = 12;  // whole register tiles for all threads but the last
    const int64_t tiles = (rows + kTile - 1) / kTile;
    first_ = min(rows, kTile * c.begin(tiles));
    end_ = min(rows, kTile * c.end(tiles));
    count_ = min(most_, end_ - first_);
  }
  explicit operator bool() const { return count_ > 0; }
  void operator++() {
    first_ += count_;
    count_ = min(most_, end_ - first_);
  }
  // The block's rows of a tensor that has all of them.
  Tensor of(const Tensor& t, int64_t row_bytes) const {
    return {t.as<uint8_t>() + first_ * row_bytes, t.rank == 1 ? 1 : 2, {count_, t.shape[t.rank - 1]}};
  }
  Tensor scratch(int64_t offset, int rank, int64_t columns) const { return {memory_ + offset, rank, {count_, columns}}; }

  const Context context;

 private:
  uint8_t* memory_;
  int64_t first_, end_, count_, most_;
};

// The integers of a tensor of any integer type.
template <class T>
inline Ints ints(const Tensor& t) {
  Ints list = {};
  const int64_t n = min(t.size(), 2 * kMaxRank);
  list.n = static_cast<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) list.v[i] = static_cast<int64_t>(t.as<T>()[i]);
  return list;
}

// Bytes from x to y, shared by the threads in whole cache lines.
inline void copy_bytes(const Context& c, void* y, const void* x, int64_t bytes) {
  const int64_t lines = (bytes + 63) / 64;
  const int64_t first = 64 * c.begin(lines), last = min(64 * c.end(lines), bytes);
  if (first < last && y != x) {
    std::memcpy(static_cast<char*>(y) + first, static_cast<const char*>(x) + first,
                static_cast<size_t>(last - first));
  }
}

// y = x: the same elements in the same order.
inline void copy_tensor(const Context& c, const Tensor& y, const Tensor& x, int64_t element_bytes) {
  copy_bytes(c, y.data, x.data, y.size() * element_bytes);
}

}  // namespace
}  // namespace qg
