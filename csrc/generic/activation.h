// gate, up -> h = act(gate) * up -> rotation -> q, sx, a token at a time, in fp32; or h alone.
//
// exp and erf are polynomials of least maximal error (fitted in float64 on Chebyshev nodes):
//   exp(x) = 2^n exp(r), |r| <= ln 2 / 2      1 to 2 ulp
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

// exp(x): infinite over 88.8; under -86 it stays at exp(-86) = 4e-38. NaN stays NaN.
TERNC_INLINE f32 exponential(f32 x) {
  // (exp(r) - 1 - r) / r^2, relative error of exp(r) under 4e-9.
  constexpr float SERIES[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.123a2p-7f,
                              0x1.6a23d4p-10f};
  constexpr float LOG2_E = 0x1.715476p0f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
  const f32 magic = splat_f32(0x1.8p23f), one = splat_f32(1.0f);
  x = min_f32(splat_f32(89.0f), max_f32(splat_f32(-86.0f), x));
  const f32 n = sub_f32(fma_f32(x, splat_f32(LOG2_E), magic), magic);
  const f32 r = fma_f32(n, splat_f32(-LN2_LOW), fma_f32(n, splat_f32(-LN2_HIGH), x));
  const f32 tail = fma_f32(mul_f32(r, r), polynomial(SERIES, r), r);
  return times_power_of_two(add_f32(one, tail), n);
}

TERNC_INLINE f32 error_function(f32 x) {
  // g(a) / a with g = -ln(1 - erf), weighted by exp(-g); erf(4.2) rounds to 1.
  constexpr float SERIES[] = {1.128380298614502f,      0.636597752571106f,
                              0.10291961580514908f,    -0.019583959132432938f,
                              0.0005369319696910679f,  0.0010324025060981512f,
                              -0.0003088024095632136f, 3.14401913783513e-05f};
  const f32 a = min_f32(splat_f32(4.2f), abs_f32(x));
  const f32 g = mul_f32(a, polynomial(SERIES, a));
  const f32 rest = exponential(sub_f32(splat_f32(0.0f), g));
  return copy_sign(sub_f32(splat_f32(1.0f), rest), x);
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1), x >= 0: 1e-7 absolute.
TERNC_INLINE f32 hyperbolic_tangent(f32 x) {
  const f32 one = splat_f32(1.0f), a = min_f32(splat_f32(20.0f), abs_f32(x));
  const f32 half_rest = reciprocal(add_f32(exponential(add_f32(a, a)), one));
  return copy_sign(sub_f32(one, add_f32(half_rest, half_rest)), x);
}

// x / (1 + exp(-x)). Under -87, where it lies above -2e-36, it counts as 0.
TERNC_INLINE f32 silu(f32 x) {
  const f32 zero = splat_f32(0.0f), limit = splat_f32(-87.0f);
  const f32 rest = exponential(sub_f32(zero, max_f32(limit, x)));
  const f32 factor = reciprocal(add_f32(splat_f32(1.0f), rest));
  return mul_f32(x, select_less(x, limit, zero, factor));
}

template <Activation A>
TERNC_INLINE f32 activation(f32 x) {
  constexpr float SQRT_HALF = 0.7071067811865476f, SQRT_2_OVER_PI = 0.7978845608028654f;
  const f32 zero = splat_f32(0.0f), one = splat_f32(1.0f), half = splat_f32(0.5f);
  if constexpr (A == Activation::silu) return silu(x);
  if constexpr (A == Activation::gelu) {
    const f32 erf = error_function(mul_f32(x, splat_f32(SQRT_HALF)));
    return mul_f32(mul_f32(x, half), add_f32(one, erf));
  }
  if constexpr (A == Activation::gelu_tanh) {
    const f32 cube = mul_f32(mul_f32(x, x), x);
    const f32 inner = mul_f32(splat_f32(SQRT_2_OVER_PI), fma_f32(cube, splat_f32(0.044715f), x));
    return mul_f32(mul_f32(half, x), add_f32(one, hyperbolic_tangent(inner)));
  }
  const f32 positive = max_f32(zero, x);
  if constexpr (A == Activation::relu) return positive;
  if constexpr (A == Activation::relu2) return mul_f32(positive, positive);
  return x;
}

// out = act(x), or act(x) * up. Without UP, up is not read.
template <Activation A, bool UP>
TERNC_NOINLINE void activation_row(const float* x, const float* up, int64_t columns,
                                   const NextRow& next_gate, const NextRow& next_up, float* out) {
  for (int64_t k = 0; k < columns; k += LANES) {
    next_gate.prefetch(k);
    if constexpr (UP) next_up.prefetch(k);
    f32 h = activation<A>(load_f32(x + k));
    if constexpr (UP) h = mul_f32(h, load_f32(up + k));
    store_f32(out + k, h);
  }
}

template <bool UP>
inline void apply_activation(Activation function, const float* x, const float* up, int64_t columns,
                             const NextRow& next_gate, const NextRow& next_up, float* out) {
  constexpr decltype(&activation_row<Activation::none, UP>) ROWS[] = {
      activation_row<Activation::none, UP>, activation_row<Activation::silu, UP>,
      activation_row<Activation::gelu, UP>, activation_row<Activation::gelu_tanh, UP>,
      activation_row<Activation::relu, UP>, activation_row<Activation::relu2, UP>,
  };
  ROWS[int(function)](x, up, columns, next_gate, next_up, out);
}

// gate, up -> h [padded(K)]. The activation is rounded to the dtype of gate, and so is the product,
// as separate operations would. wide: padded(columns) floats.
inline void gated_row(const ActivateArgs& args, int64_t token, float* wide, float* h) {
  const int64_t columns = args.columns;
  const Dtype dtype = args.gate.dtype;
  const bool gated = args.up.values != nullptr;
  const NextRow next_gate(args.gate, token), next_up(args.up, token);
  const float* gate = float_row(args.gate, token, columns, h);
  if (gated && dtype == Dtype::f32) {
    apply_activation<true>(args.function, gate, float_row(args.up, token, columns, wide), columns,
                           next_gate, next_up, h);
    return;
  }
  apply_activation<false>(args.function, gate, nullptr, columns, next_gate, next_gate, h);
  round_values(h, columns, dtype);
  if (!gated) return;
  apply_activation<true>(Activation::none, h, float_row(args.up, token, columns, wide), columns,
                         next_up, next_up, h);
  round_values(h, columns, dtype);
}

inline void activate(const ActivateArgs& args, int64_t token_begin, int64_t token_end,
                     float* scratch) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    gated_row(args, token, scratch + padded(args.columns), scratch);
    if (args.h != nullptr)
      store_values(scratch, args.columns, args.gate.dtype, args.h, token * args.columns);
    else
      quantize_rotated(scratch, args.columns, args.rotation, args.gate.dtype, args.out, token);
  }
}
