/* qigen_loader.h: opens an artifact's library at run time (header-only, C11).
 *
 *   qigen_api api;
 *   char problem[512];
 *   if (qigen_api_open(&api, "smollm2.qgn", problem, sizeof problem)) fail(problem);
 *   qigen_model* model;
 *   if (api.model_load("smollm2.qgn", NULL, &model)) fail(api.last_error());
 *   ...
 *   api.model_free(model);
 *   qigen_api_close(&api);
 *
 * Link with -ldl where the C library needs it. With QIGEN_STATIC defined, the table is filled with
 * the functions of the one model that the program is linked to.
 */
#ifndef QIGEN_LOADER_H_
#define QIGEN_LOADER_H_

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "qigen.h"

#ifndef QIGEN_STATIC
#include <errno.h>
#ifdef _WIN32
#include <windows.h>
#define QIGEN_LIBRARY "model.dll"
#else
#include <dlfcn.h>
#ifdef __APPLE__
#define QIGEN_LIBRARY "model.dylib"
#else
#include <elf.h>
#define QIGEN_LIBRARY "model.so"
#endif
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The functions of qigen.h, without their prefix. */
typedef struct qigen_api {
  void* library; /* of dlopen */
  uint32_t (*abi_version)(void);
  const char* (*last_error)(void);
  qigen_status (*model_load)(const char*, const qigen_load_options*, qigen_model**);
  void (*model_free)(qigen_model*);
  qigen_status (*model_get_info)(const qigen_model*, qigen_model_info*);
  qigen_status (*model_get_input)(const qigen_model*, int32_t, qigen_tensor*);
  qigen_status (*model_get_output)(const qigen_model*, int32_t, qigen_tensor*);
  qigen_status (*model_run)(qigen_model*, const qigen_tensor*, size_t, qigen_tensor*, size_t);
  qigen_status (*model_call)(qigen_model*, const qigen_tensor*, size_t, qigen_result**);
  qigen_status (*result_get)(const qigen_result*, int32_t, qigen_tensor*);
  void (*result_free)(qigen_result*);
  int32_t (*model_is_eos)(const qigen_model*, int32_t);
  qigen_status (*token_text)(const qigen_model*, int32_t, const char**, size_t*);
  qigen_status (*session_create)(qigen_model*, int32_t, qigen_session**);
  void (*session_free)(qigen_session*);
  qigen_status (*session_eval)(qigen_session*, const int32_t*, int32_t, float*, int32_t);
  int32_t (*session_position)(const qigen_session*);
  qigen_status (*session_rewind)(qigen_session*, int32_t);
  qigen_status (*batch_eval)(qigen_session* const*, const int32_t*, int32_t, float*);
  qigen_status (*sample)(const float*, int32_t, const qigen_sampler*, const int32_t*, int32_t,
                         uint64_t*, int32_t*);
  int32_t (*argmax)(const float*, int32_t);
  /* Null in artifacts that were compiled before there was such a function. */
  qigen_status (*session_next)(qigen_session*, const int32_t*, int32_t, const qigen_sampler*,
                               const int32_t*, int32_t, uint64_t*, int32_t*);
} qigen_api;

/* Every function but abi_version, which is looked up first, and session_next. */
#define QIGEN_API_FUNCTIONS(X) \
  X(last_error)                \
  X(model_load)                \
  X(model_free)                \
  X(model_get_info)            \
  X(model_get_input)           \
  X(model_get_output)          \
  X(model_run)                 \
  X(model_call)                \
  X(result_get)                \
  X(result_free)               \
  X(model_is_eos)              \
  X(token_text)                \
  X(session_create)            \
  X(session_free)              \
  X(session_eval)              \
  X(session_position)          \
  X(session_rewind)            \
  X(batch_eval)                \
  X(sample)                    \
  X(argmax)

#ifdef QIGEN_STATIC

