// Prints what cpu.cpp makes of the answers of arch_prctl, made-up ones and the real one.
#include <cstdio>

#include "cpu.h"
#include "error.h"
#include "qigen/generated.h"

using namespace qigen::runtime;

static int asked_code;
static unsigned long asked_feature;

template <long kAnswer>
static long answer(int code, unsigned long feature) {
  asked_code = code;
  asked_feature = feature;
  return kAnswer;
}

int main() {
  const bool given = tiles_granted(answer<0>);
  std::printf("granted: %d after %#x %lu\n", given, asked_code, asked_feature);
  const bool refused = tiles_granted(answer<-1>);
  std::printf("granted: %d after %#x %lu\n", refused, asked_code, asked_feature);
  try {
    require_cpu(qigen::CpuFeature::amx_tile | qigen::CpuFeature::amx_int8, "amx");
    std::printf("runs\n");
  } catch (const Failure& failure) {
    std::printf("%d: %s\n", failure.status(), failure.what());
  }
}
