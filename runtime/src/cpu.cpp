#include "cpu.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "error.h"
#include "qigen/generated.h"

namespace qigen::runtime {
namespace {

[[maybe_unused]] constexpr uint64_t kTileFeatures =
    CpuFeature::amx_tile | CpuFeature::amx_int8 | CpuFeature::amx_bf16;

#if defined(__x86_64__) || defined(__i386__)

// Registers that an instruction set needs and that the operating system must save: bits of XCR0.
enum State : uint64_t { kNoState = 0, kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000 };

// Results of cpuid in which features are looked up.
enum Word { kLeaf1C, kLeaf7B, kLeaf7C, kLeaf7D, kLeaf7Sub1A, kLeaf7Sub1D, kExtendedC, kWords };

struct Row {
  uint64_t feature;
  const char* name;
  Word word;
  int bit;
  State state;
};

// Intel 64 and IA-32 Software Developer's Manual, volume 2A, CPUID; lzcnt: AMD64 manual, volume 3.
constexpr Row kRows[] = {
    {CpuFeature::sse3, "sse3", kLeaf1C, 0, kNoState},
    {CpuFeature::ssse3, "ssse3", kLeaf1C, 9, kNoState},
    {CpuFeature::sse4_1, "sse4.1", kLeaf1C, 19, kNoState},
    {CpuFeature::sse4_2, "sse4.2", kLeaf1C, 20, kNoState},
    {CpuFeature::popcnt, "popcnt", kLeaf1C, 23, kNoState},
    {CpuFeature::avx, "avx", kLeaf1C, 28, kYmm},
    {CpuFeature::f16c, "f16c", kLeaf1C, 29, kYmm},
    {CpuFeature::fma, "fma", kLeaf1C, 12, kYmm},
    {CpuFeature::avx2, "avx2", kLeaf7B, 5, kYmm},
    {CpuFeature::bmi, "bmi", kLeaf7B, 3, kNoState},
    {CpuFeature::bmi2, "bmi2", kLeaf7B, 8, kNoState},
    {CpuFeature::lzcnt, "lzcnt", kExtendedC, 5, kNoState},
    {CpuFeature::movbe, "movbe", kLeaf1C, 22, kNoState},
    {CpuFeature::gfni, "gfni", kLeaf7C, 8, kNoState},
    {CpuFeature::avxvnni, "avxvnni", kLeaf7Sub1A, 4, kYmm},
    {CpuFeature::avxvnniint8, "avxvnniint8", kLeaf7Sub1D, 4, kYmm},
    {CpuFeature::avxifma, "avxifma", kLeaf7Sub1A, 23, kYmm},
    {CpuFeature::avx512f, "avx512f", kLeaf7B, 16, kZmm},
    {CpuFeature::avx512bw, "avx512bw", kLeaf7B, 30, kZmm},
    {CpuFeature::avx512dq, "avx512dq", kLeaf7B, 17, kZmm},
    {CpuFeature::avx512vl, "avx512vl", kLeaf7B, 31, kZmm},
    {CpuFeature::avx512cd, "avx512cd", kLeaf7B, 28, kZmm},
    {CpuFeature::avx512vbmi, "avx512vbmi", kLeaf7C, 1, kZmm},
    {CpuFeature::avx512vbmi2, "avx512vbmi2", kLeaf7C, 6, kZmm},
    {CpuFeature::avx512vnni, "avx512vnni", kLeaf7C, 11, kZmm},
    {CpuFeature::avx512bitalg, "avx512bitalg", kLeaf7C, 12, kZmm},
    {CpuFeature::avx512vpopcntdq, "avx512vpopcntdq", kLeaf7C, 14, kZmm},
    {CpuFeature::avx512ifma, "avx512ifma", kLeaf7B, 21, kZmm},
    {CpuFeature::avx512bf16, "avx512bf16", kLeaf7Sub1A, 5, kZmm},
    {CpuFeature::avx512fp16, "avx512fp16", kLeaf7D, 23, kZmm},
    {CpuFeature::amx_tile, "amx_tile", kLeaf7D, 24, kTiles},
    {CpuFeature::amx_int8, "amx_int8", kLeaf7D, 25, kTiles},
    {CpuFeature::amx_bf16, "amx_bf16", kLeaf7D, 22, kTiles},
};

// XCR0, read without the intrinsic because that would need -mxsave.
uint64_t extended_control_register() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

uint64_t detect() {
  uint32_t words[kWords] = {};
  uint32_t a, b, c, d;
  uint64_t saved = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) {
    words[kLeaf1C] = c;
    constexpr uint32_t kOsxsave = 1u << 27;
    if (c & kOsxsave) saved = extended_control_register();
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    words[kLeaf7B] = b;
    words[kLeaf7C] = c;
    words[kLeaf7D] = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
      words[kLeaf7Sub1A] = a;
      words[kLeaf7Sub1D] = d;
    }
  }
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) words[kExtendedC] = c;

  uint64_t features = 0;
  for (const Row& row : kRows) {
    const bool present = (words[row.word] >> row.bit) & 1;
    if (present && (saved & row.state) == row.state) features |= row.feature;
  }
  return features;
}

