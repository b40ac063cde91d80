// Runs a qigen artifact. Of a language model, it streams the greedy continuation of a prompt that
// is given as token ids; any other model it runs once on arrays in .npy files (zeros where none is
// given) and shows the outputs.
//   cpp_embed smollm2.qgn 33 28 216 34 28 216 35 28 -n 32
//   cpp_embed detector.qgn x=image.npy
#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <qigen.hpp>
#include <string>
#include <vector>

#include "arrays.h"

namespace {

struct Arguments {
  std::string artifact;
  std::vector<int32_t> prompt;
  int n = 32;                      // tokens to generate
  std::vector<std::string> files;  // NAME=FILE.npy
};

int usage() {
  std::cerr << "usage: cpp_embed ARTIFACT TOKEN... [-n COUNT]\n"
               "       cpp_embed ARTIFACT [NAME=FILE.npy...]\n";
  return QIGEN_USAGE;
}

bool parse_number(const char* text, int32_t* number) {
  char* end = nullptr;
  *number = static_cast<int32_t>(std::strtol(text, &end, 10));
  return end != text && *end == '\0';
}

bool parse(int count, char** values, Arguments* arguments) {
  if (count < 2) return false;
  arguments->artifact = values[1];
  for (int i = 2; i < count; ++i) {
    if (std::string(values[i]).find('=') != std::string::npos) {
      arguments->files.push_back(values[i]);
      continue;
    }
    if (std::string(values[i]) == "-n") {
      if (++i == count || !parse_number(values[i], &arguments->n)) return false;
      continue;
    }
    int32_t token = 0;
    if (!parse_number(values[i], &token)) return false;
    arguments->prompt.push_back(token);
  }
  return true;
}

void generate(const qigen::Model& model, const Arguments& arguments) {
  qigen::Session session = model.session();
  qigen::Sampler greedy = model.sampler();
  int32_t token = session.next(arguments.prompt, greedy);

  const auto start = std::chrono::steady_clock::now();
  int generated = 0;
  while (generated < arguments.n && !model.is_eos(token)) {
    std::cout << model.token_text(token) << std::flush;
    if (++generated == arguments.n) break;
    token = session.next({token}, greedy);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << std::endl;

  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::fprintf(stderr, "%d tokens, %.1f tokens/s, peak %ld KiB of memory\n", generated,
               generated / seconds.count(), usage.ru_maxrss);
}

void run(const qigen::Model& model, const Arguments& arguments) {
  const std::vector<qigen_tensor> wanted = model.inputs();
  std::vector<Array> arrays;
  for (const qigen_tensor& input : wanted) arrays.push_back(zeros(input));
  for (const std::string& argument : arguments.files) {
    size_t i = 0;
    while (i < wanted.size() && argument.rfind(wanted[i].name + std::string("="), 0) != 0) ++i;
    if (i == wanted.size()) {
      throw qigen::Error(QIGEN_BAD_INPUT, "the model has no input for " + argument);
    }
    arrays[i] = read_npy(argument.substr(std::string(wanted[i].name).size() + 1));
    arrays[i].tensor.name = wanted[i].name;
  }
  std::vector<qigen_tensor> inputs;
  for (Array& array : arrays) inputs.push_back(array.with_data());
  const qigen::Result result = model.call(inputs);
  for (int32_t i = 0; i < result.size(); ++i) print(result[i]);
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments;
  if (!parse(count, values, &arguments)) return usage();
  try {
    const qigen::Model model(arguments.artifact);
    const bool language_model = model.info().vocab > 0;
    if (language_model ? arguments.prompt.empty() : !arguments.prompt.empty()) return usage();
    if (language_model) {
      generate(model, arguments);
    } else {
      run(model, arguments);
    }
  } catch (const qigen::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.status();
  }
}
