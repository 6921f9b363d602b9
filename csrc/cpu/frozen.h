// Inference on weights that were packed once (csrc/frozen.h): few rows, so that a step is bound by reading the weights.
//
// A thread owns blocks of units. It takes in what it multiplies, of the input and of the state, into memory of its own, in
// the form that the format of the weights is multiplied with: float32 for float32 and bfloat16, 16-bit integers with a scale
// for int8. Where the processor multiplies pairs of bfloat16 (AVX512_BF16), the state is two of these to a number for bfloat16, and
// the input one; where it multiplies bytes (AVX512_VNNI), an integer is two of these. The input's products are taken for a
// number of steps at once.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../arena.h"
#include "../frozen.h"
#include "team.h"
#include "weights.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

typedef Vec<float>::RawBits I32;
typedef int16_t I16 __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
typedef uint16_t HalvesOfU32 __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
typedef int16_t HalfI16 __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int kLineVectors = kFrozenUnits / kFloatLanes;  // vectors of 32-bit words in a line
static_assert(kLineVectors * kFloatLanes == kFrozenUnits, "a line is whole vectors");

// The products of neighbouring 16-bit integers, added in pairs.
FUSEDRNN_INLINE I32 multiply_pairs(I32 a, I32 b) {
#if defined(__AVX512BW__) && FUSEDRNN_VECTOR_BYTES == 64
  return (I32)__builtin_ia32_pmaddwd512_mask((I16)a, (I16)b, I32{}, (uint16_t)-1);
#elif defined(__AVX2__) && FUSEDRNN_VECTOR_BYTES == 32
  return (I32)__builtin_ia32_pmaddwd256((I16)a, (I16)b);
#elif defined(__SSE2__) && FUSEDRNN_VECTOR_BYTES == 16
  return (I32)__builtin_ia32_pmaddwd128((I16)a, (I16)b);
#else
  return (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
#endif
}

// How a format is multiplied. A word holds kParts parts; part j of a vector of words times part j of a group of activations,
// the same for all lanes, is added to Sum. kChains: what a tile of 3 to 7 vectors of sums is split into, so that additions need not
// wait for each other. kApart: each part has a sum of its own, and join makes one of them. OfInput: how the input is multiplied, where
// that is a little less exact.
struct Float32Lines {
  using OfInput = Float32Lines;
  using Activation = float;
  using Part = F32;
  using Sum = F32;
  static constexpr int kGroup = 1, kParts = 1, kChains = 2;
  static constexpr bool kApart = false;
  static FUSEDRNN_INLINE Part part(U32 word, int) { return (F32)word; }
  static FUSEDRNN_INLINE Part spread(const float* a, int j) { return Vec<float>(a[j]).raw; }
  static FUSEDRNN_INLINE Sum add(Sum c, Part a, Part w) { return a * w + c; }
};

#if defined(__AVX512BF16__) && FUSEDRNN_VECTOR_BYTES == 64
// A pair of activations is a word of the two rounded to bfloat16, and a word of what that has taken from them.
struct BFloat16Rounded {
  using Activation = uint32_t;
  using Part = U32;
  using Sum = F32;
  static constexpr int kGroup = 2, kParts = 1, kChains = 4;
  static constexpr bool kApart = false;
  static FUSEDRNN_INLINE Part part(U32 word, int) { return word; }
  static FUSEDRNN_INLINE Part spread(const uint32_t* a, int j) { return a[j] + U32{}; }
  static FUSEDRNN_INLINE Sum add(Sum c, Part a, Part w) { return (F32)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)w); }
};
struct BFloat16Lines : BFloat16Rounded {
  using OfInput = BFloat16Rounded;  // many rows at once, bound by multiplying and not by reading as the state's
  static constexpr int kParts = 2;
};
#else
struct BFloat16Lines : Float32Lines {
  using OfInput = BFloat16Lines;
  static constexpr int kGroup = 2, kParts = 2;
  static FUSEDRNN_INLINE Part part(U32 word, int j) { return (F32)(j ? word & 0xffff0000u : word << 16); }
};
#endif

