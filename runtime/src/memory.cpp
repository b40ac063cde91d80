#include "memory.h"

#include <sys/mman.h>

#include <cinttypes>

#include "error.h"

namespace qigen::runtime {

LazyMemory::LazyMemory(uint64_t bytes, const char* purpose) : size_(bytes) {
  if (bytes == 0) return;
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    throw Failure(QIGEN_NO_MEMORY,
                  "the system refused %" PRIu64 " bytes for the %s; use fewer or shorter sessions",
                  bytes, purpose);
  }
  data_ = static_cast<uint8_t*>(address);
}

LazyMemory::~LazyMemory() {
  if (data_) munmap(data_, size_);
}

}  // namespace qigen::runtime
