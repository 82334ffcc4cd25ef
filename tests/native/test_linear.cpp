// linear_i8 (bit for bit), linear_f32 (close), dequantize (bit for bit), on every form of weight.
#include <algorithm>
#include <cmath>

#include "tests.h"
#include "weights.h"

namespace ternc::tests {
namespace {

constexpr int64_t TOKENS[] = {0, 1, 2, 3, 4, 5, 9, 17, 33};

int64_t whole_steps(int64_t columns) { return ceil_div(columns, STEP_COLUMNS) * STEP_COLUMNS; }

// Calls the kernel on THREADS threads, each with its share of the blocks, or of the tokens where
// there are few blocks: whole tiles of them.
template <class Args>
void run_in_pieces(void (*kernel)(const Args&, const Range&), const Args& args, int64_t blocks,
                   int64_t tokens) {
  const int64_t tiles = ceil_div(tokens, TILE_TOKENS);
  on_threads([&](int i) {
    Range range{0, blocks, 0, tokens};
    if (blocks >= THREADS)
      range.block_begin = piece_begin(blocks, i), range.block_end = piece_begin(blocks, i + 1);
    else
      range.token_begin = std::min(tokens, piece_begin(tiles, i) * TILE_TOKENS),
      range.token_end = std::min(tokens, piece_begin(tiles, i + 1) * TILE_TOKENS);
    kernel(args, range);
  });
}

struct IntegerTokens {
  Buffer<int8_t> q, tiles;  // tiles: where the kernels read them
  Buffer<float> scale;
  Buffer<int32_t> sums;
  Tokens tokens;

  IntegerTokens(Random& random, const Kernels& kernels, int64_t count, const Weight& weight)
      : q(count * whole_steps(weight.columns)), scale(count), sums(count * weight.groups) {
    tokens = {q.data(), scale.data(), sums.data(), count, whole_steps(weight.columns), nullptr};
    for (int64_t token = 0; token < count; ++token) {
      scale[token] = token % 7 == 6 ? NAN : 0.02f + 0.01f * random.uniform();
      for (int64_t k = 0; k < tokens.stride; ++k)
        q[token * tokens.stride + k] =
            int8_t(k < weight.columns ? int(random.below(255)) - 127 : 0);
    }
    finish(kernels, weight);
  }