// Weights lie there plus 128 (csrc/frozen.h), which is taken back from a sum once (Scaling). Sums wrap around at 32 bits, and what
// is left then is exact for as many inputs as a pass has (kPassGroups): 512 * 127 * 32639 < 2^31.
struct Int8Lines {
  using OfInput = Int8Lines;
  using Activation = int16_t;
  using Part = U32;
  using Sum = U32;
  static constexpr int kGroup = 4, kParts = 2;
  static constexpr float kLargest = 32639.0f;  // 127 * 256 + 127: what two bytes with a sign each can say
  static FUSEDRNN_INLINE Part spread(const int16_t* a, int j) {
    uint32_t word;
    __builtin_memcpy(&word, a + 2 * j, sizeof word);
    return word + U32{};
  }
#if defined(__AVX512VNNI__) && FUSEDRNN_VECTOR_BYTES == 64
  // Part 0 of four activations is their lower bytes, part 1 the upper ones; each has sums of its own.
  static constexpr int kChains = 4;
  static constexpr bool kApart = true;
  static FUSEDRNN_INLINE void put(int16_t* to, HalfI16 values) {
    const __m128i order = _mm_set_epi64x(0x0f0b0d090e0a0c08, 0x0703050106020400), lower = _mm_set1_epi64x(0x80808080);
    const __m256i up = (__m256i)(values + int16_t(128));  // to the next 256, where a lower byte has a sign
    const __m256i bytes = _mm256_shuffle_epi8(up, _mm256_broadcastsi128_si256(order));
    _mm256_storeu_si256((__m256i*)to, _mm256_xor_si256(bytes, _mm256_broadcastsi128_si256(lower)));
  }
  static FUSEDRNN_INLINE Part part(U32 word, int) { return word; }
  static FUSEDRNN_INLINE Sum add(Sum c, Part a, Part w) { return (U32)_mm512_dpbusd_epi32((__m512i)c, (__m512i)w, (__m512i)a); }
  static FUSEDRNN_INLINE Sum join(Sum lower, Sum upper) { return lower + (upper << 8); }
#else
  // Part 0 of four activations is the first two, part 1 the others.
  static constexpr int kChains = 1;
  static constexpr bool kApart = false;
  static FUSEDRNN_INLINE void put(int16_t* to, HalfI16 values) { __builtin_memcpy(to, &values, sizeof values); }
  static FUSEDRNN_INLINE Part part(U32 word, int j) { return j ? (U32)((HalvesOfU32)word >> 8) : word & 0x00ff00ffu; }
  static FUSEDRNN_INLINE Sum add(Sum c, Part a, Part w) { return c + (U32)multiply_pairs((I32)a, (I32)w); }
#endif
};

// -------------------------------------------------------------------------------------------------- activations

// A number of values in the format of the call's tensors, from an element on.
FUSEDRNN_INLINE Vec<float> get(Dtype dtype, const void* from, int64_t at, int n) {
  if (dtype == Dtype::kBFloat16) return load(static_cast<const Bf16*>(from) + at, n);
  return load(static_cast<const float*>(from) + at, n);
}
FUSEDRNN_INLINE void put(Dtype dtype, void* to, int64_t at, Vec<float> v, int n) {
  dtype == Dtype::kBFloat16 ? store(static_cast<Bf16*>(to) + at, v, n) : store(static_cast<float*>(to) + at, v, n);
}

// What the sums of a row over a pass are yet to be changed by, where weights are int8: less `offset`, times `scale`.
struct Scaling {
  float scale;
  uint32_t offset;
};

// Groups of inputs a pass: lines of one gate for several rows stay in the first-level cache.
constexpr int64_t kPassGroups = 128;

// Values that are multiplied with weights: `count` of them, in a row of whole vectors, zeros behind them.
FUSEDRNN_INLINE void take_in(float* to, Scaling*, Dtype dtype, const void* from, int64_t at, int64_t count) {
  for (int64_t k = 0; k < count; k += kFloatLanes) store(to + k, get(dtype, from, at + k, lanes_left<float>(k, count)));
}

