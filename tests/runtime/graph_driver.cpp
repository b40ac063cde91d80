// Exercises the fake graph model through the C interface, from several threads too; also built
// together with it under sanitizers. Arguments: the artifact, the weight that it adds.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "qigen.hpp"

namespace {

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Inputs of one run and what must come out. The vectors have exactly the size that the tensors say,
// so that AddressSanitizer sees every byte too many.
struct Case {
  Case(int64_t n, int64_t m, int seed, float weight) : n(n), m(m) {
    a.resize(n * 3);
    b.resize(n * m);
    for (size_t i = 0; i < a.size(); ++i) a[i] = float((seed + 7 * i) % 11) - 5;
    for (size_t i = 0; i < b.size(); ++i) b[i] = float((seed + 3 * i) % 13);
    shift = {seed % 5, 0};
    for (float value : a) sum.push_back(value + float(shift[0]) + weight);
    totals.assign(m, 0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) totals[j] += b[i * m + j];
      if (a[i * 3] > 0) positive.push_back(i);
    }
    inputs = {
        {"a", QIGEN_FLOAT32, 2, {n, 3}, a.data(), a.size() * 4},
        {"b", QIGEN_FLOAT32, 2, {n, m}, b.data(), b.size() * 4},
        {"shift", QIGEN_INT64, 1, {2}, shift.data(), 16},
    };
  }
  Case(const Case&) = delete;

  int64_t n, m;
  std::vector<float> a, b, sum;
  std::vector<int64_t> shift, positive;
  std::vector<double> totals;
  std::vector<qigen_tensor> inputs;
};

bool equal(const void* data, const void* expected, size_t bytes) {
  return bytes == 0 || std::memcmp(data, expected, bytes) == 0;
}

qigen_tensor named(const char* name) {
  qigen_tensor tensor{};
  tensor.name = name;
  return tensor;
}

void calls(const qigen::Model& model, const Case& given) {
  const qigen::Result result = model.call(given.inputs);
  require(result.size() == 3, "number of outputs");
  const qigen_tensor sum = result[0], totals = result[1], positive = result[2];
  require(!std::strcmp(sum.name, "sum") && !std::strcmp(positive.name, "positive"), "names");
  require(sum.rank == 2 && sum.shape[0] == given.n && sum.shape[1] == 3, "shape of sum");
  require(sum.bytes == given.sum.size() * 4, "bytes of sum");
  require(equal(sum.data, given.sum.data(), sum.bytes), "sum");
  require(totals.rank == 1 && totals.shape[0] == given.m, "shape of totals");
  require(equal(totals.data, given.totals.data(), totals.bytes), "totals");
  require(positive.dtype == QIGEN_INT64 && positive.rank == 1, "type of positive");
  require(positive.shape[0] == int64_t(given.positive.size()), "shape of positive");
  require(equal(positive.data, given.positive.data(), positive.bytes), "positive");
  for (const qigen_tensor& tensor : {sum, totals, positive}) {
    require(reinterpret_cast<uintptr_t>(tensor.data) % 64 == 0, "alignment of results");
  }
}

void runs(const qigen::Model& model, const Case& given) {
  // no data: only descriptions
  std::vector<qigen_tensor> outputs = {named("totals"), named("positive"), named("sum")};
  model.run(given.inputs, &outputs);
  require(outputs[0].dtype == QIGEN_FLOAT64 && outputs[0].shape[0] == given.m, "totals described");
  require(outputs[1].rank == 1 && outputs[1].shape[0] == -1, "only the run knows this size");
  require(outputs[2].rank == 2 && outputs[2].shape[0] == given.n, "sum described");

  // into memory of the caller, in another order than the model's, unaligned
  std::vector<double> totals(given.m);
  std::vector<char> sum(given.sum.size() * 4 + 1);
  std::vector<int64_t> positive(given.n + 1, -7);
  outputs[0].data = given.m ? static_cast<void*>(totals.data()) : &totals;
  outputs[0].bytes = totals.size() * 8;
  outputs[1].data = positive.data();
  outputs[1].bytes = positive.size() * 8;
  outputs[2].data = sum.data() + 1;
  outputs[2].bytes = given.sum.size() * 4;
  model.run(given.inputs, &outputs);
  require(totals == given.totals, "totals of a run");
  require(equal(sum.data() + 1, given.sum.data(), outputs[2].bytes), "sum of a run");
  require(outputs[1].shape[0] == int64_t(given.positive.size()), "size that the run decided");
  require(outputs[1].bytes == given.positive.size() * 8, "bytes that the run decided");
  require(std::equal(given.positive.begin(), given.positive.end(), positive.begin()), "positive");
  require(positive.back() == -7, "memory beyond the output");

  // not all outputs are asked for
  std::vector<qigen_tensor> one = {named("totals")};
  one[0].data = outputs[0].data;
  one[0].bytes = totals.size() * 8;
  std::fill(totals.begin(), totals.end(), -1);
  model.run(given.inputs, &one);
  require(totals == given.totals, "one output alone");
  std::vector<qigen_tensor> none;
  model.run(given.inputs, &none);
}

