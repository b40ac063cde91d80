#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "error.h"

namespace qigen::runtime {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    throw Failure(QIGEN_BAD_INPUT, "%s: %s; give the folder that qigen compile wrote", path.c_str(),
                  std::strerror(errno));
  }
  struct stat status;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(file);
    throw Failure(QIGEN_BAD_INPUT, "%s is not a regular file; compile the model again",
                  path.c_str());
  }
  size_ = static_cast<uint64_t>(status.st_size);
  if (size_ > 0) {
    void* address = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
    const int error = errno;
    if (address == MAP_FAILED) {
      close(file);
      throw Failure(QIGEN_NO_MEMORY, "%s: can't be mapped: %s", path.c_str(), std::strerror(error));
    }
    data_ = static_cast<const uint8_t*>(address);
  }
  close(file);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<uint8_t*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace qigen::runtime