#if defined(__AVX512BF16__) && FUSEDRNN_VECTOR_BYTES == 64
// As words of pairs, each followed by what is missing to it. What bfloat16 cannot hold is an infinity, and nothing is missing.
FUSEDRNN_INLINE void take_in(uint32_t* to, Scaling*, Dtype dtype, const void* from, int64_t at, int64_t count) {
  typedef uint32_t Pairs __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
  constexpr int32_t kInfinity = 0x7f800000;
  auto pairs = [](const Bf16* values) __attribute__((always_inline)) {
    Pairs found;
    __builtin_memcpy(&found, values, sizeof found);
    return found;
  };
  for (int64_t k = 0; k < count; k += kFloatLanes) {
    const Vec<float> x = get(dtype, from, at + k, lanes_left<float>(k, count));
    Bf16 rounded[kFloatLanes], missing[kFloatLanes];
    store(rounded, x);
    const F32 most = load(rounded).raw;
    store(missing, Vec<float>(((I32)most & kInfinity) == kInfinity ? F32{} : x.raw - most));
    const U32 words = __builtin_shufflevector(pairs(rounded), pairs(missing), 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    __builtin_memcpy(to + k, &words, sizeof words);
  }
}
#endif

// As integers of 16 bits times a scale. A NaN or an infinity among them makes the scale, and with it all sums, NaN.
FUSEDRNN_INLINE void take_in(int16_t* to, Scaling* scaling, Dtype dtype, const void* from, int64_t at, int64_t count) {
  constexpr int32_t kInfinity = 0x7f800000;
  constexpr float kTiny = 1e-30f, kRound = 12582912.0f;  // 1.5 * 2^23: the sum has the rounded number in its lower bits
  constexpr int64_t kPass = kPassGroups * Int8Lines::kGroup;
  I32 magnitudes = {};
  for (int64_t k = 0; k < count; k += kFloatLanes) {  // magnitudes are ordered as their bits are
    const I32 bits = (I32)get(dtype, from, at + k, lanes_left<float>(k, count)).raw & 0x7fffffff;
    magnitudes = bits > magnitudes ? bits : magnitudes;
  }
  int32_t most = 0;
  for (int i = 0; i < kFloatLanes; ++i) most = magnitudes[i] > most ? magnitudes[i] : most;
  float largest;
  __builtin_memcpy(&largest, &most, sizeof largest);
  const float factor = most < kInfinity && largest > kTiny ? Int8Lines::kLargest / largest : 0.0f;
  const float scale = most < kInfinity ? largest / Int8Lines::kLargest : __builtin_nanf("");
  for (int64_t first = 0; first < count; first += kPass) {
    U32 sums = {};
    for (int64_t k = first; k < first + kPass && k < count; k += kFloatLanes) {
      const Vec<float> x = get(dtype, from, at + k, lanes_left<float>(k, count));
      const F32 shifted = x.raw * Vec<float>(factor).raw + Vec<float>(kRound).raw;
      const U32 rounded = (U32)shifted - (U32)Vec<float>(kRound).raw;
      Int8Lines::put(to + k, __builtin_convertvector((I32)rounded, HalfI16));
      sums += rounded;
    }
    uint32_t sum = 0;
    for (int i = 0; i < kFloatLanes; ++i) sum += sums[i];
    scaling[first / kPass] = {scale, sum * 128};
  }
}

// ----------------------------------------------------------------------------------------------------- products

// A tile of rows by vectors of sums stays in registers, beside weights and an activation; integers need one more for a
// product.
template <class Lines>
constexpr int kSumVectors = (FUSEDRNN_VECTOR_REGISTERS - (Lines::kGroup == Int8Lines::kGroup ? 8 : 6)) / (Lines::kApart ? 2 : 1);
// Rows of a tile: as many as leave room for all gates at once, if these are three: each number of the rows is then read once. (Of one gate
// at a time an LSTM's products of the input took 1.15 times as long: H256, AVX-512.)
template <class Lines, int kGates, int kEach = kSumVectors<Lines> / kLineVectors>
constexpr int kFrozenRows = int(least(kEach / kGates >= 3 ? kEach / kGates : kEach, 8));
// c (kRows, kVectors) = a (kRows, groups) times lines, `stride` bytes from group to group. Sums of floats are split among
// several chains where there are few, as in product.h.
template <class Lines, int kRows, int kVectors>
FUSEDRNN_INLINE void frozen_tile(const typename Lines::Activation* a, int64_t a_row, const char* lines, int64_t stride,
                                 int64_t groups, typename Lines::Sum (&sums)[kRows][kVectors]) {
  using Sum = typename Lines::Sum;
  using Part = typename Lines::Part;
  constexpr int kSums = kRows * kVectors, kParts = Lines::kParts, kApart = Lines::kApart ? kParts : 1;
  constexpr int kChains = kSums * kApart >= 8 || Lines::kChains == 1 ? kApart : kSums >= 3 ? Lines::kChains : 4;
  constexpr int kUnroll = kChains > kParts ? kChains / kParts : 1;
  Sum c[kChains][kRows][kVectors] = {};
  auto word = [&](int64_t i, int v) __attribute__((always_inline)) {
    U32 found;
    __builtin_memcpy(&found, lines + i * stride + v * int(sizeof found), sizeof found);
    return found;
  };
  auto group = [&](int64_t i, int turn) __attribute__((always_inline)) {
    const typename Lines::Activation* at = a + i * Lines::kGroup;
    if constexpr (kRows == 1) {
      Part x[kParts];
#pragma GCC unroll 2
      for (int j = 0; j < kParts; ++j) x[j] = Lines::spread(at, j);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const U32 w = word(i, v);
#pragma GCC unroll 2
        for (int j = 0; j < kParts; ++j) {
          Sum& to = c[(turn * kParts + j) % kChains][0][v];
          to = Lines::add(to, x[j], Lines::part(w, j));
        }
      }
    } else {
      U32 words[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) words[v] = word(i, v);
#pragma GCC unroll 2
      for (int j = 0; j < kParts; ++j) {
        Part w[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) w[v] = Lines::part(words[v], j);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const Part x = Lines::spread(at + m * a_row, j);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) {
            Sum& to = c[(turn * kParts + j) % kChains][m][v];
            to = Lines::add(to, x, w[v]);
          }
        }
      }
    }
  };
  int64_t i = 0;
  for (; i + kUnroll <= groups; i += kUnroll)
