// Tests cpu/half.h against the definitions, in double: widens every 16-bit value, and narrows
// floats around every 16-bit value.
#include "common/half.h"

#include "simd_probe.h"
#include "testing.h"

namespace vmoe {
namespace {

template <typename Half>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int kFraction = 7, kBias = 127;
};
template <>
struct Format<Float16> {
  static constexpr int kFraction = 10, kBias = 15;
};

template <typename Half>
class Halves : public ::testing::Test {
 public:
  static constexpr int kFraction = Format<Half>::kFraction, kBias = Format<Half>::kBias;
  static constexpr int kSpecial = 2 * kBias + 1;  // the exponent of infinity and NaN

  static std::vector<Half> all() {
    std::vector<Half> values(1 << 16);
    for (size_t i = 0; i < values.size(); ++i) values[i].bits = static_cast<uint16_t>(i);
    return values;
  }

  static double value(Half half) {
    const int exponent = half.bits >> kFraction & kSpecial;
    const int fraction = half.bits & ((1 << kFraction) - 1);
    double magnitude;
    if (exponent == kSpecial) {
      magnitude = fraction ? kNaN<double> : kInf<double>;
    } else if (exponent == 0) {
      magnitude = std::ldexp(fraction, 1 - kBias - kFraction);
    } else {
      magnitude = std::ldexp(fraction + (1 << kFraction), exponent - kBias - kFraction);
    }
    return half.bits >> 15 ? -magnitude : magnitude;
  }

  // Rounds to nearest, ties to even, in units of the last place. Subnormal numbers have the unit of
  // the smallest normal number.
  static double rounded(float x) {
    if (!std::isfinite(x) || x == 0) return x;
    const int exponent = std::max(std::ilogb(x), 1 - kBias) - kFraction;
    const double nearest = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
    return std::abs(nearest) < std::ldexp(1, kBias + 1) ? nearest : std::copysign(kInf<double>, x);
  }

  static std::vector<float> widen(const std::vector<Half>& x) {
    Guarded<float> out(x.size());
    cpu::widen_each(x.data(), out.data(), static_cast<int64_t>(x.size()));
    EXPECT_TRUE(out.fences_stand());
    return out.values();
  }

  static std::vector<Half> narrow(const std::vector<float>& x) {
    Guarded<Half> out(x.size());
    cpu::narrow_each(x.data(), out.data(), static_cast<int64_t>(x.size()));
    EXPECT_TRUE(out.fences_stand());
    return out.values();
  }

  static bool same(double a, double b) {
    return std::isnan(b) ? std::isnan(a) : a == b && std::signbit(a) == std::signbit(b);
  }

  static void expect_rounded(const std::vector<float>& x) {
    const auto y = narrow(x);
    int64_t wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      if (same(value(y[i]), rounded(x[i])) || ++wrong > 10) continue;
      ADD_FAILURE() << x[i] << " became " << value(y[i]) << ", wanted " << rounded(x[i]);
    }
    EXPECT_EQ(wrong, 0);
  }
};
using HalfTypes = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(Halves, HalfTypes);

TYPED_TEST(Halves, EveryValueIsWidenedExactly) {
  const auto half = this->all();
  const auto wide = this->widen(half);
  for (size_t i = 0; i < half.size(); ++i) {
    ASSERT_TRUE(this->same(wide[i], this->value(half[i]))) << "bits " << i << " became " << wide[i];
  }
}

TYPED_TEST(Halves, EveryValueSurvivesTheRoundTrip) {
  const auto half = this->all();
  const auto back = this->narrow(this->widen(half));
  for (size_t i = 0; i < half.size(); ++i) {
    if (std::isnan(this->value(half[i]))) continue;
    ASSERT_EQ(back[i].bits, half[i].bits);
  }
}

TYPED_TEST(Halves, RoundsToNearestAndTiesToEven) {
  // Each value, the midpoints between it and its neighbours, and the floats next to all of these.
  // These floats include zero, subnormal numbers, the largest number, and the midpoint from which
  // rounding gives infinity.
  std::vector<float> x;
  for (const auto half : this->all()) {
    const double value = this->value(half);
    if (!std::isfinite(value)) continue;
    const int unit = std::max(value == 0 ? INT32_MIN / 2 : std::ilogb(value), 1 - this->kBias);
    const double step = std::ldexp(0.5, unit - this->kFraction);
    for (const double exact : {value, value + step, value - step}) {
      const auto near = static_cast<float>(exact);
      for (const float v :
           {near, std::nextafter(near, kInf<float>), std::nextafter(near, -kInf<float>)})
        x.push_back(v);
    }
  }
  this->expect_rounded(x);
}

TYPED_TEST(Halves, RoundsAnyFloat) {
  std::mt19937_64 random(1);
  std::vector<float> x(1 << 18);
  for (float& value : x) {
    const auto bits = static_cast<uint32_t>(random());
    memcpy(&value, &bits, sizeof(bits));
  }
  this->expect_rounded(x);
}

TYPED_TEST(Halves, SpecialFloats) {
  using Limits = std::numeric_limits<float>;
  std::vector<float> x{
      0.0f,          -0.0f,         kInf<float>,          -kInf<float>,          kNaN<float>,
      Limits::max(), Limits::min(), Limits::denorm_min(), -Limits::denorm_min(), Limits::lowest()};
  for (const uint32_t bits : {0x7F800001u, 0xFF800001u, 0x7FFFFFFFu, 0xFFFFFFFFu}) {  // NaN
    x.push_back(0);
    memcpy(&x.back(), &bits, sizeof(bits));
  }
  this->expect_rounded(x);
  for (size_t n = 1; n < x.size(); ++n) this->expect_rounded({x.begin(), x.begin() + n});
}

}  // namespace
}  // namespace vmoe
