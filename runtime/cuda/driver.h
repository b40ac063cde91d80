// The CUDA driver, opened at run time: an artifact links against nothing of CUDA. Types, names and
// numbers are those of the driver API (docs.nvidia.com/cuda/cuda-driver-api).
#pragma once

#include <cstddef>
#include <cstdint>

namespace qigen::cuda {

using Address = unsigned long long;

constexpr int kOutOfMemory = 2;             // CUDA_ERROR_OUT_OF_MEMORY
constexpr int kNoDevice = 100;              // CUDA_ERROR_NO_DEVICE
constexpr int kNoBinary = 209;              // CUDA_ERROR_NO_BINARY_FOR_GPU
constexpr int kUnsupportedPtx = 222;        // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
constexpr int kCapabilityMajor = 75;        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kCapabilityMinor = 76;        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int kMaxDynamicShared = 8;        // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr unsigned kNonBlockingStream = 1;  // CU_STREAM_NON_BLOCKING
constexpr int kThreadLocalCapture = 1;      // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

// Result, name and parameters of every function that is used.
#define QIGEN_CUDA_FUNCTIONS(X)                                                              \
  X(cuInit, (unsigned flags))                                                                \
  X(cuDriverGetVersion, (int* version))                                                      \
  X(cuGetErrorString, (int error, const char** text))                                        \
  X(cuDeviceGetCount, (int* count))                                                          \
  X(cuDeviceGet, (int* device, int ordinal))                                                 \
  X(cuDeviceGetName, (char* name, int length, int device))                                   \
  X(cuDeviceGetAttribute, (int* value, int attribute, int device))                           \
  X(cuDevicePrimaryCtxRetain, (void** context, int device))                                  \
  X(cuDevicePrimaryCtxRelease_v2, (int device))                                              \
  X(cuCtxPushCurrent_v2, (void* context))                                                    \
  X(cuCtxPopCurrent_v2, (void** context))                                                    \
  X(cuMemGetInfo_v2, (size_t* unused, size_t* total))                                        \
  X(cuMemAlloc_v2, (Address * address, size_t bytes))                                        \
  X(cuMemFree_v2, (Address address))                                                         \
  X(cuMemcpyHtoDAsync_v2, (Address to, const void* from, size_t bytes, void* stream))        \
  X(cuMemcpyDtoHAsync_v2, (void* to, Address from, size_t bytes, void* stream))              \
  X(cuModuleLoadData, (void** module, const void* image))                                    \
  X(cuModuleUnload, (void* module))                                                          \
  X(cuModuleGetFunction, (void** function, void* module, const char* name))                  \
  X(cuFuncSetAttribute, (void* function, int attribute, int value))                          \
  X(cuStreamCreate, (void** stream, unsigned flags))                                         \
  X(cuStreamDestroy_v2, (void* stream))                                                      \
  X(cuStreamSynchronize, (void* stream))                                                     \
  X(cuLaunchKernel, (void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,      \
                     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,  \
                     void* stream, void** parameters, void** extra))                         \
  X(cuStreamBeginCapture_v2, (void* stream, int mode))                                       \
  X(cuStreamEndCapture, (void* stream, void** graph))                                        \
  X(cuGraphInstantiateWithFlags, (void** executable, void* graph, unsigned long long flags)) \
  X(cuGraphDestroy, (void* graph))                                                           \
  X(cuGraphExecDestroy, (void* executable))                                                  \
  X(cuGraphLaunch, (void* executable, void* stream))

struct Driver {
  // Opens QIGEN_CUDA_DRIVER if it is set, else libcuda.so.1. Throws QIGEN_MACHINE if there is none
  // or it lacks a function; `targets` are named in the message.
  explicit Driver(const char* targets);

#define X(name, parameters) int(*name) parameters = nullptr;
  QIGEN_CUDA_FUNCTIONS(X)
#undef X

  // What an error code means.
  const char* text(int error) const;

  // Throws QIGEN_INTERNAL (QIGEN_NO_MEMORY for that) unless the code is 0; `doing` says what
  // failed.
  void check(int error, const char* doing) const;
};

}  // namespace qigen::cuda
