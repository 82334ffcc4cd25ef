// The tied fit of a row: W[k] ~ s * m[k / g] * c[k] of least squared error.
//
//   1. each group (or the row): the real step a of least error of a * clip(rint(w / a), +-cmax).
//      One plane: exact, sort |w| and maximise (prefix sum)^2 / length. Two and three: the best of
//      the candidate steps, then Lloyd rounds a = sum(w c) / sum(c c).
//   2. s = max(a) / t for a few t; m the better of floor and ceil of a / s; s by least squares;
//      the t of least error is kept.
//   3. `refine` rounds: a from the codes, m, s; kept where better.
//
// Sums run in 16 fixed partial sums, so that every instruction set fits the same.
#pragma once

#include "values.h"

constexpr int PARTIALS = 16;
constexpr int64_t SUM_PIECE = 2048;  // fp32 partial sums are moved to fp64 after this many values

// 2^exponent as a product of two floats, exact for every exponent a float can have.
struct PowerOfTwo {
  float first, second;

  explicit PowerOfTwo(int exponent) {
    const int half = exponent / 2;
    first = float_of(uint32_t(127 + half) << 23);
    second = float_of(uint32_t(127 + exponent - half) << 23);
  }
};

// e with 2^(e - 1) <= value < 2^e, for the bits of a positive finite value.
inline int exponent_of(uint32_t bits) {
  int exponent;
  std::frexp(float_of(bits), &exponent);
  return exponent;
}

TERNC_INLINE double fold(const float (&partial)[PARTIALS]) {
  double sum = 0.0;
  for (int i = 0; i < PARTIALS; ++i) sum += double(partial[i]);
  return sum;
}

// Code of w for a step given as its inverse, as a float.
TERNC_INLINE float snap(float w, float inverse, float cmax) {
  return round_even_f32(clamp(w * inverse, -cmax, cmax));
}

TERNC_NOINLINE SnapSums snap_piece(const float* w, int64_t count, float inverse, float cmax) {
  float weight_code[PARTIALS] = {}, code_code[PARTIALS] = {};
  int64_t k = 0;
  for (; k + PARTIALS <= count; k += PARTIALS)
    for (int i = 0; i < PARTIALS; ++i) {
      const float c = snap(w[k + i], inverse, cmax);
      weight_code[i] += w[k + i] * c;
      code_code[i] += c * c;
    }
  for (int i = 0; k + i < count; ++i) {
    const float c = snap(w[k + i], inverse, cmax);
    weight_code[i] += w[k + i] * c;
    code_code[i] += c * c;
  }
  return {fold(weight_code), fold(code_code)};
}

inline SnapSums snap_unit(const float* w, int64_t count, int planes, double step) {
  SnapSums sums = {0.0, 0.0};
  const float inverse = float(1.0 / step), cmax = float(code_max(planes));
  for (int64_t k = 0; k < count; k += SUM_PIECE) {
    const SnapSums piece =
        snap_piece(w + k, count - k < SUM_PIECE ? count - k : SUM_PIECE, inverse, cmax);
    sums.weight_code += piece.weight_code;
    sums.code_code += piece.code_code;
  }
  return sums;
}

inline void snap_sums(const float* magnitudes, int64_t count, int planes, const double* step,
                      int steps, SnapSums* sums) {
  for (int i = 0; i < steps; ++i) {
    const SnapSums unit = snap_unit(magnitudes, count, planes, step[i]);
    sums[i].weight_code += unit.weight_code;
    sums[i].code_code += unit.code_code;
  }
}

// ||w - step * c||^2 - ||w||^2
TERNC_INLINE double excess(const SnapSums& sums, double step) {
  return step * (step * sums.code_code - 2.0 * sums.weight_code);
}
TERNC_INLINE double least_squares(const SnapSums& sums, double otherwise) {
  return sums.code_code > 0.0 ? sums.weight_code / sums.code_code : otherwise;
}

