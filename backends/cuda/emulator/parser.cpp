// The text of a PTX module to a decoded kernel. Covers what NVRTC writes for kernels without calls,
// and inline assembly with its own scopes and registers.

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "numbers.h"
#include "ptx.h"

namespace ptx {
namespace {

struct TypeRow {
  const char* name;
  Type type;
  int bits;
};
const TypeRow kTypes[] = {
    {"pred", Type::pred, 8},  {"b4", Type::b4, 4},          {"s4", Type::s4, 4},
    {"u4", Type::u4, 4},      {"b8", Type::b8, 8},          {"s8", Type::s8, 8},
    {"u8", Type::u8, 8},      {"b16", Type::b16, 16},       {"s16", Type::s16, 16},
    {"u16", Type::u16, 16},   {"b32", Type::b32, 32},       {"s32", Type::s32, 32},
    {"u32", Type::u32, 32},   {"b64", Type::b64, 64},       {"s64", Type::s64, 64},
    {"u64", Type::u64, 64},   {"f16", Type::f16, 16},       {"f16x2", Type::f16x2, 32},
    {"bf16", Type::bf16, 16}, {"bf16x2", Type::bf16x2, 32}, {"f32", Type::f32, 32},
    {"f64", Type::f64, 64},
};

template <class T>
bool lookUp(const std::vector<std::pair<const char*, T>>& table, const std::string& name, T* out) {
  for (const auto& row : table) {
    if (name == row.first) {
      *out = row.second;
      return true;
    }
  }
  return false;
}

const std::vector<std::pair<const char*, Op>> kOpcodes = {
#define X(name) {#name, Op::op_##name},
    PTX_OPCODES(X)
#undef X
};
const std::vector<std::pair<const char*, Compare>> kCompares = {
    {"eq", Compare::eq},   {"ne", Compare::ne},   {"lt", Compare::lt},   {"le", Compare::le},
    {"gt", Compare::gt},   {"ge", Compare::ge},   {"lo", Compare::lt},   {"ls", Compare::le},
    {"hi", Compare::gt},   {"hs", Compare::ge},   {"equ", Compare::equ}, {"neu", Compare::neu},
    {"ltu", Compare::ltu}, {"leu", Compare::leu}, {"gtu", Compare::gtu}, {"geu", Compare::geu},
    {"num", Compare::num}, {"nan", Compare::nan}};
const std::vector<std::pair<const char*, Round>> kRounds = {
    {"rn", Round::nearest},        {"rz", Round::zero},           {"rni", Round::toInteger},
    {"rzi", Round::toIntegerZero}, {"rmi", Round::toIntegerDown}, {"rpi", Round::toIntegerUp}};
const std::vector<std::pair<const char*, Atomic>> kAtomics = {
    {"add", Atomic::add},  {"min", Atomic::min},   {"max", Atomic::max},
    {"and", Atomic::land}, {"or", Atomic::lor},    {"xor", Atomic::lxor},
    {"cas", Atomic::cas},  {"exch", Atomic::exch}, {"inc", Atomic::inc}};
const std::vector<std::pair<const char*, Shuffle>> kShuffles = {
    {"idx", Shuffle::idx}, {"up", Shuffle::up}, {"down", Shuffle::down}, {"bfly", Shuffle::bfly}};
const std::vector<std::pair<const char*, Vote>> kVotes = {
    {"any", Vote::any}, {"all", Vote::all}, {"uni", Vote::uni}, {"ballot", Vote::ballot}};
const std::vector<std::pair<const char*, Space>> kSpaces = {{"global", Space::global},
                                                            {"shared", Space::shared},
                                                            {"local", Space::local},
                                                            {"param", Space::param}};
// Modifiers that change nothing here: caching, scope, alignment, uniformity, approximation (the
// interpreter rounds exactly where the hardware may be off by units in the last place).
const char* const kIgnored[] = {
    "nc",        "ca",         "cg",       "cs",       "lu",       "cv",    "wb",    "wt",
    "L1",        "L2",         "sync",     "aligned",  "gpu",      "cta",   "sys",   "uni",
    "approx",    "full",       "release",  "acq_rel",  "sc",       "gl",    "row",   "col",
    "m8n8",      "m16n8k8",    "m16n8k16", "m16n8k32", "m16n8k64", "async", "noftz", "shared::cta",
    "satfinite", "fractional", "level",    "b128",     "clamp"};

std::string trim(const std::string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

// Splits at a character outside of brackets.
std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> parts;
  std::string current;
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == at && depth == 0) {
      parts.push_back(trim(current));
      current.clear();
    } else {
      current += c;
    }
  }
  if (!trim(current).empty()) parts.push_back(trim(current));
  return parts;
}

