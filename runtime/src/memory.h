// Zeroed, page-aligned memory that becomes resident page by page as it is touched.
#pragma once

#include <cstdint>

namespace qigen::runtime {

class LazyMemory {
 public:
  // Throws QIGEN_NO_MEMORY; `purpose` is named in the message. No bytes give a null pointer.
  LazyMemory(uint64_t bytes, const char* purpose);
  ~LazyMemory();
  LazyMemory(const LazyMemory&) = delete;
  LazyMemory& operator=(const LazyMemory&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  uint64_t size_;
};

}  // namespace qigen::runtime