static inline qigen_status qigen_api_open(qigen_api* api, const char* folder, char* problem,
                                          size_t size) {
  (void)folder;
  (void)problem;
  (void)size;
  memset(api, 0, sizeof *api);
  api->abi_version = qigen_abi_version;
#define QIGEN_FILL(name) api->name = qigen_##name;
  QIGEN_API_FUNCTIONS(QIGEN_FILL)
#undef QIGEN_FILL
  api->session_next = qigen_session_next;
  return QIGEN_OK;
}

static inline void qigen_api_close(qigen_api* api) { memset(api, 0, sizeof *api); }

#else

#if defined(__x86_64__)
#define QIGEN_ELF_MACHINE EM_X86_64
#elif defined(__aarch64__)
#define QIGEN_ELF_MACHINE EM_AARCH64
#else
#error "qigen runs on x86-64 and aarch64"
#endif

/* Writes a problem and returns its status; what doesn't fit is cut off. */
static inline qigen_status qigen_describe(char* problem, size_t size, qigen_status status,
                                          const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(problem, size, format, arguments);
  va_end(arguments);
  return status;
}

/* Whether there is a file folder/name. */
static inline int qigen_has_file(const char* folder, const char* name) {
  char path[4096];
  const int length = snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE* file = length > 0 && (size_t)length < sizeof path ? fopen(path, "rb") : NULL;
  if (file) fclose(file);
  return file != NULL;
}

/* An artifact without the library of this system may have that of another. */
static inline qigen_status qigen_check_system(const char* folder, char* problem, size_t size) {
  static const char* const systems[][2] = {
      {"Linux", "model.so"}, {"macOS", "model.dylib"}, {"Windows", "model.dll"}};
  size_t i;
  if (qigen_has_file(folder, QIGEN_LIBRARY)) return QIGEN_OK;
  for (i = 0; i < 3; ++i) {
    if (!qigen_has_file(folder, systems[i][1])) continue;
    return qigen_describe(problem, size, QIGEN_MACHINE,
                          "%s is compiled for %s: it has %s, not %s; compile the model with "
                          "--target native on this machine",
                          folder, systems[i][0], systems[i][1], QIGEN_LIBRARY);
  }
  return QIGEN_OK; /* the check of the file says what is wrong */
}

#if defined(_WIN32) || defined(__APPLE__)
static inline qigen_status qigen_check_library(const char* path, char* problem, size_t size) {
  FILE* file = fopen(path, "rb");
  if (!file) {
    return qigen_describe(problem, size, QIGEN_BAD_INPUT,
                          "%s: %s; give the folder that qigen compile wrote", path,
                          strerror(errno));
  }
  fclose(file);
  return QIGEN_OK;
}
#else
/* Looks at the file before dlopen does: dlopen crashes on a truncated library, and its messages
 * don't tell damage from a library for another processor. */
static inline qigen_status qigen_check_library(const char* path, char* problem, size_t size) {
  FILE* file = fopen(path, "rb");
  Elf64_Ehdr header;
  unsigned long long bytes = 0, end = 0;
  int complete;
  if (!file) {
    return qigen_describe(problem, size, QIGEN_BAD_INPUT,
                          "%s: %s; give the folder that qigen compile wrote", path,
                          strerror(errno));
  }
  complete = fread(&header, sizeof header, 1, file) == 1;
  if (complete && fseek(file, 0, SEEK_END) == 0) bytes = (unsigned long long)ftell(file);
  fclose(file);
  if (!complete || memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) {
    return qigen_describe(problem, size, QIGEN_BAD_INPUT,
                          "%s is no library or is damaged; copy or compile the artifact again",
                          path);
  }
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB ||
      header.e_machine != QIGEN_ELF_MACHINE) {
    return qigen_describe(
        problem, size, QIGEN_MACHINE,
        "%s is compiled for another kind of processor (ELF machine %u); compile the model with "
        "--target native on this machine",
        path, (unsigned)header.e_machine);
  }
  /* Linkers put the section headers last. */
  end = header.e_shoff + (unsigned long long)header.e_shnum * header.e_shentsize;
  if (header.e_shoff > bytes || end > bytes) {
    return qigen_describe(problem, size, QIGEN_BAD_INPUT,
                          "%s is truncated; copy or compile the artifact again", path);
  }
  return QIGEN_OK;
}
#endif

