// fit: the same bits from every instruction set and number of threads, codes that are the nearest
// ones, steps close to the best there are.
#include <algorithm>
#include <cmath>

#include "definition.h"
#include "tests.h"

namespace ternc::tests {
namespace {

struct Problem {
  int64_t rows, columns, group_size;  // group_size 0: a row; -1: the tensor
  int refine;
};
constexpr Problem PROBLEMS[] = {
    {1, 1, 0, 0},    {3, 3, 2, 1},     {5, 127, 0, 0},    {7, 129, 32, 0},  {3, 260, 128, 2},
    {2, 2100, 0, 1}, {129, 33, -1, 0}, {70, 1000, -1, 1}, {4, 512, 128, 1}, {1, 4, 4, 0},
};

struct Fitted {
  Buffer<int8_t> codes;
  Buffer<float> scale;
  Buffer<uint8_t> multiplier;
  bool finite;

  Fitted(const Problem& p, int planes, const Values& w, const Kernels& kernels,
         ParallelFor parallel)
      : codes(p.rows * p.columns),
        scale(p.group_size == -1 ? 1 : p.rows),
        multiplier(p.group_size > 0 ? p.rows * groups(p) : 0) {
    const FitArgs args{w.data(),  w.dtype(), p.rows,   p.columns,         group_size(p),
                       groups(p), planes,    p.refine, multiplier.data(), codes.data()};
    finite = fit(args, p.group_size == -1, scale.data(), kernels, parallel);
  }
  static int64_t group_size(const Problem& p) {
    return p.group_size > 0 ? p.group_size : p.columns;
  }
  static int64_t groups(const Problem& p) {
    return p.group_size > 0 ? ceil_div(p.columns, p.group_size) : 1;
  }
  double step(const Problem& p, int64_t row, int64_t column) const {
    const int64_t g = column / group_size(p);
    const int m = multiplier.size() > 0 ? multiplier[row * groups(p) + g] : 1;
    return double(scale[scale.size() == 1 ? 0 : row]) * m;
  }
};

// Error over the least: of a step that is found exactly (one plane) or searched.
constexpr double SEARCHED[] = {1.0, 1.1, 1.1};

void serial(int64_t count, int64_t, ParallelBody body, void* context) { body(context, 0, count); }

double snap_error(const std::vector<float>& w, double step, int planes) {
  double error = 0.0;
  const double most = code_max(planes);
  for (const float value : w) {
    const double code = std::clamp(std::nearbyint(double(value) / step), -most, most);
    error += (double(value) - step * code) * (double(value) - step * code);
  }
  return error;
}

// Least squared error over all steps: every step that some kept set wants (one plane), or a fine
// grid.
double least_error(std::vector<float> w, int planes) {
  double largest = 0.0, prefix = 0.0, square = 0.0, kept = 0.0;
  for (float& value : w) value = std::fabs(value), square += double(value) * double(value);
  std::sort(w.begin(), w.end(), [](float a, float b) { return a > b; });
  largest = double(w[0]);
  if (largest == 0.0) return 0.0;
  for (size_t k = 0; k < w.size(); ++k) {
    prefix += double(w[k]);
    kept = std::max(kept, prefix * prefix / double(k + 1));
  }
  if (planes == 1) return std::max(0.0, square - kept);
  double least = square;
  for (int i = 0; i < 400; ++i)
    least = std::min(least, snap_error(w, largest / code_max(planes) * (0.1 + 0.0025 * i), planes));
  return least;
}

// Every code is the nearest to w / step; the error is within `slack` of the least over all free
// steps of the same groups.
void check_quality(const Problem& p, int planes, const Values& w, const Fitted& fitted,
                   double slack) {
  double error = 0.0, least = 0.0, square = 0.0, off = 0.0;
  std::vector<float> whole;
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t first = 0; first < p.columns; first += Fitted::group_size(p)) {
      const int64_t count = std::min(Fitted::group_size(p), p.columns - first);
      const std::vector<float> group = w.row(row * p.columns + first, count);
      const double step = fitted.step(p, row, first), most = code_max(planes);
      for (int64_t k = 0; k < count; ++k) {
        const double value = double(group[size_t(k)]);
        const double code = double(fitted.codes[row * p.columns + first + k]);
        error += (value - step * code) * (value - step * code);
        square += value * value;
        if (step > 0.0)
          off = std::max(off, std::fabs(std::clamp(value / step, -most, most) - code));
        else
          off = std::max(off, 0.5 + std::fabs(code));
      }
      if (p.group_size == -1)
        whole.insert(whole.end(), group.begin(), group.end());
      else
        least += least_error(group, planes);
    }
  if (p.group_size == -1) least = least_error(whole, planes);
  expect(off <= 0.5 + 1e-5, "a code is %.6f steps from its weight (planes %d)", off, planes);
  // fp16 scales are off by up to 2^-11: error grows by the square of that.
  expect(slack == INFINITY || error <= slack * least + 1e-6 * square,
         "fit: error %.6g, least %.6g (planes %d, g %lld)", error, least, planes,
         (long long)p.group_size);
}

// Scales are fp16 values times one power of two that brings the largest into [2^14, 2^15).
void check_scales(const Fitted& fitted) {
  double largest = 0.0;
  for (int64_t i = 0; i < fitted.scale.size(); ++i)
    largest = std::max(largest, double(fitted.scale[i]));
  int exponent = 0;
  std::frexp(largest, &exponent);
  bool halves = true;
  for (int64_t i = 0; i < fitted.scale.size(); ++i) {
    const auto shifted = float(std::ldexp(double(fitted.scale[i]), 15 - exponent));
    halves = halves && rounded(shifted, Dtype::f16) == shifted;
  }
  expect(halves, "a scale is no fp16 value times the tensor's power of two");
}

void check_fit(const Kernels& kernels, const Kernels& scalar, const Problem& p, int planes,
               const Values& w) {
  const Fitted wanted(p, planes, w, scalar, serial);
  const Fitted seen(p, planes, w, kernels, parallel_for);
  expect(seen.finite, "a finite weight is fitted");
  expect_same(seen.codes.data(), wanted.codes.data(), seen.codes.size(), "codes");
  expect_same(seen.scale.data(), wanted.scale.data(), seen.scale.size(), "scales");
  expect_same(seen.multiplier.data(), wanted.multiplier.data(), seen.multiplier.size(),
              "multipliers");
  check_scales(seen);
  // Two and three planes search a grid of steps; tied groups round theirs to 127, 31 or 9
  // multiples of one, which says little about groups of a few weights.
  constexpr double TIED[] = {1.01, 1.02, 1.25};
  const bool tied = p.group_size > 0, tiny = tied && p.group_size < 32;
  check_quality(p, planes, w, seen,
                tiny   ? INFINITY
                : tied ? TIED[planes - 1]
                       : SEARCHED[planes - 1]);
}

void check_special(const Kernels& kernels, int planes) {
  Random random(9);
  for (const Problem& p : {Problem{3, 40, 0, 1}, Problem{3, 40, 8, 1}, Problem{3, 40, -1, 1}}) {
    Values w(Dtype::f32, p.rows * p.columns);
    for (int64_t i = 0; i < w.size(); ++i) w.set(i, 0.0f);
    const Fitted zero(p, planes, w, kernels, parallel_for);
    expect(zero.finite && zero.scale[0] == 0.0f && zero.codes[0] == 0, "zeros fit to zeros");
    for (const float size : {1e-42f, 1e37f}) {
      for (int64_t i = 0; i < w.size(); ++i) w.set(i, size * random.normal());
      const Fitted extreme(p, planes, w, kernels, parallel_for);
      expect(extreme.finite && std::isfinite(extreme.scale[0]), "magnitudes of %g fit",
             double(size));
    }
    for (const float bad : {float(NAN), float(INFINITY)}) {
      w.set(p.columns + 1, bad);
      expect(!Fitted(p, planes, w, kernels, parallel_for).finite, "%g is refused", double(bad));
    }
  }
}

// snap_sums and magnitudes, on their own.
void check_sums(const Kernels& kernels, int planes, const Values& w) {
  const int64_t count = w.size();
  const Buffer<float> sizes(count);
  const FitArgs args{w.data(), w.dtype(), 1, count, count, 1, planes, 0, nullptr, nullptr};
  kernels.magnitudes(args, 2, 0, count, sizes.data());
  std::vector<float> wanted;
  for (int64_t i = 0; i < count; ++i) wanted.push_back(std::fabs(w.at(i)) / 4.0f);
  expect_same(sizes.data(), wanted.data(), count, "magnitudes");
  const double steps[] = {0.05, 0.31};
  SnapSums sums[] = {{0.0, 0.0}, {0.0, 0.0}};
  kernels.snap_sums(sizes.data(), count, planes, steps, 2, sums);
  for (int i = 0; i < 2; ++i) {
    double weight_code = 0.0, code_code = 0.0, most = code_max(planes);
    for (const float value : wanted) {
      const double code = std::min(std::nearbyint(double(value) / steps[i]), most);
      weight_code += double(value) * code, code_code += code * code;
    }
    expect(std::fabs(sums[i].weight_code - weight_code) <= 1e-5 * weight_code + 1e-9 &&
               std::fabs(sums[i].code_code - code_code) <= 1e-5 * code_code + 1e-9,
           "snap_sums: %.9g and %.9g, wanted %.9g and %.9g", sums[i].weight_code, sums[i].code_code,
           weight_code, code_code);
  }
}

const Kernels& scalar_kernels() {
  int count = 0;
  const Isa* table = isa_table(&count);
  return *table[count - 1].kernels;
}

}  // namespace

void test_fit(const Kernels& kernels) {
  Random random(10);
  for (const Problem& p : PROBLEMS)
    for (int planes = 1; planes <= MAX_PLANES; ++planes)
      for (const Dtype dtype : DTYPES)
        check_fit(kernels, scalar_kernels(), p, planes,
                  random_values(random, dtype, p.rows * p.columns));
  for (int planes = 1; planes <= MAX_PLANES; ++planes) {
    check_special(kernels, planes);
    for (const int64_t count : {1, 15, 16, 17, 129, 5000})
      check_sums(kernels, planes, random_values(random, Dtype::bf16, count));
  }
}

}  // namespace ternc::tests
