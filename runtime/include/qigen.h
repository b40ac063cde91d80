/* qigen.h: the C interface of every qigen artifact, version 2 (C11).
 *
 * An artifact is a folder: model.so (the compiled model together with its runtime), weights.bin and
 * files for the tokenizer. Every model.so exports exactly the functions below, so a program that is
 * built against this header opens any artifact: with qigen_loader.h (dlopen), with qigen.hpp (C++),
 * or by linking one model directly.
 *
 *   qigen_model* model;
 *   if (qigen_model_load("smollm2.qgn", NULL, &model)) fail(qigen_last_error());
 *   qigen_session* session;
 *   if (qigen_session_create(model, 2048, &session)) fail(qigen_last_error());
 *   qigen_session_eval(session, prompt, n_prompt, logits, 0);      // logits: float[vocab]
 *   int32_t token = qigen_argmax(logits, vocab);
 *
 * Threads: a model may be used from any number of threads. It owns one pool of threads; the steps
 * of its sessions take turns on that pool, first come first served, so more sessions never mean
 * more running threads. One session is for one thread at a time: a call that finds its session busy
 * returns QIGEN_USAGE and changes nothing.
 *
 * Structs that begin with struct_size may grow at their end: set struct_size to sizeof(the struct)
 * and the fields that the caller's header doesn't know keep their defaults.
 */
#ifndef QIGEN_H_
#define QIGEN_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(QIGEN_EXPORTS) /* only while the library itself is compiled */
#define QIGEN_API __declspec(dllexport)
#elif defined(__GNUC__)
#define QIGEN_API __attribute__((visibility("default")))
#else
#define QIGEN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Version of this interface, of weights.bin and of the generated code. */
#define QIGEN_ABI_VERSION 2u

/* What a function reports. 2 to 6 are the exit codes of the command line. */
typedef int32_t qigen_status;
enum {
  QIGEN_OK = 0,
  QIGEN_INTERNAL = 1, /* a defect of qigen itself */
  QIGEN_USAGE = 2, /* an argument that makes no sense: null pointer, negative count, busy session */
  QIGEN_BAD_INPUT = 3,   /* a damaged file, a token id out of range, a prompt that is too long */
  QIGEN_UNSUPPORTED = 4, /* the artifact has no such thing, for instance no vocabulary */
  QIGEN_MACHINE = 6,     /* the artifact doesn't fit this machine: instruction set or ABI version */
  QIGEN_NO_MEMORY = 7    /* the system refused memory or threads */
};

typedef struct qigen_model qigen_model;     /* an open artifact: mapped weights, arena, threads */
typedef struct qigen_session qigen_session; /* one sequence of tokens: KV cache and position */

/* QIGEN_ABI_VERSION of the library. Callable on any machine; compare it before anything else. */
QIGEN_API uint32_t qigen_abi_version(void);

/* One sentence about the latest failure in this thread; "" if there was none. Never NULL; valid
 * until the next call of this thread that fails. */
QIGEN_API const char* qigen_last_error(void);

/* ---- model ------------------------------------------------------------------------------------
 */

typedef struct qigen_load_options {
  size_t struct_size;
  int32_t threads; /* threads of a step, the calling one among them; 0: every core that the affinity
                      mask and the cgroup's CPU quota allow */
  int32_t pin;     /* not 0: worker t stays on the t-th allowed core: fast ones come first, second
                      ones of a physical core last. The calling thread is thread 0 and is left
                      where it is */
  int32_t spin_us; /* how long idle workers spin before they sleep, in microseconds; 0: the default,
                      -1: not at all */
} qigen_load_options;

/* Opens the artifact in `folder`. options may be NULL. The processor is checked before any
 * generated code runs. The weights are mapped read-only, never copied. QIGEN_MACHINE: missing
 * instruction set (all missing features are named) or other ABI version. QIGEN_BAD_INPUT: a file is
 * missing or damaged, or weights.bin belongs to another model.so. */
QIGEN_API qigen_status qigen_model_load(const char* folder, const qigen_load_options* options,
                                        qigen_model** model);

/* Gives the handle back; NULL is allowed. The model itself lives until its last session is freed.
 */
QIGEN_API void qigen_model_free(qigen_model* model);

