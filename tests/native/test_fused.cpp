// hadamard, norm and activate: rows of any stride -> rotation -> integers.
//
// What is exact (rotation, rounding, quantisation) is compared bit for bit; what is not (square
// roots, sums, exponentials) with float64.
#include <algorithm>
#include <cmath>

#include "definition.h"
#include "tests.h"

namespace ternc::tests {
namespace {

struct Shape {
  int64_t columns, block;  // block 0: no rotation
};
constexpr Shape SHAPES[] = {{1, 0},       {3, 1},      {6, 2},   {12, 4},  {24, 8},
                            {48, 16},     {96, 32},    {64, 64}, {129, 0}, {384, 128},
                            {768, 256},   {1024, 512}, {300, 4}, {127, 0}, {2048, 1024},
                            {4096, 4096}, {4608, 512}, {16, 0},  {0, 0}};
constexpr int64_t COUNTS[] = {0, 1, 5};

// Tokens `gap` elements further apart than they are long; the last ends the memory.
struct StridedRows {
  Values values;
  Rows rows;
  int64_t columns;

  StridedRows(Random& random, Dtype dtype, int64_t count, int64_t width, int64_t gap)
      : values(random_values(random, dtype, count == 0 ? 0 : count * (width + gap) - gap)),
        rows{values.data(), dtype, width + gap},
        columns(width) {}
  std::vector<float> row(int64_t token) const { return values.row(token * rows.stride, columns); }
};

// A rotation with or without signs, and room for the integers that come out.
struct Quantized {
  Buffer<int8_t> signs, q;
  Buffer<float> scale;
  Rotation rotation;
  QuantizedRows out;

  Quantized(Random& random, int64_t count, const Shape& shape, int bits, bool with_signs)
      : signs(with_signs && shape.block > 0 ? padded(shape.columns) : 0),
        q(count * shape.columns),
        scale(count),
        rotation{signs.data(), shape.block},
        out{q.data(), scale.data(), bits} {
    for (int64_t k = 0; k < signs.size(); ++k) signs[k] = random.below(2) == 0 ? 1 : -1;
  }

  // h, already rounded to `dtype`, rotated as the kernels do it.
  std::vector<float> rotated(const std::vector<float>& h, Dtype dtype) const {
    std::vector<float> r = rotate(h, signs.data(), rotation.block);
    for (float& value : r) value = rounded(value, dtype);
    return r;
  }

  // One check: token's integers are exactly those of h.
  void expect_exact(const std::vector<float>& h, Dtype dtype, int64_t token,
                    const char* what) const {
    const QuantizedRow wanted = quantize(rotated(h, dtype), out.bits);
    const int64_t columns = int64_t(h.size());
    const bool same =
        std::equal(wanted.q.begin(), wanted.q.end(), q.data() + token * columns) &&
        (std::isnan(wanted.scale) ? std::isnan(scale[token]) : wanted.scale == scale[token]);
    expect(same, "%s: integers of token %lld differ (K %lld, block %lld, %s, %d bits)", what,
           (long long)token, (long long)columns, (long long)rotation.block, name_of(dtype),
           out.bits);
  }
};

// Calls kernel(args, begin, end, scratch) for shares of the tokens on THREADS threads.
template <class Args>
void over_tokens(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args,
                 int64_t count) {
  on_threads([&](int i) {
    const Buffer<float> scratch(scratch_floats(args.columns));
    kernel(args, piece_begin(count, i), piece_begin(count, i + 1), scratch.data());
  });
}

void check_hadamard(const Kernels& kernels, const Shape& shape, Dtype dtype, int64_t count,
                    int64_t gap, Random& random) {
  const StridedRows x(random, dtype, count, shape.columns, gap);
  const Quantized parts(random, 0, shape, 8, gap > 0);
  const Values y(dtype, count * shape.columns);
  over_tokens(kernels.hadamard, {x.rows, shape.columns, parts.rotation, y.data()}, count);
  std::vector<float> wanted;
  for (int64_t token = 0; token < count; ++token) {
    const std::vector<float> row = parts.rotated(x.row(token), dtype);
    wanted.insert(wanted.end(), row.begin(), row.end());
  }
  expect_values(y, wanted, "hadamard");
}

// Gain and bias of a norm; either may be missing.
struct Affine {
  Values gain, bias;
  float offset;