#pragma GCC unroll 4
    for (int turn = 0; turn < kUnroll; ++turn) group(i + turn, turn);
  for (; i < groups; ++i) group(i, 0);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int k = kApart; k < kChains; ++k) c[k % kApart][m][v] += c[k][m][v];
      if constexpr (Lines::kApart)
        sums[m][v] = Lines::join(c[0][m][v], c[1][m][v]);
      else
        sums[m][v] = c[0][m][v];
    }
}

// What a block multiplies, and where its sums go.
template <class Lines>
struct FrozenProduct {
  const typename Lines::Activation* a;  // (rows, groups), rows a_row apart
  int64_t a_row;
  const Scaling* scalings;              // (rows, passes), for integers
  int64_t passes;
  const char* lines;                    // (groups, gates) lines
  const float* scales;                  // (gates, kFrozenUnits), for integers
  int64_t groups;
  float* sums;                          // rows sums_row apart, in each a line for every gate
  int64_t sums_row;
  const int* slots;                     // (gates) which line
};

// Gates [kFirst, kGates) of kRows rows from row `m` on over a pass of groups, as many gates at once as registers have sums
// for.
template <class Lines, int kGates, int kRows, int kFirst = 0>
FUSEDRNN_INLINE void frozen_rows(const FrozenProduct<Lines>& p, int64_t m, int64_t begin, int64_t groups) {
  constexpr int kFit = kSumVectors<Lines> / (kRows * kLineVectors);
  constexpr int kNow = kGates - kFirst < kFit ? kGates - kFirst : kFit, kVectors = kNow * kLineVectors;
  typename Lines::Sum c[kRows][kVectors];
  frozen_tile<Lines, kRows, kVectors>(p.a + m * p.a_row + begin * Lines::kGroup, p.a_row,
                                      p.lines + (begin * kGates + kFirst) * kLineBytes, kGates * kLineBytes, groups, c);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int gate = kFirst + v / kLineVectors, lane = v % kLineVectors * kFloatLanes;
      float* to = p.sums + (m + i) * p.sums_row + p.slots[gate] * kFrozenUnits + lane;
      if constexpr (Lines::kGroup == Int8Lines::kGroup) {
        const Scaling of_row = p.scalings[(m + i) * p.passes + begin / kPassGroups];
        const Vec<float> scale = load(p.scales + gate * kFrozenUnits + lane) * Vec<float>(of_row.scale);
        store(to, load(to) + Vec<float>(__builtin_convertvector((I32)(c[i][v] - of_row.offset), F32)) * scale);
      } else {
        store(to, load(to) + Vec<float>(c[i][v]));
      }
    }
  if constexpr (kFirst + kNow < kGates) frozen_rows<Lines, kGates, kRows, kFirst + kNow>(p, m, begin, groups);
}

