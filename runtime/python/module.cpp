// qigen._runtime: artifacts from Python. Logits and tensors aren't copied; the interpreter lock is
// released while the model loads and computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bandwidth.h"
#include "qigen.hpp"

namespace py = pybind11;

namespace {

// Converted to a contiguous float32 array if it isn't one.
using Logits = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Raises the class of qigen.errors whose exit code is the status.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const qigen::Error& error) {
    if (error.status() == QIGEN_NO_MEMORY) {
      py::set_error(PyExc_MemoryError, error.what());
      return;
    }
    const py::module_ errors = py::module_::import("qigen.errors");
    const char* name = "QigenError";
    switch (error.status()) {
      case QIGEN_USAGE:
        name = "UsageError";
        break;
      case QIGEN_BAD_INPUT:
        name = "BadInput";
        break;
      case QIGEN_UNSUPPORTED:
        name = "Unsupported";
        break;
      case QIGEN_MACHINE:
        name = "MachineMismatch";
        break;
    }
    py::set_error(errors.attr(name), error.what());
  }
}

void require(bool good, const char* problem) {
  if (!good) throw qigen::Error(QIGEN_USAGE, problem);
}

int32_t length(const Logits& logits) {
  require(logits.ndim() == 1 && logits.size() <= INT32_MAX,
          "logits must be a one-dimensional array");
  return static_cast<int32_t>(logits.size());
}

// Token ids from a sequence of any integers. Those that don't fit into 32 bits become -1, which is
// out of range for every model.
std::vector<int32_t> token_ids(const py::object& object) {
  const py::array array = py::array::ensure(object);
  require(array && array.ndim() == 1, "tokens must be a one-dimensional array");
  const char kind = array.dtype().kind();
  require(kind == 'i' || kind == 'u' || array.size() == 0, "tokens must be integers");
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  require(wide && wide.size() <= INT32_MAX, "there are too many tokens");
  std::vector<int32_t> ids;
  ids.reserve(wide.size());
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t id = wide.data()[i];
    ids.push_back(id < 0 || id > INT32_MAX ? -1 : static_cast<int32_t>(id));
  }
  return ids;
}

// numpy's names of the element types, by their numbers in qigen.h; those from kFirstForeign on, and
// bfloat16, come from the package ml_dtypes.
constexpr const char* kDtypes[] = {"",
                                   "float32",
                                   "int32",
                                   "int64",
                                   "float64",
                                   "float16",
                                   "bfloat16",
                                   "int8",
                                   "uint8",
                                   "int16",
                                   "uint16",
                                   "uint32",
                                   "uint64",
                                   "bool",
                                   "float8_e4m3fn",
                                   "float8_e4m3fnuz",
                                   "float8_e5m2",
                                   "float8_e5m2fnuz",
                                   "float8_e8m0fnu",
                                   "float4_e2m1fn",
                                   "int4",
                                   "uint4",
                                   "int2",
                                   "uint2"};
constexpr int32_t kDtypeCount = sizeof kDtypes / sizeof *kDtypes;
constexpr int32_t kFirstForeign = QIGEN_FLOAT8E4M3FN;

const char* dtype_name(int32_t dtype) {
  if (dtype > 0 && dtype < kDtypeCount) return kDtypes[dtype];
  throw qigen::Error(QIGEN_INTERNAL, "the artifact has a tensor of unknown type");
}

py::dtype numpy_dtype(int32_t dtype) {
  if (dtype != QIGEN_BFLOAT16 && dtype < kFirstForeign) return py::dtype(dtype_name(dtype));
  return py::dtype::from_args(py::module_::import("ml_dtypes").attr(dtype_name(dtype)));
}

// Number of a numpy type, 0 for one that no tensor can have.
int32_t dtype_number(const py::dtype& dtype) {
  const auto name = py::cast<std::string>(dtype.attr("name"));
  for (int32_t i = 1; i < kDtypeCount; ++i) {
    if (name == kDtypes[i]) return i;
  }
  return 0;
}

