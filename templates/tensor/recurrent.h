// Recurrent layers of any type. A thread computes its units of the hidden state for all images of
// the batch, so cell states stay with it; threads meet after every step. States of earlier steps
// are read from y, so that no memory of its own is needed.
#pragma once
#include "sums.h"

namespace qg {
namespace {

// Functions of recurrent layers, in the order of qigen/ir/ops/onnx/recurrent.py.
enum class Activation : int {
  kRelu,
  kTanh,
  kSigmoid,
  kAffine,
  kLeakyRelu,
  kThresholdedRelu,
  kScaledTanh,
  kHardSigmoid,
  kElu,
  kSoftsign,
  kSoftplus
};

inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }
inline float tanh_of(float x) { return __builtin_tanhf(x); }
inline double tanh_of(double x) { return __builtin_tanh(x); }

template <class T>
inline T activate(Activation f, T alpha, T beta, T x) {
  switch (f) {
    case Activation::kRelu:
      return x < 0 ? T(0) : x;
    case Activation::kTanh:
      return tanh_of(x);
    case Activation::kSigmoid: {
      const T e = exp_of(x < 0 ? x : -x);
      return (x < 0 ? e : T(1)) / (1 + e);
    }
    case Activation::kAffine:
      return alpha * x + beta;
    case Activation::kLeakyRelu:
      return x < 0 ? alpha * x : x;
    case Activation::kThresholdedRelu:
      return x > alpha ? x : T(0);
    case Activation::kScaledTanh:
      return alpha * tanh_of(beta * x);
    case Activation::kHardSigmoid: {
      const T y = alpha * x + beta;
      return y < 0 ? T(0) : y > 1 ? T(1) : y;
    }
    case Activation::kElu:
      return x < 0 ? alpha * (exp_of(x) - 1) : x;
    case Activation::kSoftsign:
      return x / (1 + (x < 0 ? -x : x));
    case Activation::kSoftplus:
      return (x > 0 ? x : T(0)) +
             static_cast<T>(__builtin_log1p(static_cast<double>(exp_of(x > 0 ? -x : x))));
  }
  return x;
}

// What LSTM, GRU and RNN have in common; kGates are the matrices in w and r of a direction.
template <class T, int kGates>
struct Recurrent {
  using Number = compute_t<T>;
  const Tensor &y, &x, &w, &r, &bias, &lengths, &initial;
  const Ints& functions;
  const Floats &alpha, &beta;
  double clip;  // 0: none
  bool reverse, batch_first;
  int64_t steps, batch, inputs, hidden, directions;

  Recurrent(const Tensor& y_, const Tensor& x_, const Tensor& w_, const Tensor& r_,
            const Tensor& bias_, const Tensor& lengths_, const Tensor& initial_,
            const Ints& functions_, const Floats& alpha_, const Floats& beta_, double clip_,
            bool reverse_, bool batch_first_)
      : y(y_),
        x(x_),
        w(w_),
        r(r_),
        bias(bias_),
        lengths(lengths_),
        initial(initial_),
        functions(functions_),
        alpha(alpha_),
        beta(beta_),
        clip(clip_),
        reverse(reverse_),
        batch_first(batch_first_),
        steps(x_.shape[batch_first_]),
        batch(x_.shape[!batch_first_]),
        inputs(x_.shape[2]),
        hidden(r_.shape[2]),
        directions(w_.shape[0]) {}

