#include "vocab.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace qigen::runtime {
namespace {

// Little endian; i32 eos[eos_count], u32 offsets[tokens + 1] and the bytes follow.
struct Header {
  char magic[8];
  uint32_t tokens;
  uint32_t eos_count;
};
static_assert(sizeof(Header) == 16);

constexpr char kMagic[] = "QIGENVB1";

}  // namespace

Vocabulary::Vocabulary(const std::string& path, int32_t vocab) : file_(path) {
  auto require = [&path](bool good, const char* problem) {
    if (good) return;
    throw Failure(QIGEN_BAD_INPUT, "%s is damaged: %s; copy or compile the artifact again",
                  path.c_str(), problem);
  };
  require(file_.size() >= sizeof(Header), "it ends within its header");
  Header header;
  std::memcpy(&header, file_.data(), sizeof header);
  require(std::memcmp(header.magic, kMagic, sizeof header.magic) == 0, "wrong magic number");
  require(header.tokens <= static_cast<uint32_t>(vocab), "it has more tokens than the model");
  require(header.eos_count <= header.tokens, "it has more end tokens than tokens");
  const uint64_t tables =
      sizeof(Header) + 4 * (uint64_t{header.eos_count} + uint64_t{header.tokens} + 1);
  require(tables <= file_.size(), "it ends within its tables");

  size_ = static_cast<int32_t>(header.tokens);
  eos_count_ = static_cast<int32_t>(header.eos_count);
  eos_ = reinterpret_cast<const int32_t*>(file_.data() + sizeof(Header));
  offsets_ = reinterpret_cast<const uint32_t*>(eos_ + eos_count_);
  bytes_ = reinterpret_cast<const char*>(file_.data() + tables);
  require(
      std::all_of(eos_, eos_ + eos_count_, [this](int32_t id) { return id >= 0 && id < size_; }),
      "an end token is out of range");
  require(offsets_[0] == 0 && std::is_sorted(offsets_, offsets_ + size_ + 1) &&
              offsets_[size_] == file_.size() - tables,
          "the places of its texts are wrong");
}

std::string_view Vocabulary::text(int32_t id) const {
  if (id < 0 || id >= size_) return {};
  return {bytes_ + offsets_[id], offsets_[id + 1] - offsets_[id]};
}

bool Vocabulary::is_eos(int32_t id) const {
  return std::find(eos_, eos_ + eos_count_, id) != eos_ + eos_count_;
}

}  // namespace qigen::runtime
