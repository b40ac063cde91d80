// The machine that runs a decoded kernel: device memory, thread blocks, warps and their schedule.
//
// Sequentially consistent. What it looks for, all fatal: accesses outside of an allocation or
// misaligned, reads of bytes nobody wrote, values computed from registers nobody wrote reaching an
// address, a guard, memory or an mma; shared memory touched by two warps without a barrier between;
// data of another block read before that block published it by a fence; destinations of cp.async
// touched before the wait; collectives by part of a warp; barriers that not all reach; deadlock;
// too many instructions (livelock).
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ptx.h"

namespace ptx {

// Bytes of device memory, whether each was written, and who wrote it in the launch that runs.
struct Allocation {
  uint64_t base = 0, size = 0;
  std::vector<uint8_t> data, written;
  struct Writer {
    uint32_t launch = 0, block = 0, fences = 0;
  };
  std::vector<Writer> writers;               // for every 4 bytes: the last plain store
  uint64_t readBytes = 0, writtenBytes = 0;  // in sectors of 32 bytes, this launch
  std::vector<uint8_t> sectors;              // which were read (1) and written (2), this launch
};

class DeviceMemory {
 public:
  uint64_t allocate(uint64_t size);
  void release(uint64_t base);
  Allocation* find(uint64_t address, uint64_t size);  // null: outside of every allocation
  std::vector<std::unique_ptr<Allocation>>& all() { return allocations_; }
  uint64_t distance(uint64_t address, uint64_t size) const;  // to the nearest allocation
  uint32_t launches = 0;

 private:
  std::vector<std::unique_ptr<Allocation>> allocations_;  // by address
  size_t last_ = 0;
  uint64_t next_ = 0x300000000ull;
};

// What is known of a byte of shared memory; epochs count the barriers of the block.
struct SharedByte {
  uint32_t writeEpoch = 0, readEpoch = 0;
  uint16_t writer = 0, reader = 0;
  bool written = false, inFlight = false;
};
constexpr uint16_t kSeveralWarps = 0xffff;

struct Copy {
  uint32_t to;
  uint64_t from;
  uint32_t bytes, sourceBytes;
  int lane;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  int id = 0;
  std::vector<uint64_t> values;   // [register][lane]
  std::vector<uint32_t> defined;  // [register]: lanes that hold a value
  uint32_t live = 0, waiting = 0, parked = 0;
  bool converged = true;
  int pc = 0;                            // of all live lanes while converged
  int pcs[kLanes] = {};                  // of each lane otherwise
  std::vector<Copy> open;                // copies that no group holds yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Block {
  uint64_t id = 0;
  uint32_t index[3] = {};
  uint32_t fences = 0;
  std::vector<uint8_t> shared, local, localWritten;
  std::vector<SharedByte> bytes;
  std::vector<Warp> warps;
  uint32_t epoch = 1;
  int arrived = 0, live = 0;
};

enum class Policy : int {
  fair = 0,      // round robin
  random = 1,    // warps in random order, for random numbers of instructions
  priority = 2,  // one block as far as it goes before the next: finds missing acquires
};

struct Schedule {
  Policy policy = Policy::fair;
  uint64_t seed = 0;
  int resident = 8;             // blocks at a time
  int quantum = 64;             // instructions of a warp at a time
  uint64_t budget = 400000000;  // warp instructions of a launch
};

// What an instruction did: times executed, wavefronts of shared memory and sectors of device
// memory, each with the least number that the same bytes could take.
struct Count {
  uint64_t executed = 0, lanes = 0, wavefronts = 0, idealWavefronts = 0, sectors = 0,
           idealSectors = 0;
};

class Launch {
 public:
  Launch(const Kernel& kernel, DeviceMemory& memory, const uint32_t grid[3],
         const uint32_t threads[3], uint64_t dynamicShared, std::vector<uint8_t> parameters,
         const std::vector<uint64_t>& globals, const Schedule& schedule);
  void run();
  const std::vector<Count>& counts() const { return counts_; }