  // Whether the inputs fit together; `more` are the tensors of a state each.
  bool good(const Context& c, const Tensor& state, const char* wrong) const {
    bool fits = w.shape[1] == kGates * hidden && w.shape[2] == inputs && r.shape[0] == directions &&
                r.shape[1] == kGates * hidden &&
                (!bias || bias.size() == directions * 2 * kGates * hidden) &&
                (!initial || initial.size() == directions * batch * hidden) &&
                (!state || state.size() == directions * batch * hidden) &&
                (!lengths || lengths.size() == batch);
    for (int64_t b = 0; fits && lengths && b < batch; ++b) {
      const int32_t length = lengths.as<int32_t>()[b];
      fits = length >= 0 && length <= steps;
    }
    if (!fits) c.fail(wrong);
    return fits;
  }
  int64_t length(int64_t b) const { return lengths ? lengths.as<int32_t>()[b] : steps; }
  bool backwards(int64_t direction) const { return reverse || direction == 1; }
  // The place in the sequence of a step.
  int64_t place(int64_t direction, int64_t b, int64_t step) const {
    return step < length(b) && backwards(direction) ? length(b) - 1 - step : step;
  }
  int64_t state(int64_t direction, int64_t b) const {
    return (batch_first ? b * directions + direction : direction * batch + b) * hidden;
  }
  T* result(int64_t direction, int64_t b, int64_t at) const {
    const int64_t row = batch_first ? (b * steps + at) * directions + direction
                                    : (at * directions + direction) * batch + b;
    return y.as<T>() + row * hidden;
  }
  // The hidden state before a step; null: zeros.
  const T* before(int64_t direction, int64_t b, int64_t step) const {
    if (step > 0) return result(direction, b, place(direction, b, step - 1));
    return initial ? initial.as<T>() + state(direction, b) : nullptr;
  }
  static Number dot(const T* a, const T* b, int64_t n) {
    return sum_terms<Number>(
        n, [&](int64_t i) { return static_cast<Number>(a[i]) * static_cast<Number>(b[i]); });
  }
  Number input_sum(int64_t direction, int gate, int64_t unit, int64_t b, int64_t at) const {
    const T* from = x.as<T>() + (batch_first ? b * steps + at : at * batch + b) * inputs;
    return dot(from, w.as<T>() + ((direction * kGates + gate) * hidden + unit) * inputs, inputs);
  }
  Number hidden_sum(int64_t direction, int gate, int64_t unit, const T* h) const {
    return h ? dot(h, r.as<T>() + ((direction * kGates + gate) * hidden + unit) * hidden, hidden)
             : Number(0);
  }
  // Bias of the input's (part 0) or the state's (part 1) sum.
  Number shift(int64_t direction, int part, int gate, int64_t unit) const {
    if (!bias) return 0;
    return static_cast<Number>(
        bias.as<T>()[((direction * 2 + part) * kGates + gate) * hidden + unit]);
  }
  // All of a gate before its function.
  Number gate_sum(int64_t direction, int gate, int64_t unit, int64_t b, int64_t at,
                  const T* h) const {
    return input_sum(direction, gate, unit, b, at) + hidden_sum(direction, gate, unit, h) +
           shift(direction, 0, gate, unit) + shift(direction, 1, gate, unit);
  }
  // A function of a gate, whose sum is clipped.
  Number function(int64_t direction, int which, Number v) const {
    const Number limit = static_cast<Number>(clip);
    return plain_function(direction, which,
                          clip > 0 && v > limit    ? limit
                          : clip > 0 && v < -limit ? -limit
                                                   : v);
  }
  Number plain_function(int64_t direction, int which, Number v) const {
    const int i =
        static_cast<int>(direction) * (functions.n / static_cast<int>(directions)) + which;
    return activate<Number>(static_cast<Activation>(functions[i]), static_cast<Number>(alpha[i]),
                            static_cast<Number>(beta[i]), v);
  }
  // unit(direction, unit, b, step, place) for all units of this thread that the step computes.
  template <class Unit>
  void for_units(const Context& c, int64_t step, const Unit& unit) const {
    const int64_t total = directions * hidden;
    for (int64_t item = c.begin(total); item < c.end(total); ++item) {
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t direction = item / hidden, j = item % hidden, at = place(direction, b, step);
        if (step < length(b)) {
          unit(direction, j, b, at);
        } else {
          result(direction, b, at)[j] = static_cast<T>(Number(0));
        }
      }
    }
  }
  // The state after the last step.
  void last(const Context& c, const Tensor& h) const {
    const int64_t total = directions * hidden;
    for (int64_t item = c.begin(total); item < c.end(total); ++item) {
      const int64_t direction = item / hidden, j = item % hidden;
      for (int64_t b = 0; b < batch; ++b) {
        const T* from = before(direction, b, length(b));
        h.as<T>()[state(direction, b) + j] = from ? from[j] : static_cast<T>(Number(0));
      }
    }
  }
};

template <class T>
inline void rnn(const Context& c, const Tensor& y, const Tensor& y_h, const Tensor& x,
                const Tensor& w, const Tensor& r, const Tensor& bias, const Tensor& lengths,
                const Tensor& initial, const Ints& functions, const Floats& alpha,
                const Floats& beta, double clip, bool reverse, bool batch_first,
                const char* wrong) {
  const Recurrent<T, 1> l(y, x, w, r, bias, lengths, initial, functions, alpha, beta, clip, reverse,
                          batch_first);
  if (!l.good(c, Tensor{}, wrong)) return;
  for (int64_t step = 0; step < l.steps; ++step) {
    l.for_units(c, step, [&](int64_t direction, int64_t j, int64_t b, int64_t at) {
      const auto sum = l.gate_sum(direction, 0, j, b, at, l.before(direction, b, step));
      l.result(direction, b, at)[j] = static_cast<T>(l.function(direction, 0, sum));
    });
    c.wait();
  }
  l.last(c, y_h);
}