// Fails with the status and a message that has `part` in it.
template <class Call>
void require_error(qigen_status status, const char* part, Call call) {
  try {
    call();
  } catch (const qigen::Error& error) {
    require(error.status() == status, error.what());
    if (!std::strstr(error.what(), part)) std::fprintf(stderr, "%s\n", error.what());
    require(std::strstr(error.what(), part), part);
    return;
  }
  require(false, part);
}

void refusals(const qigen::Model& model, Case& given, bool dynamic) {
  using Tensors = std::vector<qigen_tensor>;
  auto refused = [&](const char* part, auto change) {
    Tensors inputs = given.inputs;
    change(inputs);
    require_error(QIGEN_BAD_INPUT, part, [&] { model.call(inputs); });
    Tensors outputs = {named("sum")};
    require_error(QIGEN_BAD_INPUT, part, [&] { model.run(inputs, &outputs); });
  };
  refused("2 inputs are given", [](Tensors& t) { t.pop_back(); });
  refused("4 inputs are given", [](Tensors& t) { t.push_back(t[0]); });
  refused("input b is missing", [](Tensors& t) { t[1].name = "c"; });
  refused("input b is missing", [](Tensors& t) { t[1].name = nullptr; });
  refused("input b is missing", [](Tensors& t) { t[1] = t[0]; });
  refused("a must be float32, not float64", [](Tensors& t) { t[0].dtype = QIGEN_FLOAT64; });
  refused("an unknown type", [](Tensors& t) { t[0].dtype = 99; });
  refused("an unknown type", [](Tensors& t) { t[0].dtype = -1; });
  refused("2 dimensions, not 1", [](Tensors& t) { t[0].rank = 1; });
  refused("2 dimensions, not 99", [](Tensors& t) { t[0].rank = 99; });
  refused("2 dimensions, not -1", [](Tensors& t) { t[0].rank = -1; });
  refused("dimension 1 of input a must be 3, not 4", [](Tensors& t) { t[0].shape[1] = 4; });
  refused("dimension 0 of input shift must be 2", [](Tensors& t) { t[2].shape[0] = 1; });
  refused("negative", [](Tensors& t) { t[0].shape[0] = -1; });
  refused("47 bytes", [](Tensors& t) { t[0].bytes = 47; });
  refused("49 bytes", [](Tensors& t) { t[0].bytes = 49; });
  refused("bytes", [](Tensors& t) { t[0].data = nullptr; });
  if (dynamic) {
    refused("dimension 0 (n) of input b is 5, but elsewhere it is 4",
            [](Tensors& t) { t[1].shape[0] = 5; });
    refused("(n) of input a is 51, but the model is compiled for at most 50",
            [](Tensors& t) { t[0].shape[0] = 51; });
    refused("bytes", [](Tensors& t) { t[1].shape[1] = int64_t{1} << 62; });
    const Case wide(1, 1001, 1, 0);
    require_error(QIGEN_BAD_INPUT, "m is larger than 1000", [&] { model.call(wide.inputs); });
  }

  // a problem that a kernel meets
  given.shift[1] = -1;
  require_error(QIGEN_BAD_INPUT, "shift[1] is negative", [&] { model.call(given.inputs); });
  given.shift[1] = 0;
  calls(model, given);

  // outputs
  auto output_refused = [&](const char* part, auto change) {
    std::vector<float> sum(given.sum.size());
    std::vector<int64_t> positive(given.n);
    Tensors outputs = {named("sum"), named("positive")};
    outputs[0].data = sum.data();
    outputs[0].bytes = sum.size() * 4;
    outputs[1].data = positive.data();
    outputs[1].bytes = positive.size() * 8;
    change(outputs);
    require_error(QIGEN_BAD_INPUT, part, [&] { model.run(given.inputs, &outputs); });
  };
  output_refused("no output other", [](Tensors& t) { t[0].name = "other"; });
  output_refused("no output", [](Tensors& t) { t[0].name = nullptr; });
  output_refused("48 bytes of memory but got 47", [](Tensors& t) { t[0].bytes = 47; });
  output_refused("48 bytes of memory but got 52", [](Tensors& t) { t[0].bytes = 52; });
  if (!given.positive.empty()) {
    output_refused("turned out to need",
                   [&](Tensors& t) { t[1].bytes = (given.positive.size() - 1) * 8; });
  }
  require_error(QIGEN_UNSUPPORTED, "no language model", [&] { model.session(); });
  require_error(QIGEN_UNSUPPORTED, "vocab.bin", [&] { model.token_text(0); });
}

