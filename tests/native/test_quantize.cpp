// quantize, sum_groups, widen and largest: bit for bit.
#include <algorithm>
#include <cmath>

#include "definition.h"
#include "tests.h"

namespace ternc::tests {
namespace {

constexpr int64_t COLUMNS[] = {0, 1, 3, 4, 15, 16, 17, 28, 60, 63, 64, 127, 129, 260, 1100};
constexpr int64_t COUNTS[] = {0, 1, 5};

// Tokens of ordinary, zero, tiny, huge and non-finite values in turn.
Values special_tokens(Random& random, Dtype dtype, int64_t count, int64_t columns) {
  Values x = random_values(random, dtype, count * columns);
  for (int64_t i = 0; i < x.size(); ++i) {
    const int64_t kind = (columns + i / columns) % 7;
    if (kind == 1) x.set(i, 0.0f);
    if (kind == 2) x.set(i, 1e-38f * x.at(i));
    if (kind == 3) x.set(i, x.at(i) * (dtype == Dtype::f16 ? 1e4f : 1e37f));
    if (kind == 4 && i % columns == columns / 2) x.set(i, NAN);
    if (kind == 5 && i % columns == columns - 1) x.set(i, -INFINITY);
  }
  return x;
}

// Products of floats as rounded as an adder takes them: x * multiply is under 2^22 for both widths.
void check_quantize(const Kernels& kernels, const Values& x, int64_t count, int64_t columns,
                    int bits) {
  const int64_t stride = ceil_div(columns, STEP_COLUMNS) * STEP_COLUMNS;
  const int64_t group_size = columns > 32 ? 32 : columns;
  const int64_t groups = columns > 0 ? ceil_div(columns, group_size) : 1;
  const Buffer<int8_t> q(count * stride), wanted_q(count * stride);
  const Buffer<float> scale(count), wanted_scale(count);
  const Buffer<int32_t> sums(count * groups), wanted_sums(count * groups);
  std::fill_n(wanted_q.data(), wanted_q.size(), int8_t(0));
  std::fill_n(wanted_sums.data(), wanted_sums.size(), 0);
  for (int64_t token = 0; token < count; ++token) {
    const QuantizedRow row = quantize(x.row(token * columns, columns), bits);
    wanted_scale[token] = row.scale;
    for (int64_t k = 0; k < columns; ++k) {
      wanted_q[token * stride + k] = row.q[size_t(k)];
      wanted_sums[token * groups + k / group_size] += row.q[size_t(k)];
    }
  }
  const QuantizeArgs args{x.data(),
                          x.dtype(),
                          columns,
                          group_size,
                          groups,
                          bits,
                          {q.data(), scale.data(), sums.data(), count, stride, nullptr}};
  on_threads(
      [&](int i) { kernels.quantize(args, piece_begin(count, i), piece_begin(count, i + 1)); });
  expect_same(q.data(), wanted_q.data(), q.size(), "q");
  expect_same(sums.data(), wanted_sums.data(), sums.size(), "sums of q");
  for (int64_t token = 0; token < count; ++token)
    expect(std::isnan(wanted_scale[token]) ? std::isnan(scale[token])
                                           : scale[token] == wanted_scale[token],
           "scale %g, wanted %g (%d bits, K %lld, %s)", double(scale[token]),
           double(wanted_scale[token]), bits, (long long)columns, name_of(x.dtype()));
}

void check_widen(const Kernels& kernels, const Values& x, int64_t count, int64_t columns) {
  const int64_t stride = ceil_div(columns, STEP_COLUMNS) * STEP_COLUMNS;
  const Values wide(Dtype::f32, count * stride);
  std::vector<float> wanted(size_t(count * stride), 0.0f);
  for (int64_t token = 0; token < count; ++token) {
    const std::vector<float> row = x.row(token * columns, columns);
    float* out = wanted.data() + token * stride;
    std::copy(row.begin(), row.end(), out);
    if (!std::all_of(row.begin(), row.end(), [](float value) { return std::isfinite(value); }))
      std::fill_n(out, stride, NAN);
  }
  on_threads([&](int i) {
    kernels.widen(x.data(), x.dtype(), columns, static_cast<float*>(wide.data()), stride,
                  piece_begin(count, i), piece_begin(count, i + 1));
  });
  expect_values(wide, wanted, "widen");
}

void check_largest(const Kernels& kernels, const Values& x) {
  float most = 0.0f;
  for (int64_t i = 0; i < x.size(); ++i) {
    const float size = std::fabs(x.at(i));
    most = std::isnan(size) || size > most ? size : most;
    if (std::isnan(size)) break;
  }
  const uint32_t seen = kernels.largest(x.data(), x.dtype(), 0, x.size());
  uint32_t wanted;
  std::memcpy(&wanted, &most, 4);
  if (std::isnan(most))
    expect(seen > 0x7f800000u, "largest: %x is not NaN", seen);
  else
    expect(seen == wanted, "largest: bits %x, wanted %x", seen, wanted);
}

// Every 16-bit pattern, as each half dtype, is read and written as the definition says.
void check_every_half(const Kernels& kernels, Dtype dtype) {
  const Values x(dtype, 1 << 16);
  for (int64_t i = 0; i < x.size(); ++i) static_cast<uint16_t*>(x.data())[i] = uint16_t(i);
  const Values wide(Dtype::f32, x.size());
  std::vector<float> wanted = x.row(0, x.size());
  for (float& value : wanted)
    if (!std::isfinite(value)) value = NAN;  // widen's word for a token that is not finite
  kernels.widen(x.data(), dtype, 1, static_cast<float*>(wide.data()), 1, 0, x.size());
  expect_values(wide, wanted, "every half");
}

// Rounding is looked at through dequantize: 1 * scale, stored as a half. Ties, overflow and
// subnormals among the scales.
void check_rounding(const Kernels& kernels, Dtype dtype) {
  Random random(4);
  constexpr int64_t ROWS = 1 << 15;
  const Buffer<float> scale(ROWS);
  for (int64_t i = 0; i < ROWS; ++i) {
    const auto any = uint32_t(random.next());
    const uint32_t tie = any & 0xffff0000u, low = dtype == Dtype::bf16 ? 0x8000u : 0x1000u;
    const uint32_t bits = i % 3 == 0   ? any
                          : i % 3 == 1 ? tie | low
                                       : (tie & 0x8fff0000u) | 0x38001000u;
    std::memcpy(scale.data() + i, &bits, 4);
  }
  const Buffer<uint8_t> bytes(ROWS);
  std::fill_n(bytes.data(), ROWS, uint8_t(242));  // trits 1
  const Weight weight{bytes.data(), scale.data(), nullptr, ScaleKind::row, ROWS, 1, 1, 1};
  const Values values(dtype, ROWS);
  kernels.dequantize({weight, 1, true, values.data(), dtype, nullptr}, 0, ROWS);
  std::vector<float> wanted;
  for (int64_t i = 0; i < ROWS; ++i) wanted.push_back(rounded(scale[i], dtype));
  expect_values(values, wanted, "rounding");
}

}  // namespace

void test_quantize(const Kernels& kernels) {
  Random random(5);
  for (const Dtype dtype : DTYPES) {
    for (const int64_t columns : COLUMNS)
      for (const int64_t count : COUNTS) {
        const Values x = special_tokens(random, dtype, count, columns);
        for (const int bits : {8, 4}) check_quantize(kernels, x, count, columns, bits);
        check_widen(kernels, x, count, columns);
        check_largest(kernels, x);
      }
    if (dtype == Dtype::f32) continue;
    check_every_half(kernels, dtype);
    check_rounding(kernels, dtype);
  }
}

}  // namespace ternc::tests
