// Prints what cpu.cpp finds: "features: …", "allowed: N", "cgroup: N" (below the folder given).
#include <cstdio>

#include "cpu.h"

int main(int count, char** arguments) {
  using namespace qigen::runtime;
  std::printf("features: %s\n", cpu_feature_names(cpu_features()).c_str());
  std::printf("allowed: %zu\n", allowed_cores().size());
  std::printf("cgroup: %d\n", cgroup_cores(count > 1 ? arguments[1] : ""));
}
