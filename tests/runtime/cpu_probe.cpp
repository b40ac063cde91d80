// Prints what cpu.cpp finds: "features: …", "allowed: N", and of the folder given "order: ID:SPEED
// …" for as many cores as the second argument says and "cgroup: N".
#include <cstdio>
#include <cstdlib>

#include "cpu.h"

int main(int count, char** arguments) {
  using namespace qigen::runtime;
  std::printf("features: %s\n", cpu_feature_names(cpu_features()).c_str());
  std::printf("allowed: %zu\n", allowed_cores().size());
  std::vector<int> cores;
  for (int i = 0; count > 2 && i < std::atoi(arguments[2]); ++i) cores.push_back(i);
  std::printf("order:");
  for (const Core& core : ordered_cores(cores, count > 1 ? arguments[1] : "")) {
    std::printf(" %d:%d", core.id, core.speed);
  }
  std::printf("\n");
  std::printf("cgroup: %d\n", cgroup_cores(count > 1 ? arguments[1] : ""));
}