inline double one_plane_step(const float* w, int64_t count, float* sorted) {
  for (int64_t k = 0; k < count; ++k) sorted[k] = std::fabs(w[k]);
  std::sort(sorted, sorted + count, std::greater<float>());
  double prefix = 0.0, best = 0.0, step = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    prefix += double(sorted[k]);
    const double kept = prefix * prefix / double(k + 1);
    if (kept > best) best = kept, step = prefix / double(k + 1);
  }
  return step;
}

inline double candidate_step(const float* w, int64_t count, int planes) {
  const double unit = double(float_of(largest(w, Dtype::f32, 0, count))) / code_max(planes);
  double ratio = FIRST_RATIO, best_ratio = 0.0, best = 0.0;
  for (int i = 0; i < CANDIDATES; ++i, ratio *= RATIO) {
    const double error = excess(snap_unit(w, count, planes, unit * ratio), unit * ratio);
    if (error < best) best = error, best_ratio = ratio;
  }
  ratio = FIRST_RATIO;
  for (int i = 0; i < MORE_CANDIDATES && best_ratio == ratio; ++i) {
    ratio /= RATIO;
    const double error = excess(snap_unit(w, count, planes, unit * ratio), unit * ratio);
    if (error < best) best = error, best_ratio = ratio;
  }
  double step = unit * best_ratio;
  for (int i = 0; i < LLOYD_ROUNDS; ++i)
    step = least_squares(snap_unit(w, count, planes, step), step);
  return step;
}

// Real step of least error for w[0, count); 0 where all are 0.
TERNC_NOINLINE double optimal_step(const float* w, int64_t count, int planes, float* sorted) {
  if (largest(w, Dtype::f32, 0, count) == 0) return 0.0;
  return planes == 1 ? one_plane_step(w, count, sorted) : candidate_step(w, count, planes);
}

// A row of groups while it is fitted. `error` leaves out ||w||^2.
struct RowFit {
  double scale, error;
  uint8_t* multiplier;  // [groups]
};

// Multipliers for `scale` from the real steps of the groups, then the scale of least squares.
inline RowFit round_multipliers(const FitArgs& args, const float* w, const float* steps,
                                double scale, uint8_t* multiplier) {
  SnapSums total = {0.0, 0.0};
  for (int64_t g = 0; g < args.groups; ++g) {
    multiplier[g] = 0;
    if (!(steps[g] > 0.0f)) continue;
    const int64_t first = g * args.group_size, left = args.columns - first;
    const int64_t count = left < args.group_size ? left : args.group_size;
    const double quotient = double(steps[g]) / scale, most = multiplier_max(args.planes);
    double best = 0.0;
    SnapSums chosen = {0.0, 0.0};
    for (int up = 0; up < 2; ++up) {
      double m = up ? std::ceil(quotient) : std::floor(quotient);
      m = m < 1.0 ? 1.0 : m > most ? most : m;
      if (up && m == double(multiplier[g])) break;
      const SnapSums sums = snap_unit(w + first, count, args.planes, scale * m);
      const double error = excess(sums, scale * m);
      if (multiplier[g] != 0 && error >= best) break;
      best = error;
      multiplier[g] = uint8_t(m);
      chosen = {m * sums.weight_code, m * m * sums.code_code};
    }
    total.weight_code += chosen.weight_code;
    total.code_code += chosen.code_code;
  }
  const double refitted = least_squares(total, scale);
  return {refitted, excess(total, refitted), multiplier};
}