std::vector<int64_t> shape_of(const qigen_tensor& tensor) {
  return {tensor.shape, tensor.shape + tensor.rank};
}

py::list describe(const std::vector<qigen_tensor>& tensors) {
  py::list list;
  for (const qigen_tensor& tensor : tensors) {
    py::dict row;
    row["name"] = tensor.name;
    row["dtype"] = dtype_name(tensor.dtype);
    row["shape"] = py::tuple(py::cast(shape_of(tensor)));
    list.append(row);
  }
  return list;
}

py::dict info(const qigen::Model& model) {
  const qigen_model_info& info = model.info();
  py::dict dict;
  dict["name"] = info.name;
  dict["isa"] = info.isa;
  dict["kv_format"] = info.kv_format;
  dict["vocab"] = info.vocab;
  dict["max_seq"] = info.max_seq;
  dict["max_batch"] = info.max_batch;
  dict["max_tokens"] = info.max_tokens;
  dict["d_model"] = info.d_model;
  dict["n_layers"] = info.n_layers;
  dict["threads"] = info.threads;
  dict["eos"] = std::vector<int32_t>(info.eos, info.eos + info.n_eos);
  dict["weights_bytes"] = info.weights_bytes;
  dict["arena_bytes"] = info.arena_bytes;
  dict["kv_bytes_per_position"] = info.kv_bytes_per_position;
  dict["placement"] = info.placement ? info.placement : "shared";
  return dict;
}

py::dict run(const qigen::Model& model, const py::dict& arrays) {
  std::vector<py::array> keep;
  std::vector<std::string> names;
  names.reserve(arrays.size());  // tensors point into it
  std::vector<qigen_tensor> inputs;
  for (const auto& [key, value] : arrays) {
    const py::array array = py::array::ensure(value, py::array::c_style);
    require(static_cast<bool>(array), "inputs must be arrays");
    require(array.ndim() <= QIGEN_MAX_RANK, "inputs may have at most 8 dimensions");
    names.push_back(py::cast<std::string>(key));
    qigen_tensor tensor{};
    tensor.name = names.back().c_str();
    tensor.dtype = dtype_number(array.dtype());
    tensor.rank = static_cast<int32_t>(array.ndim());
    std::copy_n(array.shape(), tensor.rank, tensor.shape);
    tensor.data = const_cast<void*>(array.data());
    tensor.bytes = static_cast<size_t>(array.nbytes());
    inputs.push_back(tensor);
    keep.push_back(array);
  }
  // Once for the shapes, once for the numbers, unless only the run decides the shapes.
  std::vector<qigen_tensor> outputs = model.outputs();
  model.run(inputs, &outputs);
  py::dict results;
  if (std::any_of(outputs.begin(), outputs.end(), [](const qigen_tensor& tensor) {
        return std::any_of(tensor.shape, tensor.shape + tensor.rank,
                           [](int64_t size) { return size < 0; });
      })) {
    const qigen::Result result = [&] {
      py::gil_scoped_release unlocked;
      return model.call(inputs);
    }();
    for (int32_t i = 0; i < result.size(); ++i) {
      const qigen_tensor tensor = result[i];
      // without a base, the array copies
      results[tensor.name] = py::array(numpy_dtype(tensor.dtype), shape_of(tensor), tensor.data);
    }
    return results;
  }
  for (qigen_tensor& tensor : outputs) {
    py::array array(numpy_dtype(tensor.dtype), shape_of(tensor));
    tensor.data = array.mutable_data();
    tensor.bytes = static_cast<size_t>(array.nbytes());
    results[tensor.name] = array;
  }
  py::gil_scoped_release unlocked;
  model.run(inputs, &outputs);
  return results;
}

// A session that knows the size of its results and of its steps.
struct PySession {
  qigen::Session session;
  int32_t vocab;
  int32_t max_seq;
  int32_t max_tokens;
  bool busy = false;  // in the middle of a long prompt; guarded by the interpreter lock
};

void require_idle(const PySession& self) {
  require(!self.busy, "the session is in use by another thread; give each its own session");
}

