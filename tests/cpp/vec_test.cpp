// Proves csrc/cpu/vec.h for one instruction set (FUSEDRNN_ISA, FUSEDRNN_VECTOR_BYTES and the compiler's flags): the error of
// exp, sigmoid and tanh in units of the last place against long double, their behaviour at infinities, NaN, -0 and
// denormals; the 16-bit formats, all patterns and all roundings; and that loads and stores of n lanes touch no other.
//
//   vec_test [POINTS]   random points per function, default 300000
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/vec.h"

#include "check.h"
#include "formats.h"
#include "guarded.h"

namespace vec = fusedrnn::FUSEDRNN_ISA;

namespace {

using test::Dtype;
using test::Guarded;
using test::Random;
template <class F> constexpr Dtype kDtype = sizeof(F) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
template <class F> constexpr const char* kName = sizeof(F) == 4 ? "float" : "double";

// Bounds in units of the last place. Over 12 million points a function, 1.48, 2.42 and 4.34 were seen.
constexpr double kExpUlps = 2, kSigmoidUlps = 3, kTanhUlps = 5, kLogSigmoidUlps = 6;

template <class F>
double ulps(F got, long double want) {
  if (std::isnan(got)) return INFINITY;
  return double(std::fabs(got - want) / test::spacing(test::precision(kDtype<F>), want));
}

// ------------------------------------------------------------------------------------------------- functions

template <class F, class Fn>
std::vector<F> map(const std::vector<F>& xs, const Fn& fn) {
  constexpr size_t kLanes = vec::Vec<F>::kLanes;
  std::vector<F> ys(xs.size());
  for (size_t i = 0; i < xs.size(); i += kLanes) {
    const int n = int(std::min(kLanes, xs.size() - i));
    vec::store(ys.data() + i, fn(vec::load(xs.data() + i, n)), n);
  }
  return ys;
}

// Random bits, uniform numbers within +-limit and within +-1, a grid, and the neighbourhood of every power of two.
template <class F>
std::vector<F> points(F limit, int count) {
  using Bits = std::conditional_t<sizeof(F) == 4, uint32_t, uint64_t>;
  std::vector<F> xs = {F(0), F(-0.0), std::numeric_limits<F>::denorm_min(), limit, -limit};
  Random random{1};
  for (int i = 0; i < count; ++i) {
    const Bits bits = Bits(random.bits());
    F x;
    std::memcpy(&x, &bits, sizeof x);
    xs.insert(xs.end(), {x, F(random.uniform(-limit, limit)), F(random.uniform(-1, 1)), F(limit * (2.0 * i / count - 1))});
  }
  for (F power = std::numeric_limits<F>::denorm_min(); power <= limit; power *= 2)
    for (F x : {power, std::nextafter(power, F(0)), std::nextafter(power, limit)}) xs.insert(xs.end(), {x, -x});
  xs.erase(std::remove_if(xs.begin(), xs.end(), [&](F x) { return !(std::fabs(x) <= limit); }), xs.end());
  return xs;
}

template <class F, class Fn, class Exact>
void check_accuracy(const char* name, F limit, double bound, int count, const Fn& fn, const Exact& exact) {
  std::snprintf(test::context, sizeof test::context, "%s(%s)", name, kName<F>);
  const std::vector<F> xs = points<F>(limit, count), ys = map(xs, fn);
  double worst = 0;
  F at = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const double error = ulps(ys[i], exact(static_cast<long double>(xs[i])));
    CHECK(error <= bound, "at %.17g: %.17g, %.2f ulp off", double(xs[i]), double(ys[i]), error);
    if (error > worst) worst = error, at = xs[i];
  }
  std::printf("%-8s %-6s at most %.3f ulp, at %.17g, over %zu points in +-%g\n", name, kName<F>, worst, double(at), xs.size(),
              double(limit));
}

template <class V>
V where_negative(V x) {
  const V zero(decltype(x.raw[0] + 0)(0));
  return vec::where((x.raw < zero.raw), x, V(-x.raw));
}

