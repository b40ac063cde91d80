#include "mapped_file.h"

#include <cerrno>
#include <cstring>
#include <utility>

#ifdef _WIN32
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "error.h"

namespace qigen::runtime {

#ifdef _WIN32

namespace {

// Paths of the interface are UTF-8.
std::wstring wide(const std::string& text) {
  const int size = MultiByteToWideChar(CP_UTF8, 0, text.c_str(), -1, nullptr, 0);
  std::wstring result(static_cast<size_t>(size), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, text.c_str(), -1, result.data(), size);
  return result;
}

}  // namespace

bool file_exists(const std::string& path) {
  return GetFileAttributesW(wide(path).c_str()) != INVALID_FILE_ATTRIBUTES;
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const HANDLE file = CreateFileW(wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr,
                                  OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
  LARGE_INTEGER size;
  if (file == INVALID_HANDLE_VALUE) {
    throw Failure(QIGEN_BAD_INPUT,
                  "%s can't be opened (error %lu); give the folder that qigen compile wrote",
                  path.c_str(), GetLastError());
  }
  if (!GetFileSizeEx(file, &size)) {
    CloseHandle(file);
    throw Failure(QIGEN_BAD_INPUT, "%s is not a regular file; compile the model again",
                  path.c_str());
  }
  size_ = static_cast<uint64_t>(size.QuadPart);
  if (size_ > 0) {
    const HANDLE mapping = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
    const void* address = mapping ? MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0) : nullptr;
    const DWORD error = GetLastError();
    if (mapping) CloseHandle(mapping);  // the view keeps it
    if (!address) {
      CloseHandle(file);
      throw Failure(QIGEN_NO_MEMORY, "%s: can't be mapped (error %lu)", path.c_str(), error);
    }
    data_ = static_cast<const uint8_t*>(address);
  }
  CloseHandle(file);
}

MappedFile::~MappedFile() {
  if (data_) UnmapViewOfFile(data_);
}

void MappedFile::read_ahead() const {}  // Windows reads ahead of sequential faults by itself

#else

bool file_exists(const std::string& path) {
  return access(path.c_str(), F_OK) == 0 || errno != ENOENT;
}

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

void MappedFile::read_ahead() const { madvise(const_cast<uint8_t*>(data_), size_, MADV_WILLNEED); }

#endif

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace qigen::runtime
