// Runs functions of a library for another processor, under qemu-user, on the memory of the test's
// process: foreign.py speaks to it over its standard input and output.
//
// usage: server LIBRARY PID. A request is a line "NAME N_INTEGERS i.. N_FLOATS f.."; pointers among
// the integers are addresses of process PID. Pages that the function touches are brought in at
// their own addresses when it faults on them; what it changed is written back when it returns. Only
// bytes that differ are written: others of the page may belong to objects that the other process
// changes meanwhile. The answer is "ok RESULT".
#include <dlfcn.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMaxPages = 1 << 16;

struct Page {
  uint8_t* here;
  uint8_t* before;  // what the other process had
};

int memory = -1;
Page pages[kMaxPages];
size_t n_pages = 0;

[[noreturn]] void die(const char* what, const void* address) {
  std::fprintf(stderr, "foreign server: %s at %p\n", what, address);
  _exit(3);
}

sigjmp_buf again;

// Maps the page as the other process has it; false if that has none there.
bool bring_page(uint8_t* at) {
  if (n_pages == kMaxPages) die("too many pages", at);
  void* here = mmap(at, kPage, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (here == MAP_FAILED) return false;
  void* before = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (before == MAP_FAILED) die("no memory", at);
  if (here != at ||
      pread(memory, before, kPage, reinterpret_cast<off_t>(at)) != static_cast<ssize_t>(kPage)) {
    munmap(here, kPage);
    munmap(before, kPage);
    return false;
  }
  pages[n_pages++] = {at, static_cast<uint8_t*>(before)};
  return true;
}

// Brings the page that is missing and those around it. The function then starts again: qemu was
// seen to skip the store that faulted when a handler returns to it.
void on_fault(int, siginfo_t* info, void*) {
  constexpr uintptr_t kAround = 64 * kPage;
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (!bring_page(reinterpret_cast<uint8_t*>(address & ~(kPage - 1)))) {
    die("fault outside the memory of the test", info->si_addr);
  }
  const uintptr_t first = address & ~(kAround - 1);
  for (uintptr_t at = first; at < first + kAround; at += kPage)
    bring_page(reinterpret_cast<uint8_t*>(at));
  siglongjmp(again, 1);
}

void write_back() {
  for (size_t i = 0; i < n_pages; ++i) {
    const Page page = pages[i];
    for (size_t from = 0; from < kPage;) {
      if (page.here[from] == page.before[from]) {
        ++from;
        continue;
      }
      size_t to = from;
      while (to < kPage && page.here[to] != page.before[to]) ++to;
      const off_t at = reinterpret_cast<off_t>(page.here) + static_cast<off_t>(from);
      if (pwrite(memory, page.here + from, to - from, at) != static_cast<ssize_t>(to - from)) {
        die("cannot write to the test's process", page.here);
      }
      from = to;
    }
    munmap(page.here, kPage);
    munmap(page.before, kPage);
  }
  n_pages = 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%s/mem", argv[2]);
  memory = open(path, O_RDWR);
  if (memory < 0) {
    std::perror(path);
    return 4;
  }
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  std::puts("ready");
  std::fflush(stdout);

  char name[512];
  int n;
  while (std::scanf("%511s %d", name, &n) == 2) {
    // Integers and floats have registers of their own: arguments beyond those of the function are
    // ignored.
    int64_t i[8] = {};
    float f[2] = {};
    for (int k = 0; k < n && k < 8; ++k) {
      if (std::scanf("%" SCNd64, &i[k]) != 1) return 5;
    }
    int floats;
    if (std::scanf("%d", &floats) != 1) return 5;
    for (int k = 0; k < floats && k < 2; ++k) {
      if (std::scanf("%a", &f[k]) != 1) return 5;
    }
    using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                 int64_t, float, float);
    const Function function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) die(name, nullptr);
    sigsetjmp(again, 1);
    for (size_t k = 0; k < n_pages; ++k) std::memcpy(pages[k].here, pages[k].before, kPage);
    const int64_t result = function(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], f[0], f[1]);
    write_back();
    std::printf("ok %" PRId64 "\n", result);
    std::fflush(stdout);
  }
  return 0;
}