  // What the kernels read besides q.
  void finish(const Kernels& kernels, const Weight& weight) {
    kernels.sum_groups(tokens, weight.columns, weight.group_size, weight.groups, 0, tokens.count);
    if (kernels.tile_token == nullptr || tokens.count < MIN_TILE_TOKENS) return;
    const int64_t pieces = ceil_div(tokens.stride, TILE_COLUMNS);
    const int64_t rows = ceil_div(tokens.count, TILE_TOKENS) * TILE_TOKENS;
    tiles = Buffer<int8_t>(rows * pieces * TILE_COLUMNS);
    tokens.tiles = tiles.data();
    on_threads([&](int i) {
      for (int64_t t = piece_begin(rows, i); t < piece_begin(rows, i + 1); ++t)
        kernels.tile_token(t < tokens.count ? tokens.q + t * tokens.stride : nullptr, tokens.stride,
                           t, tokens.tiles);
    });
  }
};

// y = (float(sum) * sx) * s + b; free scales: the groups' float(sum) * s added in order, times sx.
float integer_product(const TernaryWeight& weight, const Tokens& tokens, int64_t token,
                      int64_t row) {
  const Weight& w = weight.lanes();
  int64_t total = 0;
  float free_total = 0.0f;
  for (int64_t g = 0; g < w.groups; ++g) {
    int64_t sum = 0;
    for (int64_t k = g * w.group_size; k < w.columns && k < (g + 1) * w.group_size; ++k)
      sum += tokens.q[token * tokens.stride + k] * weight.code(row, k);
    total += sum * weight.multiplier(row, g);
    if (w.scale_kind == ScaleKind::group) free_total += float(sum) * weight.scale(row, g);
  }
  const float sx = tokens.scale[token];
  return w.scale_kind == ScaleKind::group ? free_total * sx
                                          : (float(total) * sx) * weight.scale(row, 0);
}

void check_i8(const Kernels& kernels, const TernaryWeight& weight, int64_t count, int64_t variant,
              Random& random) {
  const Weight& w = weight.lanes();
  const IntegerTokens x(random, kernels, count, w);
  const Epilogue epilogue(random, DTYPES[variant % 3], count, w.rows, variant);
  std::vector<float> wanted;
  for (int64_t token = 0; token < count; ++token)
    for (int64_t row = 0; row < w.rows; ++row)
      wanted.push_back(
          epilogue.finish(integer_product(weight, x.tokens, token, row), token, row, w.rows));
  const auto prefetch = Prefetch(variant % 2);
  const auto kernel = kernels.linear_i8[kind_index(weight.planes())];
  const Values y(epilogue.dtype, count * w.rows), again(epilogue.dtype, count * w.rows);
  kernel({w, x.tokens, epilogue.into(y), prefetch}, {0, weight.blocks(), 0, count});
  expect_values(y, wanted, "linear_i8");
  run_in_pieces(kernel, LinearI8Args{w, x.tokens, epilogue.into(again), prefetch}, weight.blocks(),
                count);
  expect_values(again, wanted, "linear_i8 on threads");
}

// The sum of most columns: |sum| = 127 * 127 * 131,072 with multipliers, just inside int32.
void check_largest_sums(const Kernels& kernels, int planes, int64_t group_size) {
  Random random(1);
  const Form form = {1, MAX_COLUMNS, group_size, ScaleKind::row};
  const TernaryWeight weight(form, planes, random, TernaryWeight::Content::largest);
  const Weight& w = weight.lanes();
  for (const int64_t count : {1, 4, 8}) {
    IntegerTokens x(random, kernels, count, w);
    std::fill_n(x.q.data(), x.q.size(), int8_t(-127));
    std::fill_n(x.scale.data(), count, 1.0f);
    x.finish(kernels, w);
    const Values y(Dtype::f32, count);
    const Output out{y.data(), Dtype::f32, nullptr, Dtype::f32, nullptr};
    kernels.linear_i8[kind_index(planes)]({w, x.tokens, out, Prefetch::l2},
                                          {0, weight.blocks(), 0, count});
    const int most = code_max(planes) * (group_size > 0 ? multiplier_max(planes) : 1);
    expect_values(y, std::vector<float>(size_t(count), float(-127 * MAX_COLUMNS * most)),
                  "the largest sums");
  }
}

// Outputs of 1 MB and more in every dtype, which tile kernels stream past the caches.
void check_large_outputs(const Kernels& kernels) {
  if (kernels.tile_token == nullptr) return;
  Random random(6);
  for (const int64_t rows : {8192, 8179}) {
    const TernaryWeight weight({rows, 8, 0, ScaleKind::row}, 1, random);
    for (const int64_t variant : {0, 1, 2, 3, 4, 5}) check_i8(kernels, weight, 64, variant, random);
  }
}

// Sum over columns of x * m * c * s, and of its terms' sizes.
struct RealProduct {
  double value, size, weights;  // weights: sum of |m * c * s|

