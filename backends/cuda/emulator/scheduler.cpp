// Blocks and warps: which runs when, how lanes part and meet again, barriers.

#include <algorithm>
#include <numeric>

#include "machine.h"

namespace ptx {

Launch::Launch(const Kernel& kernel, DeviceMemory& memory, const uint32_t grid[3],
               const uint32_t threads[3], uint64_t dynamicShared, std::vector<uint8_t> parameters,
               const std::vector<uint64_t>& globals, const Schedule& schedule)
    : kernel_(kernel),
      memory_(memory),
      sharedBytes_((kernel.sharedBytes + 15) / 16 * 16 + dynamicShared),
      parameters_(std::move(parameters)),
      globals_(globals),
      schedule_(schedule),
      counts_(kernel.code.size()),
      random_(schedule.seed) {
  std::copy(grid, grid + 3, grid_);
  std::copy(threads, threads + 3, threads_);
}

void Launch::fail(const Warp& w, const Instruction& i, const std::string& what) const {
  throw Finding(what + " [kernel " + kernel_.name + ", block " + std::to_string(w.block->id) +
                ", warp " + std::to_string(w.id) + ", line " + std::to_string(i.line) + ": " +
                i.text + "]");
}

void Launch::start(Block& block, uint64_t id) {
  const uint64_t threads = uint64_t(threads_[0]) * threads_[1] * threads_[2];
  block.id = id;
  block.index[0] = uint32_t(id % grid_[0]);
  block.index[1] = uint32_t(id / grid_[0] % grid_[1]);
  block.index[2] = uint32_t(id / grid_[0] / grid_[1]);
  block.shared.assign(sharedBytes_, 0xff);
  block.bytes.assign(sharedBytes_, SharedByte());
  block.live = int(threads);
  block.warps.resize((threads + kLanes - 1) / kLanes);
  block.local.assign(block.warps.size() * kLanes * kernel_.localBytes, 0xff);
  block.localWritten.assign(block.local.size(), 0);
  for (size_t n = 0; n < block.warps.size(); ++n) {
    Warp& w = block.warps[n];
    w.block = &block;
    w.id = int(n);
    w.values.assign(size_t(kernel_.registers) * kLanes, 0xdeadbeefdeadbeefull);
    w.defined.assign(kernel_.registers, 0);
    const auto fill = [&](int reg, uint64_t value) {
      std::fill_n(&w.values[size_t(reg) * kLanes], kLanes, value);
      w.defined[reg] = kAllLanes;
    };
    for (const Constant& c : kernel_.constants) fill(c.reg, c.value);
    for (int reg : kernel_.dynamicShared) fill(reg, (kernel_.sharedBytes + 15) / 16 * 16);
    for (size_t g = 0; g < globals_.size(); ++g) {
      fill(kernel_.globalAddresses[g].first, globals_[g]);
    }
    for (int d = 0; d < 3; ++d) {
      fill(3 + d, threads_[d]);
      fill(6 + d, block.index[d]);
      fill(9 + d, grid_[d]);
    }
    for (int special : {0, 1, 2, 12, 13, 14}) w.defined[special] = kAllLanes;
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t t = n * kLanes + l;
      if (t < threads) w.live |= 1u << l;
      w.values[0 * kLanes + l] = t % threads_[0];
      w.values[1 * kLanes + l] = t / threads_[0] % threads_[1];
      w.values[2 * kLanes + l] = t / threads_[0] / threads_[1];
      w.values[12 * kLanes + l] = l;
      w.values[13 * kLanes + l] = n;
      w.values[14 * kLanes + l] = (1u << l) - 1;
    }
  }
}

void Launch::setPc(Warp& w, uint32_t lanes, int pc) {
  if (w.converged && lanes == w.live) {
    w.pc = pc;
    return;
  }
  if (w.converged) {
    std::fill_n(w.pcs, kLanes, w.pc);
    w.converged = false;
  }
  for (int l = 0; l < kLanes; ++l) {
    if (lanes >> l & 1) w.pcs[l] = pc;
  }
}

void Launch::checkBarrier(Block& block) {
  if (!block.arrived || block.arrived != block.live) return;
  block.arrived = 0;
  ++block.epoch;
  for (Warp& w : block.warps) w.waiting = 0;
}