// scratch: 4 * columns floats, of which w takes the first.
TERNC_NOINLINE double fit_groups(const FitArgs& args, const float* w, uint8_t* multiplier,
                                 float* scratch) {
  constexpr int TOPS[MAX_PLANES][2] = {{127, 127}, {31, 27}, {9, 5}};
  float* steps = scratch + args.columns;
  float* sorted = scratch + 2 * args.columns;
  float largest_step = 0.0f;
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t first = g * args.group_size, left = args.columns - first;
    const int64_t count = left < args.group_size ? left : args.group_size;
    steps[g] = float(optimal_step(w + first, count, args.planes, sorted));
    largest_step = steps[g] > largest_step ? steps[g] : largest_step;
  }
  uint8_t* trial = reinterpret_cast<uint8_t*>(scratch + 3 * args.columns);
  RowFit best = {0.0, 1.0, nullptr};
  const int* tops = TOPS[args.planes - 1];
  for (int top = tops[0]; top >= tops[1]; --top) {
    const RowFit fit = round_multipliers(args, w, steps, double(largest_step) / top, trial);
    if (best.multiplier != nullptr && fit.error >= best.error) continue;
    best = {fit.scale, fit.error, multiplier};
    __builtin_memcpy(multiplier, trial, size_t(args.groups));
  }
  for (int round = 0; round < args.refine; ++round) {
    for (int64_t g = 0; g < args.groups; ++g) {
      const int64_t first = g * args.group_size, left = args.columns - first;
      const int64_t count = left < args.group_size ? left : args.group_size;
      const double step = best.scale * multiplier[g];
      if (step > 0.0)
        steps[g] = float(least_squares(snap_unit(w + first, count, args.planes, step), step));
    }
    const RowFit fit = round_multipliers(args, w, steps, best.scale, trial);
    if (!(fit.error < best.error)) break;
    best = {fit.scale, fit.error, multiplier};
    __builtin_memcpy(multiplier, trial, size_t(args.groups));
  }
  return best.scale;
}

// w[row] / 2^exponent as fp32, with the exponent that brings the largest into [0.5, 1).
inline int load_row(const FitArgs& args, int64_t row, float* w) {
  const uint32_t top = largest(args.w, args.dtype, row * args.columns, args.columns);
  const int exponent = top == 0 ? 0 : exponent_of(top);
  const PowerOfTwo power(-exponent);
  widen_values(args.w, args.dtype, row * args.columns, args.columns, w);
  for (int64_t k = 0; k < args.columns; ++k) w[k] = w[k] * power.first * power.second;
  return exponent;
}

inline void magnitudes(const FitArgs& args, int exponent, int64_t begin, int64_t count,
                       float* out) {
  const PowerOfTwo power(-exponent);
  widen_values(args.w, args.dtype, begin, count, out);
  for (int64_t k = 0; k < count; ++k) out[k] = std::fabs(out[k] * power.first * power.second);
}

inline void fit_rows(const FitArgs& args, int64_t row_begin, int64_t row_end, float* scratch,
                     double* scale) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint8_t* multiplier =
        args.multiplier == nullptr ? nullptr : args.multiplier + row * args.groups;
    scale[row] = 0.0;
    if (largest(args.w, args.dtype, row * args.columns, args.columns) == 0) {
      if (multiplier != nullptr) __builtin_memset(multiplier, 0, size_t(args.groups));
      continue;
    }
    const int exponent = load_row(args, row, scratch);
    double step;
    if (multiplier != nullptr) {
      step = fit_groups(args, scratch, multiplier, scratch);
    } else {
      step = optimal_step(scratch, args.columns, args.planes, scratch + args.columns);
      for (int round = 0; round < args.refine; ++round)
        step = least_squares(snap_unit(scratch, args.columns, args.planes, step), step);
    }
    scale[row] = std::ldexp(step, exponent);
  }
}

inline void snap_rows(const FitArgs& args, int64_t row_begin, int64_t row_end, float* scratch,
                      const float* scale, int64_t scale_stride) {
  const float cmax = float(code_max(args.planes));
  for (int64_t row = row_begin; row < row_end; ++row) {
    int8_t* codes = args.codes + row * args.columns;
    __builtin_memset(codes, 0, size_t(args.columns));
    const int exponent = load_row(args, row, scratch);
    for (int64_t g = 0; g < args.groups; ++g) {
      const int m = args.multiplier == nullptr ? 1 : args.multiplier[row * args.groups + g];
      const double step = std::ldexp(double(scale[row * scale_stride]) * m, -exponent);
      const float inverse = float(1.0 / step);
      if (!(step > 0.0) || !(inverse <= 0x1p100f)) continue;  // w * inverse stays finite
      const int64_t first = g * args.group_size, left = args.columns - first;
      const int64_t count = left < args.group_size ? left : args.group_size;
      for (int64_t k = first; k < first + count; ++k)
        codes[k] = int8_t(round_even(clamp(scratch[k] * inverse, -cmax, cmax)));
    }
  }
}