// Whether the session takes all the tokens; if not, its own message says why.
bool fits(const PySession& self, const std::vector<int32_t>& ids) {
  auto known = [&](int32_t id) { return 0 <= id && id < self.vocab; };
  return static_cast<int64_t>(ids.size()) <= self.max_seq - self.session.position() &&
         std::all_of(ids.begin(), ids.end(), known);
}

// Appends tokens by run(first token, how many), which is called without the interpreter lock. A
// long prompt goes in step by step, so that Ctrl-C is heard; it leaves the session as it was.
template <class Run>
void append(PySession& self, const std::vector<int32_t>& ids, const Run& run) {
  require_idle(self);
  self.busy = true;
  const auto n = static_cast<int32_t>(ids.size());
  const int32_t first = self.session.position();
  const int32_t step = fits(self, ids) ? self.max_tokens : n;
  int32_t done = 0;
  try {
    do {
      if (done > 0 && PyErr_CheckSignals() != 0) throw py::error_already_set();
      const int32_t count = std::min(step, n - done);
      py::gil_scoped_release unlocked;
      run(done, count);
      done += count;
    } while (done < n);
  } catch (...) {
    if (self.session.position() > first) self.session.rewind(first);
    self.busy = false;
    throw;
  }
  self.busy = false;
}

py::array_t<float> eval(PySession& self, const py::object& tokens, bool all) {
  const std::vector<int32_t> ids = token_ids(tokens);
  const auto n = static_cast<int32_t>(ids.size());
  py::array_t<float> logits = all ? py::array_t<float>({py::ssize_t{n}, py::ssize_t{self.vocab}})
                                  : py::array_t<float>(self.vocab);
  float* target = logits.mutable_data();
  append(self, ids, [&](int32_t done, int32_t count) {
    if (all) {
      self.session.eval_all(ids.data() + done, count, target + int64_t{done} * self.vocab);
    } else {
      self.session.eval(ids.data() + done, count, done + count == n ? target : nullptr);
    }
  });
  return logits;
}

int32_t next(PySession& self, const py::object& tokens, qigen::Sampler& sampler,
             const py::object& history) {
  const std::vector<int32_t> ids = token_ids(tokens), before = token_ids(history);
  const auto n = static_cast<int32_t>(ids.size());
  int32_t token = 0;
  append(self, ids, [&](int32_t done, int32_t count) {
    if (done + count < n) {
      self.session.eval(ids.data() + done, count, nullptr);
    } else {
      token = self.session.next(ids.data() + done, count, sampler, before.data(),
                                static_cast<int32_t>(before.size()));
    }
  });
  return token;
}

py::array_t<float> batch_eval(const qigen::Model& model, const std::vector<PySession*>& sessions,
                              const py::object& tokens) {
  const std::vector<int32_t> ids = token_ids(tokens);
  require(ids.size() == sessions.size(), "a batch needs one token for each session");
  std::vector<qigen::Session*> list;
  for (PySession* session : sessions) {
    require(session, "a batch holds sessions, not None");
    require_idle(*session);
    list.push_back(&session->session);
  }
  py::array_t<float> logits({ids.size(), static_cast<size_t>(model.info().vocab)});
  float* target = logits.mutable_data();
  py::gil_scoped_release unlocked;
  model.batch_eval(list, ids.data(), target);
  return logits;
}

double stream_read_gb_s(int threads, int64_t bytes, int repeats) {
  require(1 <= threads && threads <= 1024, "threads must be 1 to 1024");
  require(1 <= repeats && repeats <= 1000, "repeats must be 1 to 1000");
  require(bytes >= (int64_t{1} << 20) * threads, "a pass must be at least 1 MiB a thread");
  py::gil_scoped_release unlocked;
  return qigen::stream_read_bytes_per_second(threads, bytes, repeats) / 1e9;
}

int32_t sample(qigen::Sampler& sampler, const Logits& logits, const py::object& history) {
  const std::vector<int32_t> ids = token_ids(history);
  return sampler.sample(logits.data(), length(logits), ids.data(),
                        static_cast<int32_t>(ids.size()));
}

}  // namespace