  RealProduct(const TernaryWeight& weight, const float* x, int64_t row)
      : value(0.0), size(0.0), weights(0.0) {
    for (int64_t k = 0; k < weight.lanes().columns; ++k) {
      const int64_t g = weight.group_of(k);
      const double w = double(weight.scale(row, g)) * weight.multiplier(row, g);
      value += w * weight.code(row, k) * double(x[k]);
      size += std::fabs(w * weight.code(row, k) * double(x[k]));
      weights += std::fabs(w * weight.code(row, k));
    }
  }
};

// x_error: how far the kernel may be off in each value of x.
void check_close(const Values& y, const TernaryWeight& weight, const Buffer<float>& x,
                 int64_t stride, const Epilogue& epilogue, const char* what, double x_error = 0.0) {
  const int64_t rows = weight.lanes().rows;
  double worst = 0.0;
  for (int64_t i = 0; i < y.size(); ++i) {
    const RealProduct exact(weight, x.data() + i / rows * stride, i % rows);
    const double bias = epilogue.bias.size() > 0 ? double(epilogue.bias.at(i % rows)) : 0.0;
    const double residual = epilogue.residual.size() > 0 ? double(epilogue.residual.at(i)) : 0.0;
    const double error = std::fabs(double(y.at(i)) - (exact.value + bias + residual));
    const double roundings = std::fabs(exact.value) + std::fabs(bias) + std::fabs(residual);
    // Sums of pieces of up to 512 columns: a few roundings of the size of the whole sum.
    const double allowed = 0x1p-20 * exact.size + x_error * exact.weights +
                           2.0 * unit_of(y.dtype()) * roundings + 1e-30;
    worst = std::fmax(worst, error / allowed);
  }
  expect(worst <= 1.0, "%s: error %.3g times what is allowed (planes %d, K %lld, %s)", what, worst,
         weight.planes(), (long long)weight.lanes().columns, name_of(y.dtype()));
}

void check_f32(const Kernels& kernels, const TernaryWeight& weight, int64_t count, int64_t variant,
               Random& random) {
  const Weight& w = weight.lanes();
  const int64_t stride = whole_steps(w.columns);
  const Dtype dtype = DTYPES[variant % 3];
  const Values x = random_values(random, dtype, count * w.columns);
  const Buffer<float> wide(count * stride);
  kernels.widen(x.data(), dtype, w.columns, wide.data(), stride, 0, count);
  const Epilogue epilogue(random, dtype, count, w.rows, variant);
  const auto prefetch = Prefetch(variant % 2);
  const auto kernel = kernels.linear_f32[kind_index(weight.planes())];
  const Values y(dtype, count * w.rows), again(dtype, count * w.rows);
  kernel({w, wide.data(), stride, epilogue.into(y), prefetch}, {0, weight.blocks(), 0, count});
  check_close(y, weight, wide, stride, epilogue, "linear_f32");
  run_in_pieces(kernel, LinearF32Args{w, wide.data(), stride, epilogue.into(again), prefetch},
                weight.blocks(), count);
  check_close(again, weight, wide, stride, epilogue, "linear_f32 on threads");
}

// Of the digits of a token, in units of its largest value.
double error_of(int digits) { return digits == 4 ? 0x1p-31 : 0x1p-22; }

// Tokens as digits, the products of these by linear_i8, joined.
void check_digits(const Kernels& kernels, const TernaryWeight& weight, int64_t count,
                  int64_t variant, Random& random) {
  if (kernels.split == nullptr) return;
  const Weight& w = weight.lanes();
  const Dtype dtype = DTYPES[variant % 3];
  const int digits = dtype == Dtype::f32 && variant % 2 == 0 ? 4 : 3;
  const int64_t rows = count * digits, stride = whole_steps(w.columns);
  const Values x = random_values(random, dtype, count * w.columns);
  const Buffer<float> wide(count * stride), scale(rows);
  const Buffer<int8_t> given(rows * w.columns), q(rows * stride);
  kernels.widen(x.data(), dtype, w.columns, wide.data(), stride, 0, count);
  on_threads([&](int i) {
    kernels.split({x.data(), dtype, w.columns, digits, given.data(), scale.data()},
                  piece_begin(count, i), piece_begin(count, i + 1));
  });
  for (int64_t i = 0; i < rows * stride; ++i)
    q[i] = i % stride < w.columns ? given[i / stride * w.columns + i % stride] : int8_t(0);
  const Buffer<int32_t> sums(rows * w.groups);
  const Tokens tokens{q.data(), scale.data(), sums.data(), rows, stride};
  kernels.sum_groups(tokens, w.columns, w.group_size, w.groups, 0, rows);
  const Values parts(Dtype::f32, rows * w.rows), y(dtype, count * w.rows);
  const Output out{parts.data(), Dtype::f32, nullptr, Dtype::f32, nullptr};
  kernels.linear_i8[kind_index(weight.planes())]({w, tokens, out, Prefetch(variant % 2)},
                                                 {0, weight.blocks(), 0, rows});
  const Epilogue epilogue(random, dtype, count, w.rows, variant);
  const JoinArgs join{static_cast<const float*>(parts.data()), digits, w.rows, epilogue.into(y)};
  on_threads([&](int i) { kernels.join(join, piece_begin(count, i), piece_begin(count, i + 1)); });
  float largest = 0.0f;
  for (int64_t i = 0; i < count * stride; ++i) largest = std::max(largest, std::fabs(wide[i]));
  check_close(y, weight, wide, stride, epilogue, "digits", error_of(digits) * double(largest));
}

// x[k] = sum over d of q[d][k] * s[d], to error_of(digits) of the largest; exact for integers over
// 128, but in the three digits of fp32.
void check_split(const Kernels& kernels, Dtype dtype, int digits, float size) {
  Random random(5);
  for (const int64_t columns : {1, 63, 64, 200}) {
    const Values x(dtype, columns);
    const Buffer<float> scale(digits);
    const Buffer<int8_t> q(digits * columns);
    for (int64_t k = 0; k < columns; ++k)
      x.set(k, k % 5 == 4 ? float(int(random.below(255)) - 127) * size / 128.0f
                          : size * random.uniform());
    x.set(columns / 2, columns == 63 ? size : -size);
    kernels.split({x.data(), dtype, columns, digits, q.data(), scale.data()}, 0, 1);
    for (int64_t k = 0; k < columns; ++k) {
      double sum = 0.0;
      for (int d = 0; d < digits; ++d) sum += double(q[d * columns + k]) * double(scale[d]);
      const double error = std::fabs(sum - double(x.at(k)));
      const bool exact = size == 1.0f && k % 5 == 4 && (digits == 4 || dtype != Dtype::f32);
      expect(error <= (exact ? 0.0 : double(size) * error_of(digits)),
             "%d digits of %g (of %g, %s): off by %g", digits, double(x.at(k)), double(size),
             name_of(dtype), error);
    }
  }
}

void check_count_of_digits(const Kernels& kernels) {
  constexpr int64_t COLUMNS = 1030;
  const Buffer<float> x(COLUMNS);
  const auto digits = [&](int64_t columns) {
    return kernels.digits(x.data(), Dtype::f32, 0, columns);
  };
  const auto fill = [&](auto value) {
    for (int64_t k = 0; k < COLUMNS; ++k) x[k] = value(k);
  };
  const auto ones = [](int64_t k) { return k % 2 == 1 ? 1.0f : -0.75f; };
  fill(ones);
  expect(digits(COLUMNS) == 3, "values of one size take %d digits", digits(COLUMNS));
  expect(digits(1020) == 4, "few columns take %d digits", digits(1020));
  for (const int64_t at : {int64_t(0), int64_t(7), COLUMNS - 1})
    for (const float most : {2.9f, -300.0f, 900.0f, 1e30f, INFINITY, NAN}) {
      fill(ones);
      x[at] = most;
      const int wanted = most == 2.9f ? 3 : most == -300.0f ? 4 : 0;
      expect(digits(COLUMNS) == wanted, "%d digits of %g among ones at %lld", digits(COLUMNS),
             double(most), (long long)at);
    }
  for (const float size : {0.0f, 1e-40f, 1e-20f, 1e35f}) {
    fill([&](int64_t k) { return size * ones(k); });
    expect(digits(COLUMNS) == 0, "a token of %g is split", double(size));
  }
  for (const float small : {0.1f, 1e-3f}) {
    const int wanted = small == 0.1f ? 4 : 0;
    fill([&](int64_t k) { return k < 64 ? small : 1.0f; });
    expect(digits(COLUMNS) == wanted, "a span of %g takes %d digits", double(small),
           digits(COLUMNS));
    fill([&](int64_t k) { return k % 4 == 0 ? small : 1.0f; });
    expect(digits(COLUMNS) == wanted, "with %g in every fourth column: %d digits", double(small),
           digits(COLUMNS));
  }
  fill([](int64_t k) { return k < 64 || k % 4 == 0 ? 0.0f : 1.0f; });
  expect(digits(COLUMNS) == 3, "zeros are uneven");
}

void check_digits_alone(const Kernels& kernels) {
  if (kernels.split == nullptr) return;
  check_count_of_digits(kernels);
  for (const float size : {1.0f, 1.99f, 0.0117f, 300.0f}) {
    for (const Dtype dtype : DTYPES) check_split(kernels, dtype, 3, size);
    check_split(kernels, Dtype::f32, 4, size);
  }
}

// body(weight, count, variant, random) for every form, number of planes and of tokens.
template <class Body>
void each_product(const Body& body) {
  Random random(2);
  int64_t variant = 0;
  for (const Form& form : FORMS)
    for (const int planes : KINDS) {
      if (!fits(form, planes)) continue;
      const TernaryWeight weight(form, planes, random);
      for (const int64_t count : TOKENS) body(weight, count, variant++, random);
    }
}

// All rows, or `picked` ones.
void check_dequantize(const Kernels& kernels, const TernaryWeight& weight, bool at_rest,
                      Dtype dtype, const Buffer<int64_t>& picked) {
  const Weight& w = at_rest ? weight.at_rest() : weight.lanes();
  const int64_t rows = picked.size() > 0 ? picked.size() : w.rows;
  const Values values(dtype, rows * w.columns);
  std::vector<float> wanted;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < w.columns; ++k) {
      const int64_t g = weight.group_of(k), row = picked.size() > 0 ? picked[i] : i;
      const auto integer = float(weight.multiplier(row, g) * weight.code(row, k));
      wanted.push_back(rounded(weight.scale(row, g) * integer, dtype));
    }
  const int planes = at_rest && weight.planes() == DENSE ? 1 : weight.planes();
  const DequantizeArgs args{w, planes, at_rest, values.data(), dtype, picked.data()};
  on_threads(
      [&](int i) { kernels.dequantize(args, piece_begin(rows, i), piece_begin(rows, i + 1)); });
  expect_values(values, wanted, at_rest ? "dequantize at rest" : "dequantize lanes");
}

// Bytes over 242 are no five digits: they count as five zeros.
void check_invalid_bytes(const Kernels& kernels) {
  const Buffer<uint8_t> bytes(2);
  const Buffer<float> scale(1);
  bytes[0] = 242, bytes[1] = 243, scale[0] = 1.0f;
  const Weight weight{bytes.data(), scale.data(), nullptr, ScaleKind::tensor, 1, 10, 10, 1};
  const Values values(Dtype::f32, 10);
  kernels.dequantize({weight, 1, true, values.data(), Dtype::f32, nullptr}, 0, 1);
  expect_values(values, {1, 1, 1, 1, 1, 0, 0, 0, 0, 0}, "an invalid byte");
}

}  // namespace

