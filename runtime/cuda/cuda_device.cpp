#include "cuda_device.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "driver.h"
#include "error.h"
#include "program.h"

namespace qigen::cuda {
namespace {

using runtime::Failure;

struct Cache {
  uint64_t base;
  int64_t capacity;
};

constexpr uint32_t kSharedWithoutAsking = 32 << 10;  // 48 KiB with what kernels have of their own
constexpr int64_t kCapacityUnit = 4;  // positions: what kernels copy at a time is aligned

class CudaDevice final : public runtime::Device {
 public:
  CudaDevice(const ModelDescription& description, const uint8_t* weights)
      : description_(description),
        program_(*static_cast<const Program*>(description.device_program)),
        driver_(program_.targets) {
    choose_device();
    try {
      const Current current(*this);
      load_modules();
      allocate();
      upload(weights);
      resolve_arguments();
    } catch (...) {
      release();
      throw;
    }
  }
  ~CudaDevice() override { release(); }

  KvCache create_cache(int64_t capacity) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Current current(*this);
    capacity = (capacity + kCapacityUnit - 1) / kCapacityUnit * kCapacityUnit;
    const uint64_t bytes = std::max<uint64_t>(capacity * description_.kv_bytes_per_position, 1);
    const Address address = take(bytes, "the KV cache of a session; use fewer or shorter sessions");
    return {reinterpret_cast<uint8_t*>(address), capacity};
  }

  // Called by destructors, as release is: what fails here is let go.
  void destroy_cache(const KvCache& cache) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (driver_.cuCtxPushCurrent_v2(context_) != 0) return;
    driver_.cuMemFree_v2(reinterpret_cast<Address>(cache.base));
    void* popped;
    driver_.cuCtxPopCurrent_v2(&popped);
  }