 private:
  // scheduler.cpp
  void start(Block& block, uint64_t id);
  bool step(Warp& warp, int instructions);  // whether it got on
  void setPc(Warp& warp, uint32_t lanes, int pc);
  void checkBarrier(Block& block);
  [[noreturn]] void deadlock(const std::vector<std::unique_ptr<Block>>& active);

  // memory.cpp
  uint8_t* global(Warp&, const Instruction&, uint64_t address, uint32_t bytes, uint32_t alignment,
                  bool write, bool plain);
  uint8_t* access(Warp&, const Instruction&, Space, uint64_t address, uint32_t bytes, bool write,
                  int lane);
  void readShared(Warp&, const Instruction&, uint64_t address, uint32_t bytes);
  void writeShared(Warp&, const Instruction&, uint64_t address, uint32_t bytes);
  void startCopy(Warp&, const Instruction&, const Copy&);
  void finishCopies(Warp&, const Instruction&, const std::vector<Copy>&);
  void countShared(Count&, const uint64_t* addresses, uint32_t lanes, uint32_t bytes);
  void countGlobal(Count&, const uint64_t* addresses, uint32_t lanes, uint32_t bytes, bool write);

  // execute.cpp: false if other warps should run before the next instruction of this one
  bool execute(Warp&, const Instruction&, uint32_t lanes);
  void arithmetic(Warp&, const Instruction&, uint32_t lanes);
  void integerWide(Warp&, const Instruction&, uint32_t lanes);
  void convert(Warp&, const Instruction&, uint32_t lanes);
  void move(Warp&, const Instruction&, uint32_t lanes);
  void compareAndSet(Warp&, const Instruction&, uint32_t lanes);
  void load(Warp&, const Instruction&, uint32_t lanes);
  void store(Warp&, const Instruction&, uint32_t lanes);
  void atomic(Warp&, const Instruction&, uint32_t lanes);
  void asyncCopy(Warp&, const Instruction&, uint32_t lanes);

  // collective.cpp
  void loadMatrix(Warp&, const Instruction&, uint32_t lanes);
  void findPlaces(Warp&, const Instruction&, uint8_t (&places)[16][32]);
  void multiplyMatrices(Warp&, const Instruction&, uint32_t lanes);
  void shuffle(Warp&, const Instruction&, uint32_t lanes);
  void vote(Warp&, const Instruction&, uint32_t lanes);

  uint64_t* values(Warp& w, const Operand& o) { return &w.values[size_t(o.index) * kLanes]; }
  uint32_t& defined(Warp& w, const Operand& o) { return w.defined[o.index]; }
  // Results are defined in the lanes where every source is.
  void define(Warp& w, const Operand& to, uint32_t lanes, uint32_t sources) {
    uint32_t& d = w.defined[to.index];
    d = (d & ~lanes) | (lanes & sources);
  }
  uint32_t sources(Warp& w, const Instruction& i, size_t first);
  void need(Warp& w, const Instruction& i, const Operand& o, uint32_t lanes, const char* what);
  [[noreturn]] void fail(const Warp&, const Instruction&, const std::string& what) const;
  Count& countOf(const Instruction& i) { return counts_[&i - kernel_.code.data()]; }

  const Kernel& kernel_;
  DeviceMemory& memory_;
  uint32_t grid_[3], threads_[3];
  uint64_t sharedBytes_;
  std::vector<uint8_t> parameters_;
  const std::vector<uint64_t>& globals_;
  Schedule schedule_;
  std::vector<Count> counts_;
  std::mt19937_64 random_;
  std::vector<uint32_t> fences_;  // of every block of the grid
  uint64_t executed_ = 0;
  bool spun_ = false;
};

// Compares two values of a type as setp and the atomics do.
bool compareValues(Compare, Type, uint64_t a, uint64_t b);
int64_t asInteger(Type, uint64_t bits);
double asDouble(Type, uint64_t bits);

}  // namespace ptx
