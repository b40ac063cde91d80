// Zeroed, page-aligned memory that becomes resident page by page as it is touched.
#pragma once

#include <cstdint>

namespace qigen::runtime {

// Huge pages spare address translations where all of the memory is used; they become resident 2 MiB
// at a time.
enum class Pages { kSmall, kHuge };

// Memory of a multiple of `alignment` bytes; null if the system has none. free_aligned gives it
// back.
void* aligned_memory(uint64_t alignment, uint64_t bytes);
void free_aligned(void* memory);

class LazyMemory {
 public:
  // Throws QIGEN_NO_MEMORY; `purpose` is named in the message. No bytes give a null pointer.
  LazyMemory(uint64_t bytes, const char* purpose, Pages pages = Pages::kSmall);
  ~LazyMemory();
  LazyMemory(const LazyMemory&) = delete;
  LazyMemory& operator=(const LazyMemory&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  uint8_t* mapping_ = nullptr;
  uint64_t size_, mapped_ = 0;
};

}  // namespace qigen::runtime