template <class F>
void check_functions(int count) {
  using V = vec::Vec<F>;
  using Limits = std::numeric_limits<F>;
  const F range = vec::Format<F>::kExpRange;
  auto exp = [](V x) {
    V expm1_r, power;
    vec::split_exp(x, expm1_r, power);
    return power + power * expm1_r;
  };
  auto sigmoid = [](V x) { return vec::sigmoid(x); };
  auto tanh = [](V x) { return vec::tanh(x); };
  check_accuracy<F>("exp", range, kExpUlps, count, exp, [](long double x) { return std::exp(x); });
  check_accuracy<F>("sigmoid", range, kSigmoidUlps, count, sigmoid, [](long double x) { return 1 / (1 + std::exp(-x)); });
  check_accuracy<F>("tanh", range, kTanhUlps, count, tanh, [](long double x) { return std::tanh(x); });

  check_accuracy<F>("log_sigmoid", range, kLogSigmoidUlps, count, [](V x) { return vec::log_sigmoid(x); },
                    [](long double x) { return std::min(x, 0.0L) - std::log1p(std::exp(-std::fabs(x))); });
  check_accuracy<F>("exp_of_negative", range, kExpUlps, count, [](V x) { return vec::exp_of_negative(where_negative(x)); },
                    [](long double x) { return std::exp(-std::fabs(x)); });

  std::snprintf(test::context, sizeof test::context, "special values, %s", kName<F>);
  const F inf = Limits::infinity(), nan = Limits::quiet_NaN();
  std::vector<F> huge = {inf, Limits::max(), F(1e30), std::nextafter(range, inf), F(2) * range};
  for (F x : map(huge, sigmoid)) CHECK(x == 1, "sigmoid of a large number is %g", double(x));
  for (F x : map(huge, tanh)) CHECK(x == 1, "tanh of a large number is %g", double(x));
  for (F& x : huge) x = -x;
  // Beyond the range sigmoid stays at its value at the end of it instead of going on to 0.
  for (F x : map(huge, sigmoid)) CHECK(x >= 0 && x <= 2 * std::exp(-range), "sigmoid of a large negative number is %g", double(x));
  for (F x : map(huge, tanh)) CHECK(x == -1, "tanh of a large negative number is %g", double(x));
  for (F x : map(std::vector<F>{nan, -nan}, sigmoid)) CHECK(std::isnan(x), "sigmoid of NaN is %g", double(x));
  for (F x : map(std::vector<F>{nan, -nan}, tanh)) CHECK(std::isnan(x), "tanh of NaN is %g", double(x));
  for (F x : {F(0), F(-0.0), Limits::denorm_min(), -Limits::denorm_min(), 5 * Limits::denorm_min(), -Limits::min() / 2}) {
    const F half = map(std::vector<F>{x}, sigmoid)[0], same = map(std::vector<F>{x}, tanh)[0];
    CHECK(half == F(0.5), "sigmoid(%g) is %g", double(x), double(half));
    CHECK(same == x && std::signbit(same) == std::signbit(x), "tanh(%g) is %g", double(x), double(same));
  }
  for (F x : map(points<F>(Limits::max() / 4, count / 10), tanh)) CHECK(std::fabs(x) <= 1, "tanh is %g", double(x));
  for (F x : map(points<F>(Limits::max() / 4, count / 10), sigmoid)) CHECK(x >= 0 && x <= 1, "sigmoid is %g", double(x));

  const std::vector<F> kinds = {inf, F(2), Limits::denorm_min(), F(0), F(-0.0), -Limits::denorm_min(), F(-2), -inf};
  const std::vector<F> relu = map(kinds, [](V x) { return vec::relu(x); });
  const std::vector<F> slope = map(kinds, [](V x) { return vec::relu_grad(x, V(F(3))); });
  for (size_t i = 0; i < kinds.size(); ++i) {
    CHECK(relu[i] == std::max(kinds[i], F(0)), "relu(%g) is %g", double(kinds[i]), double(relu[i]));
    CHECK(slope[i] == (kinds[i] > 0 ? 3 : 0), "relu_grad at %g is %g", double(kinds[i]), double(slope[i]));
  }
  CHECK(std::isnan(map(std::vector<F>{nan}, [](V x) { return vec::relu(x); })[0]), "relu loses a NaN");
  CHECK(std::isnan(map(std::vector<F>{F(1)}, [&](V x) { return vec::relu_grad(x, V(nan)); })[0]), "relu_grad loses a NaN");
}

// ---------------------------------------------------------------------------------------------------- formats

// What store makes of floats, as patterns.
template <class S>
std::vector<uint16_t> stored(const std::vector<float>& xs) {
  std::vector<S> out(xs.size());
  for (size_t i = 0; i < xs.size(); i += vec::kFloatLanes) {
    const int n = int(std::min(size_t(vec::kFloatLanes), xs.size() - i));
    vec::store(out.data() + i, vec::load(xs.data() + i, n), n);
  }
  std::vector<uint16_t> bits(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) bits[i] = out[i].bits;
  return bits;
}

