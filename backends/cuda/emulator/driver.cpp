// The CUDA driver API in front of the emulator: what an artifact calls, so that its library runs as
// it is (QIGEN_CUDA_DRIVER names this one). Names and numbers are those of the driver API.
//
// QIGEN_EMULATED_GPU says what the device is: "key=value,..." with the keys policy (fair, random,
// priority), seed, budget (instructions of a launch), memory (bytes), capability (10 major +
// minor), version (of CUDA, 1000 major + 10 minor) and devices. By default it is later than every
// architecture, so that artifacts give it their PTX. A finding is CUDA_ERROR_LAUNCH_FAILED, and
// cuGetErrorString says what was found.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>

#include "machine.h"

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3,
              kNoDevice = 100, kInvalidDevice = 101, kInvalidContext = 201, kNoBinary = 209,
              kInvalidPtx = 218, kNotFound = 500, kLaunchFailed = 719;
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kMaxDynamicShared = 8;
constexpr uint64_t kSharedWithoutAsking = 48 << 10;  // what a kernel has of its own included

struct Settings {
  ptx::Schedule schedule;
  uint64_t memory = 8ull << 30;
  int capability = 999, version = 99000, devices = 1;

  Settings() {
    const char* text = std::getenv("QIGEN_EMULATED_GPU");
    std::string entries = text ? text : "";
    for (size_t at = 0; at < entries.size();) {
      const size_t end = std::min(entries.find(',', at), entries.size());
      const std::string entry = entries.substr(at, end - at);
      const size_t equals = entry.find('=');
      const std::string key = entry.substr(0, equals);
      const std::string value = equals == std::string::npos ? "" : entry.substr(equals + 1);
      const uint64_t number = std::strtoull(value.c_str(), nullptr, 10);
      if (key == "policy") {
        schedule.policy = value == "random"     ? ptx::Policy::random
                          : value == "priority" ? ptx::Policy::priority
                                                : ptx::Policy::fair;
      } else if (key == "seed") {
        schedule.seed = number;
      } else if (key == "budget") {
        schedule.budget = number;
      } else if (key == "memory") {
        memory = number;
      } else if (key == "capability") {
        capability = int(number);
      } else if (key == "version") {
        version = int(number);
      } else if (key == "devices") {
        devices = int(number);
      } else {
        std::fprintf(stderr, "QIGEN_EMULATED_GPU: unknown key %s\n", key.c_str());
        std::abort();
      }
      at = end + 1;
    }
  }
};

struct Module {
  std::string text;
};

struct Function {
  ptx::Kernel kernel;
  std::vector<uint64_t> globals;
  uint64_t mostShared = 0;  // dynamic, that was asked for
};

struct Stream {
  std::vector<std::function<int()>>* recording = nullptr;
};

using Graph = std::vector<std::function<int()>>;

struct Driver {
  std::recursive_mutex mutex;
  Settings settings;
  ptx::DeviceMemory memory;
  uint64_t used = 0;
  bool initialized = false;
  std::string finding;  // the latest
};

Driver& driver() {
  static Driver* const instance = new Driver;  // outlives every artifact
  return *instance;
}

using Lock = std::lock_guard<std::recursive_mutex>;

// The contexts of this thread, the current one last. There may be others than the device's own.
std::vector<void*>& contexts() {
  static thread_local std::vector<void*> stack;
  return stack;
}

// Whether what belongs to the device's own context may be used now.
bool own() { return !contexts().empty() && contexts().back() == &driver(); }

int allocate(uint64_t bytes, uint64_t* address) {
  Driver& d = driver();
  if (bytes == 0) return kInvalidValue;
  if (bytes > d.settings.memory - d.used) return kOutOfMemory;
  d.used += bytes;
  *address = d.memory.allocate(bytes);
  return kSuccess;
}

int launch(const Function& function, const uint32_t (&grid)[3], const uint32_t (&threads)[3],
           unsigned shared, const std::vector<uint8_t>& parameters) {
  Driver& d = driver();
  try {
    ptx::Launch launch(function.kernel, d.memory, grid, threads, shared, parameters,
                       function.globals, d.settings.schedule);
    launch.run();
    return kSuccess;
  } catch (const std::exception& error) {
    d.finding = error.what();
    return kLaunchFailed;
  }
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  const Lock lock(driver().mutex);
  if (driver().settings.devices == 0) return kNoDevice;
  driver().initialized = true;
  return kSuccess;
}

