// Device, shared and local memory: addresses checked, who wrote what, asynchronous copies.

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {

uint64_t DeviceMemory::allocate(uint64_t size) {
  auto made = std::make_unique<Allocation>();
  made->base = next_;
  made->size = size;
  made->data.assign(size, 0xff);
  made->written.assign(size, 0);
  made->writers.resize(size / 4 + 1);
  made->sectors.assign(size / 32 + 1, 0);
  next_ += (size + 8191) / 4096 * 4096;  // never next to each other
  allocations_.push_back(std::move(made));
  return allocations_.back()->base;
}

void DeviceMemory::release(uint64_t base) {
  allocations_.erase(std::remove_if(allocations_.begin(), allocations_.end(),
                                    [&](const auto& a) { return a->base == base; }),
                     allocations_.end());
  last_ = 0;
}

Allocation* DeviceMemory::find(uint64_t address, uint64_t size) {
  const auto holds = [&](const Allocation& a) {
    return address >= a.base && size <= a.size && address - a.base <= a.size - size;
  };
  if (last_ < allocations_.size() && holds(*allocations_[last_])) return allocations_[last_].get();
  const auto after = std::upper_bound(allocations_.begin(), allocations_.end(), address,
                                      [](uint64_t a, const auto& x) { return a < x->base; });
  if (after == allocations_.begin()) return nullptr;
  const size_t at = after - allocations_.begin() - 1;
  if (!holds(*allocations_[at])) return nullptr;
  last_ = at;
  return allocations_[at].get();
}

uint64_t DeviceMemory::distance(uint64_t address, uint64_t size) const {
  uint64_t best = ~0ull;
  for (const auto& a : allocations_) {
    const uint64_t end = a->base + a->size;
    const uint64_t away = address < a->base      ? a->base - address
                          : address + size > end ? address + size - end
                                                 : 0;
    best = std::min(best, away);
  }
  return best;
}

uint8_t* Launch::global(Warp& w, const Instruction& i, uint64_t address, uint32_t bytes,
                        uint32_t alignment, bool write, bool plain) {
  Allocation* a = memory_.find(address, bytes);
  if (!a) {
    fail(w, i,
         "access outside of every allocation, " + std::to_string(memory_.distance(address, bytes)) +
             " bytes past the nearest");
  }
  if (address % alignment) fail(w, i, "misaligned access to device memory");
  const uint64_t at = address - a->base;
  if (!write) {
    for (uint32_t b = 0; b < bytes; ++b) {
      if (!a->written[at + b]) fail(w, i, "read of device memory that nobody wrote");
    }
  } else {
    std::memset(&a->written[at], 1, bytes);
  }
  if (!plain) return &a->data[at];
  const auto block = uint32_t(w.block->id);
  for (uint64_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    Allocation::Writer& last = a->writers[word];
    const bool foreign = last.launch == memory_.launches && last.block != block;
    if (foreign && fences_[last.block] == last.fences) {
      fail(w, i,
           std::string("race between blocks: ") + (write ? "write over" : "read of") +
               " what another block wrote and has not published by a fence");
    }
    if (write) last = {memory_.launches, block, w.block->fences};
  }
  return &a->data[at];
}

void Launch::readShared(Warp& w, const Instruction& i, uint64_t address, uint32_t bytes) {
  Block& block = *w.block;
  if (address + bytes > block.shared.size()) fail(w, i, "read outside of shared memory");
  if (address % bytes) fail(w, i, "misaligned access to shared memory");
  for (uint64_t b = address; b < address + bytes; ++b) {
    SharedByte& s = block.bytes[b];
    if (s.inFlight) fail(w, i, "read of the destination of a cp.async that nobody waited for");
    if (!s.written) fail(w, i, "read of shared memory that nobody wrote");
    if (s.writeEpoch == block.epoch && s.writer != w.id) {
      fail(w, i, "race in shared memory: read after a write by another warp without a barrier");
    }
    s.reader = s.readEpoch == block.epoch && s.reader != w.id ? kSeveralWarps : uint16_t(w.id);
    s.readEpoch = block.epoch;
  }
}

void Launch::writeShared(Warp& w, const Instruction& i, uint64_t address, uint32_t bytes) {
  Block& block = *w.block;
  if (address + bytes > block.shared.size()) fail(w, i, "write outside of shared memory");
  if (address % bytes) fail(w, i, "misaligned access to shared memory");
  for (uint64_t b = address; b < address + bytes; ++b) {
    SharedByte& s = block.bytes[b];
    if (s.inFlight) fail(w, i, "write over the destination of a cp.async in flight");
    if (s.writeEpoch == block.epoch && s.writer != w.id) {
      fail(w, i, "race in shared memory: write after a write by another warp without a barrier");
    }
    if (s.readEpoch == block.epoch && s.reader != w.id) {
      fail(w, i, "race in shared memory: write after a read by another warp without a barrier");
    }
    s.writeEpoch = block.epoch;
    s.writer = uint16_t(w.id);
    s.written = true;
  }
}

uint8_t* Launch::access(Warp& w, const Instruction& i, Space space, uint64_t address,
                        uint32_t bytes, bool write, int lane) {
  const uint64_t window = address >> 56 << 56;
  if (space == Space::generic) {
    space = window == kSharedWindow  ? Space::shared
            : window == kLocalWindow ? Space::local
                                     : Space::global;
  }
  if (space == Space::global) return global(w, i, address, bytes, bytes, write, !i.synchronizes);
  if (space == Space::shared) {
    address = window == kSharedWindow ? address - kSharedWindow : uint32_t(address);
    write ? writeShared(w, i, address, bytes) : readShared(w, i, address, bytes);
    return &w.block->shared[address];
  }
  const uint64_t at = window == kLocalWindow ? address - kLocalWindow : address;
  if (at + bytes > kernel_.localBytes) fail(w, i, "access outside of local memory");
  const uint64_t thread = uint64_t(w.id) * kLanes + lane, place = thread * kernel_.localBytes + at;
  for (uint32_t b = 0; b < bytes; ++b) {
    if (!write && !w.block->localWritten[place + b]) fail(w, i, "read of unwritten local memory");
    if (write) w.block->localWritten[place + b] = 1;
  }
  return &w.block->local[place];
}

void Launch::startCopy(Warp& w, const Instruction& i, const Copy& copy) {
  if (copy.sourceBytes > copy.bytes) fail(w, i, "cp.async reads more than it writes");
  if (copy.from % copy.bytes) fail(w, i, "misaligned access to device memory");
  if (copy.sourceBytes) global(w, i, copy.from, copy.sourceBytes, 1, false, true);
  writeShared(w, i, copy.to, copy.bytes);
  for (uint32_t b = 0; b < copy.bytes; ++b) w.block->bytes[copy.to + b].inFlight = true;
  std::memset(&w.block->shared[copy.to], 0xff, copy.bytes);  // NaN until it lands
}

void Launch::finishCopies(Warp& w, const Instruction& i, const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    for (uint32_t b = 0; b < copy.bytes; ++b) w.block->bytes[copy.to + b].inFlight = false;
    writeShared(w, i, copy.to, copy.bytes);
    uint8_t* to = &w.block->shared[copy.to];
    std::memset(to, 0, copy.bytes);
    if (copy.sourceBytes) {
      std::memcpy(to, global(w, i, copy.from, copy.sourceBytes, 1, false, true), copy.sourceBytes);
    }
  }
}