bool isName(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

[[noreturn]] void unknown(const std::string& what) {
  throw std::runtime_error("PTX that the emulator does not know: " + what);
}

// A variable in shared or local memory: its address inside the space; dynamic if it has no size.
struct Variable {
  uint64_t address;
  bool dynamic;
};

class Parser {
 public:
  Kernel run(const std::string& module, const std::string& entry) {
    const std::string text = withoutComments(module);
    const size_t start = text.find(".entry " + entry + "(");
    if (start == std::string::npos) throw std::runtime_error("the module has no kernel " + entry);
    kernel_.name = entry;
    scopes_.emplace_back();
    for (const std::string& name : kSpecialRegisters) scopes_[0][name] = kernel_.registers++;
    scopes_[0]["WARP_SZ"] = constant(kLanes);
    moduleVariables(text);
    const size_t open = text.find('(', start), close = matching(text, open);
    parameters(text.substr(open + 1, close - open - 1));
    body(text, text.find('{', close));
    for (Instruction& i : kernel_.code) {
      if (i.op != Op::op_bra) continue;
      const auto found = labels_.find(i.operands.back().name);
      if (found == labels_.end()) unknown("label of " + i.text);
      i.target = found->second;
    }
    Instruction end;
    end.op = Op::op_ret;
    end.text = "ret (end of the kernel)";
    kernel_.code.push_back(end);
    return std::move(kernel_);
  }

 private:
  Kernel kernel_;
  std::vector<std::map<std::string, int>> scopes_;  // names of registers, innermost last
  std::map<std::string, int> labels_;
  std::map<uint64_t, int> constants_;
  std::map<std::string, Variable> variables_;
  std::map<std::string, int> parameterOffsets_;
  std::map<std::string, int> globals_;  // name to register that will hold the address
  int dynamic_ = -1;
  int line_ = 0;

  static std::string withoutComments(const std::string& s) {
    std::string out;
    out.reserve(s.size());
    for (size_t i = 0; i < s.size(); ++i) {
      if (s[i] == '/' && i + 1 < s.size() && s[i + 1] == '/') {
        while (i < s.size() && s[i] != '\n') ++i;
        out += '\n';
      } else {
        out += s[i];
      }
    }
    return out;
  }

  static size_t matching(const std::string& s, size_t open) {
    int depth = 0;
    for (size_t i = open; i < s.size(); ++i) {
      depth += (s[i] == '(') - (s[i] == ')');
      if (!depth) return i;
    }
    unknown("an open parenthesis");
  }

  int constant(uint64_t value) {
    const auto found = constants_.find(value);
    if (found != constants_.end()) return found->second;
    kernel_.constants.push_back({kernel_.registers, value});
    return constants_[value] = kernel_.registers++;
  }

  int lookup(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    return -1;
  }

  int dynamicShared() {
    if (dynamic_ < 0) {
      dynamic_ = kernel_.registers++;
      kernel_.dynamicShared.push_back(dynamic_);
    }
    return dynamic_;
  }

  // -- declarations ------------------------------------------------------------------------------

  void moduleVariables(const std::string& text) {
    int depth = 0;
    std::string statement;
    for (char c : text) {
      if (c == '{' || c == '(') ++depth;
      if (depth == 0 || statement.find('=') != std::string::npos) statement += c;
      if (c == '}' || c == ')') {
        --depth;
        if (depth == 0 && statement.find('=') == std::string::npos) statement.clear();
      }
      if (c == ';' && depth == 0) {
        declare(trim(statement));
        statement.clear();
      }
    }
  }

  void declare(const std::string& text) {
    const size_t equals = text.find('=');
    std::istringstream words(text.substr(0, equals));
    std::string word, name;
    Space space = Space::generic;
    Type type = Type::b8;
    uint64_t align = 1;
    while (words >> word) {
      if (word == ".align") {
        words >> align;
      } else if (word == ".const") {
        space = Space::global;
        name.clear();
      } else if (word[0] == '.') {
        const Type named = typeNamed(word.substr(1));
        if (named != Type::none) type = named;
        if (lookUp(kSpaces, word.substr(1), &space)) name.clear();  // after .version and .target
      } else {
        name += word;
      }
    }
    if (!name.empty() && name.back() == ';') name.pop_back();
    if (space == Space::generic || name.empty()) return;
    const size_t bracket = name.find('[');
    uint64_t count = 1;
    if (bracket != std::string::npos) count = std::strtoull(name.c_str() + bracket + 1, nullptr, 0);
    name = name.substr(0, bracket);
    align = std::max<uint64_t>(align, bytesOf(type));
    const uint64_t size = count * bytesOf(type);
    if (space == Space::shared) {
      if (size == 0) {
        variables_[name] = {0, true};
        return;
      }
      kernel_.sharedBytes = (kernel_.sharedBytes + align - 1) / align * align;
      variables_[name] = {kernel_.sharedBytes, false};
      kernel_.sharedBytes += size;
    } else if (space == Space::local) {
      kernel_.localBytes = (kernel_.localBytes + align - 1) / align * align;
      variables_[name] = {kLocalWindow + kernel_.localBytes, false};
      kernel_.localBytes += size;
    } else if (space == Space::global) {
      Global global{name, size, align, std::vector<uint8_t>(size, 0)};
      if (equals != std::string::npos) initialize(global, type, text.substr(equals + 1));
      globals_[name] = kernel_.registers++;
      kernel_.globalAddresses.emplace_back(globals_[name], name);
      kernel_.globals.push_back(std::move(global));
    }
  }

  static void initialize(Global& global, Type type, std::string values) {
    for (char& c : values) {
      if (c == '{' || c == '}' || c == ';') c = ' ';
    }
    size_t at = 0;
    const size_t each = bytesOf(type);
    for (const std::string& value : split(values, ',')) {
      if (at + each > global.size) unknown("initializer of " + global.name);
      const uint64_t bits = immediate(value, type);
      std::memcpy(&global.data[at], &bits, each);
      at += each;
    }
  }

  void parameters(const std::string& list) {
    for (const std::string& text : split(list, ',')) {
      std::istringstream words(text);
      std::string word, name;
      Type type = Type::u64;
      int align = 0;
      while (words >> word) {
        if (word == ".align" || word == ".ptr") {
          if (word == ".align") words >> align;
        } else if (word[0] == '.') {
          const Type named = typeNamed(word.substr(1));
          if (named != Type::none) type = named;
        } else {
          name = word;
        }
      }
      int size = bytesOf(type), to = std::max(size, 1);
      const size_t bracket = name.find('[');
      if (bracket != std::string::npos) {
        size *= std::atoi(name.c_str() + bracket + 1);
        to = std::max(to, align);
        name = name.substr(0, bracket);
      }
      kernel_.parameterBytes = (kernel_.parameterBytes + to - 1) / to * to;
      parameterOffsets_[name] = kernel_.parameterBytes;
      kernel_.parameters.push_back({name, kernel_.parameterBytes, size});
      kernel_.parameterBytes += size;
    }
  }

  void registers(const std::string& text) {
    std::istringstream words(text);
    std::string directive, type, rest;
    words >> directive >> type;
    std::getline(words, rest);
    for (const std::string& name : split(trim(rest), ',')) {
      const size_t angle = name.find('<');
      if (angle == std::string::npos) {
        scopes_.back()[name] = kernel_.registers++;
        continue;
      }
      const int count = std::atoi(name.c_str() + angle + 1);
      for (int i = 0; i < count; ++i) {
        scopes_.back()[name.substr(0, angle) + std::to_string(i)] = kernel_.registers++;
      }
    }
  }

  // -- statements --------------------------------------------------------------------------------

  void body(const std::string& text, size_t open) {
    scopes_.emplace_back();
    int depth = 1;
    std::string statement;
    bool empty = true;
    for (size_t i = open + 1; i < text.size(); ++i) {
      const char c = text[i];
      if (c == '\n' && trim(statement).rfind(".loc", 0) == 0) {
        location(trim(statement));
        statement.clear();
        empty = true;
      } else if (empty && c == '{') {
        ++depth;
        scopes_.emplace_back();
        statement.clear();
      } else if (empty && c == '}') {
        scopes_.pop_back();
        statement.clear();
        if (--depth == 0) return;
      } else if (c == ';') {
        finish(trim(statement));
        statement.clear();
        empty = true;
      } else if (c == ':' && text[i + 1] != ':' && text[i - 1] != ':' && isLabel(trim(statement))) {
        labels_[trim(statement)] = int(kernel_.code.size());
        statement.clear();
        empty = true;
      } else {
        statement += c == '\n' || c == '\t' ? ' ' : c;
        empty = empty && std::isspace(static_cast<unsigned char>(c));
      }
    }
    unknown("a kernel without an end");
  }

  static bool isLabel(const std::string& s) {
    return !s.empty() && std::all_of(s.begin(), s.end(), isName);
  }

  // `.loc file line column[, function_name label, inlined_at file line column]`: the kernel's line.
  void location(const std::string& text) {
    const size_t inlined = text.rfind("inlined_at");
    std::istringstream words(text.substr(inlined == std::string::npos ? 4 : inlined + 10));
    int file;
    words >> file >> line_;
  }

  void finish(const std::string& statement) {
    if (statement.empty()) return;
    if (statement.rfind(".reg", 0) == 0) {
      registers(statement);
    } else if (statement[0] == '.') {
      if (statement.rfind(".pragma", 0) != 0) declare(statement);
    } else {
      kernel_.code.push_back(instruction(statement));
    }
  }

  static uint64_t immediate(const std::string& s, Type type) {
    if (s.size() > 2 && s[0] == '0' && std::strchr("fFdD", s[1])) {
      return std::strtoull(s.c_str() + 2, nullptr, 16);
    }
    if (s.find('.') != std::string::npos) {
      const double value = std::strtod(s.c_str(), nullptr);
      return type == Type::f64 ? bitsAs<uint64_t>(value) : bitsAs<uint32_t>(float(value));
    }
    return s[0] == '-' ? uint64_t(std::strtoll(s.c_str(), nullptr, 0))
                       : std::strtoull(s.c_str(), nullptr, 0);
  }

  // The register that holds the value of a name or number; -1 if it is neither.
  int valueOf(const std::string& s, Type type) {
    const int known = lookup(s);
    if (known >= 0) return known;
    if (std::isdigit(static_cast<unsigned char>(s[0])) || s[0] == '-') {
      return constant(immediate(s, type));
    }
    const auto variable = variables_.find(s);
    if (variable != variables_.end()) {
      return variable->second.dynamic ? dynamicShared() : constant(variable->second.address);
    }
    const auto global = globals_.find(s);
    return global == globals_.end() ? -1 : global->second;
  }

  Operand operand(std::string s, Type type) {
    Operand o;
    s = trim(s);
    if (s.empty()) unknown("an empty operand");
    if (s == "_") {
      o.kind = Operand::sink;
    } else if (s[0] == '!') {
      o = operand(s.substr(1), type);
      o.negated = true;
    } else if (s[0] == '{') {
      o.kind = Operand::list;
      for (const std::string& part : split(s.substr(1, s.rfind('}') - 1), ',')) {
        o.parts.push_back(operand(part, type));
      }
    } else if (s[0] == '[') {
      o = address(trim(s.substr(1, s.rfind(']') - 1)));
    } else {
      o.index = valueOf(s, type);
      o.kind = o.index >= 0 ? Operand::reg : Operand::label;
      o.name = s;
    }
    return o;
  }

  Operand address(const std::string& inside) {
    Operand o;
    o.kind = Operand::address;
    const size_t sign = inside.find('+', 1);
    const std::string base = trim(inside.substr(0, sign));
    if (sign != std::string::npos) {
      o.offset = std::strtoll(trim(inside.substr(sign + 1)).c_str(), nullptr, 0);
    }
    const auto parameter = parameterOffsets_.find(base);
    if (parameter != parameterOffsets_.end()) {
      o.offset += parameter->second;
    } else {
      o.index = valueOf(base, Type::u64);
      if (o.index < 0) unknown("address " + inside);
    }
    return o;
  }

  Instruction instruction(std::string s) {
    Instruction i;
    i.text = s;
    i.line = line_;
    if (s[0] == '@') {
      const size_t space = s.find(' ');
      i.guardNegated = s[1] == '!';
      i.guard = lookup(s.substr(1 + i.guardNegated, space - 1 - i.guardNegated));
      if (i.guard < 0) unknown("guard of " + i.text);
      s = trim(s.substr(space));
    }
    size_t end = 0;
    while (end < s.size() && (isName(s[end]) || s[end] == '.' || s[end] == ':')) ++end;
    std::vector<std::string> modifiers;
    std::istringstream parts(s.substr(0, end));
    std::string part;
    while (std::getline(parts, part, '.')) modifiers.push_back(part);
    if (!lookUp(kOpcodes, modifiers[0], &i.op)) unknown(i.text);
    modifiers.erase(modifiers.begin());
    std::vector<Type> types;
    for (const std::string& m : modifiers) modifier(i, m, types);
    if (!types.empty()) i.type = types[0];
    if (types.size() > 1) i.from = types[1];
    if (i.op == Op::op_mma) {
      if (types.size() != 4) unknown(i.text);
      std::copy(types.begin(), types.end(), i.matrix);
    }
    for (const std::string& text : split(trim(s.substr(end)), ',')) {
      const size_t bar = text.find('|');
      if (bar != std::string::npos && i.operands.empty()) {
        i.operands.push_back(operand(text.substr(0, bar), i.type));
        i.second = operand(text.substr(bar + 1), Type::pred);
      } else {
        i.operands.push_back(operand(text, i.type));
      }
    }
    check(i);
    return i;
  }

  void modifier(Instruction& i, const std::string& m, std::vector<Type>& types) {
    const Type type = typeNamed(m);
    const bool compares = i.op == Op::op_setp, atomic = i.op == Op::op_atom || i.op == Op::op_red;
    if (type != Type::none) {
      types.push_back(type);
    } else if (lookUp(kSpaces, m, &i.space)) {
    } else if (compares && (m == "and" || m == "or" || m == "xor")) {
      i.combine = m == "and" ? Bool::land : m == "or" ? Bool::lor : Bool::lxor;
    } else if (compares && lookUp(kCompares, m, &i.compare)) {
    } else if (atomic && lookUp(kAtomics, m, &i.atomic)) {
    } else if (i.op == Op::op_shfl && lookUp(kShuffles, m, &i.shuffle)) {
    } else if (i.op == Op::op_vote && lookUp(kVotes, m, &i.vote)) {
    } else if (m == "lo" || m == "hi" || m == "wide") {
      i.part = m == "lo" ? Part::low : m == "hi" ? Part::high : Part::wide;
    } else if (lookUp(kRounds, m, &i.round)) {
    } else if (m == "v2" || m == "x2") {
      i.vector = 2;
    } else if (m == "v4" || m == "x4") {
      i.vector = 4;
    } else if (m == "x1") {
      i.vector = 1;
    } else if (m == "sat") {
      i.saturate = true;
    } else if (m == "ftz") {
      i.flushes = true;
    } else if (m == "trans") {
      i.transposed = true;
    } else if (i.op == Op::op_shf && (m == "l" || m == "r")) {
      i.left = m == "l";
    } else if (m == "wrap") {
      i.wraps = true;
    } else if (m == "shiftamt") {
      i.shiftAmount = true;
    } else if (i.op == Op::op_mma && m == "sp::ordered_metadata") {
      i.sparse = true;
    } else if (m == "warp") {
      i.warpBarrier = true;
    } else if (m == "to") {
      i.toSpace = true;
    } else if (m == "commit_group" || m == "wait_group" || m == "wait_all") {
      i.async = m == "commit_group" ? Async::commit
                : m == "wait_group" ? Async::waitGroup
                                    : Async::waitAll;
    } else if (m == "acquire" || m == "volatile" || m == "relaxed") {
      i.synchronizes = true;
    } else if (m.find("cache_hint") != std::string::npos) {
      i.hint = true;
    } else if (m.rfind("L1::", 0) != 0 && m.rfind("L2::", 0) != 0 &&
               std::none_of(std::begin(kIgnored), std::end(kIgnored),
                            [&](const char* k) { return m == k; })) {
      unknown("." + m + " of " + i.text);
    }
    if (m.rfind("m16n8k", 0) == 0) i.depth = std::atoi(m.c_str() + 6);
  }

  static void check(Instruction& i) {
    static const std::map<Op, size_t> least = {
        {Op::op_add, 3}, {Op::op_sub, 3},  {Op::op_mul, 3}, {Op::op_mad, 4},     {Op::op_fma, 4},
        {Op::op_mov, 2}, {Op::op_ld, 2},   {Op::op_st, 2},  {Op::op_cvt, 2},     {Op::op_setp, 3},
        {Op::op_mma, 4}, {Op::op_shfl, 5}, {Op::op_bra, 1}, {Op::op_ldmatrix, 2}};
    const auto found = least.find(i.op);
    if (found != least.end() && i.operands.size() < found->second) unknown(i.text);
    const bool convert = i.op == Op::op_cvt;
    if ((i.round == Round::zero && !convert) || (i.flushes && i.type != Type::f32)) unknown(i.text);
    if (i.op == Op::op_mma && (!i.depth || i.operands.size() != (i.sparse ? 6 : 4))) {
      unknown(i.text);
    }
    if (i.sparse) {
      const int bits = bitsOf(i.matrix[1]);
      const bool halves = bits == 16 && i.matrix[0] != Type::f16 && i.depth >= 16;
      if (!halves && (bits != 8 || i.depth != 64)) unknown(i.text);
    }
    if (i.op == Op::op_cp && i.text.find("bulk") != std::string::npos) unknown(i.text);
    for (const Operand& o : i.operands) {
      if (o.kind == Operand::label && i.op != Op::op_bra) unknown(o.name + " in " + i.text);
    }
    i.converges = i.op == Op::op_mma || i.op == Op::op_ldmatrix || i.op == Op::op_shfl ||
                  i.op == Op::op_bar || i.op == Op::op_barrier;
  }
};

}  // namespace

const std::vector<std::string> kSpecialRegisters = {
    "%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
    "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
    "%nctaid.y", "%nctaid.z", "%laneid",  "%warpid",  "%lanemask_lt"};

int bitsOf(Type type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row.bits;
  }
  return 32;
}

bool isFloat(Type t) {
  return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64;
}

bool isSigned(Type t) {
  return t == Type::s4 || t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64;
}

Type typeNamed(const std::string& name) {
  for (const TypeRow& row : kTypes) {
    if (name == row.name) return row.type;
  }
  return Type::none;
}

Kernel parse(const std::string& module, const std::string& entry) {
  return Parser().run(module, entry);
}

}  // namespace ptx