template <class Lines, int kGates, int kRows = kFrozenRows<Lines, kGates>>
FUSEDRNN_INLINE void frozen_rows_of(int64_t rows, const FrozenProduct<Lines>& p, int64_t m, int64_t begin, int64_t groups) {
  if constexpr (kRows > 1)
    if (rows < kRows) return frozen_rows_of<Lines, kGates, kRows - 1>(rows, p, m, begin, groups);
  frozen_rows<Lines, kGates, kRows>(p, m, begin, groups);
}

// The product of all rows, in passes over the depth and tiles of nearly equal height.
template <class Lines, int kGates>
inline void frozen_multiply(const FrozenProduct<Lines>& p, int64_t rows) {
  const int64_t tiles = blocks_of(rows, kFrozenRows<Lines, kGates>);
  for (int64_t begin = 0; begin < p.groups; begin += kPassGroups) {
    const int64_t groups = p.groups - begin < kPassGroups ? p.groups - begin : kPassGroups;
    for (int64_t i = 0; i < tiles; ++i) {
      const Range tile = share(rows, tiles, i);
      frozen_rows_of<Lines, kGates>(tile.end - tile.begin, p, tile.begin, begin, groups);
    }
  }
}

// ----------------------------------------------------------------------------------------------------- the pass

template <class Cell, class Lines>
struct FrozenPass {
  using V = Vec<float>;
  using Activation = typename Lines::Activation;
  static constexpr int kInner = Cell::kStates - 1;
  static constexpr int kSumRow = Cell::kPre * kFrozenUnits;
  static constexpr int64_t kChunkRows = 32;  // whose input products are taken at once
  // Which pre-activation the input half and the recurrent half of a gate add to; the first of kXSlots is 0.
  struct Slots {
    int at[Cell::kGates];
    constexpr Slots(int (*pre)(int)) : at() {
      for (int g = 0; g < Cell::kGates; ++g) at[g] = pre(g);
    }
  };
  static constexpr Slots kXSlots{Cell::x_pre}, kHSlots{Cell::h_pre};
  // A second thread is worth its waking up where a call reads so many bytes for one row, and its waiting where a step does.
  // Measured: a thread reads 50 bytes a ns; waking another takes 4 us, and 8 ms where other work has its core.
  static constexpr int64_t kCallBytes = 2 << 20, kStepBytes = 64 << 10;

  struct Own {                   // a thread's memory
    Activation *x, *h;           // (chunk, x_row), (B, h_row)
    Scaling *x_scalings, *h_scalings;  // (chunk, passes), (B, passes)
  };