  void run(const Step& step) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Current current(*this);
    start(step, step.n_logits > 0 ? Wanted::kLogits : Wanted::kNothing, {});
    if (step.n_logits > 0) {
      // one copy: rows of logits are adjacent on both sides
      driver_.check(
          driver_.cuMemcpyDtoHAsync_v2(step.logits, arena_ + program_.logits,
                                       sizeof(float) * step.n_logits * description_.vocab, stream_),
          "copying logits from it");
    }
    driver_.check(driver_.cuStreamSynchronize(stream_), "running a step");
  }

  int32_t choose(const Step& step, const runtime::Sampling& sampling) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Current current(*this);
    start(step, Wanted::kToken, sampling);
    int32_t token = -1;
    driver_.check(
        driver_.cuMemcpyDtoHAsync_v2(&token, arena_ + head_.size(), sizeof token, stream_),
        "copying the next token from it");
    driver_.check(driver_.cuStreamSynchronize(stream_), "running a step");
    return token;
  }

 private:
  enum class Wanted { kNothing, kLogits, kToken };

  // Starts the launches of a step, which are recorded first if they never ran.
  void start(const Step& step, Wanted wanted, const runtime::Sampling& sampling) {
    const int number = fitting_sequence(step);
    write_head(step, program_.sequences[number], sampling);
    driver_.check(driver_.cuMemcpyHtoDAsync_v2(arena_, head_.data(), head_.size(), stream_),
                  "copying a step's tokens to it");
    void*& graph = graphs_[3 * number + static_cast<int>(wanted)];
    if (!graph) graph = record(program_.sequences[number], wanted);
    driver_.check(driver_.cuGraphLaunch(graph, stream_), "starting a step");
  }

  // The context is current while this lives; the caller may have one of its own.
  class Current {
   public:
    explicit Current(const CudaDevice& device) : driver_(device.driver_) {
      driver_.check(driver_.cuCtxPushCurrent_v2(device.context_), "making its context current");
    }
    ~Current() {
      void* popped;
      driver_.cuCtxPopCurrent_v2(&popped);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Driver& driver_;
  };

  void choose_device() {
    const int error = driver_.cuInit(0);
    int count = 0;
    if (error == 0) driver_.check(driver_.cuDeviceGetCount(&count), "counting devices");
    if (error == kNoDevice || (error == 0 && count == 0)) {
      throw Failure(QIGEN_MACHINE,
                    "this artifact is for NVIDIA GPUs (%s), but the driver sees none here; compile "
                    "the model for the processor with --target native",
                    program_.targets);
    }
    if (error != 0) {
      throw Failure(QIGEN_MACHINE, "the CUDA driver doesn't start: %s (error %d)",
                    driver_.text(error), error);
    }
    driver_.check(driver_.cuDeviceGet(&device_, 0), "opening it");
    driver_.cuDeviceGetName(name_, sizeof name_, device_);
    name_[sizeof name_ - 1] = 0;
    int major = 0, minor = 0;
    driver_.check(driver_.cuDeviceGetAttribute(&major, kCapabilityMajor, device_), "asking it");
    driver_.check(driver_.cuDeviceGetAttribute(&minor, kCapabilityMinor, device_), "asking it");
    choose_image(major, minor);
    check_driver();
    driver_.check(driver_.cuDevicePrimaryCtxRetain(&context_, device_), "opening its context");
  }

  // Machine code of the device's generation runs on it unless it is of a later member of it; PTX on
  // everything from its own architecture on.
  void choose_image(int major, int minor) {
    const Image* images = program_.modules[0].images;
    int best = -1;
    for (int i = 0; i < program_.n_images; ++i) {
      const int capability = images[i].capability;
      const bool fits = images[i].ptx ? capability <= 10 * major + minor
                                      : capability / 10 == major && capability % 10 <= minor;
      if (!fits) continue;
      const bool better =
          best < 0 || images[best].ptx || (!images[i].ptx && capability > images[best].capability);
      if (better) best = i;
    }
    if (best < 0) {
      throw Failure(QIGEN_MACHINE,
                    "the GPU %s has compute capability %d.%d, this artifact is for %s and later; "
                    "compile the model with --target sm_%d%d if that is a target, or for the "
                    "processor with --target native",
                    name_, major, minor, program_.targets, major, minor);
    }
    image_ = best;
  }

  void check_driver() {
    int version = 0;
    driver_.check(driver_.cuDriverGetVersion(&version), "asking the driver for its version");
    const bool ptx = program_.modules[0].images[image_].ptx;
    // machine code runs with every driver of the compiler's major version
    const int needed = ptx ? program_.cuda_version : program_.cuda_version / 1000 * 1000;
    if (version >= needed) return;
    throw Failure(QIGEN_MACHINE,
                  "the driver is for CUDA %d.%d, but %s of this artifact needs one for CUDA %d.%d; "
                  "install a later driver%s",
                  version / 1000, version % 1000 / 10, ptx ? "the PTX" : "the machine code",
                  needed / 1000, needed % 1000 / 10,
                  ptx ? ", or compile the model with the GPU's own architecture as a target" : "");
  }

  void load_modules() {
    const char* blob = reinterpret_cast<const char*>(program_.blob);
    for (int i = 0; i < program_.n_modules; ++i) {
      const Module& module = program_.modules[i];
      void* loaded = nullptr;
      const int error = driver_.cuModuleLoadData(&loaded, blob + module.images[image_].offset);
      if (error == kUnsupportedPtx || error == kNoBinary) {
        throw Failure(QIGEN_MACHINE,
                      "the driver doesn't take the kernel %s for the GPU %s (%s); install a later "
                      "driver, or compile the model with the GPU's architecture as a target",
                      module.name, name_, driver_.text(error));
      }
      driver_.check(error, module.name);
      modules_.push_back(loaded);
    }
    for (int i = 0; i < program_.n_kernels; ++i) {
      const Kernel& kernel = program_.kernels[i];
      void* function = nullptr;
      driver_.check(driver_.cuModuleGetFunction(&function, modules_[kernel.module], kernel.name),
                    kernel.name);
      functions_.push_back(function);
    }
  }

  Address take(uint64_t bytes, const char* purpose) {
    Address address = 0;
    const int error = driver_.cuMemAlloc_v2(&address, bytes);
    if (error == kOutOfMemory) {
      size_t left = 0, total = 0;
      driver_.cuMemGetInfo_v2(&left, &total);
      throw Failure(QIGEN_NO_MEMORY,
                    "the GPU %s has %zu of %zu bytes left and refused %" PRIu64 " for %s", name_,
                    left, total, bytes, purpose);
    }
    driver_.check(error, "allocating memory");
    return address;
  }

  void allocate() {
    driver_.check(driver_.cuStreamCreate(&stream_, kNonBlockingStream), "creating a stream");
    weights_ = take(description_.weights_bytes,
                    "the weights; take fewer bits a weight, or compile the model for the processor "
                    "with --target native");
    arena_ = take(description_.arena_bytes, "the arena; compile with a smaller --max-seq");
    head_.resize(sampling_offset() + sizeof(runtime::Sampling));
    graphs_.assign(3 * program_.n_sequences, nullptr);
  }

  // On the stream of the steps: a copy on the default one might still be under way when they begin.
  void copy(Address to, const void* from, uint64_t bytes, const char* doing) {
    driver_.check(driver_.cuMemcpyHtoDAsync_v2(to, from, bytes, stream_), doing);
    driver_.check(driver_.cuStreamSynchronize(stream_), doing);
  }

  void upload(const uint8_t* weights) {
    copy(weights_, weights, description_.weights_bytes, "copying the weights to it");
    for (int i = 0; i < program_.n_angles; ++i) {
      const Angles& a = program_.angles[i];
      std::vector<float> table(2 * size_t(a.pairs) * description_.max_seq);
      float* to = table.data();
      for (int position = 0; position < description_.max_seq; ++position) {
        for (int pair = 0; pair < a.pairs; ++pair) {
          const double angle = position * a.position_scale * a.frequencies[pair];
          *to++ = static_cast<float>(std::cos(angle) * a.factor);
          *to++ = static_cast<float>(std::sin(angle) * a.factor);
        }
      }
      copy(arena_ + a.offset, table.data(), table.size() * sizeof(float),
           "copying the rotation table to it");
    }
  }

  // Addresses in the place of offsets: the launches of all sequences share the list.
  void resolve_arguments() {
    int count = 0;
    for (int s = 0; s < program_.n_sequences; ++s) {
      const Sequence& sequence = program_.sequences[s];
      for (int i = 0; i < sequence.n_launches; ++i) {
        const Launch& launch = sequence.launches[i];
        count = std::max(count, launch.first_argument + launch.n_arguments);
        if (launch.shared > kSharedWithoutAsking) {
          driver_.check(driver_.cuFuncSetAttribute(functions_[launch.kernel], kMaxDynamicShared,
                                                   static_cast<int>(launch.shared)),
                        "asking for shared memory");
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      const Argument& argument = program_.arguments[i];
      const Address base = argument.kind == ArgumentKind::kArena     ? arena_
                           : argument.kind == ArgumentKind::kWeights ? weights_
                                                                     : 0;
      arguments_.push_back(base + argument.value);
    }
    // the driver takes a pointer to each value
    for (uint64_t& argument : arguments_) argument_pointers_.push_back(&argument);
  }

  // In the head: behind three numbers a token.
  size_t caches_offset() const { return (12 * size_t(program_.max_tokens) + 15) / 16 * 16; }

  size_t sampling_offset() const { return caches_offset() + sizeof(Cache) * program_.max_tokens; }

  // The smallest sequence that the step fits into; the last ones fit every step.
  int fitting_sequence(const Step& step) const {
    const bool sessions = step.n_tokens > 1 && step.kv[0].base != step.kv[1].base;
    for (int i = 0; i < program_.n_sequences; ++i) {
      const Sequence& s = program_.sequences[i];
      if (s.tokens >= step.n_tokens && s.rows >= step.n_logits && (s.sessions || !sessions)) {
        return i;
      }
    }
    throw Failure(QIGEN_INTERNAL, "no sequence of launches fits %d tokens", step.n_tokens);
  }

  void write_head(const Step& step, const Sequence& sequence, const runtime::Sampling& sampling) {
    const int most = program_.max_tokens;
    auto* numbers = reinterpret_cast<int32_t*>(head_.data());
    int32_t *tokens = numbers, *positions = numbers + most, *rows = numbers + 2 * most;
    std::fill_n(tokens, most, 0);
    std::fill_n(positions, most, -1);
    std::fill_n(rows, most, 0);
    std::memcpy(tokens, step.tokens, sizeof(int32_t) * step.n_tokens);
    std::copy_n(step.positions, step.n_tokens, positions);
    std::copy_n(step.logit_rows, step.n_logits, rows);
    std::vector<Cache> caches;
    for (int i = 0; i < sequence.tokens; ++i) {
      const KvCache& kv = step.kv[i < step.n_tokens ? i : 0];
      caches.push_back({reinterpret_cast<uint64_t>(kv.base), kv.capacity});
    }
    std::memcpy(head_.data() + caches_offset(), caches.data(), sizeof(Cache) * caches.size());
    std::memcpy(head_.data() + sampling_offset(), &sampling, sizeof sampling);
  }

  void* record(const Sequence& sequence, Wanted wanted) {
    void *graph = nullptr, *executable = nullptr;
    driver_.check(driver_.cuStreamBeginCapture_v2(stream_, kThreadLocalCapture), "recording");
    int error = 0;
    for (int i = 0; i < sequence.n_launches && !error; ++i) {
      const Launch& launch = sequence.launches[i];
      if (launch.logits && wanted == Wanted::kNothing) continue;
      if (launch.choice && wanted != Wanted::kToken) continue;
      error = driver_.cuLaunchKernel(functions_[launch.kernel], launch.grid[0], launch.grid[1],
                                     launch.grid[2], launch.threads, 1, 1, launch.shared, stream_,
                                     argument_pointers_.data() + launch.first_argument, nullptr);
    }
    const int ended = driver_.cuStreamEndCapture(stream_, &graph);
    if (!error && !ended) error = driver_.cuGraphInstantiateWithFlags(&executable, graph, 0);
    if (graph) driver_.cuGraphDestroy(graph);
    driver_.check(error ? error : ended, "recording the launches of a step");
    return executable;
  }

  void release() {
    if (!context_) return;
    if (driver_.cuCtxPushCurrent_v2(context_) == 0) {
      for (void* graph : graphs_) {
        if (graph) driver_.cuGraphExecDestroy(graph);
      }
      if (stream_) driver_.cuStreamDestroy_v2(stream_);
      for (const Address memory : {weights_, arena_}) {
        if (memory) driver_.cuMemFree_v2(memory);
      }
      for (void* module : modules_) driver_.cuModuleUnload(module);
      void* popped;
      driver_.cuCtxPopCurrent_v2(&popped);
    }
    driver_.cuDevicePrimaryCtxRelease_v2(device_);
    context_ = nullptr;
  }

  const ModelDescription& description_;
  const Program& program_;
  const Driver driver_;
  std::mutex mutex_;
  int device_ = 0;
  int image_ = 0;
  char name_[128] = "";
  void* context_ = nullptr;
  void* stream_ = nullptr;
  Address weights_ = 0, arena_ = 0;
  std::vector<void*> modules_, functions_, argument_pointers_;
  std::vector<uint64_t> arguments_;
  std::vector<void*> graphs_;  // of each sequence, by what is wanted; null: not recorded yet
  std::vector<uint8_t> head_;
};

}  // namespace

runtime::Device* open_device(const ModelDescription& description, const uint8_t* weights) {
  return new CudaDevice(description, weights);
}

}  // namespace qigen::cuda
