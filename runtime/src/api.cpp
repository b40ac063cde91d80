// The C interface: checks pointers, turns exceptions into statuses.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "error.h"
#include "model.h"
#include "sampler.h"

using qigen::runtime::Failure;
using qigen::runtime::guarded;
using qigen::runtime::Model;
using qigen::runtime::Session;

// A handle owns a share of the model, each session another one.
struct qigen_model {
  std::shared_ptr<Model> model;
};

struct qigen_session {
  Session session;
};

// The model's outputs; it keeps the model, whose descriptions the names point into.
struct qigen_result {
  std::shared_ptr<Model> model;
  qigen::runtime::Outputs outputs;
};

namespace {

void require(bool good, const char* problem) {
  if (!good) throw Failure(QIGEN_USAGE, "%s", problem);
}

// A struct of the caller, who may have an older header: fields beyond its size stay zero.
template <class Struct>
Struct known_fields(const Struct* given) {
  Struct full{};
  if (given) {
    require(given->struct_size >= sizeof(size_t), "struct_size of an argument isn't set");
    std::memcpy(&full, given, std::min(given->struct_size, sizeof full));
  }
  return full;
}

}  // namespace

uint32_t qigen_abi_version(void) { return QIGEN_ABI_VERSION; }

const char* qigen_last_error(void) { return qigen::runtime::last_error(); }

qigen_status qigen_model_load(const char* folder, const qigen_load_options* options,
                              qigen_model** model) {
  return guarded([&] {
    require(folder && model, "qigen_model_load needs a folder and a place for the model");
    *model = nullptr;
    *model = new qigen_model{std::make_shared<Model>(folder, known_fields(options))};
  });
}

void qigen_model_free(qigen_model* model) { delete model; }

qigen_status qigen_model_get_info(const qigen_model* model, qigen_model_info* info) {
  return guarded([&] {
    require(model && info, "qigen_model_get_info needs a model and an info");
    require(info->struct_size >= sizeof(size_t), "struct_size of the info isn't set");
    model->model->get_info(info);
  });
}

qigen_status qigen_token_text(const qigen_model* model, int32_t id, const char** bytes,
                              size_t* length) {
  return guarded([&] {
    require(model && bytes && length, "qigen_token_text needs a model and places for the text");
    if (!model->model->vocabulary().present()) {
      throw Failure(QIGEN_UNSUPPORTED,
                    "the artifact has no vocab.bin, so its tokens have no texts");
    }
    model->model->check_tokens(&id, 1);
    const std::string_view text = model->model->vocabulary().text(id);
    *bytes = text.data() ? text.data() : "";
    *length = text.size();
  });
}

int32_t qigen_model_is_eos(const qigen_model* model, int32_t id) {
  return model && model->model->vocabulary().is_eos(id);
}

qigen_status qigen_model_get_input(const qigen_model* model, int32_t index, qigen_tensor* tensor) {
  return guarded([&] {
    require(model && tensor, "qigen_model_get_input needs a model and a tensor");
    model->model->get_input(index, tensor);
  });
}

qigen_status qigen_model_get_output(const qigen_model* model, int32_t index, qigen_tensor* tensor) {
  return guarded([&] {
    require(model && tensor, "qigen_model_get_output needs a model and a tensor");
    model->model->get_output(index, tensor);
  });
}

qigen_status qigen_model_run(qigen_model* model, const qigen_tensor* inputs, size_t n_inputs,
                             qigen_tensor* outputs, size_t n_outputs) {
  return guarded([&] {
    require(model && (inputs || n_inputs == 0) && (outputs || n_outputs == 0),
            "qigen_model_run needs a model, inputs and outputs");
    run_tensors(model->model, inputs, n_inputs, outputs, n_outputs);
  });
}

