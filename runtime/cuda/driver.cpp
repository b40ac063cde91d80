#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>

#include "error.h"

namespace qigen::cuda {

using runtime::Failure;

Driver::Driver(const char* targets) {
  const char* named = std::getenv("QIGEN_CUDA_DRIVER");
  const char* path = named && *named ? named : "libcuda.so.1";
  // Never closed: the driver doesn't take being unloaded.
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* why = dlerror();
    throw Failure(
        QIGEN_MACHINE,
        "this artifact is for NVIDIA GPUs (%s), but there is no driver here (%s); install "
        "it, or compile the model for the processor with --target native",
        targets, why ? why : path);
  }
#define X(name, parameters)                                                                 \
  this->name = reinterpret_cast<int(*) parameters>(dlsym(library, #name));                  \
  if (!this->name) {                                                                        \
    throw Failure(QIGEN_MACHINE,                                                            \
                  "the CUDA driver %s is too old: it has no %s; install a later one", path, \
                  #name);                                                                   \
  }
  QIGEN_CUDA_FUNCTIONS(X)
#undef X
}

const char* Driver::text(int error) const {
  const char* text = nullptr;
  return cuGetErrorString(error, &text) == 0 && text ? text : "unknown error";
}

void Driver::check(int error, const char* doing) const {
  if (error == 0) return;
  if (error == kOutOfMemory) {
    throw Failure(QIGEN_NO_MEMORY, "the GPU is out of memory while %s", doing);
  }
  throw Failure(QIGEN_INTERNAL, "the GPU failed while %s: %s (error %d)", doing, text(error),
                error);
}

}  // namespace qigen::cuda
