// What a warp does as one: matrix fragments, shuffles, votes.

#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace ptx {

void Launch::loadMatrix(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != kAllLanes) fail(w, i, "ldmatrix by a part of a warp");
  const Operand& from = i.operands[1];
  need(w, i, from, kAllLanes >> (32 - 8 * i.vector), "an address that nobody computed");
  uint64_t results[4][kLanes];
  for (int m = 0; m < i.vector; ++m) {
    uint16_t rows[8][8];
    uint64_t addresses[kLanes] = {};
    for (int r = 0; r < 8; ++r) {
      addresses[r] = uint32_t(values(w, from)[8 * m + r] + from.offset);
      readShared(w, i, addresses[r], 16);
      std::memcpy(rows[r], &w.block->shared[addresses[r]], 16);
    }
    countShared(countOf(i), addresses, 0xff, 16);
    for (int l = 0; l < kLanes; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      const uint32_t low = i.transposed ? rows[c][r] : rows[r][c];
      const uint32_t high = i.transposed ? rows[c + 1][r] : rows[r][c + 1];
      results[m][l] = low | high << 16;
    }
  }
  const Operand& to = i.operands[0];
  for (int m = 0; m < i.vector; ++m) {
    const Operand& part = to.kind == Operand::list ? to.parts[m] : to;
    std::memcpy(values(w, part), results[m], sizeof results[m]);
    define(w, part, kAllLanes, kAllLanes);
  }
}

// Metadata of mma.sp: 4 bits say which two of four numbers of a row of A there are, the lower index
// first.
// 16-bit numbers: a lane's word has row l / 4 in its lower half and row l / 4 + 8 in the upper one,
// of 16 numbers along k; the selector says which lanes of every four give theirs: one of them for
// k = 16, the first or second two for k = 32.
// Bytes (k = 64): all lanes give theirs, a word has 32 numbers of one row. Of every four lanes the
// first two have k = 0 to 31 of the rows l / 4 and l / 4 + 8, the others k = 32 to 63. The PTX ISA
// has this in two figures; CUTLASS has it as the layout ((2, 2, 8), 32) : ((8, 512, 1), 16) of E in
// mma_traits_sm120_sparse.hpp, and before that as what reorder_meta and ldmatrix do together.
void Launch::findPlaces(Warp& w, const Instruction& i, uint8_t (&places)[16][32]) {
  const Operand &metadata = i.operands[4], &selector = i.operands[5];
  const uint64_t* words = values(w, metadata);
  const bool bytes = bitsOf(i.matrix[1]) == 8;
  const int givers = bytes ? 4 : i.depth / 16, which = int(values(w, selector)[0]);
  if (which < 0 || which >= 4 / givers) fail(w, i, "a selector out of range");
  for (int row = 0; row < 16; ++row) {
    for (int four = 0; four < i.depth / 4; ++four) {
      const int giver = bytes ? row / 8 + four / 8 * 2 : which * givers + four / 4;
      const int shift = bytes ? four % 8 * 4 : row / 8 * 16 + four % 4 * 4;
      const int lane = row % 8 * 4 + giver;
      if (!(defined(w, metadata) >> lane & 1)) fail(w, i, "metadata that nobody computed");
      const uint32_t pair = uint32_t(words[lane]) >> shift & 15;
      const int first = pair & 3, second = pair >> 2;
      if (first >= second) fail(w, i, "metadata whose indices do not ascend");
      places[row][2 * four] = uint8_t(4 * four + first);
      places[row][2 * four + 1] = uint8_t(4 * four + second);
    }
  }
}

