// Arrays for the inputs of a model, and how to show its outputs.
#pragma once

#include <qigen.hpp>
#include <string>
#include <vector>

struct Array {
  qigen_tensor tensor{};
  std::vector<char> bytes;

  // The tensor with its memory: valid as long as this stays where it is.
  qigen_tensor with_data();
};

// The array in a .npy file of little-endian numbers. Throws qigen::Error.
Array read_npy(const std::string& file);

// Zeros of an input's type and shape; dimensions of any size are 1.
Array zeros(const qigen_tensor& description);

// One line: name, shape and the first numbers.
void print(const qigen_tensor& tensor);
