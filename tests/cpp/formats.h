// The number formats in memory, one value at a time and by their definition: an independent reference for csrc/cpu/vec.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "params.h"

namespace test {

using fusedrnn::Dtype;

// Significant bits behind the leading one, smallest exponent of a normal number, largest exponent.
struct Precision {
  int mantissa, min_exponent, max_exponent;
};
inline Precision precision(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return {23, -126, 127};
    case Dtype::kBFloat16:
      return {7, -126, 127};
    case Dtype::kFloat16:
      return {10, -14, 15};
    default:
      return {52, -1022, 1023};
  }
}
inline int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? "f64" : dtype == Dtype::kFloat32 ? "f32" : dtype == Dtype::kBFloat16 ? "bf16" : "f16";
}

// The distance between neighbours of the format around x.
template <class Wide>
Wide spacing(Precision format, Wide x) {
  const int exponent = x == 0 ? format.min_exponent : std::ilogb(x);
  return std::ldexp(Wide(1), (exponent < format.min_exponent ? format.min_exponent : exponent) - format.mantissa);
}

// The nearest number of the format, of two the even one; infinity from halfway beyond the largest on.
inline double round_to(Dtype dtype, double x) {
  if (dtype == Dtype::kFloat64 || !std::isfinite(x)) return x;
  const Precision format = precision(dtype);
  const double step = spacing(format, x), rounded = std::nearbyint(x / step) * step;  // both exact but for nearbyint
  return std::fabs(rounded) >= std::ldexp(1.0, format.max_exponent + 1) ? std::copysign(INFINITY, x) : rounded;
}

// The value of a 16-bit pattern.
inline double decode16(Dtype dtype, uint16_t bits) {
  const Precision format = precision(dtype);
  const int exponent_bits = 15 - format.mantissa, exponent = (bits & 0x7fff) >> format.mantissa;
  const double fraction = (bits & ((1 << format.mantissa) - 1)) * std::ldexp(1.0, -format.mantissa);
  const double magnitude = exponent == (1 << exponent_bits) - 1 ? (fraction == 0 ? INFINITY : NAN)
                           : exponent == 0                      ? std::ldexp(fraction, format.min_exponent)
                                                                : std::ldexp(1 + fraction, exponent - 1 + format.min_exponent);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline std::vector<double> all_values(Dtype dtype) {
  std::vector<double> values(65536);
  for (int i = 0; i < 65536; ++i) values[size_t(i)] = decode16(dtype, uint16_t(i));
  return values;
}

// The pattern of a value of the format; a NaN becomes some NaN.
inline uint16_t encode16(Dtype dtype, double x) {
  const Precision format = precision(dtype);
  const int infinity = ((1 << (15 - format.mantissa)) - 1) << format.mantissa, sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return uint16_t(infinity | 1);
  if (std::isinf(x)) return uint16_t(sign | infinity);
  const double steps = std::fabs(x) / spacing(format, x);  // below 2^mantissa: a denormal
  const int above = x == 0 || std::ilogb(x) < format.min_exponent ? 0 : std::ilogb(x) - format.min_exponent;
  return uint16_t(sign | ((above << format.mantissa) + int(steps)));
}

inline double decode(Dtype dtype, const void* from, int64_t i) {
  static const std::vector<double> bfloat16 = all_values(Dtype::kBFloat16), float16 = all_values(Dtype::kFloat16);
  switch (dtype) {
    case Dtype::kFloat64:
      return static_cast<const double*>(from)[i];
    case Dtype::kFloat32:
      return static_cast<const float*>(from)[i];
    case Dtype::kBFloat16:
      return bfloat16[static_cast<const uint16_t*>(from)[i]];
    default:
      return float16[static_cast<const uint16_t*>(from)[i]];
  }
}
inline void encode(Dtype dtype, void* to, int64_t i, double x) {
  switch (dtype) {
    case Dtype::kFloat64:
      static_cast<double*>(to)[i] = x;
      break;
    case Dtype::kFloat32:
      static_cast<float*>(to)[i] = float(x);
      break;
    default:
      static_cast<uint16_t*>(to)[i] = encode16(dtype, round_to(dtype, x));
  }
}

}  // namespace test