  const FrozenParams& p;
  const FrozenLayout& layout;
  const int64_t steps, unit_row, x_row, h_row, passes;  // steps: of a chunk
  const int threads;
  Barrier::Count* counts;        // (2, threads): each thread's count at its team's barrier, then at that between layers
  float* h[2];                   // (D, B, unit_row) the hidden state before and after a step, by turns
  float* inner[slots(kInner)];   // (D, B, unit_row)
  float* unprojected;            // (D, B, unit_row)
  float* below[2];               // (T, B, D * P) what a layer hands to the next, by turns
  float* sums;                   // (D, blocks, steps * B, kSumRow)
  float* column_sums;            // (D, columns, B, kFrozenUnits)
  Activation *own_x, *own_h;
  Scaling *own_x_scalings, *own_h_scalings;

  FrozenPass(const FrozenParams& p, Arena& arena)
      : p(p), layout(p.layout), steps(least(p.T, most(1, kChunkRows / p.B))),
        unit_row(padded_row<float>(most(layout.H, layout.P), kFrozenUnits)),
        x_row(padded_row<Activation>(most(layout.I, layout.layers > 1 ? layout.D * layout.P : 0), kFrozenUnits)),
        h_row(padded_row<Activation>(most(layout.H, layout.P), kFrozenUnits)),
        passes(blocks_of(most(x_row, h_row), kPassGroups * Lines::kGroup)), threads(useful_threads()) {
    const int64_t D = layout.D, states = D * p.B * unit_row, chunk = steps * p.B;
    counts = arena.take<Barrier::Count>(2 * threads);
    if (arena.base)
      for (int i = 0; i < 2 * threads; ++i) counts[i].reached = 0;
    for (float*& each : h) each = arena.take<float>(states);
    for (int k = 0; k < kInner; ++k) inner[k] = arena.take<float>(states);
    unprojected = arena.take<float>(layout.projected ? states : 0);
    for (int i = 0; i < 2; ++i) below[i] = arena.take<float>(layout.layers > i + 1 ? p.T * p.B * D * layout.P : 0);
    sums = arena.take<float>(D * layout.blocks() * chunk * kSumRow);
    column_sums = arena.take<float>(D * layout.columns() * p.B * kFrozenUnits);
    own_x = arena.take<Activation>(threads * chunk * x_row);
    own_h = arena.take<Activation>(threads * p.B * h_row);
    own_x_scalings = arena.take<Scaling>(threads * chunk * passes);
    own_h_scalings = arena.take<Scaling>(threads * p.B * passes);
  }

  Division divide_among(int granted) const {
    const int64_t per_direction = most(1, granted / layout.D);
    const int64_t members = least(least(per_direction, layout.blocks()), layout.direction_bytes(0) * p.B / kStepBytes);
    return {int(layout.D), 1, int(most(1, members))};
  }
  int useful_threads() const {
    return layout.bytes() * p.B * p.T < kCallBytes ? 1 : int(least(p.threads, divide_among(p.threads).threads()));
  }

  void run() const {
    run_team(threads, [&](int thread, int granted) {
      const Division division = divide_among(granted);
      const int useful = int(least(granted, division.threads()));
      if (thread >= useful) return;
      const Own own{own_x + thread * steps * p.B * x_row, own_h + thread * p.B * h_row, own_x_scalings + thread * steps * p.B * passes,
                    own_h_scalings + thread * p.B * passes};
      for (int64_t layer = 0; layer < layout.layers; ++layer) {
        for (int place = thread; place < division.threads(); place += useful) {
          const int d = place / division.members, member = place % division.members;
          Member{*this, own, layer, d, member, Barrier{counts + d * division.members, division.members}}.run();
        }
        if (layer + 1 < layout.layers) Barrier{counts + threads, useful}.wait(thread);
      }
    });
  }

  // One thread's part of one direction of one layer.
  struct Member {
    const FrozenPass& pass;
    const Own own;
    const int64_t layer, d;
    const int member;
    const Barrier barrier;

    const FrozenParams& p = pass.p;
    const FrozenLayout& layout = pass.layout;
    const int64_t state = layer * layout.D + d;  // of the caller's states
    const char* const weights = p.blocks + layout.direction(layer, d);
    const char* const projection = weights + layout.blocks() * layout.block_bytes(layer);
    const Range blocks = share(layout.blocks(), barrier.members, member);
    const Range columns = share(layout.columns(), barrier.members, member);