// Runs a warp. Lanes that parted run in the order of their places in the code, the hindmost first,
// and park at instructions that the warp must execute as one.
bool Launch::step(Warp& w, int instructions) {
  bool progress = false;
  while (instructions-- > 0) {
    const uint32_t ready = w.live & ~w.waiting;
    if (!ready) return progress;
    uint32_t lanes = ready;
    int pc = w.pc;
    if (!w.converged) {
      uint32_t candidates = ready & ~w.parked;
      const bool all = !candidates;
      if (all) candidates = ready;
      pc = int(kernel_.code.size());
      for (int l = 0; l < kLanes; ++l) {
        if (candidates >> l & 1) pc = std::min(pc, w.pcs[l]);
      }
      lanes = 0;
      for (int l = 0; l < kLanes; ++l) {
        if ((candidates >> l & 1) && w.pcs[l] == pc) lanes |= 1u << l;
      }
      const Instruction& at = kernel_.code[pc];
      if (all && lanes != ready) {
        fail(w, at, "a diverged warp waits at different instructions that need all of it");
      }
      if (lanes == w.live) {
        w.converged = true;
        w.parked = 0;
        w.pc = pc;
      } else if (all) {
        w.parked = 0;
      } else if (at.converges) {
        w.parked |= lanes;
        continue;
      }
    }
    const Instruction& i = kernel_.code[pc];
    uint32_t active = lanes;
    if (i.guard >= 0) {
      if (lanes & ~w.defined[i.guard]) fail(w, i, "a guard that nobody computed");
      const uint64_t* guard = &w.values[size_t(i.guard) * kLanes];
      for (int l = 0; l < kLanes; ++l) {
        if ((guard[l] != 0) == i.guardNegated) active &= ~(1u << l);
      }
    }
    Count& count = counts_[pc];
    count.executed += 1;
    count.lanes += __builtin_popcount(active);
    if (++executed_ > schedule_.budget) {
      fail(w, i, "more than " + std::to_string(schedule_.budget) + " instructions: livelock");
    }
    progress = true;
    Block& block = *w.block;
    if (i.op == Op::op_bra) {
      setPc(w, active, i.target);
      if (active != lanes) setPc(w, lanes & ~active, pc + 1);
    } else if (i.op == Op::op_ret || i.op == Op::op_exit) {
      setPc(w, lanes & ~active, pc + 1);
      w.live &= ~active;
      block.live -= __builtin_popcount(active);
      checkBarrier(block);
    } else if ((i.op == Op::op_bar || i.op == Op::op_barrier) && !i.warpBarrier) {
      if (active != w.live) fail(w, i, "a barrier that only a part of the warp reaches");
      setPc(w, lanes, pc + 1);
      w.waiting |= active;
      block.arrived += __builtin_popcount(active);
      checkBarrier(block);
    } else {
      const bool goOn = !active || execute(w, i, active);
      setPc(w, lanes, pc + 1);
      if (!goOn) {
        spun_ = true;
        return true;
      }
    }
  }
  return progress;
}

void Launch::deadlock(const std::vector<std::unique_ptr<Block>>& active) {
  std::string text = "deadlock [kernel " + kernel_.name + "]:";
  for (size_t b = 0; b < active.size() && b < 4; ++b) {
    text += " block " + std::to_string(active[b]->id) + " has " +
            std::to_string(active[b]->arrived) + " of " + std::to_string(active[b]->live) +
            " threads at a barrier;";
  }
  throw Finding(text);
}

void Launch::run() {
  const uint64_t total = uint64_t(grid_[0]) * grid_[1] * grid_[2];
  ++memory_.launches;
  fences_.assign(total, 0);
  for (auto& a : memory_.all()) {
    a->readBytes = a->writtenBytes = 0;
    std::fill(a->sectors.begin(), a->sectors.end(), uint8_t(0));
  }
  std::vector<uint64_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  std::vector<std::unique_ptr<Block>> active;
  uint64_t next = 0;
  while (next < total || !active.empty()) {
    while (next < total && active.size() < size_t(schedule_.resident)) {
      active.push_back(std::make_unique<Block>());
      start(*active.back(), order[next++]);
      if (schedule_.policy == Policy::priority) {  // the newest anywhere in the order of priority
        std::swap(active.back(), active[random_() % active.size()]);
      }
    }
    bool progress = false;
    const auto quantum = [&] {
      if (schedule_.policy == Policy::fair) return schedule_.quantum;
      return 1 + int(random_() % (2 * schedule_.quantum));
    };
    std::vector<Warp*> ready;
    for (auto& block : active) {
      std::vector<Warp*> own;
      for (Warp& w : block->warps) {
        if (w.live & ~w.waiting) own.push_back(&w);
      }
      if (schedule_.policy != Policy::fair) std::shuffle(own.begin(), own.end(), random_);
      if (schedule_.policy == Policy::priority) {
        // the next block runs only when this one is done, blocked, or spins on another's word
        spun_ = false;
        bool got = false;
        for (Warp* w : own) got = step(*w, quantum()) || got;
        progress = progress || got;
        if (got && !spun_) break;
      }
      ready.insert(ready.end(), own.begin(), own.end());
    }
    if (schedule_.policy != Policy::priority) {
      if (schedule_.policy == Policy::random) std::shuffle(ready.begin(), ready.end(), random_);
      for (Warp* w : ready) progress = step(*w, quantum()) || progress;
    }
    const auto done =
        std::remove_if(active.begin(), active.end(), [](const auto& b) { return b->live == 0; });
    if (done != active.end()) progress = true;
    active.erase(done, active.end());
    if (!progress) deadlock(active);
  }
}

}  // namespace ptx