// m16n8k<depth>: fragments as the PTX ISA lays them out. A register holds `each` elements that
// follow one another in k; lane l has row (A) or column (B) l / 4. Sums are exact or in double and
// rounded once: tensor cores may round differently in the last places. Of a sparse A (mma.sp) the
// fragments hold two of every four numbers of a row.
void Launch::multiplyMatrices(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != kAllLanes) fail(w, i, "mma by a part of a warp");
  const Type result = i.matrix[0], left = i.matrix[1], right = i.matrix[2];
  const int bits = bitsOf(left) > 16 ? 16 : bitsOf(left), each = 32 / bits;
  const int nb = i.depth / (4 * each), na = i.sparse ? nb : 2 * nb;
  const Operand *d = &i.operands[0], *a = &i.operands[1], *b = &i.operands[2], *c = &i.operands[3];
  const auto part = [&](const Operand& o, int n) -> const Operand& {
    const Operand& p = o.kind == Operand::list ? o.parts.at(n) : o;
    need(w, i, p, kAllLanes, "an mma of values that nobody computed");
    return p;
  };
  const auto element = [&](Type type, uint64_t word, int n) -> double {
    const uint64_t v = word >> (bits * n) & ((1ull << bits) - 1);
    return asDouble(type, v);
  };
  double A[16][64] = {}, B[64][8];
  uint8_t places[16][32];  // of the numbers of a sparse A along k
  if (i.sparse) findPlaces(w, i, places);
  for (int r = 0; r < na; ++r) {
    const uint64_t* words = values(w, part(*a, r));
    for (int l = 0; l < kLanes; ++l) {
      for (int e = 0; e < each; ++e) {
        const int row = l / 4 + 8 * (r & 1), column = l % 4 * each + (r >> 1) * 4 * each + e;
        A[row][i.sparse ? places[row][column] : column] = element(left, words[l], e);
      }
    }
  }
  for (int r = 0; r < nb; ++r) {
    const uint64_t* words = values(w, part(*b, r));
    for (int l = 0; l < kLanes; ++l) {
      for (int e = 0; e < each; ++e) {
        B[l % 4 * each + r * 4 * each + e][l / 4] = element(right, words[l], e);
      }
    }
  }
  double sum[16][8];
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double s = 0;
      for (int k = 0; k < i.depth; ++k) s += A[row][k] * B[k][column];
      sum[row][column] = s;
    }
  }
  const bool halves = result == Type::f16;
  const int outputs = halves ? 2 : 4;
  uint64_t out[4][kLanes];
  for (int r = 0; r < outputs; ++r) {
    const uint64_t* start = values(w, part(*c, r));
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + 8 * (halves ? r : r >> 1), column = l % 4 * 2;
      if (halves) {
        const uint32_t low = doubleToHalf(halfToDouble(uint16_t(start[l])) + sum[row][column]);
        const uint32_t high =
            doubleToHalf(halfToDouble(uint16_t(start[l] >> 16)) + sum[row][column + 1]);
        out[r][l] = low | high << 16;
      } else if (result == Type::f32) {
        out[r][l] =
            bitsAs<uint32_t>(float(bitsAs<float>(uint32_t(start[l])) + sum[row][column + (r & 1)]));
      } else {
        out[r][l] = uint32_t(int32_t(start[l]) + int64_t(sum[row][column + (r & 1)]));
      }
    }
  }
  for (int r = 0; r < outputs; ++r) {
    const Operand& to = d->kind == Operand::list ? d->parts.at(r) : *d;
    std::memcpy(values(w, to), out[r], sizeof out[r]);
    define(w, to, kAllLanes, kAllLanes);
  }
}

void Launch::shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  const uint64_t *source = values(w, from), *amount = values(w, i.operands[2]),
                 *control = values(w, i.operands[3]), *members = values(w, i.operands[4]);
  uint64_t results[kLanes];
  uint32_t inRange = 0, known = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    if (!(members[l] >> l & 1)) fail(w, i, "shfl by a lane outside of its own mask");
    const int clamp = int(control[l] & 31), segment = int(control[l] >> 8 & 31);
    const int b = int(amount[l] & 31);
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int other = l;
    bool valid = false;
    switch (i.shuffle) {
      case Shuffle::up:
        other = l - b, valid = other >= last;
        break;
      case Shuffle::down:
        other = l + b, valid = other <= last;
        break;
      case Shuffle::bfly:
        other = l ^ b, valid = other <= last;
        break;
      case Shuffle::idx:
        other = first | (b & ~segment), valid = other <= last;
        break;
    }
    if (!valid) other = l;
    if (!(lanes >> other & 1)) fail(w, i, "shfl from a lane that does not take part");
    results[l] = uint32_t(source[other]);
    known |= (defined(w, from) >> other & 1) << l;
    inRange |= uint32_t(valid) << l;
  }
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    values(w, to)[l] = results[l];
    if (i.second.kind == Operand::reg) values(w, i.second)[l] = inRange >> l & 1;
  }
  define(w, to, lanes, known);
  if (i.second.kind == Operand::reg) define(w, i.second, lanes, lanes);
}

void Launch::vote(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  need(w, i, from, lanes, "a vote on predicates that nobody computed");
  uint32_t yes = 0;
  for (int l = 0; l < kLanes; ++l) {
    if ((lanes >> l & 1) && (values(w, from)[l] != 0) != from.negated) yes |= 1u << l;
  }
  uint64_t result = yes;
  if (i.vote == Vote::any) result = yes != 0;
  if (i.vote == Vote::all) result = yes == lanes;
  if (i.vote == Vote::uni) result = yes == lanes || !yes;
  for (int l = 0; l < kLanes; ++l) {
    if (lanes >> l & 1) values(w, to)[l] = result;
  }
  define(w, to, lanes, lanes);
}

}  // namespace ptx