qigen_status qigen_model_call(qigen_model* model, const qigen_tensor* inputs, size_t n_inputs,
                              qigen_result** result) {
  return guarded([&] {
    require(model && (inputs || n_inputs == 0) && result,
            "qigen_model_call needs a model, inputs and a place for the result");
    *result = nullptr;
    *result = new qigen_result{model->model, call_tensors(model->model, inputs, n_inputs)};
  });
}

qigen_status qigen_result_get(const qigen_result* result, int32_t index, qigen_tensor* tensor) {
  return guarded([&] {
    require(result && tensor, "qigen_result_get needs a result and a tensor");
    const auto& tensors = result->outputs.tensors;
    require(index >= 0 && static_cast<size_t>(index) < tensors.size(),
            "the result has no output of that number");
    *tensor = tensors[index];
  });
}

void qigen_result_free(qigen_result* result) { delete result; }

qigen_status qigen_session_create(qigen_model* model, int32_t max_seq, qigen_session** session) {
  return guarded([&] {
    require(model && session, "qigen_session_create needs a model and a place for the session");
    *session = nullptr;
    *session = new qigen_session{{model->model, max_seq}};
  });
}

void qigen_session_free(qigen_session* session) { delete session; }

qigen_status qigen_session_eval(qigen_session* session, const int32_t* tokens, int32_t n,
                                float* logits, int32_t all) {
  return guarded([&] {
    require(session && (tokens || n <= 0), "qigen_session_eval needs a session and tokens");
    Session::Use use(session->session);
    session->session.eval(tokens, n, logits, all != 0);
  });
}

int32_t qigen_session_position(const qigen_session* session) {
  return session ? session->session.position() : 0;
}

qigen_status qigen_session_rewind(qigen_session* session, int32_t position) {
  return guarded([&] {
    require(session, "qigen_session_rewind needs a session");
    Session::Use use(session->session);
    session->session.rewind(position);
  });
}

qigen_status qigen_batch_eval(qigen_session* const* sessions, const int32_t* tokens, int32_t n,
                              float* logits) {
  return guarded([&] {
    require(n >= 1, "qigen_batch_eval needs at least one session");
    require(sessions && tokens && logits, "qigen_batch_eval needs sessions, tokens and logits");
    std::vector<Session*> list;
    for (int32_t i = 0; i < n; ++i) {
      require(sessions[i], "a session of the batch is null");
      list.push_back(&sessions[i]->session);
    }
    batch_eval(list.data(), tokens, n, logits);
  });
}

qigen_status qigen_sample(const float* logits, int32_t vocab, const qigen_sampler* sampler,
                          const int32_t* history, int32_t n_history, uint64_t* rng,
                          int32_t* token) {
  return guarded([&] {
    require(logits && sampler && token,
            "qigen_sample needs logits, a sampler and a place for a token");
    require(n_history == 0 || (history && n_history > 0),
            "the history is null or has a negative length");
    const qigen_sampler full = known_fields(sampler);
    require(full.temperature == 0 || rng,
            "sampling at a temperature needs the state of a generator");
    *token = qigen::runtime::sample(logits, vocab, full, history, n_history, rng);
  });
}

qigen_status qigen_session_next(qigen_session* session, const int32_t* tokens, int32_t n,
                                const qigen_sampler* sampler, const int32_t* history,
                                int32_t n_history, uint64_t* rng, int32_t* token) {
  return guarded([&] {
    require(session && (tokens || n <= 0) && sampler && token,
            "qigen_session_next needs a session, tokens, a sampler and a place for a token");
    require(n_history == 0 || (history && n_history > 0),
            "the history is null or has a negative length");
    const qigen_sampler full = known_fields(sampler);
    require(full.temperature == 0 || rng,
            "sampling at a temperature needs the state of a generator");
    Session::Use use(session->session);
    *token = session->session.next(tokens, n, full, history, n_history, rng);
  });
}

int32_t qigen_argmax(const float* logits, int32_t vocab) {
  return logits ? qigen::runtime::argmax(logits, vocab) : -1;
}
