// Exercises everything from several threads through qigen.hpp; built together with the runtime and
// the fake model under sanitizers. Argument: the artifact.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "qigen.hpp"

namespace {

constexpr int kVocab = 37;

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <class Call>
void require_error(qigen_status status, Call call) {
  try {
    call();
  } catch (const qigen::Error& error) {
    require(error.status() == status, error.what());
    return;
  }
  require(false, "an error was expected");
}

std::vector<int32_t> tokens_of(int seed, int n) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back((seed * 31 + i * i * 7 + i) % kVocab);
  return tokens;
}

// Token by token and in one go must agree, whatever other sessions do meanwhile.
void generate(const qigen::Model& model, int seed) {
  const std::vector<int32_t> tokens = tokens_of(seed, 40);
  qigen::Session one = model.session();
  qigen::Session whole = model.session(40);
  const std::vector<float> all = whole.eval_all(tokens);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::vector<float> logits = one.eval({tokens[i]});
    require(std::equal(logits.begin(), logits.end(), all.begin() + i * kVocab), "rows agree");
  }
  require_error(QIGEN_BAD_INPUT, [&] { whole.eval({1}); });
  whole.rewind(10);
  require(whole.position() == 10, "position");

  qigen::Sampler sampler = model.sampler({0.8f, 20, 0.9f, 0.01f, 1.1f, uint64_t(seed)});
  for (int i = 0; i < 20; ++i) {
    const int32_t token = sampler.sample(all, {});
    require(token >= 0 && token < int32_t(all.size()), "sampled token");
  }

  // the same tokens as from logits that are asked for
  qigen::Sampler here = model.sampler({0.8f, 20, 0.9f, 0.01f, 1.1f, uint64_t(seed)});
  qigen::Sampler there = model.sampler({0.8f, 20, 0.9f, 0.01f, 1.1f, uint64_t(seed)});
  qigen::Session drawing = model.session();
  std::vector<int32_t> history = {1, 2, 3};
  int32_t token = drawing.next(history, there, history);
  whole.rewind(0);
  require(token == here.sample(whole.eval(history), history), "first token");
  for (int i = 0; i < 5; ++i) {
    history.push_back(token);
    const int32_t want = here.sample(whole.eval({token}), history);
    token = drawing.next({token}, there, history);
    require(token == want, "next token");
  }
  require(drawing.position() == whole.position(), "positions agree");
}

void batches(const qigen::Model& model) {
  for (int round = 0; round < 10; ++round) {
    std::vector<qigen::Session> sessions;
    std::vector<qigen::Session*> pointers;
    for (int i = 0; i < 4; ++i) sessions.push_back(model.session());
    for (qigen::Session& session : sessions) pointers.push_back(&session);
    model.batch_eval(pointers, {1, 2, 3, 4});
    const std::vector<float> logits = model.batch_eval(pointers, {5, 6, 7, 8});
    qigen::Session alone = model.session();
    const std::vector<float> expected = alone.eval({4, 8});
    require(std::equal(expected.begin(), expected.end(), logits.begin() + 3 * kVocab), "batch");
    require_error(QIGEN_USAGE, [&] { model.batch_eval({pointers[0], pointers[0]}, {1, 2}); });
  }
}

// Two threads on one session: each call works or is refused, and the position counts those that
// worked.
void shared_session(const qigen::Model& model) {
  qigen::Session session = model.session();
  std::atomic<int> worked{0};
  auto hammer = [&] {
    for (int i = 0; i < 40; ++i) {
      try {
        session.eval({i % kVocab});
        ++worked;
      } catch (const qigen::Error& error) {
        require(error.status() == QIGEN_USAGE, error.what());
      }
    }
  };
  std::thread other(hammer);
  hammer();
  other.join();
  require(session.position() == worked, "position of a shared session");
}

void named_tensors(const qigen::Model& model) {
  std::vector<int64_t> ids = {1, 2, 3};
  std::vector<qigen_tensor> inputs = model.inputs();
  inputs[0].dtype = QIGEN_INT64;
  inputs[0].shape[1] = 3;
  inputs[0].data = ids.data();
  inputs[0].bytes = ids.size() * sizeof(int64_t);
  std::vector<qigen_tensor> outputs = model.outputs();
  model.run(inputs, &outputs);
  require(outputs[0].shape[1] == 3 && outputs[0].shape[2] == kVocab, "shape of the output");
  std::vector<float> logits(3 * kVocab);
  outputs[0].data = logits.data();
  outputs[0].bytes = logits.size() * sizeof(float);
  model.run(inputs, &outputs);
  require(logits == model.session().eval_all({1, 2, 3}), "run");
}

}  // namespace

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  for (int threads : {1, 2, 3}) {
    for (int spin_us : {-1, 50}) {
      const qigen::Model model(folder, {threads, spin_us < 0, spin_us});
      require(model.info().threads == threads && model.token_text(3) == " t3", "info");
      std::vector<std::thread> users;
      for (int seed = 0; seed < 3; ++seed) users.emplace_back([&, seed] { generate(model, seed); });
      users.emplace_back([&] { batches(model); });
      for (std::thread& user : users) user.join();
      shared_session(model);
      named_tensors(model);
    }
  }
  require_error(QIGEN_BAD_INPUT, [&] { qigen::Model(folder + "/nowhere"); });
  std::puts("ok");
}
