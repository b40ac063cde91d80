#include "placement.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "error.h"

namespace qigen::runtime {
namespace {

constexpr int kOwn = 10;  // a node's distance to itself
constexpr double kAsGood = 1.05;
constexpr const char* kNames[] = {"shared", "partitioned", "interleaved", "replicated"};

const char* name(Placement placement) { return kNames[static_cast<int>(placement)]; }

size_t index_of(const Topology& topology, int node) {
  const auto found = std::find(topology.nodes.begin(), topology.nodes.end(), node);
  return found == topology.nodes.end() ? 0 : static_cast<size_t>(found - topology.nodes.begin());
}

// The part of the weights that the threads of each node read.
std::vector<double> node_shares(const Topology& topology, const Load& load) {
  std::vector<double> shares(topology.nodes.size());
  double all = 0;
  for (size_t t = 0; t < load.thread_nodes.size(); ++t) {
    shares[index_of(topology, load.thread_nodes[t])] += load.thread_speeds[t];
    all += load.thread_speeds[t];
  }
  for (double& share : shares) share /= all;
  return shares;
}

// "Node 0 MemFree:  123 kB"
uint64_t free_memory(const std::string& path) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t at = line.find("MemFree:");
    if (at != std::string::npos) return std::strtoull(line.c_str() + at + 8, nullptr, 10) << 10;
  }
  return 0;
}

bool fits_each_node(const Topology& topology, uint64_t bytes) {
  return std::all_of(topology.free_bytes.begin(), topology.free_bytes.end(),
                     [&](uint64_t free) { return free > bytes + bytes / 4; });
}

}  // namespace

Topology read_topology(const std::vector<Core>& cores, const std::string& root) {
  Topology topology;
  for (const Core& core : cores) topology.nodes.push_back(core.node);
  std::sort(topology.nodes.begin(), topology.nodes.end());
  topology.nodes.erase(std::unique(topology.nodes.begin(), topology.nodes.end()),
                       topology.nodes.end());
  const std::string system = root + "/sys/devices/system/node/";
  const std::vector<int> online = read_list(system + "online");
  for (const int from : topology.nodes) {
    const std::string folder = system + "node" + std::to_string(from);
    std::vector<int> row(topology.nodes.size(), 2 * kOwn);
    row[index_of(topology, from)] = kOwn;
    std::ifstream file(folder + "/distance");  // to each node that is online
    int distance;
    for (size_t i = 0; i < online.size() && file >> distance; ++i) {
      const auto to = std::find(topology.nodes.begin(), topology.nodes.end(), online[i]);
      if (to == topology.nodes.end() || distance < kOwn) continue;
      row[static_cast<size_t>(to - topology.nodes.begin())] = distance;
    }
    topology.distance.push_back(row);
    topology.free_bytes.push_back(free_memory(folder + "/meminfo"));
  }
  return topology;
}

double relative_time(Placement placement, const Topology& topology, const Load& load) {
  const size_t n = topology.nodes.size();
  const std::vector<double> shares = node_shares(topology, load);
  double slowest = 0;
  std::vector<double> given(n);
  for (size_t reader = 0; reader < n; ++reader) {
    double read = 0;
    for (size_t giver = 0; giver < n; ++giver) {
      double part = 0;
      switch (placement) {
        case Placement::kShared:  // whoever wrote the file had it on one node
          part = giver == 0;
          break;
        case Placement::kInterleaved:
          part = 1.0 / static_cast<double>(n);
          break;
        case Placement::kPartitioned:
        case Placement::kReplicated:
          part = giver == reader;
          break;
      }
      const double time = shares[reader] * part * topology.distance[reader][giver] / kOwn;
      read += time;
      given[giver] += time;
    }
    slowest = std::max(slowest, read);
  }
  return std::max(slowest, *std::max_element(given.begin(), given.end()));
}

Placement choose_placement(const Topology& topology, const Load& load) {
  if (topology.nodes.size() < 2 || load.bytes < kCachedWeights) return Placement::kShared;
  std::vector<Placement> possible = {Placement::kShared};
  if (load.by_rows) possible.push_back(Placement::kPartitioned);
  possible.push_back(Placement::kInterleaved);
  if (fits_each_node(topology, load.bytes)) possible.push_back(Placement::kReplicated);
  double least = relative_time(Placement::kShared, topology, load);
  for (const Placement p : possible) least = std::min(least, relative_time(p, topology, load));
  return *std::find_if(possible.begin(), possible.end(), [&](Placement p) {
    return relative_time(p, topology, load) <= kAsGood * least;
  });
}

Placement parse_placement(const std::string& text, Placement chosen, const Load& load) {
  if (text == "auto") return chosen;
  for (int i = 0; i < 4; ++i) {
    if (text != kNames[i]) continue;
    const auto placement = static_cast<Placement>(i);
    if (placement == Placement::kPartitioned && !load.by_rows) {
      throw Failure(QIGEN_UNSUPPORTED,
                    "QIGEN_PLACEMENT is partitioned, but this model's work is not dealt out by "
                    "rows; choose auto, shared, interleaved or replicated");
    }
    return placement;
  }
  throw Failure(QIGEN_USAGE,
                "QIGEN_PLACEMENT is '%s'; choose auto, shared, partitioned, interleaved or "
                "replicated",
                text.c_str());
}