PYBIND11_MODULE(_runtime, module) {
  module.doc() = "Artifacts of qigen: loading, evaluation and sampling.";
  py::register_exception_translator(translate);

  module.def("stream_read_gb_s", &stream_read_gb_s, py::arg("threads"), py::arg("bytes"),
             py::arg("repeats") = 5,
             "GB/s that the threads read from memory together, one sequential stream each: the "
             "median of `repeats` passes over `bytes`.");

  py::class_<PySession>(module, "Session", "A sequence of tokens with its KV cache.")
      .def("eval", &eval, py::arg("tokens"), py::arg("all") = false,
           "Append tokens, integers [n]; return the logits of the last, float32[vocab], or of all, "
           "float32[n, vocab].")
      .def("next", &next, py::arg("tokens"), py::arg("sampler"), py::arg("history") = py::tuple(),
           "Append tokens; return the next one as the sampler chooses it from the logits of the "
           "last, which stay where the model runs. `history`: tokens so far.")
      .def(
          "rewind",
          [](PySession& self, int32_t position) {
            require_idle(self);
            self.session.rewind(position);
          },
          py::arg("position"), "Forget all tokens from `position` on.")
      .def_property_readonly(
          "position", [](const PySession& self) { return self.session.position(); },
          "Tokens evaluated so far.");

  py::class_<qigen::Sampler>(module, "Sampler", "Draws tokens; keeps the state of its generator.")
      .def("sample", &sample, py::arg("logits"), py::arg("history") = py::tuple(),
           "Choose a token from float32[vocab]; `history`, tokens so far, is for the repetition "
           "penalty.");

  py::class_<qigen::Model>(module, "Model", "An open artifact.")
      .def(py::init([](const std::string& folder, int threads, bool pin, int spin_us) {
             py::gil_scoped_release unlocked;
             return qigen::Model(folder, {threads, pin, spin_us});
           }),
           py::arg("folder"), py::arg("threads") = 0, py::arg("pin") = false,
           py::arg("spin_us") = 0)
      .def_property_readonly("info", &info, "What the artifact says about itself, as a dict.")
      .def_property_readonly(
          "inputs", [](const qigen::Model& model) { return describe(model.inputs()); },
          "name, dtype and shape of each input of run(); -1 is any size.")
      .def_property_readonly(
          "outputs", [](const qigen::Model& model) { return describe(model.outputs()); },
          "name, dtype and shape of each output of run().")
      .def("run", &run, py::arg("inputs"), "Run once on named arrays, without state.")
      .def(
          "session",
          [](const qigen::Model& model, int32_t max_seq) {
            const qigen_model_info& info = model.info();
            return PySession{model.session(max_seq), info.vocab,
                             max_seq > 0 ? max_seq : info.max_seq, info.max_tokens};
          },
          py::arg("max_seq") = 0, "An empty session; 0: as many positions as the model has.")
      .def("batch_eval", &batch_eval, py::arg("sessions"), py::arg("tokens"),
           "Append one token to each session in one step; return float32[n, vocab].")
      .def(
          "sampler",
          [](const qigen::Model& model, float temperature, int top_k, float top_p, float min_p,
             float repetition_penalty, uint64_t seed) {
            return model.sampler({temperature, top_k, top_p, min_p, repetition_penalty, seed});
          },
          py::kw_only(), py::arg("temperature") = 0.0f, py::arg("top_k") = 0,
          py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f, py::arg("repetition_penalty") = 1.0f,
          py::arg("seed") = 0, "Draws tokens; greedy at temperature 0.")
      .def(
          "argmax",
          [](const qigen::Model& model, const Logits& logits) {
            return model.argmax(logits.data(), length(logits));
          },
          py::arg("logits"), "Index of the greatest logit, the lowest of several.")
      .def(
          "token_text",
          [](const qigen::Model& model, int32_t id) { return py::bytes(model.token_text(id)); },
          py::arg("id"), "Raw bytes of a token's text.")
      .def("is_eos", &qigen::Model::is_eos, py::arg("id"), "Whether the token ends a text.");
}