    const char* block_at(int64_t block) const { return weights + block * layout.block_bytes(layer); }
    float* sums_at(int64_t block, int64_t row) const {
      return pass.sums + ((d * layout.blocks() + block) * pass.steps * p.B + row) * kSumRow;
    }
    int64_t row_of(int64_t b) const { return (d * p.B + b) * pass.unit_row; }
    int64_t time(int64_t s) const { return d ? p.T - 1 - s : s; }

    void run() const {
      begin();
      for (int64_t first = 0; first < p.T; first += pass.steps) {
        const int64_t end = least(first + pass.steps, p.T);
        take_input(first, end);
        for (int64_t block = blocks.begin; block < blocks.end; ++block) multiply_input(block, (end - first) * p.B);
        for (int64_t s = first; s < end; ++s) {
          step(s, s - first);
          if (s + 1 < p.T) barrier.wait(member);  // for the new hidden states of all units
        }
      }
    }

    // The states of this thread's own units.
    void begin() const {
      for (int64_t b = 0; b < p.B; ++b)
        for (int64_t u = blocks.begin * kFrozenUnits; u < blocks.end * kFrozenUnits; u += kFloatLanes) {
          const int n = lanes_left<float>(u, layout.H);
          auto first = [&](const void* from) {
            return from && n ? get(p.dtype, from, (state * p.B + b) * layout.H + u, n) : V(0.0f);
          };
          store(pass.h[0] + row_of(b) + u, layout.projected ? V(0.0f) : first(p.hx));
          for (int k = 0; k < kInner; ++k) store(pass.inner[k] + row_of(b) + u, first(p.cx));
        }
    }

    void take_input(int64_t first, int64_t end) const {
      const int64_t depth = layout.depth(layer);
      for (int64_t s = first; s < end; ++s)
        for (int64_t b = 0; b < p.B; ++b) {
          const int64_t row = (s - first) * p.B + b, t = time(s);
          Activation* to = own.x + row * pass.x_row;
          if (layer == 0)
            take_in(to, own.x_scalings + row * pass.passes, p.dtype, p.input, t * p.input_step + b * p.input_row, depth);
          else
            take_in(to, own.x_scalings + row * pass.passes, Dtype::kFloat32, pass.below[(layer - 1) & 1], (t * p.B + b) * depth, depth);
        }
    }

    void multiply_input(int64_t block, int64_t rows) const {
      const char* at = block_at(block);
      const float* start = reinterpret_cast<const float*>(at);
      float* sums = sums_at(block, 0);
      for (int64_t m = 0; m < rows; ++m) __builtin_memcpy(sums + m * kSumRow, start, sizeof(float) * kSumRow);
      frozen_multiply<typename Lines::OfInput, Cell::kGates>({own.x, pass.x_row, own.x_scalings, pass.passes, at + layout.ih(),
                                            reinterpret_cast<const float*>(at + layout.ih_scales()),
                                            layout.groups(layout.depth(layer)), sums, kSumRow, kXSlots.at}, rows);
    }

    void step(int64_t s, int64_t of_chunk) const {
      const float* h = pass.h[s & 1];
      float* h_new = pass.h[(s + 1) & 1];
      if (s > 0 || p.hx) {
        for (int64_t b = 0; b < p.B; ++b)
          s > 0 ? take_state(b, Dtype::kFloat32, h, row_of(b), layout.P)
                : take_state(b, p.dtype, p.hx, (state * p.B + b) * layout.P, layout.P);
        there_or_back(blocks, s & 1, [&](int64_t block) {
          const char* at = block_at(block);
          const float* scales = reinterpret_cast<const float*>(at + layout.hh_scales());
          frozen_multiply<Lines, Cell::kGates>({own.h, pass.h_row, own.h_scalings, pass.passes, at + layout.hh(layer), scales,
                                                layout.groups(layout.P), sums_at(block, of_chunk * p.B), kSumRow,
                                                kHSlots.at}, p.B);
        });
      }
      for (int64_t block = blocks.begin; block < blocks.end; ++block)
        for (int64_t b = 0; b < p.B; ++b) cells(s, block, b, sums_at(block, of_chunk * p.B + b), h, h_new);
      if (layout.projected) project(s, h_new);
    }