template <class S>
void check_format(Dtype dtype, int count) {
  std::snprintf(test::context, sizeof test::context, "format %s", test::name_of(dtype));
  std::vector<S> patterns(65536);
  for (int i = 0; i < 65536; ++i) patterns[size_t(i)].bits = uint16_t(i);
  std::vector<float> values(65536);
  for (size_t i = 0; i < patterns.size(); i += vec::kFloatLanes)
    vec::store(values.data() + i, vec::load(patterns.data() + i));

  // Around every value and around the midpoint to the next one: it, and the floats before and after; besides, any floats.
  std::vector<float> xs;
  Random random{2};
  for (int i = 0; i < 65536; ++i) {
    const double want = test::decode16(dtype, uint16_t(i)), next = test::decode16(dtype, uint16_t(i + 1));
    const float got = values[size_t(i)];
    CHECK(std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want),
          "pattern %04x loads as %.9g, is %.9g", i, double(got), want);
    CHECK(vec::value(patterns[size_t(i)]) == got || std::isnan(got), "value() of pattern %04x", i);
    for (float x : {float(want), float(want + (next - want) / 2)})
      xs.insert(xs.end(), {x, std::nextafter(x, -INFINITY), std::nextafter(x, INFINITY)});
  }
  for (int i = 0; i < 4 * count; ++i) {
    const uint32_t bits = uint32_t(random.bits());
    float x;
    std::memcpy(&x, &bits, sizeof x);
    xs.push_back(x);
  }
  const double largest = test::decode16(dtype, uint16_t(test::encode16(dtype, INFINITY) - 1));
  const float overflow = float(largest + test::spacing(test::precision(dtype), largest) / 2);
  for (float x : {overflow, std::nextafter(overflow, 0.0f), std::numeric_limits<float>::max()}) xs.insert(xs.end(), {x, -x});

  const std::vector<uint16_t> bits = stored<S>(xs);
  for (size_t i = 0; i < xs.size(); ++i) {
    const uint16_t want = test::encode16(dtype, test::round_to(dtype, xs[i]));
    CHECK(std::isnan(xs[i]) ? std::isnan(test::decode16(dtype, bits[i])) : bits[i] == want, "%.9g is stored as %04x, not %04x",
          double(xs[i]), bits[i], want);
#if defined(__FLT16_MAX__)
    if (dtype != Dtype::kFloat16 || std::isnan(xs[i])) continue;
    const _Float16 half = _Float16(xs[i]);
    uint16_t compiler;
    std::memcpy(&compiler, &half, sizeof compiler);
    CHECK(bits[i] == compiler, "%.9g is stored as %04x, by the compiler as %04x", double(xs[i]), bits[i], compiler);
#endif
  }
}

// ----------------------------------------------------------------------------------------------------- memory

// n lanes right behind and right before memory that may not be touched.
template <class F, class S>
void check_lanes(const char* name) {
  constexpr int kLanes = vec::Vec<F>::kLanes;
  std::snprintf(test::context, sizeof test::context, "lanes of %s", name);
  for (int n = 0; n <= kLanes; ++n)
    for (Guarded::Place place : {Guarded::kAtEnd, Guarded::kAtStart}) {
      const Guarded memory(int64_t(n ? n : 1) * int64_t(sizeof(S)), place);
      S* p = static_cast<S*>(memory.data()) + (n == 0 && place == Guarded::kAtEnd);
      F in[kLanes], out[kLanes];
      for (int i = 0; i < kLanes; ++i) in[i] = F(i + 1);
      vec::store(p, vec::load(in), n);
      vec::store(out, vec::load(p, n));
      for (int i = 0; i < kLanes; ++i) CHECK(out[i] == (i < n ? F(i + 1) : F(0)), "lane %d of %d is %g", i, n, double(out[i]));
      for (int i = 0; i < n; ++i) CHECK(vec::value(p[i]) == F(i + 1), "value %d of %d is %g", i, n, double(vec::value(p[i])));
      CHECK(memory.intact(), "a store of %d lanes wrote beside them", n);
    }
  F whole[kLanes];
  F sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += whole[i] = F(1 << i);
  CHECK(vec::sum_lanes(vec::load(whole)) == sum, "sum_lanes gives %g, not %g", double(vec::sum_lanes(vec::load(whole))), double(sum));
  for (int64_t u = 0; u < 3 * kLanes; ++u)
    CHECK(vec::lanes_left<F>(u, kLanes + 3) == std::clamp<int64_t>(kLanes + 3 - u, 0, kLanes), "lanes_left from %d", int(u));
}

}  // namespace

int main(int arguments, char** argument) {
  test::print_context_at_crash();
  const int count = arguments > 1 ? std::atoi(argument[1]) : 300000;
  check_functions<float>(count);
  check_functions<double>(count);
  check_format<vec::Bf16>(Dtype::kBFloat16, count);
  check_format<vec::Fp16>(Dtype::kFloat16, count);
  check_lanes<float, float>("float");
  check_lanes<double, double>("double");
  check_lanes<float, vec::Bf16>("bf16");
  check_lanes<float, vec::Fp16>("fp16");
  return test::conclude("vec_test");
}
