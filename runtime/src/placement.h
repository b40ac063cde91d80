// Where the weights lie on a machine with several memory nodes (sockets): a thread reads the memory
// of its own node faster, and the nodes read side by side.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"
#include "memory.h"
#include "qigen/generated.h"

namespace qigen::runtime {

enum class Placement {
  kShared,       // in the page cache, where the system put them
  kPartitioned,  // each page on the node of the thread whose rows it holds
  kInterleaved,  // the pages in turns on all nodes
  kReplicated,   // a copy on each node
};

// Weights of fewer bytes may lie in the last caches of a node: they stay where they are.
constexpr uint64_t kCachedWeights = uint64_t{32} << 20;

// The memory nodes of the cores that may be used; one if the system does not say.
struct Topology {
  std::vector<int> nodes;                  // ids
  std::vector<std::vector<int>> distance;  // [from][to] as the firmware declares it, 10: its own
  std::vector<uint64_t> free_bytes;        // of each node
};

// `root` is put before /sys.
Topology read_topology(const std::vector<Core>& cores, const std::string& root = "");

// What is to be placed, and for whom.
struct Load {
  uint64_t bytes;
  std::vector<int> thread_nodes;   // ids
  std::vector<int> thread_speeds;  // rows are dealt out by these
  bool by_rows;                    // every thread reads the same rows in every step
};

// Time of a pass over the weights, 1 being one node that reads its own memory alone. The slowest of
// all nodes counts, as giver and as reader; a distant byte counts as often as its distance says.
double relative_time(Placement placement, const Topology& topology, const Load& load);

// The placement of the least relative_time that is possible; of those within 5 % the one that comes
// first above.
Placement choose_placement(const Topology& topology, const Load& load);

// A name as QIGEN_PLACEMENT has it ("auto": `chosen`); throws QIGEN_USAGE for others, and
// QIGEN_UNSUPPORTED for a partition of what is not dealt out by rows.
Placement parse_placement(const std::string& text, Placement chosen, const Load& load);

// The node of each page: `matrices` say whose rows are where. kPartitioned and kInterleaved.
std::vector<int> page_nodes(Placement placement, uint64_t page_bytes, const Topology& topology,
                            const Load& load, const Matrix* matrices, int n_matrices);

// The weights of a model where its threads want them.
class PlacedWeights {
 public:
  // `weights` stay mapped as long as this. What the system refuses is said by `description`.
  PlacedWeights(const uint8_t* weights, Placement placement, const Topology& topology,
                const std::vector<Core>& cores, const Load& load, const Matrix* matrices,
                int n_matrices);

  const std::string& description() const { return description_; }

  // Of each thread; empty: all read the mapped file.
  const std::vector<const uint8_t*>& copies() const { return copies_; }

 private:
  void move(const uint8_t* weights, const std::vector<int>& nodes, uint64_t page_bytes);

  std::string description_;
  std::vector<std::unique_ptr<LazyMemory>> memory_;
  std::vector<const uint8_t*> copies_;
};

}  // namespace qigen::runtime
