#include "model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu.h"
#include "error.h"

namespace qigen::runtime {
namespace {

constexpr int kMaxThreads = 1024;

// The first of the variants, the fastest ahead, that this machine can run; the last if there is
// none.
const ModelDescription& fitting_variant() {
  const ModelDescription* variant = &qigen_model_description;
  while (granted_features(variant->cpu_features) != variant->cpu_features && variant->next) {
    variant = variant->next;
  }
  return *variant;
}

const ModelDescription& checked_description() {
  const ModelDescription& description = fitting_variant();
  if (description.abi != QIGEN_ABI_VERSION) {
    throw Failure(
        QIGEN_MACHINE,
        "the kernels of this artifact were generated for ABI version %u of qigen, its runtime "
        "has version %u; compile the model again",
        description.abi, QIGEN_ABI_VERSION);
  }
  std::string isas = qigen_model_description.isa;
  for (const ModelDescription* other = qigen_model_description.next; other; other = other->next) {
    isas += std::string(" or ") + other->isa;
  }
  require_cpu(description.cpu_features, isas.c_str());
  return description;
}

Vocabulary open_vocabulary(const std::string& path, int32_t vocab) {
  // Models that aren't language models have none.
  if (!file_exists(path)) return {};
  return Vocabulary(path, vocab);
}

int thread_count(int32_t asked) {
  if (asked < 0 || asked > kMaxThreads) {
    throw Failure(QIGEN_USAGE, "%d threads are asked for; give 1 to %d, or 0 for all usable cores",
                  asked, kMaxThreads);
  }
  return asked > 0 ? asked : std::min(usable_cores(), kMaxThreads);
}

// A model with a device needs the calling thread alone.
int pool_threads(const ModelDescription& description, int32_t asked) {
  const int threads = thread_count(asked);
  return description.open_device ? 1 : threads;
}

// Few threads take as many cores on each memory node.
std::vector<Core> cores_for(const ModelDescription& description, int threads) {
  const bool spread = description.weights_bytes >= kCachedWeights;
  return ordered_cores(allowed_cores(), "", spread ? threads : 0);
}

Load load_of(const ModelDescription& description, int threads, const std::vector<Core>& cores,
             bool pin) {
  Load load{description.weights_bytes, {}, {}, description.matrices != nullptr};
  for (int t = 0; t < threads; ++t) {
    const Core& core = cores[static_cast<size_t>(t) % cores.size()];
    load.thread_nodes.push_back(core.node);
    load.thread_speeds.push_back(pin ? core.speed : 1);
  }
  // speeds of the threads that the user declares count for all
  if (const char* declared = std::getenv("QIGEN_CORE_SPEEDS")) {
    load.thread_speeds = parse_speeds(declared, threads);
  }
  return load;
}

Placement placement_of(const Topology& topology, const Load& load) {
  const char* asked = std::getenv("QIGEN_PLACEMENT");
  return parse_placement(asked ? asked : "auto", choose_placement(topology, load), load);
}

ThreadPool::Stay stay_of(bool pin, Placement placement) {
  if (pin) return ThreadPool::Stay::kOnCore;
  const bool by_node = placement == Placement::kPartitioned || placement == Placement::kReplicated;
  return by_node ? ThreadPool::Stay::kOnNode : ThreadPool::Stay::kAnywhere;
}

int spin_time(int32_t asked) {
  if (asked == 0) return ThreadPool::kDefaultSpinUs;
  return std::max(asked, 0);
}

}  // namespace

Model::Model(const std::string& folder, const qigen_load_options& options)
    : description_(checked_description()),
      weights_(open_weights(folder + "/weights.bin", description_)),
      vocabulary_(open_vocabulary(folder + "/vocab.bin", description_.vocab)),
      cores_(cores_for(description_, pool_threads(description_, options.threads))),
      load_(load_of(description_, pool_threads(description_, options.threads), cores_,
                    options.pin != 0)),
      topology_(read_topology(cores_)),
      placement_(description_.open_device ? Placement::kShared : placement_of(topology_, load_)),
      pool_(pool_threads(description_, options.threads), stay_of(options.pin != 0, placement_),
            spin_time(options.spin_us), cores_),
      placed_(weights_.data(), placement_, topology_, cores_, load_, description_.matrices,
              description_.n_matrices),
      arena_(description_.open_device
                 ? 0
                 : description_.arena_bytes + pool_.threads() * description_.arena_bytes_per_thread,
             "arena", description_.graph ? Pages::kHuge : Pages::kSmall),
      graph_(description_.graph ? std::make_unique<Graph>(*description_.graph) : nullptr),
      device_(description_.open_device ? description_.open_device(description_, weights_.data())
                                       : nullptr) {
  pool_.set_weights(placed_.copies());
}

void Model::check_tokens(const int32_t* tokens, int32_t n) const {
  for (int32_t i = 0; i < n; ++i) {
    if (tokens[i] >= 0 && tokens[i] < description_.vocab) continue;
    throw Failure(
        QIGEN_BAD_INPUT,
        "token %d has id %d, but ids of this model are 0 to %d; use the model's tokenizer", i,
        tokens[i], description_.vocab - 1);
  }
}

int32_t Model::choose(Step step, const Sampling& sampling) {
  return device_->choose(step, sampling);
}

void Model::run(Step step) {
  step.logits_stride = description_.vocab;
  if (device_) return device_->run(step);
  step.weights = weights_.data();
  step.arena = arena_.data();
  step.shares = pool_.shares();
  pool_.run(description_.step, step);
}

void Model::run(const GraphStep& graph, uint8_t* arena) {
  Step step{};
  step.weights = weights_.data();
  step.arena = arena ? arena : arena_.data();
  step.graph = &graph;
  pool_.run(description_.step, step);
}

void Model::get_info(qigen_model_info* info) const {
  qigen_model_info full{};
  full.struct_size = info->struct_size;
  full.name = description_.name;
  full.isa = description_.isa;
  full.kv_format = description_.kv_format;
  full.vocab = description_.vocab;
  full.max_seq = description_.max_seq;
  full.max_batch = description_.max_batch;
  full.max_tokens = description_.max_tokens;
  full.d_model = description_.d_model;
  full.n_layers = description_.n_layers;
  full.threads = pool_.threads();
  full.n_inputs = graph_ ? graph_->description().n_inputs : 1;
  full.n_outputs = graph_ ? graph_->description().n_outputs : 1;
  full.n_eos = vocabulary_.eos_count();
  full.eos = vocabulary_.eos();
  full.weights_bytes = description_.weights_bytes;
  full.arena_bytes = device_ ? description_.arena_bytes : arena_.size();
  full.kv_bytes_per_position = description_.kv_bytes_per_position;
  full.placement = placed_.description().c_str();
  std::memcpy(info, &full, std::min(info->struct_size, sizeof full));
}

}  // namespace qigen::runtime
