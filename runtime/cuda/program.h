// What the generated code of a GPU artifact says: kernels, and the launches of a step. Data only.
#pragma once

#include <cstdint>

namespace qigen::cuda {

// Machine code of one architecture, or PTX that the driver compiles for later ones.
struct Image {
  int32_t capability;  // 10 major + minor
  bool ptx;
  uint64_t offset, bytes;  // in Program::blob; PTX ends with a zero byte
};

struct Module {
  const char* name;
  const Image* images;  // [Program::n_images], the same architectures for every module
};

struct Kernel {
  int32_t module;
  const char* name;
};

enum class ArgumentKind : uint8_t {
  kValue,    // the number itself, 4 or 8 bytes
  kArena,    // an address: offset in the arena
  kWeights,  // an address: offset in weights.bin
};

struct Argument {
  ArgumentKind kind;
  uint64_t value;
};

struct Launch {
  int32_t kernel;
  int32_t grid[3];
  int32_t threads;
  uint32_t shared;  // dynamic, bytes
  int32_t first_argument, n_arguments;
  bool logits;  // only needed if logits are wanted
  bool choice;  // only needed if the next token is to be chosen from them
};

// The launches of a step of up to `tokens` tokens, whose padding the kernels know by position -1.
// Nothing in them changes from step to step.
struct Sequence {
  int32_t tokens;
  int32_t rows;   // of logits, 1 to tokens
  bool sessions;  // the tokens are of several sessions
  const Launch* launches;
  int32_t n_launches;
};

// Cosines and sines of all positions, float pairs [max_seq][pairs].
struct Angles {
  const double* frequencies;
  int32_t pairs;
  double position_scale;
  float factor;
  uint64_t offset;  // in the arena
};

struct Program {
  int32_t cuda_version;  // of the compiler: 1000 major + 10 minor; PTX needs a driver that new
  const char* targets;   // names of the architectures, for messages
  const uint64_t* blob;  // the images
  int32_t n_images, n_modules, n_kernels, n_sequences, n_angles;
  const Module* modules;
  const Kernel* kernels;
  const Argument* arguments;
  const Sequence* sequences;
  const Angles* angles;
  // The head of the arena, written before a step: int32 tokens[max_tokens], positions[max_tokens]
  // and rows[max_tokens], then, from the next multiple of 16 bytes on, {uint64 base, int64
  // capacity} caches[max_tokens] and a runtime::Sampling. Behind it, the int32 that is chosen.
  int32_t max_tokens;
  uint64_t logits;  // offset in the arena: float[max_tokens][vocab]
};

}  // namespace qigen::cuda