#elif defined(__aarch64__)

struct Row {
  uint64_t feature;
  const char* name;
  int word, bit;        // Linux: AT_HWCAP or AT_HWCAP2 (arch/arm64/include/uapi/asm/hwcap.h)
  const char* setting;  // macOS: sysctl
};

constexpr Row kRows[] = {
    {CpuFeature::neon, "neon", 0, 1, "hw.optional.AdvSIMD"},
    {CpuFeature::dotprod, "dotprod", 0, 20, "hw.optional.arm.FEAT_DotProd"},
    {CpuFeature::i8mm, "i8mm", 1, 13, "hw.optional.arm.FEAT_I8MM"},
    {CpuFeature::bf16, "bf16", 1, 14, "hw.optional.arm.FEAT_BF16"},
    {CpuFeature::sve, "sve", 0, 22, "hw.optional.arm.FEAT_SVE"},
};

#if defined(__linux__)

uint64_t detect() {
  const unsigned long words[] = {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
  uint64_t features = 0;
  for (const Row& row : kRows) {
    if ((words[row.word] >> row.bit) & 1) features |= row.feature;
  }
  return features;
}

#elif defined(__APPLE__)

uint64_t detect() {
  uint64_t features = 0;
  for (const Row& row : kRows) {
    int present = 0;
    size_t size = sizeof present;
    if (sysctlbyname(row.setting, &present, &size, nullptr, 0) == 0 && present) {
      features |= row.feature;
    }
  }
  return features;
}

#else

// Windows on ARM asks for both of these.
uint64_t detect() { return CpuFeature::neon; }

#endif

#else
#error "qigen runs on x86-64 and aarch64"
#endif

// First number of "quota period" or of one number in a file; false if the file has none ("max").
bool read_numbers(const std::string& path, std::vector<long long>* numbers) {
  std::ifstream file(path);
  long long number;
  while (file >> number) numbers->push_back(number);
  return !numbers->empty();
}

}  // namespace

uint64_t cpu_features() {
  static const uint64_t features = detect();
  return features;
}

std::string cpu_feature_names(uint64_t bits) {
  std::string names;
  for (const Row& row : kRows) {
    if (!(bits & row.feature)) continue;
    if (!names.empty()) names += ' ';
    names += row.name;
    bits &= ~row.feature;
  }
  // Bits of a later version than this table.
  if (bits) names += (names.empty() ? "bits " : " and bits ") + std::to_string(bits);
  return names;
}

bool tiles_granted(long (*request)(int code, unsigned long feature)) {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr unsigned long kTileData = 18;     // XFEATURE_XTILEDATA
  return request(kRequestPermission, kTileData) == 0;
}

uint64_t granted_features(uint64_t wanted) {
  uint64_t granted = wanted & cpu_features();
#if defined(__x86_64__) && defined(__linux__)
  if (granted & CpuFeature::amx_tile) {
    static const bool tiles = tiles_granted(
        [](int code, unsigned long feature) { return syscall(SYS_arch_prctl, code, feature); });
    if (!tiles) granted &= ~kTileFeatures;
  }
#endif
  return granted;
}

void require_cpu(uint64_t required, const char* isa) {
  const uint64_t missing = required & ~granted_features(required);
  if (!missing) return;
  if (!(missing & ~cpu_features())) {
    throw Failure(
        QIGEN_MACHINE,
        "the artifact is compiled for %s, but the system does not let this process use the "
        "processor's tile registers (arch_prctl, ARCH_REQ_XCOMP_PERM): allow it, or compile the "
        "model with --isa avx512bf16",
        isa);
  }
  throw Failure(
      QIGEN_MACHINE,
      "the artifact is compiled for %s, but this machine lacks %s; compile the model with "
      "--target native on this machine",
      isa, cpu_feature_names(missing).c_str());
}