// Gates z, r, h.
template <class T>
inline void gru(const Context& c, const Tensor& y, const Tensor& y_h, const Tensor& x,
                const Tensor& w, const Tensor& r, const Tensor& bias, const Tensor& lengths,
                const Tensor& initial, const Ints& functions, const Floats& alpha,
                const Floats& beta, double clip, bool reverse, bool batch_first,
                bool linear_before_reset, const char* wrong) {
  using Number = compute_t<T>;
  const Recurrent<T, 3> l(y, x, w, r, bias, lengths, initial, functions, alpha, beta, clip, reverse,
                          batch_first);
  if (!l.good(c, Tensor{}, wrong)) return;
  const auto mixed = [](Number z, Number now, const T* h, int64_t j) {
    return static_cast<T>((1 - z) * now + (h ? z * static_cast<Number>(h[j]) : Number(0)));
  };
  for (int64_t step = 0; step < l.steps; ++step) {
    l.for_units(c, step, [&](int64_t direction, int64_t j, int64_t b, int64_t at) {
      const T* h = l.before(direction, b, step);
      T* to = l.result(direction, b, at);
      const Number z = l.function(direction, 0, l.gate_sum(direction, 0, j, b, at, h));
      const Number reset = l.function(direction, 0, l.gate_sum(direction, 1, j, b, at, h));
      if (linear_before_reset) {
        const Number sum = l.input_sum(direction, 2, j, b, at) + l.shift(direction, 0, 2, j) +
                           reset * (l.hidden_sum(direction, 2, j, h) + l.shift(direction, 1, 2, j));
        to[j] = mixed(z, l.function(direction, 1, sum), h, j);
      } else {  // kept until all of the state is reset: z in the result's place, the state in y_h
        to[j] = static_cast<T>(z);
        y_h.as<T>()[l.state(direction, b) + j] =
            static_cast<T>(h ? reset * static_cast<Number>(h[j]) : Number(0));
      }
    });
    c.wait();
    if (linear_before_reset) continue;
    l.for_units(c, step, [&](int64_t direction, int64_t j, int64_t b, int64_t at) {
      T* to = l.result(direction, b, at);
      const Number sum = l.gate_sum(direction, 2, j, b, at, y_h.as<T>() + l.state(direction, b));
      to[j] = mixed(static_cast<Number>(to[j]), l.function(direction, 1, sum),
                    l.before(direction, b, step), j);
    });
    c.wait();
  }
  l.last(c, y_h);
}

// Gates i, o, f, c; peepholes i, o, f. The cell state stays in y_c.
template <class T>
inline void lstm(const Context& c, const Tensor& y, const Tensor& y_h, const Tensor& y_c,
                 const Tensor& x, const Tensor& w, const Tensor& r, const Tensor& bias,
                 const Tensor& lengths, const Tensor& initial, const Tensor& initial_c,
                 const Tensor& peepholes, const Ints& functions, const Floats& alpha,
                 const Floats& beta, double clip, bool reverse, bool batch_first, bool input_forget,
                 const char* wrong) {
  using Number = compute_t<T>;
  const Recurrent<T, 4> l(y, x, w, r, bias, lengths, initial, functions, alpha, beta, clip, reverse,
                          batch_first);
  if (!l.good(c, initial_c, wrong)) return;
  if (peepholes && peepholes.size() != l.directions * 3 * l.hidden) return c.fail(wrong);
  const auto peep = [&](int64_t direction, int gate, int64_t j, Number cell) {
    return peepholes
               ? static_cast<Number>(peepholes.as<T>()[(direction * 3 + gate) * l.hidden + j]) *
                     cell
               : Number(0);
  };
  const int64_t total = l.directions * l.hidden;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    for (int64_t b = 0; b < l.batch; ++b) {
      const int64_t at = l.state(item / l.hidden, b) + item % l.hidden;
      y_c.as<T>()[at] = initial_c ? initial_c.as<T>()[at] : static_cast<T>(Number(0));
    }
  }
  for (int64_t step = 0; step < l.steps; ++step) {
    l.for_units(c, step, [&](int64_t direction, int64_t j, int64_t b, int64_t at) {
      const T* h = l.before(direction, b, step);
      T* cell = y_c.as<T>() + l.state(direction, b) + j;
      const Number old = static_cast<Number>(*cell);
      const Number in = l.function(
          direction, 0, l.gate_sum(direction, 0, j, b, at, h) + peep(direction, 0, j, old));
      const Number forget =
          input_forget
              ? 1 - in
              : l.function(direction, 0,
                           l.gate_sum(direction, 2, j, b, at, h) + peep(direction, 2, j, old));
      const Number now =
          forget * old + in * l.function(direction, 1, l.gate_sum(direction, 3, j, b, at, h));
      const Number out = l.function(
          direction, 0, l.gate_sum(direction, 1, j, b, at, h) + peep(direction, 1, j, now));
      *cell = static_cast<T>(now);
      // like onnxruntime, the cell state is not clipped
      l.result(direction, b, at)[j] = static_cast<T>(out * l.plain_function(direction, 2, now));
    });
    c.wait();
  }
  l.last(c, y_h);
}

}  // namespace
}  // namespace qg