std::vector<int> page_nodes(Placement placement, uint64_t page_bytes, const Topology& topology,
                            const Load& load, const Matrix* matrices, int n_matrices) {
  std::vector<int> nodes((load.bytes + page_bytes - 1) / page_bytes);
  for (size_t i = 0; i < nodes.size(); ++i) nodes[i] = topology.nodes[i % topology.nodes.size()];
  if (placement != Placement::kPartitioned) return nodes;
  std::vector<uint64_t> starts = {0};
  for (const int speed : load.thread_speeds) {
    starts.push_back(starts.back() + static_cast<uint64_t>(speed));
  }
  for (int first = 0, next; first < n_matrices; first = next) {
    uint64_t total = 0;
    for (next = first; next < n_matrices && matrices[next].step == matrices[first].step; ++next) {
      total += matrices[next].bytes;
    }
    // the matrices of a step are one sequence of rows, of which each thread takes a piece
    for (size_t t = 0; t < load.thread_nodes.size(); ++t) {
      const uint64_t low = total * starts[t] / starts.back();
      const uint64_t high = total * starts[t + 1] / starts.back();
      uint64_t before = 0;
      for (int i = first; i < next; before += matrices[i].bytes, ++i) {
        const uint64_t begin = std::max(low, before);
        const uint64_t end = std::min(high, before + matrices[i].bytes);
        if (begin >= end) continue;
        const uint64_t from = matrices[i].offset + begin - before;
        const uint64_t to = matrices[i].offset + end - before;
        for (uint64_t page = from / page_bytes; page <= (to - 1) / page_bytes; ++page) {
          nodes[page] = load.thread_nodes[t];
        }
      }
    }
  }
  return nodes;
}

PlacedWeights::PlacedWeights(const uint8_t* weights, Placement placement, const Topology& topology,
                             const std::vector<Core>& cores, const Load& load,
                             const Matrix* matrices, int n_matrices)
    : description_(name(placement)) {
  if (placement == Placement::kShared) return;
  const std::string over = " over " + std::to_string(topology.nodes.size()) +
                           (topology.nodes.size() == 1 ? " node" : " nodes");
  description_ += over;
  if (placement == Placement::kReplicated) {
    std::vector<std::thread> copiers;
    for (const int node : topology.nodes) {
      memory_.push_back(
          std::make_unique<LazyMemory>(load.bytes, "copy of the weights on a node", Pages::kHuge));
      uint8_t* copy = memory_.back()->data();
      // a page lies on the node of the thread that touches it first
      copiers.emplace_back([=] { std::memcpy(copy, weights, load.bytes); });
      keep_on_cores(copiers.back(), cores_of_node(cores, node));
    }
    for (std::thread& copier : copiers) copier.join();
    for (const int node : load.thread_nodes) {
      copies_.push_back(memory_[index_of(topology, node)]->data());
    }
    return;
  }
#ifdef __linux__
  const auto page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  move(weights, page_nodes(placement, page_bytes, topology, load, matrices, n_matrices),
       page_bytes);
#else
  static_cast<void>(matrices), static_cast<void>(n_matrices);
  description_ = "shared (this system cannot move pages)";
#endif
}

#ifdef __linux__

// Pages of the mapped file move to their nodes: nothing is copied that was not in the page cache.
void PlacedWeights::move(const uint8_t* weights, const std::vector<int>& nodes,
                         uint64_t page_bytes) {
  constexpr int kMoveOwnPages = 2;  // MPOL_MF_MOVE
  constexpr size_t kTogether = 1 << 14;
  size_t there = 0;
  for (size_t first = 0; first < nodes.size(); first += kTogether) {
    const size_t count = std::min(kTogether, nodes.size() - first);
    std::vector<const void*> pages(count);
    std::vector<int> status(count, -1);
    for (size_t i = 0; i < count; ++i) {
      const uint8_t* page = weights + (first + i) * page_bytes;
      static_cast<void>(*static_cast<const volatile uint8_t*>(page));  // only what is there moves
      pages[i] = page;
    }
    if (syscall(SYS_move_pages, 0, count, pages.data(), nodes.data() + first, status.data(),
                kMoveOwnPages) < 0) {
      description_ =
          std::string("shared (the system refuses to move pages: ") + std::strerror(errno) + ")";
      return;
    }
    for (size_t i = 0; i < count; ++i) there += status[i] == nodes[first + i];
  }
  // others that map the file keep their pages
  if (there < nodes.size()) {
    description_ += " (" + std::to_string(100 * there / nodes.size()) + " % of the pages)";
  }
}

#endif

}  // namespace qigen::runtime
