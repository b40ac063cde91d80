// What the machine can do: instruction sets and usable cores.
#pragma once

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace qigen::runtime {

// Bits of CpuFeature that the processor has and whose registers the operating system saves.
uint64_t cpu_features();

// Names of the features in `bits`, separated by spaces.
std::string cpu_feature_names(uint64_t bits);

// Those of `wanted` that are there and that this process may use. Linux gives tile registers (AMX)
// only to those who ask, and this asks for the whole process if they are wanted.
uint64_t granted_features(uint64_t wanted);

// Whether the system call arch_prctl, or what stands for it, gives the tile registers.
bool tiles_granted(long (*request)(int code, unsigned long feature));

// Throws QIGEN_MACHINE naming the features of `required` that are missing here.
void require_cpu(uint64_t required, const char* isa);

// Ids of the cores in this thread's affinity mask, ascending.
std::vector<int> allowed_cores();

// A core, its speed beside the fastest one's in 1/1024, and its memory node.
struct Core {
  int id;
  int speed;
  int node;
};

// The order in which threads take cores: fast ones before slow ones, one of each physical core
// before their second ones, and those of a memory node side by side. The speeds are those that the
// system declares: cpu_capacity (arm64); for Intel's efficiency cores (devices/cpu_atom) half, as
// their vector units are half as wide, by the ratio of the highest clocks. `root` is put before
// /sys; without it cores are equal.
// Of equal cores, `spread` threads take as many on each node (0: they fill one node after the
// other).
std::vector<Core> ordered_cores(const std::vector<int>& cores, const std::string& root = "",
                                int spread = 0);

// The ids of the cores of a memory node.
std::vector<int> cores_of_node(const std::vector<Core>& cores, int node);

// Lets a thread run on some cores alone. Only a preference: cores that were taken away meanwhile
// are no reason to fail.
void keep_on_cores(std::thread& thread, const std::vector<int>& cores);

// The numbers of a list like "0-3,8" in a file; none if it cannot be read.
std::vector<int> read_list(const std::string& path);

// Speeds from a list like "1024,1024,512", for threads in their order; throws QIGEN_USAGE for
// anything else. The last one is that of all further threads.
std::vector<int> parse_speeds(const std::string& text, int threads);

// Cores' worth of time that the control groups of this process grant (cpu.max of version 2,
// cfs_quota of version 1), at least 1; INT_MAX if unlimited. `root` is put before /proc and /sys.
int cgroup_cores(const std::string& root = "");

// Threads that can run at the same time: the smaller of the two.
int usable_cores();

}  // namespace qigen::runtime