#ifdef _WIN32
static inline void* qigen_open_library(const char* path) { return (void*)LoadLibraryA(path); }
static inline void qigen_close_library(void* library) { FreeLibrary((HMODULE)library); }
static inline const char* qigen_library_problem(void) { return "Windows cannot load model.dll"; }
static inline void* qigen_symbol(void* library, const char* name) {
  void* symbol;
  FARPROC function = GetProcAddress((HMODULE)library, name);
  memcpy(&symbol, &function, sizeof symbol);
  return symbol;
}
#else
/* Local: several artifacts in one process export the same names. */
static inline void* qigen_open_library(const char* path) {
  return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}
static inline void qigen_close_library(void* library) { dlclose(library); }
static inline const char* qigen_library_problem(void) { return dlerror(); }
static inline void* qigen_symbol(void* library, const char* name) { return dlsym(library, name); }
#endif

/* Stores the function `name` of the library at *function; POSIX lets an object pointer be a
 * function. */
static inline int qigen_find_function(void* library, const char* name, void* function) {
  void* symbol = qigen_symbol(library, name);
  memcpy(function, &symbol, sizeof symbol);
  return symbol != NULL;
}

static inline void qigen_api_close(qigen_api* api) {
  if (api->library) qigen_close_library(api->library);
  memset(api, 0, sizeof *api);
}

/* Opens the library of the artifact and fills *api. On failure, *api is empty and a sentence is in
 * `problem`. QIGEN_BAD_INPUT: no such file, or damaged. QIGEN_MACHINE: another system or processor,
 * another ABI version or a C library that is too old. */
static inline qigen_status qigen_api_open(qigen_api* api, const char* folder, char* problem,
                                          size_t size) {
  char path[4096];
  const char* missing = NULL;
  uint32_t version = 0;
  qigen_status status;
  int length = snprintf(path, sizeof path, "%s/" QIGEN_LIBRARY, folder);
  memset(api, 0, sizeof *api);
  if (length < 0 || (size_t)length >= sizeof path) {
    return qigen_describe(problem, size, QIGEN_BAD_INPUT,
                          "the path of the artifact is longer than %zu bytes", sizeof path);
  }
  status = qigen_check_system(folder, problem, size);
  if (status == QIGEN_OK) status = qigen_check_library(path, problem, size);
  if (status != QIGEN_OK) return status;

  api->library = qigen_open_library(path);
  if (!api->library) {
    return qigen_describe(problem, size, QIGEN_MACHINE,
                          "%s; compile the model again on this machine", qigen_library_problem());
  }
  if (!qigen_find_function(api->library, "qigen_abi_version", &api->abi_version)) {
    missing = "qigen_abi_version";
  } else if ((version = api->abi_version()) != QIGEN_ABI_VERSION) {
    qigen_api_close(api);
    return qigen_describe(
        problem, size, QIGEN_MACHINE,
        "%s has ABI version %u of qigen, this program needs version %u; compile the model again "
        "with the same qigen as the program",
        path, (unsigned)version, QIGEN_ABI_VERSION);
  }
#define QIGEN_FIND(name)                                                            \
  if (!missing && !qigen_find_function(api->library, "qigen_" #name, &api->name)) { \
    missing = "qigen_" #name;                                                       \
  }
  QIGEN_API_FUNCTIONS(QIGEN_FIND)
#undef QIGEN_FIND
  if (missing) {
    qigen_api_close(api);
    return qigen_describe(problem, size, QIGEN_BAD_INPUT,
                          "%s is no model of qigen: it has no function %s", path, missing);
  }
  qigen_find_function(api->library, "qigen_session_next", &api->session_next);
  return QIGEN_OK;
}

#endif /* QIGEN_STATIC */

#ifdef __cplusplus
}
#endif

#endif /* QIGEN_LOADER_H_ */