/* All pointers stay valid as long as the model. */
typedef struct qigen_model_info {
  size_t struct_size;
  const char* name;
  const char* isa;       /* instruction set of the kernels, a name of `qigen targets` */
  const char* kv_format; /* format of the KV cache, for instance "f16" */
  int32_t vocab;         /* logits per position */
  int32_t max_seq;       /* most positions of a session */
  int32_t max_batch;     /* most sessions of one qigen_batch_eval */
  int32_t max_tokens;    /* most tokens of one step; longer prompts are cut into several */
  int32_t d_model;
  int32_t n_layers;
  int32_t threads;
  int32_t n_inputs; /* of qigen_model_run */
  int32_t n_outputs;
  int32_t n_eos;
  const int32_t* eos;     /* ids that end a text */
  uint64_t weights_bytes; /* size of weights.bin */
  uint64_t arena_bytes;   /* scratch memory of a step, all threads together */
  uint64_t kv_bytes_per_position;
  const char* placement; /* where the weights lie on machines with several memory nodes: "shared"
                            (in the page cache), or "partitioned", "interleaved" or "replicated"
                            over them. The environment variable QIGEN_PLACEMENT chooses one of
                            these; "auto" (the default) is what is predicted to be read fastest */
} qigen_model_info;

/* Fills as many bytes of *info as info->struct_size says. */
QIGEN_API qigen_status qigen_model_get_info(const qigen_model* model, qigen_model_info* info);

/* Text of a token as raw bytes (a token may hold part of a UTF-8 character; control tokens and ids
 * past the vocabulary of the tokenizer are empty). Not zero-terminated. */
QIGEN_API qigen_status qigen_token_text(const qigen_model* model, int32_t id, const char** bytes,
                                        size_t* length);

/* 1 if the token ends a text, else 0. */
QIGEN_API int32_t qigen_model_is_eos(const qigen_model* model, int32_t id);

/* ---- named tensors ----------------------------------------------------------------------------
 */

#define QIGEN_MAX_RANK 8
enum {
  QIGEN_FLOAT32 = 1,
  QIGEN_INT32 = 2,
  QIGEN_INT64 = 3,
  QIGEN_FLOAT64 = 4,
  QIGEN_FLOAT16 = 5,
  QIGEN_BFLOAT16 = 6,
  QIGEN_INT8 = 7,
  QIGEN_UINT8 = 8,
  QIGEN_INT16 = 9,
  QIGEN_UINT16 = 10,
  QIGEN_UINT32 = 11,
  QIGEN_UINT64 = 12,
  QIGEN_BOOL = 13, /* a byte, 0 or 1 */
  /* one value a byte */
  QIGEN_FLOAT8E4M3FN = 14,
  QIGEN_FLOAT8E4M3FNUZ = 15,
  QIGEN_FLOAT8E5M2 = 16,
  QIGEN_FLOAT8E5M2FNUZ = 17,
  QIGEN_FLOAT8E8M0 = 18,
  QIGEN_FLOAT4E2M1 = 19,
  QIGEN_INT4 = 20,
  QIGEN_UINT4 = 21,
  QIGEN_INT2 = 22,
  QIGEN_UINT2 = 23
};

/* A dense row-major tensor. */
typedef struct qigen_tensor {
  const char* name;
  int32_t dtype;
  int32_t rank;
  int64_t shape[QIGEN_MAX_RANK]; /* -1 in a description: any size */
  void* data;
  size_t bytes; /* size of the memory at data */
} qigen_tensor;

/* Describe input or output number `index`: name, dtype, rank and shape; data is NULL. */
QIGEN_API qigen_status qigen_model_get_input(const qigen_model* model, int32_t index,
                                             qigen_tensor* tensor);
QIGEN_API qigen_status qigen_model_get_output(const qigen_model* model, int32_t index,
                                              qigen_tensor* tensor);

/* Runs the model once, without state. Inputs are found by name. For each output, the caller sets
 * name, data and bytes; dtype, rank and shape are filled in. If data of an output is NULL, only the
 * descriptions of the outputs are filled in and nothing is computed: the way to learn their sizes.
 * A size that only the computation decides (how many elements are not zero, say) is then -1: see
 * qigen_model_call.
 * Language models: input_ids int32 or int64, [n] or [1, n]  ->  logits float32 [1, n, vocab]. */