#ifdef __linux__

std::vector<int> allowed_cores() {
  // The mask of the kernel may be larger than cpu_set_t, so grow until it fits.
  for (int size = 1024; size <= 1 << 20; size *= 2) {
    cpu_set_t* set = CPU_ALLOC(size);
    if (!set) break;
    const size_t bytes = CPU_ALLOC_SIZE(size);
    std::vector<int> cores;
    const bool fits = sched_getaffinity(0, bytes, set) == 0;
    if (fits) {
      for (int core = 0; core < size; ++core) {
        if (CPU_ISSET_S(core, bytes, set)) cores.push_back(core);
      }
    }
    CPU_FREE(set);
    if (fits && !cores.empty()) return cores;
  }
  return {0};
}

#else

std::vector<int> allowed_cores() {
  std::vector<int> cores(std::max(1u, std::thread::hardware_concurrency()));
  for (size_t i = 0; i < cores.size(); ++i) cores[i] = static_cast<int>(i);
  return cores;
}

#endif

namespace {

constexpr int kFullSpeed = 1024;

long long read_number(const std::string& path, long long otherwise) {
  std::vector<long long> numbers;
  return read_numbers(path, &numbers) && numbers[0] > 0 ? numbers[0] : otherwise;
}

struct Place {
  Core core;
  int sibling;  // how many cores of the same physical one come before it
};

// Reorders equal places so that the first `count` of them are dealt out over the nodes, those of a
// node side by side.
void spread_over_nodes(std::vector<Place>::iterator begin, std::vector<Place>::iterator end,
                       std::ptrdiff_t count) {
  std::vector<int> turn;  // of each place: how many of its node come before it
  for (auto place = begin; place != end; ++place) {
    turn.push_back(static_cast<int>(std::count_if(
        begin, place, [&](const Place& other) { return other.core.node == place->core.node; })));
  }
  std::vector<std::pair<int, Place>> order;
  for (auto place = begin; place != end; ++place) {
    order.push_back({turn[static_cast<size_t>(place - begin)], *place});
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::transform(order.begin(), order.end(), begin, [](const auto& pair) { return pair.second; });
  std::stable_sort(begin, begin + count,
                   [](const Place& a, const Place& b) { return a.core.node < b.core.node; });
}

}  // namespace

std::vector<int> read_list(const std::string& path) {
  std::ifstream file(path);
  std::vector<int> found;
  for (std::string part; std::getline(file, part, ',');) {
    int first = 0, last = 0;
    const int count = std::sscanf(part.c_str(), "%d-%d", &first, &last);
    if (count < 1) continue;
    for (int i = first; i <= (count == 2 ? last : first); ++i) found.push_back(i);
  }
  return found;
}

std::vector<int> cores_of_node(const std::vector<Core>& cores, int node) {
  std::vector<int> found;
  for (const Core& core : cores) {
    if (core.node == node) found.push_back(core.id);
  }
  return found;
}

#ifdef __linux__
void keep_on_cores(std::thread& thread, const std::vector<int>& cores) {
  if (cores.empty()) return;
  const int most = *std::max_element(cores.begin(), cores.end()) + 1;
  const size_t bytes = CPU_ALLOC_SIZE(most);
  cpu_set_t* set = CPU_ALLOC(most);
  if (!set) return;
  CPU_ZERO_S(bytes, set);
  for (const int core : cores) CPU_SET_S(core, bytes, set);
  pthread_setaffinity_np(thread.native_handle(), bytes, set);
  CPU_FREE(set);
}
#else
void keep_on_cores(std::thread&, const std::vector<int>&) {}
#endif

std::vector<Core> ordered_cores(const std::vector<int>& cores, const std::string& root,
                                int spread) {
  const std::string system = root + "/sys/devices/system/";
  const std::vector<int> atoms = read_list(root + "/sys/devices/cpu_atom/cpus");
  const std::vector<int> nodes = read_list(system + "node/online");
  const auto holds = [](const std::vector<int>& list, int id) {
    return std::find(list.begin(), list.end(), id) != list.end();
  };
  std::vector<long long> speeds;
  for (const int id : cores) {
    const std::string cpu = system + "cpu/cpu" + std::to_string(id);
    long long speed = read_number(cpu + "/cpu_capacity", 0);
    if (!speed && !atoms.empty()) {
      speed = read_number(cpu + "/cpufreq/cpuinfo_max_freq", 1000000);
      if (holds(atoms, id)) speed = std::max(1ll, speed / 2);
    }
    speeds.push_back(speed);
  }
  const long long most = speeds.empty() ? 0 : *std::max_element(speeds.begin(), speeds.end());
  std::vector<std::vector<int>> node_cores;
  for (const int node : nodes) {
    node_cores.push_back(read_list(system + "node/node" + std::to_string(node) + "/cpulist"));
  }
  std::vector<Place> places;
  for (size_t i = 0; i < cores.size(); ++i) {
    const int id = cores[i];
    const std::vector<int> siblings =
        read_list(system + "cpu/cpu" + std::to_string(id) + "/topology/thread_siblings_list");
    int before = 0, node = 0;
    for (const int other : siblings) before += other < id && holds(cores, other);
    while (node < static_cast<int>(node_cores.size()) &&
           !holds(node_cores[static_cast<size_t>(node)], id)) {
      ++node;
    }
    const long long speed = most > 0 && speeds[i] > 0 ? speeds[i] * kFullSpeed / most : kFullSpeed;
    const int node_id =
        node < static_cast<int>(nodes.size()) ? nodes[static_cast<size_t>(node)] : 0;
    places.push_back({{id, static_cast<int>(std::max(1ll, speed)), node_id}, before});
  }
  std::stable_sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    if (a.sibling != b.sibling) return a.sibling < b.sibling;
    if (a.core.speed != b.core.speed) return a.core.speed > b.core.speed;
    return a.core.node < b.core.node;
  });
  if (spread > 0 && spread < static_cast<int>(places.size())) {
    const auto last = places.begin() + spread - 1;
    const auto equal = [&](const Place& place) {
      return place.sibling == last->sibling && place.core.speed == last->core.speed;
    };
    const auto begin = std::find_if(places.begin(), places.end(), equal);
    const auto end = std::find_if_not(begin, places.end(), equal);
    spread_over_nodes(begin, end, last + 1 - begin);
  }
  std::vector<Core> result;
  for (const Place& place : places) result.push_back(place.core);
  return result;
}