void test_linear_i8(const Kernels& kernels) {
  each_product([&](const TernaryWeight& weight, int64_t count, int64_t variant, Random& random) {
    check_i8(kernels, weight, count, variant, random);
  });
  for (const int planes : KINDS)
    for (const int64_t group_size : {0, 128}) check_largest_sums(kernels, planes, group_size);
  check_large_outputs(kernels);
}

void test_linear_f32(const Kernels& kernels) {
  check_digits_alone(kernels);
  each_product([&](const TernaryWeight& weight, int64_t count, int64_t variant, Random& random) {
    check_f32(kernels, weight, count, variant, random);
    check_digits(kernels, weight, count, variant, random);
  });
}

void test_dequantize(const Kernels& kernels) {
  Random random(3);
  for (const Form& form : FORMS)
    for (const int planes : KINDS) {
      if (!fits(form, planes)) continue;
      const TernaryWeight weight(form, planes, random);
      const Buffer<int64_t> all, picked(form.rows / 2);
      for (int64_t r = 0; r < picked.size(); ++r) picked[r] = random.below(form.rows);
      for (const Dtype dtype : DTYPES)
        for (const bool at_rest : {false, true}) {
          check_dequantize(kernels, weight, at_rest, dtype, all);
          check_dequantize(kernels, weight, at_rest, dtype, picked);
        }
    }
  check_invalid_bytes(kernels);
}

}  // namespace ternc::tests
