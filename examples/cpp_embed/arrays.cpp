#include "arrays.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

namespace {

constexpr int64_t kShown = 8;  // numbers of an output

struct Type {
  int32_t number;   // as in qigen.h
  const char* npy;  // as in .npy files
  size_t bytes;
};
constexpr Type kTypes[] = {
    {QIGEN_FLOAT32, "<f4", 4}, {QIGEN_FLOAT64, "<f8", 8}, {QIGEN_FLOAT16, "<f2", 2},
    {QIGEN_INT8, "|i1", 1},    {QIGEN_INT16, "<i2", 2},   {QIGEN_INT32, "<i4", 4},
    {QIGEN_INT64, "<i8", 8},   {QIGEN_UINT8, "|u1", 1},   {QIGEN_UINT16, "<u2", 2},
    {QIGEN_UINT32, "<u4", 4},  {QIGEN_UINT64, "<u8", 8},  {QIGEN_BOOL, "|b1", 1},
};

[[noreturn]] void fail(const std::string& what, const char* problem) {
  throw qigen::Error(QIGEN_BAD_INPUT, what + ": " + problem);
}

int64_t elements(const qigen_tensor& tensor) {
  int64_t n = 1;
  for (int32_t i = 0; i < tensor.rank; ++i) n *= tensor.shape[i];
  return n;
}

// What follows `key` in the header, a Python dictionary.
std::string value_of(const std::string& header, const char* key) {
  const size_t at = header.find(key);
  return at == std::string::npos ? "" : header.substr(at + std::strlen(key));
}

template <class T>
void print_numbers(const qigen_tensor& tensor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T number;
    std::memcpy(&number, static_cast<const char*>(tensor.data) + i * sizeof number, sizeof number);
    std::cout << ' ' << +number;
  }
}

}  // namespace

qigen_tensor Array::with_data() {
  tensor.data = bytes.data();
  tensor.bytes = bytes.size();
  return tensor;
}

Array read_npy(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) fail(file, "it cannot be read");
  const std::string all{std::istreambuf_iterator<char>(stream), {}};
  // "\x93NUMPY", version, length of the header (2 or 4 bytes), header, numbers
  if (all.size() < 12 || all.compare(0, 6, "\x93NUMPY") != 0) fail(file, "this is no .npy file");
  const size_t digits = all[6] == 1 ? 2 : 4;
  size_t length = 0;
  for (size_t i = digits; i-- > 0;) length = length << 8 | static_cast<unsigned char>(all[8 + i]);
  const size_t start = 8 + digits + length;
  if (start > all.size()) fail(file, "it is truncated");
  const std::string header = all.substr(8 + digits, length);
  if (value_of(header, "'fortran_order': ").compare(0, 5, "False") != 0) {
    fail(file, "its rows are not contiguous");
  }

  Array array;
  size_t item = 0;
  for (const Type& type : kTypes) {
    if (value_of(header, "'descr': '").compare(0, std::strlen(type.npy), type.npy) != 0) continue;
    array.tensor.dtype = type.number;
    item = type.bytes;
  }
  if (!item) fail(file, "its numbers have a type that this program does not know");
  std::string shape = value_of(header, "'shape': (");
  shape.resize(shape.find(')') == std::string::npos ? 0 : shape.find(')'));
  for (const char* at = shape.c_str(); *at;) {
    char* end = nullptr;
    const long long size = std::strtoll(at, &end, 10);
    if (end == at || array.tensor.rank == QIGEN_MAX_RANK) fail(file, "its shape makes no sense");
    array.tensor.shape[array.tensor.rank++] = size;
    at = end + std::strspn(end, ", ");
  }
  array.bytes.assign(all.begin() + static_cast<std::ptrdiff_t>(start), all.end());
  return array;  // the library checks the shape against the number of bytes
}

Array zeros(const qigen_tensor& description) {
  Array array;
  array.tensor = description;
  for (int32_t i = 0; i < array.tensor.rank; ++i) {
    if (array.tensor.shape[i] < 0) array.tensor.shape[i] = 1;
  }
  size_t item = 1;  // the types that .npy files do not have take a byte, but for bfloat16
  if (array.tensor.dtype == QIGEN_BFLOAT16) item = 2;
  for (const Type& type : kTypes) {
    if (type.number == array.tensor.dtype) item = type.bytes;
  }
  array.bytes.resize(static_cast<size_t>(elements(array.tensor)) * item);
  return array;
}

void print(const qigen_tensor& tensor) {
  std::cout << tensor.name << " [";
  for (int32_t i = 0; i < tensor.rank; ++i) std::cout << (i ? ", " : "") << tensor.shape[i];
  std::cout << "]:";
  const int64_t n = elements(tensor);
  const int64_t shown = n < kShown ? n : kShown;
  switch (tensor.dtype) {
    case QIGEN_FLOAT32:
      print_numbers<float>(tensor, shown);
      break;
    case QIGEN_FLOAT64:
      print_numbers<double>(tensor, shown);
      break;
    case QIGEN_INT8:
      print_numbers<int8_t>(tensor, shown);
      break;
    case QIGEN_INT16:
      print_numbers<int16_t>(tensor, shown);
      break;
    case QIGEN_INT32:
      print_numbers<int32_t>(tensor, shown);
      break;
    case QIGEN_INT64:
      print_numbers<int64_t>(tensor, shown);
      break;
    case QIGEN_BOOL:
    case QIGEN_UINT8:
      print_numbers<uint8_t>(tensor, shown);
      break;
    case QIGEN_UINT16:
      print_numbers<uint16_t>(tensor, shown);
      break;
    case QIGEN_UINT32:
      print_numbers<uint32_t>(tensor, shown);
      break;
    case QIGEN_UINT64:
      print_numbers<uint64_t>(tensor, shown);
      break;
    default:
      std::cout << " (numbers that this program cannot show)";
  }
  std::cout << (n > shown ? " ...\n" : "\n");
}
