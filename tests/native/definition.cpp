#include "definition.h"

#include <algorithm>
#include <cmath>

namespace ternc::tests {
namespace {

// A binary format of 16 bits: digits of the significand, and the exponent e of the values f * 2^e,
// 1/2 <= f < 1, under which they are subnormal.
struct Half {
  int digits, least;
};
constexpr Half BF16 = {8, -125}, F16 = {11, -13};

uint16_t encode(float value, const Half& format) {
  const int fraction_bits = format.digits - 1;
  const int infinity = ((1 << (15 - fraction_bits)) - 1) << fraction_bits;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return uint16_t(infinity + (1 << (fraction_bits - 1)));
  if (std::isinf(value)) return uint16_t(sign + infinity);
  int exponent = format.least;
  std::frexp(value, &exponent);
  exponent = value == 0.0f ? format.least : std::max(exponent, format.least);
  const double units =
      std::nearbyint(std::ldexp(std::fabs(double(value)), format.digits - exponent));
  // A carry out of `units` is the next exponent.
  const int bits = ((exponent - format.least) << fraction_bits) + int(units);
  return uint16_t(sign + std::min(bits, infinity));
}

float decode(uint16_t bits, const Half& format) {
  const int fraction_bits = format.digits - 1, magnitude = bits & 0x7fff;
  const int biased = magnitude >> fraction_bits, fraction = magnitude & ((1 << fraction_bits) - 1);
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (biased == (1 << (15 - fraction_bits)) - 1) return fraction != 0 ? NAN : sign * INFINITY;
  const int units = biased == 0 ? fraction : fraction + (1 << fraction_bits);
  const int exponent = biased == 0 ? format.least : format.least + biased - 1;
  return sign * float(std::ldexp(double(units), exponent - format.digits));
}

const Half& format_of(Dtype dtype) { return dtype == Dtype::bf16 ? BF16 : F16; }

}  // namespace

const char* name_of(Dtype dtype) {
  return dtype == Dtype::f32 ? "f32" : dtype == Dtype::bf16 ? "bf16" : "f16";
}

int itemsize(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

double unit_of(Dtype dtype) {
  return dtype == Dtype::f32 ? 0x1p-23 : dtype == Dtype::bf16 ? 0x1p-7 : 0x1p-10;
}

float rounded(float value, Dtype dtype) {
  return dtype == Dtype::f32 ? value : decode(encode(value, format_of(dtype)), format_of(dtype));
}

float Values::at(int64_t i) const {
  if (dtype_ == Dtype::f32) return reinterpret_cast<const float*>(bytes_.data())[i];
  return decode(reinterpret_cast<const uint16_t*>(bytes_.data())[i], format_of(dtype_));
}

void Values::set(int64_t i, float value) const {
  if (dtype_ == Dtype::f32)
    reinterpret_cast<float*>(bytes_.data())[i] = value;
  else
    reinterpret_cast<uint16_t*>(bytes_.data())[i] = encode(value, format_of(dtype_));
}

std::vector<float> Values::row(int64_t begin, int64_t count) const {
  std::vector<float> row;
  for (int64_t i = 0; i < count; ++i) row.push_back(at(begin + i));
  return row;
}

Values random_values(Random& random, Dtype dtype, int64_t count) {
  Values values(dtype, count);
  for (int64_t i = 0; i < count; ++i) values.set(i, random.normal());
  return values;
}

bool expect_values(const Values& seen, const std::vector<float>& wanted, const char* what) {
  int64_t i = 0;
  for (; i < seen.size(); ++i) {
    const float a = seen.at(i), b = wanted[size_t(i)];
    if (std::memcmp(&a, &b, 4) != 0 && !(std::isnan(a) && std::isnan(b))) break;
  }
  const bool same = i == seen.size();
  return expect(same, "%s: value %lld of %lld differs: %.9g, wanted %.9g", what, (long long)i,
                (long long)seen.size(), same ? 0.0 : double(seen.at(i)),
                same ? 0.0 : double(wanted[size_t(i)]));
}

QuantizedRow quantize(const std::vector<float>& x, int bits) {
  QuantizedRow row{std::vector<int8_t>(x.size(), 0), 0.0f};
  double largest = 0.0, sum = 0.0;
  for (const float value : x) {
    if (!std::isfinite(value)) {
      row.scale = NAN;
      return row;
    }
    largest = std::max(largest, std::fabs(double(value)));
    sum += std::fabs(double(value));
  }
  const float numerator = bits == 8 ? 127.0f : float(std::sqrt(7.0));
  const float size = bits == 8 ? float(largest) : float(sum / double(x.size()));
  // Too small to divide by: the token counts as zero.
  if (x.empty() || size == 0.0f || std::isinf(numerator / size)) return row;
  const float multiply = numerator / size;
  const double low = bits == 8 ? -127.0 : -8.0, high = bits == 8 ? 127.0 : 7.0;
  for (size_t k = 0; k < x.size(); ++k)
    row.q[k] = int8_t(std::clamp(std::nearbyint(double(x[k] * multiply)), low, high));
  row.scale = size / numerator;
  return row;
}

std::vector<float> rotate(std::vector<float> x, const int8_t* signs, int64_t block) {
  if (block == 0) return x;
  const int64_t columns = int64_t(x.size());
  if (signs != nullptr)
    for (int64_t k = 0; k < columns; ++k) x[size_t(k)] *= float(signs[k]);
  for (int64_t distance = 1; distance < block; distance *= 2)
    for (int64_t k = 0; k < columns; ++k) {
      if ((k & distance) != 0) continue;
      const float a = x[size_t(k)], b = x[size_t(k + distance)];
      x[size_t(k)] = a + b;
      x[size_t(k + distance)] = a - b;
    }
  const float factor = float(1.0 / std::sqrt(double(block)));
  for (float& value : x) value *= factor;
  return x;
}

double activate(double x, Activation function) {
  switch (function) {
    case Activation::none:
      return x;
    case Activation::silu:
      return x / (1.0 + std::exp(-x));
    case Activation::gelu:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu:
      return x > 0.0 ? x : 0.0;
    case Activation::relu2:
      return x > 0.0 ? x * x : 0.0;
  }
  return NAN;
}

}  // namespace ternc::tests
