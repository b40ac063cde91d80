// Makes the runtime alone a library: what a model that is compiled without a C++ compiler is put
// into (backends/llvm/attach.py). The model's code becomes segments of a copy of this library.
#include <cmath>
#include <cstring>

#include "qigen/generated.h"

namespace {

float call_expf(float x) { return expf(x); }
double call_cos(double x) { return cos(x); }
double call_sin(double x) { return sin(x); }
void* call_memcpy(void* to, const void* from, size_t n) { return std::memcpy(to, from, n); }
void* call_memmove(void* to, const void* from, size_t n) { return std::memmove(to, from, n); }
void* call_memset(void* to, int byte, size_t n) { return std::memset(to, byte, n); }
void call_barrier(qigen::Barrier* barrier, int thread) { barrier->wait(thread); }

// What the code may call, by the names of its undefined symbols.
struct Import {
  char name[24];
  void* function;
};
__attribute__((section(".qigen_imports"), used)) Import imports[] = {
    {"qigen_barrier_wait", reinterpret_cast<void*>(call_barrier)},
    {"expf", reinterpret_cast<void*>(call_expf)},
    {"cos", reinterpret_cast<void*>(call_cos)},
    {"sin", reinterpret_cast<void*>(call_sin)},
    {"memcpy", reinterpret_cast<void*>(call_memcpy)},
    {"memmove", reinterpret_cast<void*>(call_memmove)},
    {"memset", reinterpret_cast<void*>(call_memset)},
};

}  // namespace

namespace qigen {

// The place of the model's description. The pointer keeps the imports from being dropped and makes
// the section one that is relocated.
extern "C" __attribute__((section(".qigen_model"), used))
const ModelDescription qigen_model_description = {
    0, "", imports[0].name, "",      nullptr, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0,  nullptr,         nullptr, nullptr};

}  // namespace qigen
