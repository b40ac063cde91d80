#include "memory.h"

#include <sys/mman.h>

#include <cinttypes>

#include "error.h"

namespace qigen::runtime {

namespace {
constexpr uint64_t kHugePage = uint64_t{2} << 20;
}

LazyMemory::LazyMemory(uint64_t bytes, const char* purpose, Pages pages) : size_(bytes) {
  if (bytes == 0) return;
  // Only whole huge pages can be one: the mapping has room to begin at one.
  const bool huge = pages == Pages::kHuge && bytes >= kHugePage;
  mapped_ = huge ? bytes + kHugePage : bytes;
  void* address = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    throw Failure(QIGEN_NO_MEMORY,
                  "the system refused %" PRIu64 " bytes for the %s; use fewer or shorter sessions",
                  bytes, purpose);
  }
  mapping_ = data_ = static_cast<uint8_t*>(address);
  if (huge) {
    data_ += (kHugePage - reinterpret_cast<uintptr_t>(data_) % kHugePage) % kHugePage;
#ifdef MADV_HUGEPAGE
    madvise(data_, size_, MADV_HUGEPAGE);  // a wish: small pages serve as well, only slower
#endif
  }
}

LazyMemory::~LazyMemory() {
  if (mapping_) munmap(mapping_, mapped_);
}

}  // namespace qigen::runtime
