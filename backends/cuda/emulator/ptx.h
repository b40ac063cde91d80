// A PTX kernel after decoding: what the parser makes and the interpreter runs.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Windows of the generic address space; device memory lies below both.
constexpr uint64_t kSharedWindow = 0x7100000000000000ull;
constexpr uint64_t kLocalWindow = 0x7200000000000000ull;

// A fault of the program that runs. Always ends the launch.
struct Finding : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t {
  none,
  pred,
  b4,
  s4,
  u4,
  b8,
  s8,
  u8,
  b16,
  s16,
  u16,
  b32,
  s32,
  u32,
  b64,
  s64,
  u64,
  f16,
  f16x2,
  bf16,
  bf16x2,
  f32,
  f64,
};

int bitsOf(Type type);
inline int bytesOf(Type type) { return (bitsOf(type) + 7) / 8; }
bool isFloat(Type type);                  // a scalar float: f16, bf16, f32, f64
bool isSigned(Type type);                 // s4 to s64
Type typeNamed(const std::string& name);  // none if there is no such type

// Every opcode that the interpreter knows; the names are those of the PTX ISA.
#define PTX_OPCODES(X)                                                                           \
  X(add)                                                                                         \
  X(sub)                                                                                         \
  X(mul)                                                                                         \
  X(mad) X(fma) X(div) X(rem) X(min) X(max) X(neg) X(abs) X(and) X(or) X(xor) X(not) X(cnot)     \
      X(shl) X(shr) X(shf) X(lop3) X(prmt) X(bfe) X(bfi) X(popc) X(clz) X(bfind) X(brev) X(dp4a) \
          X(setp) X(selp) X(mov) X(cvt) X(cvta) X(ld) X(st) X(atom) X(red) X(bra) X(bar)         \
              X(barrier) X(ret) X(exit) X(cp) X(ldmatrix) X(mma) X(shfl) X(vote) X(activemask)   \
                  X(membar) X(fence) X(createpolicy) X(prefetch) X(ex2) X(lg2) X(rcp) X(sqrt)    \
                      X(rsqrt) X(trap) X(nanosleep)

enum class Op : uint8_t {
#define X(name) op_##name,
  PTX_OPCODES(X)
#undef X
};

enum class Space : uint8_t { generic, global, shared, local, param };
enum class Compare : uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
enum class Round : uint8_t {
  none,
  nearest,
  zero,
  toInteger,
  toIntegerZero,
  toIntegerDown,
  toIntegerUp
};
enum class Part : uint8_t { low, high, wide };
enum class Bool : uint8_t { none, land, lor, lxor };
enum class Async : uint8_t { copy, commit, waitGroup, waitAll };
enum class Shuffle : uint8_t { idx, up, down, bfly };
enum class Vote : uint8_t { any, all, uni, ballot };
enum class Atomic : uint8_t { add, min, max, land, lor, lxor, exch, cas, inc };

struct Operand {
  enum Kind : uint8_t { none, reg, list, address, label, sink } kind = none;
  int index = -1;              // register; of an address: its base, or -1 for a parameter
  int64_t offset = 0;          // of an address
  bool negated = false;        // a predicate behind '!'
  std::string name;            // of a label
  std::vector<Operand> parts;  // of a list
};

struct Instruction {
  Op op{};
  Type type = Type::none;  // the first type of the opcode
  Type from = Type::none;  // the second one (cvt)
  Type matrix[4] = {};     // d, a, b, c of mma
  int guard = -1;          // predicate register, or -1
  bool guardNegated = false;
  Space space = Space::generic;
  Compare compare{};
  Round round{};
  Part part{};
  Bool combine{};
  Async async{};
  Shuffle shuffle{};
  Vote vote{};
  Atomic atomic{};
  int vector = 1;  // .v2, .v4; matrices of ldmatrix
  int depth = 0;   // k of mma
  bool saturate = false, flushes = false, transposed = false, left = false, wraps = false;
  bool shiftAmount = false;   // bfind: by how much to shift the found bit to the top
  bool sparse = false;        // mma.sp: A has 2 of 4 numbers, the metadata says which
  bool warpBarrier = false;   // bar.warp.sync
  bool converges = false;     // every live lane of the warp must come here together
  bool synchronizes = false;  // an acquire or volatile access: others may run before the next
  bool toSpace = false;       // cvta.to
  bool cached = true;         // counts as traffic (loads of parameters do not)
  bool hint = false;          // the last operand is a cache policy
  std::vector<Operand> operands;
  Operand second;   // the destination behind '|' (setp, shfl)
  int target = -1;  // of bra
  int line = 0;     // of the CUDA source
  std::string text;
};

struct Constant {
  int reg;
  uint64_t value;
};
struct Parameter {
  std::string name;
  int offset, size;
};

// A variable of the module that lies in device memory.
struct Global {
  std::string name;
  uint64_t size, align;
  std::vector<uint8_t> data;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  int registers = 0;
  std::vector<Constant> constants;
  std::vector<int> dynamicShared;  // registers that hold the offset of dynamic shared memory
  std::vector<Parameter> parameters;
  int parameterBytes = 0;
  uint64_t sharedBytes = 0;  // static
  uint64_t localBytes = 0;   // a thread
  std::vector<Global> globals;
  std::vector<std::pair<int, std::string>> globalAddresses;  // register, variable
};

// Special registers take the first indices of every kernel, in this order.
extern const std::vector<std::string> kSpecialRegisters;

// Throws std::runtime_error for what is no PTX or not known.
Kernel parse(const std::string& module, const std::string& entry);

}  // namespace ptx