  Affine(Random& random, int64_t columns, int64_t variant)
      : gain(random_values(random, DTYPES[variant % 3], variant % 5 > 0 ? columns : 0)),
        bias(random_values(random, DTYPES[variant / 2 % 3], variant % 4 == 1 ? columns : 0)),
        offset(variant % 2 == 0 ? 0.0f : 1.0f) {}
  double gain_at(int64_t k) const { return gain.size() > 0 ? double(gain.at(k) + offset) : 1.0; }
  double bias_at(int64_t k) const { return bias.size() > 0 ? double(bias.at(k)) : 0.0; }
};

// Largest error of y over what its roundings allow.
double norm_error(const NormArgs& args, const Affine& affine, const std::vector<float>& x,
                  const std::vector<float>& y) {
  double mean = 0.0, square = 0.0, worst = 0.0;
  for (const float value : x) mean += double(value) / double(x.size());
  if (args.kind == Norm::rms) mean = 0.0;
  for (const float value : x) square += (double(value) - mean) * (double(value) - mean);
  const double factor = 1.0 / std::sqrt(square / double(x.size()) + double(args.eps));
  for (size_t k = 0; k < x.size(); ++k) {
    const double gained = (double(x[k]) - mean) * factor * affine.gain_at(int64_t(k));
    const double bias = affine.bias_at(int64_t(k));
    const double around = std::fabs(mean) * factor * std::fabs(affine.gain_at(int64_t(k)));
    const double allowed = 2.0 * unit_of(args.x.dtype) * (std::fabs(gained) + std::fabs(bias)) +
                           0x1p-20 * (std::fabs(gained) + around) + 1e-7;
    worst = std::max(worst, std::fabs(double(y[k]) - (gained + bias)) / allowed);
  }
  return worst;
}

// A norm that keeps no y may apply its factor behind the rotation: q is the same, but for the few
// that lie on the border of two integers.
void expect_alike(const Quantized& alone, const Quantized& kept) {
  int64_t other = 0, far = 0;
  for (int64_t i = 0; i < kept.q.size(); ++i) {
    other += alone.q[i] != kept.q[i];
    far += std::abs(alone.q[i] - kept.q[i]) > 1;
  }
  expect(far == 0 && other <= 1 + kept.q.size() / 1000,
         "q of a norm without y: %lld of %lld differ", (long long)other, (long long)kept.q.size());
  for (int64_t t = 0; t < kept.scale.size(); ++t) {
    const float seen = alone.scale[t], wanted = kept.scale[t];
    const bool close = std::fabs(seen - wanted) <= 4e-6f * std::fabs(wanted);
    expect(close || (std::isnan(seen) && std::isnan(wanted)), "scale of a norm without y: %g, %g",
           double(seen), double(wanted));
  }
}

void check_norm(const Kernels& kernels, const Shape& shape, Dtype dtype, int64_t count,
                int64_t variant, Random& random) {
  const StridedRows x(random, dtype, count, shape.columns, variant % 3 == 2 ? 5 : 0);
  const Affine affine(random, shape.columns, variant);
  const int bits = variant % 7 == 0 ? 4 : 8;
  const Quantized kept(random, count, shape, bits, variant % 2 == 0);
  const Values y(dtype, count * shape.columns);
  NormArgs args{x.rows,
                shape.columns,
                variant % 2 == 0 ? Norm::rms : Norm::layer,
                1e-5f,
                {affine.gain.data(), affine.gain.dtype(), affine.offset},
                {affine.bias.data(), affine.bias.dtype(), 0.0f},
                variant % 3 == 1,
                y.data(),
                kept.rotation,
                kept.out};
  over_tokens(kernels.norm, args, count);
  for (int64_t token = 0; token < count; ++token) {
    const std::vector<float> row = y.row(token * shape.columns, shape.columns);
    const double error = norm_error(args, affine, x.row(token), row);
    expect(error <= 1.0, "norm: error %.3g times what is allowed (K %lld, %s, variant %lld)", error,
           (long long)shape.columns, name_of(dtype), (long long)variant);
    kept.expect_exact(row, dtype, token, "norm");
  }
  const Quantized alone(random, count, shape, bits, false);
  args.y = nullptr;
  args.out = alone.out;
  kernels.norm(args, 0, count, Buffer<float>(scratch_floats(shape.columns)).data());
  expect_alike(alone, kept);
}

// act(gate) * up, rounded where the kernel rounds: exactly what it computes where act() is exact.
std::vector<float> gated(const ActivateArgs& args, const std::vector<float>& gate,
                         const std::vector<float>& up) {
  std::vector<float> h;
  for (size_t k = 0; k < gate.size(); ++k) {
    const auto value = rounded(float(activate(double(gate[k]), args.function)), args.gate.dtype);
    h.push_back(up.empty() ? value : rounded(value * up[k], args.gate.dtype));
  }
  return h;
}

// One check: the integers stand for h within half a step and the error of the activation.
void expect_near(const Quantized& seen, const std::vector<float>& h, Dtype dtype, int64_t token) {
  const std::vector<float> wanted = seen.rotated(h, dtype);
  const QuantizedRow exact = quantize(wanted, seen.out.bits);
  const double step = double(seen.scale[token]);
  double most = 0.0, worst = 0.0;
  for (const float value : h) most = std::max(most, std::fabs(double(value)));
  most *= std::sqrt(double(std::max<int64_t>(seen.rotation.block, 1)));
  const double error = (0x1p-20 + unit_of(dtype)) * most;
  const double low = seen.out.bits == 8 ? -127.0 : -8.0, high = seen.out.bits == 8 ? 127.0 : 7.0;
  for (size_t k = 0; k < wanted.size(); ++k) {
    const double q = double(seen.q[token * int64_t(h.size()) + int64_t(k)]);
    const double nearest = std::clamp(double(wanted[k]), low * step, high * step);
    worst = std::max(worst, std::fabs(q * step - nearest) - 0.5 * step - error);
  }
  const bool scaled = std::fabs(step - double(exact.scale)) <= error;
  expect(scaled && worst <= 1e-6 * step, "activate: %.3g over the bound, step %.6g, wanted %.6g",
         worst, step, double(exact.scale));
}

void check_activate(const Kernels& kernels, const Shape& shape, Dtype dtype, int64_t count,
                    int64_t variant, Random& random) {
  const int64_t gap = variant % 3 == 1 ? 3 : 0;
  const StridedRows gate(random, dtype, count, shape.columns, gap);
  const StridedRows up(random, dtype, count, shape.columns, 2 * gap);
  for (int64_t i = 0; variant % 5 == 4 && i < gate.values.size(); ++i)
    gate.values.set(i, 30.0f * gate.values.at(i));  // where exponentials saturate
  const bool has_up = variant % 2 == 0;
  const auto function = Activation(variant % 6);
  const Quantized seen(random, count, shape, variant % 7 == 0 ? 4 : 8, variant % 4 < 2);
  const ActivateArgs args{gate.rows,     has_up ? up.rows : Rows{nullptr, dtype, 0},
                          shape.columns, function,
                          seen.rotation, seen.out,
                          nullptr};
  over_tokens(kernels.activate, args, count);
  const bool exact =
      function == Activation::none || function == Activation::relu || function == Activation::relu2;
  for (int64_t token = 0; token < count; ++token) {
    const std::vector<float> h =
        gated(args, gate.row(token), has_up ? up.row(token) : std::vector<float>());
    if (exact)
      seen.expect_exact(h, dtype, token, "activate");
    else
      expect_near(seen, h, dtype, token);
  }
}

}  // namespace

void test_hadamard(const Kernels& kernels) {
  Random random(6);
  for (const Shape& shape : SHAPES)
    for (const Dtype dtype : DTYPES)
      for (const int64_t count : COUNTS)
        for (const int64_t gap : {0, 5})
          if (shape.block > 0) check_hadamard(kernels, shape, dtype, count, gap, random);
}

void test_norm(const Kernels& kernels) {
  Random random(7);
  int64_t variant = 0;
  for (int round = 0; round < 3; ++round)
    for (const Shape& shape : SHAPES)
      for (const Dtype dtype : DTYPES)
        for (const int64_t count : COUNTS)
          check_norm(kernels, shape, dtype, count, variant++, random);
}

void test_activate(const Kernels& kernels) {
  Random random(8);
  int64_t variant = 0;
  for (int round = 0; round < 4; ++round)
    for (const Shape& shape : SHAPES)
      for (const Dtype dtype : DTYPES)
        for (const int64_t count : COUNTS)
          check_activate(kernels, shape, dtype, count, variant++, random);
}

}  // namespace ternc::tests