int cuDriverGetVersion(int* version) {
  *version = driver().settings.version;
  return kSuccess;
}

int cuGetErrorString(int error, const char** text) {
  const Lock lock(driver().mutex);
  static thread_local std::string finding;
  switch (error) {
    case kSuccess:
      *text = "no error";
      return kSuccess;
    case kInvalidValue:
      *text = "invalid argument";
      return kSuccess;
    case kOutOfMemory:
      *text = "out of memory";
      return kSuccess;
    case kNotInitialized:
      *text = "initialization error";
      return kSuccess;
    case kNoDevice:
      *text = "no CUDA-capable device is detected";
      return kSuccess;
    case kInvalidDevice:
      *text = "invalid device ordinal";
      return kSuccess;
    case kNoBinary:
      *text = "no kernel image is available for execution on the device";
      return kSuccess;
    case kNotFound:
      *text = "named symbol not found";
      return kSuccess;
    case kInvalidPtx:
    case kLaunchFailed:
      finding = driver().finding;
      *text = finding.c_str();
      return kSuccess;
    default:
      *text = nullptr;
      return kInvalidValue;
  }
}

int cuDeviceGetCount(int* count) {
  if (!driver().initialized) return kNotInitialized;
  *count = driver().settings.devices;
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  if (!driver().initialized) return kNotInitialized;
  if (ordinal < 0 || ordinal >= driver().settings.devices) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

int cuDeviceGetName(char* name, int length, int) {
  std::snprintf(name, length, "PTX emulator");
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = driver().settings.capability;
  if (attribute != kCapabilityMajor && attribute != kCapabilityMinor) return kInvalidValue;
  *value = attribute == kCapabilityMajor ? capability / 10 : capability % 10;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &driver();
  return kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }
int cuCtxPushCurrent_v2(void* context) {
  if (!context) return kInvalidValue;
  contexts().push_back(context);
  return kSuccess;
}
int cuCtxPopCurrent_v2(void** context) {
  if (contexts().empty()) return kInvalidContext;
  *context = contexts().back();
  contexts().pop_back();
  return kSuccess;
}

int cuMemGetInfo_v2(size_t* left, size_t* total) {
  const Lock lock(driver().mutex);
  *total = driver().settings.memory;
  *left = *total - driver().used;
  return kSuccess;
}

int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  if (!own()) return kInvalidContext;
  const Lock lock(driver().mutex);
  uint64_t made = 0;
  const int error = allocate(bytes, &made);
  *address = made;
  return error;
}

int cuMemFree_v2(unsigned long long address) {
  if (!own()) return kInvalidContext;
  const Lock lock(driver().mutex);
  const ptx::Allocation* a = driver().memory.find(address, 1);
  if (!a || a->base != address) return kInvalidValue;
  driver().used -= a->size;
  driver().memory.release(address);
  return kSuccess;
}

int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes) {
  if (!own()) return kInvalidContext;
  const Lock lock(driver().mutex);
  ptx::Allocation* a = driver().memory.find(to, bytes);
  if (!a) return kInvalidValue;
  std::memcpy(&a->data[to - a->base], from, bytes);
  std::memset(&a->written[to - a->base], 1, bytes);
  return kSuccess;
}

int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t bytes) {
  if (!own()) return kInvalidContext;
  const Lock lock(driver().mutex);
  ptx::Allocation* a = driver().memory.find(from, bytes);
  if (!a) return kInvalidValue;
  if (std::memchr(&a->written[from - a->base], 0, bytes)) {
    driver().finding = "copy of device memory that nobody wrote";
    return kLaunchFailed;
  }
  std::memcpy(to, &a->data[from - a->base], bytes);
  return kSuccess;
}

// Copies are at once and are not recorded: what a step copies changes.
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, void* stream) {
  return static_cast<Stream*>(stream)->recording ? kInvalidValue : cuMemcpyHtoD_v2(to, from, bytes);
}
int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void* stream) {
  return static_cast<Stream*>(stream)->recording ? kInvalidValue : cuMemcpyDtoH_v2(to, from, bytes);
}

