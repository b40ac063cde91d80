// What the machine can do: instruction sets and usable cores.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace qigen::runtime {

// Bits of CpuFeature that the processor has and whose registers the operating system saves.
uint64_t cpu_features();

// Names of the features in `bits`, separated by spaces.
std::string cpu_feature_names(uint64_t bits);

// Throws QIGEN_MACHINE naming the features of `required` that are missing here.
void require_cpu(uint64_t required, const char* isa);

// Ids of the cores in this thread's affinity mask, ascending.
std::vector<int> allowed_cores();

// Cores' worth of time that the control groups of this process grant (cpu.max of version 2,
// cfs_quota of version 1), at least 1; INT_MAX if unlimited. `root` is put before /proc and /sys.
int cgroup_cores(const std::string& root = "");

// Threads that can run at the same time: the smaller of the two.
int usable_cores();

}  // namespace qigen::runtime
