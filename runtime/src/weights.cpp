#include "weights.h"

#include <algorithm>
#include <cinttypes>
#include <cstddef>
#include <cstring>

#include "error.h"

namespace qigen::runtime {
namespace {

// Little endian. Magic, abi and crc32 stay where they are in every version.
struct Header {
  char magic[8];
  uint32_t abi;
  uint32_t header_bytes;
  uint64_t file_bytes;
  uint8_t model_uid[32];
  uint32_t crc32;  // of the bytes before it
};
static_assert(offsetof(Header, crc32) == 56);

constexpr char kMagic[] = "QIGENWB1";
constexpr uint64_t kHeaderBytes = 4096;

// CRC-32 of zlib. Bit by bit: it sees 56 bytes.
uint32_t crc32(const uint8_t* data, size_t size) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1)));
  }
  return ~crc;
}

}  // namespace

MappedFile open_weights(const std::string& path, const ModelDescription& description) {
  MappedFile file(path);
  const char* name = path.c_str();
  if (file.size() < kHeaderBytes) {
    throw Failure(QIGEN_BAD_INPUT,
                  "%s has only %" PRIu64
                  " bytes and is truncated; copy or compile the artifact again",
                  name, file.size());
  }
  Header header;
  std::memcpy(&header, file.data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof header.magic) != 0) {
    throw Failure(
        QIGEN_BAD_INPUT,
        "%s does not begin with %s, so it is no weight file of qigen or it is damaged; copy or "
        "compile the artifact again",
        name, kMagic);
  }
  const bool padded_with_zeros =
      std::all_of(file.data() + sizeof(uint32_t) + offsetof(Header, crc32),
                  file.data() + kHeaderBytes, [](uint8_t byte) { return byte == 0; });
  if (crc32(file.data(), offsetof(Header, crc32)) != header.crc32 || !padded_with_zeros) {
    throw Failure(
        QIGEN_BAD_INPUT,
        "the header of %s is damaged (its checksum is wrong); copy or compile the artifact again",
        name);
  }
  if (header.abi != QIGEN_ABI_VERSION) {
    throw Failure(
        QIGEN_MACHINE,
        "%s was written for ABI version %u of qigen, this library has version %u; compile the "
        "model again",
        name, header.abi, QIGEN_ABI_VERSION);
  }
  if (header.header_bytes != kHeaderBytes || header.file_bytes != file.size()) {
    throw Failure(QIGEN_BAD_INPUT,
                  "%s has %" PRIu64 " bytes where its header says %" PRIu64
                  ", so it is truncated or padded; copy or compile the artifact again",
                  name, file.size(), header.file_bytes);
  }
  if (std::memcmp(header.model_uid, description.model_uid, sizeof header.model_uid) != 0 ||
      header.file_bytes != description.weights_bytes) {
    throw Failure(
        QIGEN_BAD_INPUT,
        "%s belongs to another model.so than the one beside it; copy or compile the whole "
        "artifact again",
        name);
  }
  file.read_ahead();  // load doesn't wait for it
  return file;
}

}  // namespace qigen::runtime
