// The C face of the emulator, shaped like the driver's: devices, modules' kernels, launches.

#include <cstring>
#include <sstream>

#include "machine.h"

namespace {
thread_local std::string lastError;

struct LoadedKernel {
  ptx::Kernel kernel;
  std::vector<uint64_t> globals;
  std::vector<ptx::Count> counts;
};

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const ptx::Finding& finding) {
    lastError = finding.what();
    return 2;
  } catch (const std::exception& error) {
    lastError = error.what();
    return 1;
  }
}
}  // namespace

extern "C" {

const char* ptxLastError() { return lastError.c_str(); }

void* ptxCreateDevice() { return new ptx::DeviceMemory; }
void ptxDestroyDevice(void* device) { delete static_cast<ptx::DeviceMemory*>(device); }

uint64_t ptxAllocate(void* device, uint64_t bytes) {
  return static_cast<ptx::DeviceMemory*>(device)->allocate(bytes);
}
void ptxFree(void* device, uint64_t address) {
  static_cast<ptx::DeviceMemory*>(device)->release(address);
}

int ptxCopyToDevice(void* device, uint64_t to, const void* from, uint64_t bytes) {
  return guarded([&] {
    ptx::Allocation* a = static_cast<ptx::DeviceMemory*>(device)->find(to, bytes);
    if (!a) throw ptx::Finding("copy to outside of every allocation");
    std::memcpy(&a->data[to - a->base], from, bytes);
    std::memset(&a->written[to - a->base], 1, bytes);
  });
}

int ptxCopyToHost(void* device, void* to, uint64_t from, uint64_t bytes) {
  return guarded([&] {
    ptx::Allocation* a = static_cast<ptx::DeviceMemory*>(device)->find(from, bytes);
    if (!a) throw ptx::Finding("copy from outside of every allocation");
    if (std::memchr(&a->written[from - a->base], 0, bytes)) {
      throw ptx::Finding("copy of device memory that nobody wrote");
    }
    std::memcpy(to, &a->data[from - a->base], bytes);
  });
}

// Bytes of the allocation at `address` that the last launch read and wrote, in whole sectors.
void ptxTraffic(void* device, uint64_t address, uint64_t* read, uint64_t* written) {
  const ptx::Allocation* a = static_cast<ptx::DeviceMemory*>(device)->find(address, 1);
  *read = a ? a->readBytes : 0;
  *written = a ? a->writtenBytes : 0;
}

// The same with every sector counted once: what a level-2 cache that holds it all moves.
void ptxDistinctTraffic(void* device, uint64_t address, uint64_t* read, uint64_t* written) {
  const ptx::Allocation* a = static_cast<ptx::DeviceMemory*>(device)->find(address, 1);
  *read = *written = 0;
  if (!a) return;
  for (const uint8_t sector : a->sectors) {
    *read += sector & 1 ? 32 : 0;
    *written += sector & 2 ? 32 : 0;
  }
}

void* ptxLoadKernel(void* device, const char* module, const char* entry) {
  auto loaded = std::make_unique<LoadedKernel>();
  const int failed = guarded([&] {
    auto* memory = static_cast<ptx::DeviceMemory*>(device);
    loaded->kernel = ptx::parse(module, entry);
    for (const ptx::Global& g : loaded->kernel.globals) {
      const uint64_t at = memory->allocate(g.size);
      ptx::Allocation* a = memory->find(at, g.size);
      a->data = g.data;
      a->written.assign(g.size, 1);
      loaded->globals.push_back(at);
    }
  });
  return failed ? nullptr : loaded.release();
}
void ptxUnloadKernel(void* kernel) { delete static_cast<LoadedKernel*>(kernel); }

int ptxParameterCount(void* kernel) {
  return int(static_cast<LoadedKernel*>(kernel)->kernel.parameters.size());
}
int ptxParameterSize(void* kernel, int n) {
  return static_cast<LoadedKernel*>(kernel)->kernel.parameters[n].size;
}
uint64_t ptxStaticShared(void* kernel) {
  return static_cast<LoadedKernel*>(kernel)->kernel.sharedBytes;
}

// 0: done; 1: cannot run; 2: a finding. `arguments` are pointers to values, as cuLaunchKernel's.
int ptxLaunch(void* device, void* handle, const uint32_t* grid, const uint32_t* threads,
              uint64_t dynamicShared, const void* const* arguments, int policy, uint64_t seed,
              int resident, int quantum, uint64_t budget) {
  return guarded([&] {
    auto* loaded = static_cast<LoadedKernel*>(handle);
    std::vector<uint8_t> parameters(loaded->kernel.parameterBytes);
    for (size_t n = 0; n < loaded->kernel.parameters.size(); ++n) {
      const ptx::Parameter& p = loaded->kernel.parameters[n];
      std::memcpy(&parameters[p.offset], arguments[n], p.size);
    }
    const ptx::Schedule schedule{ptx::Policy(policy), seed, resident, quantum, budget};
    ptx::Launch launch(loaded->kernel, *static_cast<ptx::DeviceMemory*>(device), grid, threads,
                       dynamicShared, std::move(parameters), loaded->globals, schedule);
    launch.run();
    loaded->counts = launch.counts();
  });
}

// What each instruction of the last launch did: seven columns separated by tabs, a line each: line
// of the source, opcode, times executed, wavefronts, least wavefronts, sectors, least sectors.
const char* ptxReport(void* handle) {
  static thread_local std::string text;
  const auto* loaded = static_cast<LoadedKernel*>(handle);
  std::ostringstream out;
  for (size_t n = 0; n < loaded->counts.size(); ++n) {
    const ptx::Count& c = loaded->counts[n];
    if (!c.executed) continue;
    const ptx::Instruction& i = loaded->kernel.code[n];
    std::string opcode = i.text.substr(i.text[0] == '@' ? i.text.find(' ') + 1 : 0);
    opcode = opcode.substr(0, opcode.find_first_of(" \t"));
    out << i.line << '\t' << opcode << '\t' << c.executed << '\t' << c.wavefronts << '\t'
        << c.idealWavefronts << '\t' << c.sectors << '\t' << c.idealSectors << '\n';
  }
  text = out.str();
  return text.c_str();
}

}  // extern "C"