int cuModuleLoadData(void** module, const void* image) {
  if (!own()) return kInvalidContext;
  const auto* text = static_cast<const char*>(image);
  if (std::memcmp(text, "\177ELF", 4) == 0) return kNoBinary;  // machine code
  *module = new Module{text};
  return kSuccess;
}
// Functions stay: they are few, and graphs hold them.
int cuModuleUnload(void* module) {
  delete static_cast<Module*>(module);
  return kSuccess;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (!own()) return kInvalidContext;
  const Lock lock(driver().mutex);
  const std::string& text = static_cast<Module*>(module)->text;
  if (text.find(std::string(".entry ") + name + "(") == std::string::npos) return kNotFound;
  try {
    auto made = std::make_unique<Function>();
    made->kernel = ptx::parse(text, name);
    for (const ptx::Global& g : made->kernel.globals) {
      uint64_t address = 0;
      if (allocate(g.size, &address) != kSuccess) return kOutOfMemory;
      ptx::Allocation* a = driver().memory.find(address, g.size);
      a->data = g.data;
      a->written.assign(g.size, 1);
      made->globals.push_back(address);
    }
    *function = made.release();
    return kSuccess;
  } catch (const std::exception& error) {
    driver().finding = error.what();
    return kInvalidPtx;
  }
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != kMaxDynamicShared || value < 0) return kInvalidValue;
  static_cast<Function*>(function)->mostShared = uint64_t(value);
  return kSuccess;
}

int cuStreamCreate(void** stream, unsigned) {
  if (!own()) return kInvalidContext;
  *stream = new Stream;
  return kSuccess;
}
int cuStreamDestroy_v2(void* stream) {
  delete static_cast<Stream*>(stream);
  return kSuccess;
}
int cuStreamSynchronize(void*) { return own() ? kSuccess : kInvalidContext; }

int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void* stream, void** arguments, void**) {
  if (!own()) return kInvalidContext;
  const Lock lock(driver().mutex);
  const auto* function = static_cast<const Function*>(handle);
  const uint64_t threads = uint64_t(block_x) * block_y * block_z;
  if (threads == 0 || threads > 1024 || !grid_x || !grid_y || !grid_z || grid_y > 65535 ||
      grid_z > 65535) {
    return kInvalidValue;
  }
  if (shared + function->kernel.sharedBytes > kSharedWithoutAsking &&
      shared > function->mostShared) {
    return kInvalidValue;
  }
  // taken now, as the driver does: the caller may change its arguments
  std::vector<uint8_t> parameters(function->kernel.parameterBytes);
  for (size_t n = 0; n < function->kernel.parameters.size(); ++n) {
    const ptx::Parameter& p = function->kernel.parameters[n];
    std::memcpy(&parameters[p.offset], arguments[n], p.size);
  }
  auto run = [=] {
    const uint32_t grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    return launch(*function, grid, block, shared, parameters);
  };
  auto* recording = stream ? static_cast<Stream*>(stream)->recording : nullptr;
  if (!recording) return run();
  recording->push_back(run);
  return kSuccess;
}

int cuStreamBeginCapture_v2(void* stream, int) {
  auto* s = static_cast<Stream*>(stream);
  if (s->recording) return kInvalidValue;
  s->recording = new Graph;
  return kSuccess;
}
int cuStreamEndCapture(void* stream, void** graph) {
  auto* s = static_cast<Stream*>(stream);
  if (!s->recording) return kInvalidValue;
  *graph = s->recording;
  s->recording = nullptr;
  return kSuccess;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*static_cast<Graph*>(graph));
  return kSuccess;
}
int cuGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return kSuccess;
}
int cuGraphExecDestroy(void* executable) {
  delete static_cast<Graph*>(executable);
  return kSuccess;
}
int cuGraphLaunch(void* executable, void*) {
  if (!own()) return kInvalidContext;
  const Lock lock(driver().mutex);
  for (const auto& run : *static_cast<Graph*>(executable)) {
    const int error = run();
    if (error != kSuccess) return error;
  }
  return kSuccess;
}

}  // extern "C"