void null_pointers(const std::string& folder, const Case& given) {
  qigen_api api;
  char problem[768];
  require(qigen_api_open(&api, folder.c_str(), problem, sizeof problem) == QIGEN_OK, "open");
  qigen_model* model = nullptr;
  require(api.model_load(folder.c_str(), nullptr, &model) == QIGEN_OK, "load");
  qigen_result* result = nullptr;
  qigen_tensor tensor{};
  require(api.model_call(nullptr, nullptr, 0, &result) == QIGEN_USAGE, "no model");
  require(api.model_call(model, nullptr, 3, &result) == QIGEN_USAGE, "no inputs");
  require(api.model_call(model, given.inputs.data(), 3, nullptr) == QIGEN_USAGE, "no place");
  require(api.model_run(model, given.inputs.data(), 3, nullptr, 1) == QIGEN_USAGE, "no outputs");
  require(api.model_get_input(model, 3, &tensor) == QIGEN_USAGE, "input 3");
  require(api.model_get_output(model, -1, &tensor) == QIGEN_USAGE, "output -1");
  require(api.model_call(model, given.inputs.data(), 3, &result) == QIGEN_OK, "call");
  require(api.result_get(result, 3, &tensor) == QIGEN_USAGE, "result 3");
  require(api.result_get(result, -1, &tensor) == QIGEN_USAGE, "result -1");
  require(api.result_get(nullptr, 0, &tensor) == QIGEN_USAGE, "no result");
  // results outlive the handle of their model
  api.model_free(model);
  require(api.result_get(result, 0, &tensor) == QIGEN_OK, "get");
  require(!std::strcmp(tensor.name, "sum"), "name after the model is freed");
  require(equal(tensor.data, given.sum.data(), tensor.bytes), "data after the model is freed");
  api.result_free(result);
  api.result_free(nullptr);
  qigen_api_close(&api);
}

}  // namespace

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  const float weight = std::strtof(arguments[2], nullptr);
  for (int threads : {1, 2, 3}) {
    const qigen::Model model(folder, {threads, false, threads == 2 ? -1 : 50});
    const bool dynamic = model.inputs()[0].shape[0] == -1;
    require(model.info().vocab == 0 && model.info().n_inputs == 3, "info");
    require(model.outputs()[2].shape[0] == -1, "described output");
    if (dynamic) {
      // the arena grows and is laid out anew
      for (int64_t n : {4, 50, 1, 0, 4}) {
        for (int64_t m : {5, 0, 300, 1000}) {
          const Case given(n, m, int(n + m), weight);
          calls(model, given);
          runs(model, given);
        }
      }
    }
    Case given(4, 5, 3, weight);
    refusals(model, given, dynamic);
    std::vector<std::thread> users;
    for (int seed = 0; seed < 3; ++seed) {
      users.emplace_back([&, seed] {
        for (int round = 0; round < 20; ++round) {
          const Case own(dynamic ? 1 + (seed * 7 + round) % 50 : 4, dynamic ? seed * 40 + round : 5,
                         seed * 100 + round, weight);
          calls(model, own);
          runs(model, own);
        }
      });
    }
    for (std::thread& user : users) user.join();
  }
  null_pointers(folder, Case(4, 5, 3, weight));
  std::puts("ok");
}
