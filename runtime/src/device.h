// A device that runs the steps of a model in the place of the threads of the pool: a GPU.
#pragma once

#include "qigen/generated.h"

namespace qigen::runtime {

// How the next token is chosen on a device; numbers as its kernel takes them.
struct Sampling {
  float scale;  // log2(e) / temperature; 0: the greatest logit
  int32_t top_k;
  uint64_t top_p;       // in 2^-64; 0: all
  uint64_t min_weight;  // of the greatest, in 2^-40; 0: all
  uint64_t random;      // in 2^-64
};

// Weights and arena belong to the device. Every function may be called from any thread.
class Device {
 public:
  Device() = default;
  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Memory of the device for a cache of `capacity` positions. Throws QIGEN_NO_MEMORY.
  virtual KvCache create_cache(int64_t capacity) = 0;
  virtual void destroy_cache(const KvCache& cache) = 0;

  // Runs a step; tokens, positions and logits are on the host. One step at a time.
  virtual void run(const Step& step) = 0;

  // Runs a step of one session that wants logits of its last token, which stay on the device.
  // Returns the token that they give, -1 if none of them is a finite maximum.
  virtual int32_t choose(const Step& step, const Sampling& sampling) = 0;
};

// The cache of a session on a device.
class DeviceCache {
 public:
  // Nothing if there is no device.
  DeviceCache(Device* device, int64_t capacity)
      : device_(device), cache_(device ? device->create_cache(capacity) : KvCache{}) {}
  ~DeviceCache() {
    if (device_) device_->destroy_cache(cache_);
  }
  DeviceCache(const DeviceCache&) = delete;
  DeviceCache& operator=(const DeviceCache&) = delete;

  const KvCache& cache() const { return cache_; }

 private:
  Device* device_;
  KvCache cache_;
};

}  // namespace qigen::runtime
