// How fast threads read memory: the yardstick of `qigen bench`.
#pragma once

#include <cstdint>

namespace qigen {

// Bytes that `threads` threads read from memory together in a second, one sequential stream each:
// the median of `repeats` passes over a buffer of `bytes`, which should be far larger than the
// caches. Throws std::bad_alloc, and std::system_error if threads can't be started.
double stream_read_bytes_per_second(int threads, int64_t bytes, int repeats);

}  // namespace qigen
