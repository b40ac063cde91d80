// Prints where the weights of a made-up model lie on a made-up machine. Arguments: the folder
// before /sys, cores, threads, bytes, whether rows are dealt out. A model of two steps: one matrix
// of 16 pages behind a page of something else; one of 4 pages and one of 12, one step together.
#include <cstdio>
#include <cstdlib>

#include "error.h"
#include "placement.h"

using namespace qigen::runtime;

int main(int, char** arguments) {
  std::vector<int> ids;
  for (int i = 0; i < std::atoi(arguments[2]); ++i) ids.push_back(i);
  const int threads = std::atoi(arguments[3]);
  const std::vector<Core> cores = ordered_cores(ids, arguments[1], threads);
  const Topology topology = read_topology(cores, arguments[1]);
  Load load{std::strtoull(arguments[4], nullptr, 10), {}, {}, arguments[5][0] == '1'};
  std::printf("cores:");
  for (int t = 0; t < threads; ++t) {
    const Core& core = cores[static_cast<size_t>(t) % cores.size()];
    load.thread_nodes.push_back(core.node);
    load.thread_speeds.push_back(core.speed);
    std::printf(" %d", core.id);
  }
  std::printf("\nnodes:");
  for (size_t i = 0; i < topology.nodes.size(); ++i) {
    std::printf(" %d:%llu", topology.nodes[i],
                static_cast<unsigned long long>(topology.free_bytes[i]));
    for (const int distance : topology.distance[i]) std::printf(":%d", distance);
  }
  std::printf("\ntimes:");
  for (int p = 0; p < 4; ++p) {
    std::printf(" %.3f", relative_time(static_cast<Placement>(p), topology, load));
  }
  std::printf("\nchosen: %d\n", static_cast<int>(choose_placement(topology, load)));
  load.bytes = 33 * 4096;
  const qigen::Matrix matrices[] = {
      {4096, 16 * 4096, 0}, {17 * 4096, 4 * 4096, 1}, {21 * 4096, 12 * 4096, 1}};
  std::printf("pages:");
  for (const int node : page_nodes(Placement::kPartitioned, 4096, topology, load, matrices, 3)) {
    std::printf(" %d", node);
  }
  std::printf("\n");
}
