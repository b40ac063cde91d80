#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "error.h"

namespace qigen::runtime {
namespace {

struct Candidate {
  float logit;
  int32_t id;
  double weight;  // exp((logit - best) / temperature): the most probable token has 1
};

// Order of probability: the greater logit first, of equal ones the lower id.
bool more_probable(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

bool less_probable(const Candidate& a, const Candidate& b) { return more_probable(b, a); }

bool lower_id(const Candidate& a, const Candidate& b) { return a.id < b.id; }

// splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
uint64_t next_random(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// In [0, 1), with all 53 bits of a double.
double uniform(uint64_t* state) { return double(random_bits(state)) * 0x1p-53; }

}  // namespace

uint64_t random_bits(uint64_t* rng) { return next_random(rng) >> 11; }

void check_sampler(const qigen_sampler& sampler) {
  auto require = [](bool good, const char* what) {
    if (!good) throw Failure(QIGEN_USAGE, "sampling: %s", what);
  };
  require(std::isfinite(sampler.temperature) && sampler.temperature >= 0,
          "temperature must be 0 or more");
  require(sampler.top_k >= 0, "top_k must be 0 or more");
  require(sampler.top_p >= 0 && sampler.top_p <= 1, "top_p must be between 0 and 1");
  require(sampler.min_p >= 0 && sampler.min_p <= 1, "min_p must be between 0 and 1");
  require(std::isfinite(sampler.repetition_penalty) && sampler.repetition_penalty >= 0,
          "repetition_penalty must be positive, or 0 for none");
}

namespace {

// Penalty of Keskar et al. (CTRL, 2019), once for each different token of the history.
void penalize(std::vector<float>* logits, const int32_t* history, int32_t n, float penalty) {
  std::vector<int32_t> tokens(history, history + n);
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  for (int32_t token : tokens) {
    if (token < 0 || token >= static_cast<int32_t>(logits->size())) {
      throw Failure(QIGEN_BAD_INPUT, "the history holds token %d, outside the vocabulary", token);
    }
    float& logit = (*logits)[token];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

// The k most probable tokens. In a heap whose front is the least probable of them, because all but
// a few of a hundred thousand fail at the first comparison. NaN is left out.
std::vector<Candidate> most_probable(const float* logits, int32_t vocab, int32_t k) {
  std::vector<Candidate> heap;
  heap.reserve(k);
  for (int32_t id = 0; id < vocab; ++id) {
    const bool full = static_cast<int32_t>(heap.size()) == k;
    // The front has a lower id, so of equal logits it stays.
    if (std::isnan(logits[id]) || (full && !(logits[id] > heap.front().logit))) continue;
    if (full) {
      std::pop_heap(heap.begin(), heap.end(), more_probable);
      heap.pop_back();
    }
    heap.push_back({logits[id], id, 0});
    if (k < vocab) std::push_heap(heap.begin(), heap.end(), more_probable);
  }
  return heap;
}

double sum_of_weights(const std::vector<Candidate>& candidates) {
  double sum = 0;
  for (const Candidate& candidate : candidates) sum += candidate.weight;
  return sum;
}

// Keeps the fewest most probable candidates that together reach share top_p of the sum. A heap,
// because most often a few of a hundred thousand are enough.
void keep_top_p(std::vector<Candidate>* candidates, double top_p) {
  const double total = sum_of_weights(*candidates);
  auto end = candidates->end();
  std::make_heap(candidates->begin(), end, less_probable);
  double reached = 0;
  while (end != candidates->begin() && reached < top_p * total) {
    std::pop_heap(candidates->begin(), end, less_probable);
    reached += (--end)->weight;
  }
  candidates->erase(candidates->begin(), end);
}

}  // namespace

int32_t argmax(const float* logits, int32_t vocab) {
  // Maxima of blocks in lanes first, which compiles to vector instructions; a block is looked into
  // only if it beats all before it.
  constexpr int kLanes = 16;
  constexpr int32_t kBlock = 512;
  float best = -std::numeric_limits<float>::infinity();
  int32_t index = -1;
  for (int32_t start = 0; start < vocab; start += kBlock) {
    const int32_t end = std::min(start + kBlock, vocab);
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, best);
    int32_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] = logits[i + lane] > lanes[lane] ? logits[i + lane] : lanes[lane];
      }
    }
    for (; i < end; ++i) lanes[0] = logits[i] > lanes[0] ? logits[i] : lanes[0];
    const float block_best = *std::max_element(lanes, lanes + kLanes);
    if (block_best > best) {
      best = block_best;
      index = static_cast<int32_t>(std::find(logits + start, logits + end, best) - logits);
    }
  }
  return index;
}

int32_t sample(const float* logits, int32_t vocab, const qigen_sampler& sampler,
               const int32_t* history, int32_t n_history, uint64_t* rng) {
  check_sampler(sampler);
  std::vector<float> penalized;
  const bool penalty = sampler.repetition_penalty != 0 && sampler.repetition_penalty != 1;
  if (penalty && n_history > 0) {
    penalized.assign(logits, logits + vocab);
    penalize(&penalized, history, n_history, sampler.repetition_penalty);
    logits = penalized.data();
  }
  const int32_t best = argmax(logits, vocab);
  if (best < 0 || !std::isfinite(logits[best])) {
    throw Failure(QIGEN_BAD_INPUT, "no token can be chosen: the logits have no finite maximum");
  }
  if (sampler.temperature == 0) return best;

  const bool limited = sampler.top_k > 0 && sampler.top_k < vocab;
  std::vector<Candidate> candidates = most_probable(logits, vocab, limited ? sampler.top_k : vocab);
  for (Candidate& candidate : candidates) {
    const double distance = double{candidate.logit} - double{logits[best]};
    candidate.weight = std::exp(distance / sampler.temperature);
  }
  if (sampler.top_p > 0 && sampler.top_p < 1) keep_top_p(&candidates, sampler.top_p);
  if (sampler.min_p > 0) {
    auto improbable = [&](const Candidate& c) { return c.weight < double{sampler.min_p}; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), improbable),
                     candidates.end());
  }

  // The draw goes through the ids in ascending order, so it depends on the set and not on the
  // filters.
  if (!std::is_sorted(candidates.begin(), candidates.end(), lower_id)) {
    std::sort(candidates.begin(), candidates.end(), lower_id);
  }
  const double target = uniform(rng) * sum_of_weights(candidates);
  double reached = 0;
  for (const Candidate& candidate : candidates) {
    reached += candidate.weight;
    if (reached > target) return candidate.id;
  }
  return candidates.back().id;
}

}  // namespace qigen::runtime
