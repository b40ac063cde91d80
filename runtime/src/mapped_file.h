// A whole file in memory, read-only, shared with everyone who maps it.
#pragma once

#include <cstdint>
#include <string>

namespace qigen::runtime {

// Whether there is such a file, even one that can't be opened.
bool file_exists(const std::string& path);

class MappedFile {
 public:
  MappedFile() = default;
  // Throws QIGEN_BAD_INPUT if the file can't be opened.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  const uint8_t* data() const { return data_; }  // page aligned; null if the file is empty
  uint64_t size() const { return size_; }

  // Only a hint: reading starts in the background.
  void read_ahead() const;

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace qigen::runtime