QIGEN_API qigen_status qigen_model_run(qigen_model* model, const qigen_tensor* inputs,
                                       size_t n_inputs, qigen_tensor* outputs, size_t n_outputs);

/* The outputs of one call of a model. */
typedef struct qigen_result qigen_result;

/* As qigen_model_run, in memory of the library: for outputs whose sizes only the call decides. The
 * result holds all outputs, in the order of qigen_model_get_output, until it is freed. */
QIGEN_API qigen_status qigen_model_call(qigen_model* model, const qigen_tensor* inputs,
                                        size_t n_inputs, qigen_result** result);
/* Output number `index` with its data. */
QIGEN_API qigen_status qigen_result_get(const qigen_result* result, int32_t index,
                                        qigen_tensor* tensor);
QIGEN_API void qigen_result_free(qigen_result* result);

/* ---- sessions of a language model -------------------------------------------------------------
 */

/* An empty session for up to max_seq positions; 0: the model's max_seq. Its KV cache becomes
 * resident only as positions are used. */
QIGEN_API qigen_status qigen_session_create(qigen_model* model, int32_t max_seq,
                                            qigen_session** session);
QIGEN_API void qigen_session_free(qigen_session* session);

/* Appends n tokens. logits: float[vocab] of the last token, or with all != 0 float[n][vocab] of
 * every token; NULL (with all == 0): not wanted, for instance in the middle of a prompt.
 * QIGEN_BAD_INPUT: no tokens, an id outside the vocabulary, or more positions than the session has.
 * On any failure the session is unchanged. */
QIGEN_API qigen_status qigen_session_eval(qigen_session* session, const int32_t* tokens, int32_t n,
                                          float* logits, int32_t all);

/* Tokens evaluated so far. */
QIGEN_API int32_t qigen_session_position(const qigen_session* session);

/* Forgets all tokens from `position` on: 0 <= position <= qigen_session_position(session). */
QIGEN_API qigen_status qigen_session_rewind(qigen_session* session, int32_t position);

/* One step for n different sessions of one model: appends tokens[i] to sessions[i] and writes its
 * logits to logits[i][vocab]. 1 <= n <= max_batch. On failure all sessions are unchanged. */
QIGEN_API qigen_status qigen_batch_eval(qigen_session* const* sessions, const int32_t* tokens,
                                        int32_t n, float* logits);

/* ---- choosing the next token ------------------------------------------------------------------
 */

/* Applied in this order. */
typedef struct qigen_sampler {
  size_t struct_size;
  float repetition_penalty; /* >= 1; 1 or 0: none. Logits of tokens in the history are divided by it
                               if positive, else multiplied */
  float temperature;        /* logits are divided by it; 0: greedy, the rest is ignored */
  int32_t top_k;            /* keep the k most probable tokens; 0: all */
  float top_p; /* keep the fewest most probable tokens that together reach top_p; 1 or 0: all */
  float min_p; /* keep tokens at least min_p times as probable as the most probable one; 0: all */
} qigen_sampler;

/* Draws a token. The generator is splitmix64: *rng is its whole state, start it with the seed. The
 * same logits, history and *rng give the same token. Greedy leaves *rng alone (rng may then be
 * NULL). Tokens of equal probability: the lower id counts as more probable. */
QIGEN_API qigen_status qigen_sample(const float* logits, int32_t vocab,
                                    const qigen_sampler* sampler, const int32_t* history,
                                    int32_t n_history, uint64_t* rng, int32_t* token);

/* Appends tokens as qigen_session_eval and draws the next one from the logits of the last, as
 * qigen_sample does: on a GPU they stay there, and of a repetition penalty alone they are copied.
 * There the weights of tokens are rounded to multiples of 2^-40 of the greatest, so that a draw
 * that falls between two tokens may come out as the other. */
QIGEN_API qigen_status qigen_session_next(qigen_session* session, const int32_t* tokens, int32_t n,
                                          const qigen_sampler* sampler, const int32_t* history,
                                          int32_t n_history, uint64_t* rng, int32_t* token);

/* Index of the greatest logit, the lowest one of several; NaN never wins. -1 if there is none. */
QIGEN_API int32_t qigen_argmax(const float* logits, int32_t vocab);

#ifdef __cplusplus
}
#endif

#endif /* QIGEN_H_ */
