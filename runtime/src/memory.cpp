#include "memory.h"

#include <cinttypes>
#include <cstdlib>

#ifdef _WIN32
#include <malloc.h>
#include <windows.h>
#else
#include <sys/mman.h>
#endif

#include "error.h"

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace qigen::runtime {

namespace {

constexpr uint64_t kHugePage = uint64_t{2} << 20;

// Zeroed pages, which are taken when they are touched (Windows: promised at once); null if refused.
void* map_pages(uint64_t bytes) {
#ifdef _WIN32
  return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? nullptr : address;
#endif
}

void unmap_pages(void* address, [[maybe_unused]] uint64_t bytes) {
#ifdef _WIN32
  VirtualFree(address, 0, MEM_RELEASE);
#else
  munmap(address, bytes);
#endif
}

}  // namespace

#ifdef _WIN32
void* aligned_memory(uint64_t alignment, uint64_t bytes) {
  return _aligned_malloc(bytes, alignment);
}
void free_aligned(void* memory) { _aligned_free(memory); }
#else
void* aligned_memory(uint64_t alignment, uint64_t bytes) {
  return std::aligned_alloc(alignment, bytes);
}
void free_aligned(void* memory) { std::free(memory); }
#endif

LazyMemory::LazyMemory(uint64_t bytes, const char* purpose, Pages pages) : size_(bytes) {
  if (bytes == 0) return;
  // Only whole huge pages can be one: the mapping has room to begin at one.
  const bool huge = pages == Pages::kHuge && bytes >= kHugePage;
  mapped_ = huge ? bytes + kHugePage : bytes;
  void* address = map_pages(mapped_);
  if (!address) {
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
  if (mapping_) unmap_pages(mapping_, mapped_);
}

}  // namespace qigen::runtime