std::vector<int> parse_speeds(const std::string& text, int threads) {
  std::vector<int> speeds;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    char* end = nullptr;
    const long value = std::strtol(part.c_str(), &end, 10);
    if (part.empty() || *end || value < 1 || value > 1 << 20) {
      throw Failure(QIGEN_USAGE,
                    "QIGEN_CORE_SPEEDS is '%s'; give numbers from 1 to 1048576 for the threads, "
                    "separated by commas",
                    text.c_str());
    }
    speeds.push_back(static_cast<int>(value));
  }
  if (speeds.empty()) throw Failure(QIGEN_USAGE, "QIGEN_CORE_SPEEDS is empty; give numbers");
  speeds.resize(static_cast<size_t>(threads), speeds.back());
  return speeds;
}

int cgroup_cores(const std::string& root) {
  double cores = INT_MAX;
  auto limit = [&cores](long long quota, long long period) {
    if (quota > 0 && period > 0) cores = std::min(cores, double(quota) / double(period));
  };

  // Lines are "id:controllers:path"; version 2 has id 0 and no controllers.
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version2 = controllers == ",,";
    if (!version2 && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (version2 ? "" : "/cpu");

    // Every ancestor limits too. Inside a container the path can be that of the host: then only the
    // mount point itself exists, which is the container's own group.
    std::string path = line.substr(second + 1);
    while (true) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      std::vector<long long> quota, period;
      if (version2) {
        if (read_numbers(mount + path + "/cpu.max", &quota) && quota.size() == 2) {
          limit(quota[0], quota[1]);
        }
      } else if (read_numbers(mount + path + "/cpu.cfs_quota_us", &quota) &&
                 read_numbers(mount + path + "/cpu.cfs_period_us", &period)) {
        limit(quota[0], period[0]);
      }
      if (path.empty()) break;
      path.erase(path.rfind('/'));
    }
  }
  return std::max(1, static_cast<int>(cores));
}

int usable_cores() { return std::min(static_cast<int>(allowed_cores().size()), cgroup_cores()); }

}  // namespace qigen::runtime