// Wavefronts of a shared access: lanes go in phases of 128 bytes; a bank serves one word a time.
void Launch::countShared(Count& count, const uint64_t* addresses, uint32_t lanes, uint32_t bytes) {
  const int phase = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += phase) {
    uint64_t words[32][33];
    int used[32] = {}, most = 0;
    bool any = false;
    for (int l = first; l < first + phase; ++l) {
      if (!(lanes >> l & 1)) continue;
      any = true;
      for (uint32_t b = 0; b < std::max(bytes, 4u); b += 4) {
        const uint64_t word = (addresses[l] + b) / 4;
        const int bank = int(word % 32);
        uint64_t* end = words[bank] + used[bank];
        if (std::find(words[bank], end, word) == end && used[bank] < 32) {
          *end = word;
          most = std::max(most, ++used[bank]);
        }
      }
    }
    if (!any) continue;
    count.wavefronts += std::max(most, 1);
    count.idealWavefronts += 1;
  }
}

void Launch::countGlobal(Count& count, const uint64_t* addresses, uint32_t lanes, uint32_t bytes,
                         bool write) {
  std::vector<uint64_t> sectors, distinct;
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    distinct.push_back(addresses[l]);
    for (uint64_t s = addresses[l] / 32; s <= (addresses[l] + bytes - 1) / 32; ++s) {
      sectors.push_back(s);
    }
  }
  const auto unique = [](std::vector<uint64_t>& v) {
    std::sort(v.begin(), v.end());
    v.erase(std::unique(v.begin(), v.end()), v.end());
  };
  unique(sectors);
  unique(distinct);
  count.sectors += sectors.size();
  count.idealSectors += (distinct.size() * bytes + 31) / 32;
  for (uint64_t s : sectors) {
    Allocation* a = memory_.find(s * 32, 1);
    if (!a) continue;
    (write ? a->writtenBytes : a->readBytes) += 32;
    a->sectors[(s * 32 - a->base) / 32] |= write ? 2 : 1;
  }
}

}  // namespace ptx
