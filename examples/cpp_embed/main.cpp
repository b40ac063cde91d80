// Streams text from a qigen artifact: greedy continuation of a prompt given as token ids.
//   cpp_embed smollm2.qgn 33 28 216 34 28 216 35 28 -n 32
#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <qigen.hpp>
#include <string>
#include <vector>

namespace {

struct Arguments {
  std::string artifact;
  std::vector<int32_t> prompt;
  int n = 32;  // tokens to generate
};

int usage() {
  std::cerr << "usage: cpp_embed ARTIFACT TOKEN... [-n COUNT]\n";
  return QIGEN_USAGE;
}

bool parse_number(const char* text, int32_t* number) {
  char* end = nullptr;
  *number = static_cast<int32_t>(std::strtol(text, &end, 10));
  return end != text && *end == '\0';
}

bool parse(int count, char** values, Arguments* arguments) {
  if (count < 3) return false;
  arguments->artifact = values[1];
  for (int i = 2; i < count; ++i) {
    if (std::string(values[i]) == "-n") {
      if (++i == count || !parse_number(values[i], &arguments->n)) return false;
      continue;
    }
    int32_t token = 0;
    if (!parse_number(values[i], &token)) return false;
    arguments->prompt.push_back(token);
  }
  return !arguments->prompt.empty();
}

void generate(const Arguments& arguments) {
  const qigen::Model model(arguments.artifact);
  qigen::Session session = model.session();
  int32_t token = model.argmax(session.eval(arguments.prompt));

  const auto start = std::chrono::steady_clock::now();
  int generated = 0;
  while (generated < arguments.n && !model.is_eos(token)) {
    std::cout << model.token_text(token) << std::flush;
    if (++generated == arguments.n) break;
    token = model.argmax(session.eval({token}));
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << std::endl;

  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::fprintf(stderr, "%d tokens, %.1f tokens/s, peak %ld KiB of memory\n", generated,
               generated / seconds.count(), usage.ru_maxrss);
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments;
  if (!parse(count, values, &arguments)) return usage();
  try {
    generate(arguments);
  } catch (const qigen::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.status();
  }
}
