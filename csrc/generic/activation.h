// gate, up -> h = act(gate) * up -> rotation -> q, sx, a token at a time, in fp32.
//
// exp and erf are polynomials of least maximal error (fitted in float64 on Chebyshev nodes):
//   exp(x) = 2^n exp(r), |r| <= ln 2 / 2      1 ulp
//   erf(a) = 1 - exp(-g(a)), a >= 0           1e-7 absolute, like 1 - erf of fp32 itself
#pragma once

#include "norm.h"

// Horner's rule: sum of c[i] * x^i.
template <int N>
TERNC_INLINE f32 polynomial(const float (&c)[N], f32 x) {
  f32 sum = splat_f32(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = fma_f32(sum, x, splat_f32(c[i]));
  return sum;
}

TERNC_INLINE f32 least(f32 a, float b) { return select_less(splat_f32(b), a, splat_f32(b), a); }

// exp(x): infinite over 88.8; under -86 it stays at exp(-86) = 4e-38. NaN stays NaN.
TERNC_INLINE f32 exponential(f32 x) {
  // (exp(r) - 1 - r) / r^2, relative error of exp(r) under 4e-9.
  constexpr float SERIES[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.123a2p-7f,
                              0x1.6a23d4p-10f};
  constexpr float LOG2_E = 0x1.715476p0f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
  const f32 low = splat_f32(-86.0f), magic = splat_f32(0x1.8p23f);
  x = least(select_less(x, low, low, x), 89.0f);
  const f32 n = sub_f32(add_f32(mul_f32(x, splat_f32(LOG2_E)), magic), magic);
  const f32 r = fma_f32(n, splat_f32(-LN2_LOW), fma_f32(n, splat_f32(-LN2_HIGH), x));
  const f32 tail = mul_f32(mul_f32(r, r), polynomial(SERIES, r));
  const f32 power = add_f32(splat_f32(1.0f), add_f32(r, tail));
  // 2^n in two factors: n = 128 is too much for one.
  const f32 half = power_of_two(sub_f32(n, splat_f32(1.0f)));
  return mul_f32(mul_f32(power, half), splat_f32(2.0f));
}

TERNC_INLINE f32 absolute(f32 x) {
  return select_less(x, splat_f32(0.0f), sub_f32(splat_f32(0.0f), x), x);
}

// size >= 0 with the sign of x.
TERNC_INLINE f32 signed_like(f32 size, f32 x) {
  return select_less(x, splat_f32(0.0f), sub_f32(splat_f32(0.0f), size), size);
}

TERNC_INLINE f32 error_function(f32 x) {
  // g(a) / a with g = -ln(1 - erf), weighted by exp(-g); erf(4.2) rounds to 1.
  constexpr float SERIES[] = {1.128380298614502f,      0.636597752571106f,
                              0.10291961580514908f,    -0.019583959132432938f,
                              0.0005369319696910679f,  0.0010324025060981512f,
                              -0.0003088024095632136f, 3.14401913783513e-05f};
  const f32 a = least(absolute(x), 4.2f);
  const f32 g = mul_f32(a, polynomial(SERIES, a));
  const f32 rest = exponential(sub_f32(splat_f32(0.0f), g));
  return signed_like(sub_f32(splat_f32(1.0f), rest), x);
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1), x >= 0: 1e-7 absolute.
TERNC_INLINE f32 hyperbolic_tangent(f32 x) {
  const f32 one = splat_f32(1.0f), a = absolute(x);
  const f32 rest = div_f32(splat_f32(2.0f), add_f32(exponential(add_f32(a, a)), one));
  return signed_like(sub_f32(one, rest), x);
}

template <Activation A>
TERNC_INLINE f32 activation(f32 x) {
  constexpr float SQRT_HALF = 0.7071067811865476f, SQRT_2_OVER_PI = 0.7978845608028654f;
  const f32 zero = splat_f32(0.0f), one = splat_f32(1.0f), half = splat_f32(0.5f);
  if constexpr (A == Activation::silu)
    return div_f32(x, add_f32(one, exponential(sub_f32(zero, x))));
  if constexpr (A == Activation::gelu) {
    const f32 erf = error_function(mul_f32(x, splat_f32(SQRT_HALF)));
    return mul_f32(mul_f32(x, half), add_f32(one, erf));
  }
  if constexpr (A == Activation::gelu_tanh) {
    const f32 cube = mul_f32(mul_f32(x, x), x);
    const f32 inner = mul_f32(splat_f32(SQRT_2_OVER_PI), fma_f32(cube, splat_f32(0.044715f), x));
    return mul_f32(mul_f32(half, x), add_f32(one, hyperbolic_tangent(inner)));
  }
  const f32 positive = select_less(x, zero, zero, x);
  if constexpr (A == Activation::relu) return positive;
  if constexpr (A == Activation::relu2) return mul_f32(positive, positive);
  return x;
}

template <Activation A>
TERNC_NOINLINE void activation_row(const float* x, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; k += LANES) store_f32(out + k, activation<A>(load_f32(x + k)));
}

TERNC_NOINLINE void multiply_row(const float* a, const float* b, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; k += LANES)
    store_f32(out + k, mul_f32(load_f32(a + k), load_f32(b + k)));
}

inline void apply_activation(Activation function, const float* x, int64_t columns, float* out) {
  constexpr decltype(&activation_row<Activation::none>) ROWS[] = {
      activation_row<Activation::none>, activation_row<Activation::silu>,
      activation_row<Activation::gelu>, activation_row<Activation::gelu_tanh>,
      activation_row<Activation::relu>, activation_row<Activation::relu2>,
  };
  ROWS[int(function)](x, columns, out);
}

// scratch: 2 * padded(columns) floats. The activation is rounded to the dtype of gate, and so is
// the product, as separate operations would.
inline void activate(const ActivateArgs& args, int64_t token_begin, int64_t token_end,
                     float* scratch) {
  const int64_t columns = args.columns;
  const Dtype dtype = args.gate.dtype;
  float *h = scratch, *wide = scratch + padded(columns);
  for (int64_t token = token_begin; token < token_end; ++token) {
    apply_activation(args.function, float_row(args.gate, token, columns, wide), columns, h);
    round_values(h, columns, dtype);
    if (args.up.values != nullptr) {
      multiply_row(h, float_row(args.up, token, columns, wide), columns, h);
      round_values(h, columns, dtype);
    }
    quantize_rotated(h, columns, args.rotation, dtype, args.out, token);
  }
}
