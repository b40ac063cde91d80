// vocab.bin: the text of every token and the ids that end a text.
#pragma once

#include <string_view>

#include "mapped_file.h"

namespace qigen::runtime {

class Vocabulary {
 public:
  Vocabulary() = default;  // of an artifact without vocab.bin

  // Throws QIGEN_BAD_INPUT if the file contradicts itself or has more tokens than `vocab`.
  Vocabulary(const std::string& path, int32_t vocab);

  bool present() const { return file_.data() != nullptr; }
  std::string_view text(int32_t id) const;  // empty past the last token of the file
  bool is_eos(int32_t id) const;
  const int32_t* eos() const { return eos_; }
  int32_t eos_count() const { return eos_count_; }

 private:
  MappedFile file_;
  int32_t size_ = 0;
  int32_t eos_count_ = 0;
  const int32_t* eos_ = nullptr;       // [eos_count_]
  const uint32_t* offsets_ = nullptr;  // [size_ + 1] into bytes_
  const char* bytes_ = nullptr;
};

}  // namespace qigen::runtime
