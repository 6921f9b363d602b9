// One SIMD register of float or double, its memory formats, and the functions a cell calls on it.
//
// GCC and Clang vector types: the same source is compiled once per instruction set. Each translation unit defines
//   FUSEDRNN_ISA               the namespace its code lives in (baseline, avx2, avx512)
//   FUSEDRNN_VECTOR_BYTES      the width of a register
//   FUSEDRNN_VECTOR_REGISTERS  how many there are; sizes the register tiles of product.h
// Everything here is a template or always inline in that namespace, so that no symbol of one instruction set can stand in
// for another's at link time. (tests/test_build.py looks at the objects' symbols.)
#pragma once
#include <cstdint>
#include <utility>

#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#define FUSEDRNN_OUTSIDE inline __attribute__((noinline))  // seldom run, and in every cell's every access they take the compiler minutes
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call boundary here

namespace fusedrnn {
namespace FUSEDRNN_ISA {

// Memory formats of 16 bits; arithmetic is always float.
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

// The register, and what exp needs to know of its number type.
template <class F> struct Format;
template <> struct Format<float> {
  typedef float Raw __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef int32_t RawBits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  static constexpr int kMantissa = 23;
  // Coefficients of (exp(r) - 1) / r for |r| <= ln(2) / 2: the best polynomial of so many terms, the first two held; off by
  // 2^-28 of exp(r) at most.
  static constexpr float kExp[] = {1, 0.5f, 0.16666535f, 0.041667238f, 0.008367483f, 0.0013863781f};
  static constexpr float kExpRange = 87.0f;              // exp(+-87) is a normal float
  static constexpr float kTanhRange = 10.0f;             // 1 - tanh(10) < 2^-28
  static constexpr float kRound = 12583039.0f;           // 1.5 * 2^23 + bias: adding it rounds, and leaves a biased exponent
  static constexpr float kLn2High = 0.693359375f;        // ln 2 in two parts, the first with few bits (Cody and Waite)
  static constexpr float kLn2Low = -2.12194440e-4f;
};
template <> struct Format<double> {
  typedef double Raw __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef int64_t RawBits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  static constexpr int kMantissa = 52;
  // Taylor's: |r|^14 / 14! < 2^-57.
  static constexpr double kExp[] = {1., 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880,
                                    1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  static constexpr double kExpRange = 708.0;
  static constexpr double kTanhRange = 20.0;
  static constexpr double kRound = 6755399441056767.0;   // 1.5 * 2^52 + bias
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
};

template <class F>
struct Vec {
  using Raw = typename Format<F>::Raw;
  using RawBits = typename Format<F>::RawBits;  // what comparisons give: all ones where they hold
  static constexpr int kLanes = FUSEDRNN_VECTOR_BYTES / sizeof(F);

  Raw raw;
  FUSEDRNN_INLINE Vec() = default;
  FUSEDRNN_INLINE explicit Vec(F value) : raw(value - Raw{}) {}
  FUSEDRNN_INLINE explicit Vec(Raw value) : raw(value) {}
};

#define FUSEDRNN_OPERATOR(op)                                                      \
  template <class F>                                                               \
  FUSEDRNN_INLINE Vec<F> operator op(Vec<F> a, Vec<F> b) { return Vec<F>(a.raw op b.raw); }
FUSEDRNN_OPERATOR(+)
FUSEDRNN_OPERATOR(-)
FUSEDRNN_OPERATOR(*)
FUSEDRNN_OPERATOR(/)
#undef FUSEDRNN_OPERATOR

// a where the comparison holds, else b. Comparisons with a NaN do not hold.
template <class F>
FUSEDRNN_INLINE Vec<F> where(typename Vec<F>::RawBits mask, Vec<F> a, Vec<F> b) {
  return Vec<F>(mask ? a.raw : b.raw);
}

// ---------------------------------------------------------------------------------------------------- memory

// How many of the lanes from index u on are before the end.
template <class F>
FUSEDRNN_INLINE int lanes_left(int64_t u, int64_t end) {
  const int64_t left = end - u;
  return left <= 0 ? 0 : left < Vec<F>::kLanes ? int(left) : Vec<F>::kLanes;
}

template <class F>
FUSEDRNN_OUTSIDE Vec<F> load_part(const F* p, int n) {
  alignas(FUSEDRNN_VECTOR_BYTES) F part[Vec<F>::kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  Vec<F> v;
  __builtin_memcpy(&v.raw, part, sizeof v.raw);
  return v;
}
template <class F>
FUSEDRNN_OUTSIDE void store_part(F* p, Vec<F> v, int n) {
  alignas(FUSEDRNN_VECTOR_BYTES) F part[Vec<F>::kLanes];
  __builtin_memcpy(part, &v.raw, sizeof v.raw);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

// n values from p, the lanes behind them zero. n is the full width in all but the last block of a row.
template <class F>
FUSEDRNN_INLINE Vec<F> load(const F* p, int n = Vec<F>::kLanes) {
  if (__builtin_expect(n != Vec<F>::kLanes, 0)) return load_part(p, n);
  Vec<F> v;
  __builtin_memcpy(&v.raw, p, sizeof v.raw);
  return v;
}

template <class F>
FUSEDRNN_INLINE void store(F* p, Vec<F> v, int n = Vec<F>::kLanes) {
  if (__builtin_expect(n != Vec<F>::kLanes, 0)) return store_part(p, v, n);
  __builtin_memcpy(p, &v.raw, sizeof v.raw);
}

// The square of kLanes rows by kLanes lanes, turned over: blocks of kDistance change places across the diagonal, for distances
// 1, 2, 4, ...
template <class F, int kDistance, int... kLane>
FUSEDRNN_INLINE void exchange_blocks(Vec<F> (&rows)[sizeof...(kLane)], std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  using Bits = typename Vec<F>::RawBits;
  constexpr Bits kUpper = {(kLane & kDistance ? kLanes + kLane - kDistance : kLane)...};
  constexpr Bits kLower = {(kLane & kDistance ? kLanes + kLane : kLane + kDistance)...};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const typename Vec<F>::Raw a = rows[i].raw, b = rows[i + kDistance].raw;
    rows[i].raw = __builtin_shuffle(a, b, kUpper);
    rows[i + kDistance].raw = __builtin_shuffle(a, b, kLower);
  }
  if constexpr (2 * kDistance < kLanes) exchange_blocks<F, 2 * kDistance>(rows, std::integer_sequence<int, kLane...>{});
}
template <class F, int kLanes>
FUSEDRNN_INLINE void transpose(Vec<F> (&rows)[kLanes]) {
  exchange_blocks<F, 1>(rows, std::make_integer_sequence<int, kLanes>{});
}

typedef uint32_t U32 __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
typedef Vec<float>::Raw F32;
constexpr int kFloatLanes = Vec<float>::kLanes;

FUSEDRNN_OUTSIDE U16 load_part(const uint16_t* p, int n) {
  uint16_t part[kFloatLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  U16 half;
  __builtin_memcpy(&half, part, sizeof half);
  return half;
}
FUSEDRNN_OUTSIDE void store_part(uint16_t* p, U16 half, int n) {
  uint16_t bits[kFloatLanes];
  __builtin_memcpy(bits, &half, sizeof half);
  for (int i = 0; i < n; ++i) p[i] = bits[i];
}

FUSEDRNN_INLINE U32 widen(const uint16_t* p, int n) {
  U16 half;
  if (__builtin_expect(n == kFloatLanes, 1))
    __builtin_memcpy(&half, p, sizeof half);
  else
    half = load_part(p, n);
  return __builtin_convertvector(half, U32);
}

FUSEDRNN_INLINE void narrow(uint16_t* p, U32 bits, int n) {
  const U16 half = __builtin_convertvector(bits, U16);
  if (__builtin_expect(n == kFloatLanes, 1))
    __builtin_memcpy(p, &half, sizeof half);
  else
    store_part(p, half, n);
}

FUSEDRNN_INLINE U32 choose(U32 mask, U32 a, U32 b) { return (a & mask) | (b & ~mask); }

FUSEDRNN_INLINE Vec<float> load(const Bf16* p, int n = kFloatLanes) {
  return Vec<float>((F32)(widen(&p->bits, n) << 16));
}

// Round to nearest even; a NaN stays one.
FUSEDRNN_INLINE void store(Bf16* p, Vec<float> v, int n = kFloatLanes) {
  const U32 bits = (U32)v.raw;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 is_nan = (U32)((bits & 0x7fffffffu) > 0x7f800000u);
  narrow(&p->bits, choose(is_nan, U32{} + 0x7fc0u, rounded), n);
}

// Exponents are rebiased by a multiplication with 2^112, which is exact and turns half's denormals into normal floats.
FUSEDRNN_INLINE Vec<float> load(const Fp16* p, int n = kFloatLanes) {
  const U32 half = widen(&p->bits, n);
  const U32 magnitude = (half & 0x7fffu) << 13;
  const U32 finite = (U32)((F32)magnitude * 0x1p112f);
  const U32 is_special = (U32)(magnitude >= 0x0f800000u);
  return Vec<float>((F32)(choose(is_special, magnitude | 0x7f800000u, finite) | ((half & 0x8000u) << 16)));
}

// Round to nearest even. Below 2^-14 the result is a denormal: adding 0.5 leaves its bits at the end of the mantissa.
FUSEDRNN_INLINE void store(Fp16* p, Vec<float> v, int n = kFloatLanes) {
  const U32 all = (U32)v.raw, sign = (all >> 16) & 0x8000u, bits = all & 0x7fffffffu;
  const U32 normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const U32 denormal = (U32)((F32)bits + 0.5f) - 0x3f000000u;
  const U32 special = choose((U32)(bits > 0x7f800000u), U32{} + 0x7e00u, U32{} + 0x7c00u);
  U32 half = choose((U32)(bits < 0x38800000u), denormal, normal);
  half = choose((U32)(bits >= 0x47800000u), special, half);
  narrow(&p->bits, half | sign, n);
}

// One value, for packing weights.
FUSEDRNN_INLINE float value(float x) { return x; }
FUSEDRNN_INLINE double value(double x) { return x; }
template <class S>
FUSEDRNN_INLINE float value(const S& x) { return load(&x, 1).raw[0]; }

template <int kCount>
struct Constant {
  static constexpr int value = kCount;
};

// ------------------------------------------------------------------------------------------------- functions

// a if it is the smaller (larger) one, else b, so that a NaN in b stays. Left to the compiler this takes two instructions.
#if defined(__AVX__) && FUSEDRNN_VECTOR_BYTES == 32
#define FUSEDRNN_CHOICE(name, op, of_float, of_double)                     \
  template <class Raw>                                                     \
  FUSEDRNN_INLINE Raw name(Raw a, Raw b) {                                 \
    if constexpr (sizeof a[0] == sizeof(float)) return of_float(a, b);     \
    else return of_double(a, b);                                           \
  }
#else
#define FUSEDRNN_CHOICE(name, op, of_float, of_double)                     \
  template <class Raw>                                                     \
  FUSEDRNN_INLINE Raw name(Raw a, Raw b) { return a op b ? a : b; }
#endif
FUSEDRNN_CHOICE(smaller, <, __builtin_ia32_minps256, __builtin_ia32_minpd256)
FUSEDRNN_CHOICE(larger, >, __builtin_ia32_maxps256, __builtin_ia32_maxpd256)
#undef FUSEDRNN_CHOICE

// NaN passes through unclamped.
template <class F>
FUSEDRNN_INLINE Vec<F> at_most(Vec<F> x, F limit) { return Vec<F>(smaller(Vec<F>(limit).raw, x.raw)); }
template <class F>
FUSEDRNN_INLINE Vec<F> at_least(Vec<F> x, F limit) { return Vec<F>(larger(Vec<F>(limit).raw, x.raw)); }

// (exp(r) - 1) / r: `count` terms of its polynomial from `first` on, over r^first. The halves are summed apart (Estrin), since
// the length of this chain of multiply-adds is what a cell waits for.
template <int first, int count, class F>
FUSEDRNN_INLINE Vec<F> exp_series(Vec<F> r, const Vec<F>* powers) {
  if constexpr (count == 1) {
    return Vec<F>(Format<F>::kExp[first]);
  } else {
    constexpr int level = count > 8 ? 3 : count > 4 ? 2 : count > 2 ? 1 : 0, low = 1 << level;
    return exp_series<first + low, count - low>(r, powers) * powers[level] + exp_series<first, low>(r, powers);
  }
}

// x = n ln 2 + r with integer n. Gives exp(r) - 1 by its series, and 2^n. |x| must be within the exponent's range.
template <class F>
FUSEDRNN_INLINE void split_exp(Vec<F> x, Vec<F>& expm1_r, Vec<F>& power) {
  using V = Vec<F>;
  using Fmt = Format<F>;
  constexpr int kTerms = sizeof Fmt::kExp / sizeof(F);
  const V shifted = x * V(F(1.4426950408889634074)) + V(Fmt::kRound);
  const V n = shifted - V(Fmt::kRound);
  const V r = x - n * V(Fmt::kLn2High) - n * V(Fmt::kLn2Low);
  const V r2 = r * r, r4 = r2 * r2;
  const V powers[] = {r, r2, r4, kTerms > 8 ? r4 * r4 : r4};
  expm1_r = exp_series<0, kTerms>(r, powers) * r;
  power = V((typename V::Raw)((typename V::RawBits)shifted.raw << Fmt::kMantissa));
}

// 1 / (1 + exp(-x)).
template <class F>
FUSEDRNN_INLINE Vec<F> sigmoid(Vec<F> x) {
  using V = Vec<F>;
  V expm1_r, power;
  split_exp(V(-at_least(at_most(x, Format<F>::kExpRange), -Format<F>::kExpRange).raw), expm1_r, power);
  return V(F(1)) / (power * expm1_r + (V(F(1)) + power));
}

// tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1, which keeps the relative accuracy of small x. From a half on it is taken as
// 1 - 2 / (e + 2), which is rounded once: the gradient, 1 - tanh^2, magnifies what a saturated unit is wrong by.
template <class F>
FUSEDRNN_INLINE Vec<F> tanh(Vec<F> x) {
  using V = Vec<F>;
  using Bits = typename V::RawBits;
  const Bits sign = (Bits)V(F(-0.0)).raw;
  const V magnitude = at_most(V((typename V::Raw)((Bits)x.raw & ~sign)), Format<F>::kTanhRange);
  V expm1_r, power;
  split_exp(magnitude + magnitude, expm1_r, power);
  const V e = power * expm1_r + (power - V(F(1)));
  const Bits large = e.raw > V(F(2)).raw;
  const V quotient = where(large, V(F(2)), e) / (e + V(F(2)));
  const V t = where(large, V(F(1)) - quotient, quotient);
  return V((typename V::Raw)((Bits)t.raw | ((Bits)x.raw & sign)));
}

template <class F>
FUSEDRNN_INLINE Vec<F> relu(Vec<F> x) { return where((x.raw < Vec<F>(F(0)).raw), Vec<F>(F(0)), x); }

template <class F>
FUSEDRNN_INLINE Vec<F> relu_grad(Vec<F> y, Vec<F> grad) { return where((y.raw <= Vec<F>(F(0)).raw), Vec<F>(F(0)), grad); }

template <class F>
FUSEDRNN_INLINE Vec<F> clamp(Vec<F> x, Vec<F> low, Vec<F> high) {
  return where((x.raw < low.raw), low, where((x.raw > high.raw), high, x));
}
template <class F>
FUSEDRNN_INLINE Vec<F> clamp_grad(Vec<F> y, Vec<F> low, Vec<F> high, Vec<F> grad) {
  return where((y.raw <= low.raw) | (y.raw >= high.raw), Vec<F>(F(0)), grad);
}
template <class F>
FUSEDRNN_INLINE Vec<F> greater_of(Vec<F> a, Vec<F> b) { return where((a.raw != a.raw) | (a.raw > b.raw), a, b); }
template <class F>
FUSEDRNN_INLINE Vec<F> where_zero(Vec<F> x, Vec<F> yes, Vec<F> no) { return where((x.raw == Vec<F>(F(0)).raw), yes, no); }
template <class F>
FUSEDRNN_INLINE Vec<F> where_one(Vec<F> x, Vec<F> yes, Vec<F> no) { return where((x.raw == Vec<F>(F(1)).raw), yes, no); }

template <class F>
FUSEDRNN_INLINE Vec<F> exp_of_negative(Vec<F> x) {
  Vec<F> expm1_r, power;
  split_exp(at_least(x, -Format<F>::kExpRange), expm1_r, power);
  return power * expm1_r + power;
}

// min(x, 0) - log(1 + e) with e = exp(-|x|); the logarithm by the series of 2 artanh(s) with s = e / (2 + e), at most a third.
template <class F>
FUSEDRNN_INLINE Vec<F> log_sigmoid(Vec<F> x) {
  using V = Vec<F>;
  constexpr int kTerms = sizeof(F) == sizeof(float) ? 8 : 17;
  const V e = exp_of_negative(where((x.raw < V(F(0)).raw), x, V(-x.raw)));
  const V s = e / (V(F(2)) + e), square = s * s;
  V sum(F(1) / F(2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * square + V(F(1) / F(2 * k + 1));
  return where((x.raw < V(F(0)).raw), x, V(F(0))) - (s + s) * sum;
}

// The same lanes of kRows rows at once: the chain of one row's cell is longer than what a processor looks ahead, so two or
// more rows are interleaved to keep it busy.
template <class F, int kRows>
struct Rows {
  Vec<F> row[kRows];
  FUSEDRNN_INLINE Rows() = default;
  FUSEDRNN_INLINE explicit Rows(F value) {
    for (Vec<F>& v : row) v = Vec<F>(value);
  }
};

#define FUSEDRNN_ROWWISE_BINARY(name, expression)                                 \
  template <class F, int kRows>                                                   \
  FUSEDRNN_INLINE Rows<F, kRows> name(Rows<F, kRows> a, Rows<F, kRows> b) {       \
    for (int i = 0; i < kRows; ++i) a.row[i] = expression(a.row[i], b.row[i]);    \
    return a;                                                                     \
  }
#define FUSEDRNN_ROWWISE_UNARY(name)                                              \
  template <class F, int kRows>                                                   \
  FUSEDRNN_INLINE Rows<F, kRows> name(Rows<F, kRows> a) {                         \
    for (int i = 0; i < kRows; ++i) a.row[i] = name(a.row[i]);                    \
    return a;                                                                     \
  }
FUSEDRNN_ROWWISE_BINARY(operator+, operator+)
FUSEDRNN_ROWWISE_BINARY(operator-, operator-)
FUSEDRNN_ROWWISE_BINARY(operator*, operator*)
FUSEDRNN_ROWWISE_BINARY(operator/, operator/)
FUSEDRNN_ROWWISE_BINARY(relu_grad, relu_grad)
FUSEDRNN_ROWWISE_UNARY(sigmoid)
FUSEDRNN_ROWWISE_UNARY(tanh)
FUSEDRNN_ROWWISE_UNARY(relu)
FUSEDRNN_ROWWISE_UNARY(log_sigmoid)
FUSEDRNN_ROWWISE_UNARY(exp_of_negative)
FUSEDRNN_ROWWISE_BINARY(greater_of, greater_of)
#define FUSEDRNN_ROWWISE_TERNARY(name)                                                            \
  template <class F, int kRows>                                                                   \
  FUSEDRNN_INLINE Rows<F, kRows> name(Rows<F, kRows> a, Rows<F, kRows> b, Rows<F, kRows> c) {     \
    for (int i = 0; i < kRows; ++i) a.row[i] = name(a.row[i], b.row[i], c.row[i]);                \
    return a;                                                                                     \
  }
FUSEDRNN_ROWWISE_TERNARY(clamp)
FUSEDRNN_ROWWISE_TERNARY(where_zero)
FUSEDRNN_ROWWISE_TERNARY(where_one)
#undef FUSEDRNN_ROWWISE_TERNARY
template <class F, int kRows>
FUSEDRNN_INLINE Rows<F, kRows> clamp_grad(Rows<F, kRows> y, Rows<F, kRows> low, Rows<F, kRows> high, Rows<F, kRows> grad) {
  for (int i = 0; i < kRows; ++i) grad.row[i] = clamp_grad(y.row[i], low.row[i], high.row[i], grad.row[i]);
  return grad;
}
#undef FUSEDRNN_ROWWISE_BINARY
#undef FUSEDRNN_ROWWISE_UNARY

// The same number, of which the compiler does not know where it came from. Where a product is added to something behind a branch, it
// makes one multiply-add of them here and two operations there, and the bits would depend on how many rows are taken at once.
template <class F>
FUSEDRNN_INLINE Vec<F> rounded(Vec<F> v) {
  asm("" : "+m"(v.raw));  // and not in a register, which a vector of this width may not fit into
  return v;
}
template <class F, int kRows>
FUSEDRNN_INLINE Rows<F, kRows> rounded(Rows<F, kRows> v) {
  for (int i = 0; i < kRows; ++i) v.row[i] = rounded(v.row[i]);
  return v;
}

template <class F>
FUSEDRNN_INLINE F sum_lanes(Vec<F> v) {
  F lanes[Vec<F>::kLanes];
  __builtin_memcpy(lanes, &v.raw, sizeof lanes);
#pragma GCC unroll 4
  for (int half = Vec<F>::kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