    void take_state(int64_t b, Dtype dtype, const void* from, int64_t at, int64_t count) const {
      take_in(own.h + b * pass.h_row, own.h_scalings + b * pass.passes, dtype, from, at, count);
    }

    // The units of a block, two vectors at a time where it has so many (see Rows).
    void cells(int64_t s, int64_t block, int64_t b, const float* sums, const float* h, float* h_new) const {
      constexpr int kRows = kLineVectors > 1 ? 2 : 1;
      for (int v = 0; v < kLineVectors; v += kRows) {
        const int64_t u = block * kFrozenUnits + v * kFloatLanes, at = row_of(b) + u;
        Rows<float, kRows> pre[Cell::kPre], before[Cell::kStates], after[Cell::kStates], saved[slots(Cell::kSaved)];
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
          for (int k = 0; k < Cell::kPre; ++k) pre[k].row[i] = load(sums + k * kFrozenUnits + (v + i) * kFloatLanes);
          before[0].row[i] = load(h + at + i * kFloatLanes);
#pragma GCC unroll 4
          for (int k = 0; k < kInner; ++k) before[k + 1].row[i] = load(pass.inner[k] + at + i * kFloatLanes);
        }
        Cell::forward(pre, before, after, saved);
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i) {
          const int64_t unit = u + i * kFloatLanes;
          const int n = lanes_left<float>(unit, layout.H);
#pragma GCC unroll 4
          for (int k = 0; k < kInner; ++k) store(pass.inner[k] + at + i * kFloatLanes, after[k + 1].row[i]);
          if constexpr (kInner > 0)
            if (s + 1 == p.T && n) put(p.dtype, p.cy, (state * p.B + b) * layout.H + unit, after[1].row[i], n);
          if (layout.projected)
            store(pass.unprojected + at + i * kFloatLanes, after[0].row[i]);
          else
            hidden(s, b, unit, n, after[0].row[i], h_new);
        }
      }
    }

    // Units from `unit` on of row b's new hidden state, n of them real.
    void hidden(int64_t s, int64_t b, int64_t unit, int n, V value, float* h_new) const {
      store(h_new + row_of(b) + unit, value);
      if (!n) return;
      const int64_t t = time(s), column = d * layout.P + unit;
      if (layer + 1 < layout.layers)
        store(pass.below[layer & 1] + (t * p.B + b) * layout.D * layout.P + column, value, n);
      else if (p.output)
        put(p.dtype, p.output, t * p.output_step + b * p.output_row + column, value, n);
      if (s + 1 == p.T) put(p.dtype, p.hy, (state * p.B + b) * layout.P + unit, value, n);
    }

    void project(int64_t s, float* h_new) const {
      barrier.wait(member);  // for the unprojected states of all units
      for (int64_t b = 0; b < p.B; ++b) take_state(b, Dtype::kFloat32, pass.unprojected, row_of(b), layout.H);
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        const char* at = projection + column * layout.column_bytes();
        float* sums = pass.column_sums + (d * layout.columns() + column) * p.B * kFrozenUnits;
        __builtin_memset(sums, 0, size_t(p.B) * kFrozenUnits * sizeof(float));
        const float* scales = reinterpret_cast<const float*>(at);
        frozen_multiply<Lines, 1>({own.h, pass.h_row, own.h_scalings, pass.passes, at + layout.scales(1), scales, layout.groups(layout.H),
                                   sums, kFrozenUnits, kXSlots.at}, p.B);
        for (int64_t b = 0; b < p.B; ++b)
          for (int v = 0; v < kLineVectors; ++v) {
            const int64_t unit = column * kFrozenUnits + v * kFloatLanes;
            hidden(s, b, unit, lanes_left<float>(unit, layout.P), load(sums + b * kFrozenUnits + v * kFloatLanes), h_new);
          }
      }
    }
  };
};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
