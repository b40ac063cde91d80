// Choosing the next token from logits.
#pragma once

#include "qigen.h"

namespace qigen::runtime {

// Index of the greatest number, the lowest of several; -1 if there is none.
int32_t argmax(const float* logits, int32_t vocab);

// See qigen_sample; `sampler` has all fields. Throws QIGEN_USAGE for parameters out of range and
// QIGEN_BAD_INPUT for logits without a finite maximum.
int32_t sample(const float* logits, int32_t vocab, const qigen_sampler& sampler,
               const int32_t* history, int32_t n_history, uint64_t* rng);

// Throws QIGEN_USAGE for parameters out of range.
void check_sampler(const qigen_sampler& sampler);

// 53 random bits; splitmix64.
uint64_t random_bits(uint64_t* rng);

}  // namespace qigen::runtime
