// x -> (x * signs) blockdiag(H_block) / sqrt(block): block Hadamard transform of a token.
//
// log2(block) stages of butterflies (a, b) -> (a + b, a - b), distance 1 first. The stages run in
// passes over as many columns as fit L1, each on RADIX vectors in registers: the first pass has the
// stages within a vector and across neighbouring vectors, every later pass the next log2(RADIX).
// The order of the stages is the reference's, so that every instruction set gives its bits.
#pragma once

#include "values.h"

constexpr int RADIX = ACCUMULATORS;  // vectors that one pass keeps in registers

// Stages at distances H, 2 H, ... below WIDTH, within each of R vectors.
template <int WIDTH, int R, int H = 1>
TERNC_INLINE void lane_stages(f32 (&v)[R]) {
  if constexpr (H < WIDTH) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) v[i] = butterfly_lanes<H>(v[i]);
    lane_stages<WIDTH, R, 2 * H>(v);
  }
}

// Stages at distances H, 2 H, ... below R, in vectors. One butterfly of four is left to the units
// that multiply where those stand beside the adders: with the same roundings.
template <int R, int H = 1>
TERNC_INLINE void vector_stages(f32 (&v)[R]) {
  if constexpr (H < R) {
#pragma GCC unroll 16
    for (int i = 0; i < R / 2; ++i) {
      const int first = i / H * 2 * H + i % H;
      const f32 a = v[first], b = v[first + H];
      if (FUSES_BUTTERFLIES && i % 4 == 0) {
        v[first] = fma_f32(a, splat_f32(1.0f), b);
        v[first + H] = fma_f32(b, splat_f32(-1.0f), a);
      } else {
        v[first] = add_f32(a, b);
        v[first + H] = sub_f32(a, b);
      }
    }
    vector_stages<R, 2 * H>(v);
  }
}

// Columns of a row on their way through the passes.
struct HadamardRow {
  const int8_t* signs;
  int64_t begin, end;
  float factor;  // what the last pass multiplies by
  bool last;     // this pass is the last one: it applies the factor, and finds the largest
  bool wanted;   // the largest
  float* out;
};

// The values that the first pass starts from, as they lie or computed on the way: of a call with
// column k and the vector's number in its pass, which is known to the compiler.
struct PlainValues {
  static constexpr bool SCALED = true;  // by the row's factor, else that is 1
  const float* in;                      // may be the row's `out`
  TERNC_INLINE f32 operator()(int64_t k, int) const { return load_f32(in + k); }
  TERNC_INLINE void finish() const {}
};

// The largest of R vectors and of `largest`, by pairs: a chain of maxima would wait for each. The
// stages before have mixed the vectors: where a lane of one is NaN or infinite, so is that of all.
template <int R>
TERNC_INLINE i32 larger(const f32 (&v)[R], i32 largest) {
  f32 top[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) top[i] = TAKES_MAGNITUDES ? v[i] : abs_f32(v[i]);
#pragma GCC unroll 4
  for (int half = R / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) top[i] = larger_magnitude(top[i], top[i + half]);
  return max_i32(largest, magnitude_bits(top[0]));
}

// Results of one pass at out, out + distance, ...; those of the last are scaled.
template <int R, bool SCALED>
TERNC_INLINE void store_pass(const HadamardRow& row, f32 (&v)[R], float* out, int64_t distance,
                             i32& largest) {
  if (SCALED && row.last && row.factor != 1.0f) {
    const f32 factor = splat_f32(row.factor);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) v[i] = mul_f32(v[i], factor);
  }
  if (row.last && row.wanted) largest = larger(v, largest);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) store_f32(out + i * distance, v[i]);
}

// Sub-blocks of WIDTH * R columns (WIDTH < LANES: of WIDTH, several in a vector). Reads and writes
// whole vectors: past a row of odd length, up to padded(columns).
template <int WIDTH, int R, class Values>
TERNC_NOINLINE uint32_t first_pass(const HadamardRow row, Values values) {
  i32 largest = splat_i32(0);
  for (int64_t k = row.begin; k < row.end; k += R * LANES) {
    f32 v[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) v[i] = values(k + i * LANES, i);
    if (row.signs != nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) v[i] = with_sign(v[i], row.signs + k + i * LANES);
    }
    lane_stages<WIDTH>(v);
    vector_stages<R>(v);
    store_pass<R, Values::SCALED>(row, v, row.out + k, LANES, largest);
  }
  values.finish();
  return uint32_t(max_lanes(largest));
}

// Stages at distances DISTANCE, ... below R * DISTANCE, in place.
template <int R, int64_t DISTANCE>
TERNC_NOINLINE uint32_t later_pass(const HadamardRow row) {
  i32 largest = splat_i32(0);
  for (int64_t block = row.begin; block < row.end; block += R * DISTANCE)
    for (int64_t k = block; k < block + DISTANCE; k += LANES) {
      float* out = row.out + k;
      f32 v[R];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) v[i] = load_f32(out + i * DISTANCE);
      vector_stages<R>(v);
      store_pass<R, true>(row, v, out, DISTANCE, largest);
    }
  return uint32_t(max_lanes(largest));
}

// Calls first_pass<width, 1>, the width below a whole vector.
template <int WIDTH, class Values>
TERNC_INLINE uint32_t narrow_pass(const HadamardRow& row, int64_t width, const Values& values) {
  if constexpr (WIDTH < LANES) {
    if (width > WIDTH) return narrow_pass<2 * WIDTH>(row, width, values);
  }
  return first_pass<WIDTH, 1>(row, values);
}

// Calls the pass of `radix` vectors.
template <int R, class Values>
TERNC_INLINE uint32_t wide_pass(const HadamardRow& row, int64_t radix, const Values& values) {
  if constexpr (R < RADIX) {
    if (radix > R) return wide_pass<2 * R>(row, radix, values);
  }
  return first_pass<LANES, R>(row, values);
}
template <int R, int64_t DISTANCE>
TERNC_INLINE uint32_t distant_pass(const HadamardRow& row, int64_t radix) {
  if constexpr (R < RADIX) {
    if (radix > R) return distant_pass<2 * R, DISTANCE>(row, radix);
  }
  return later_pass<R, DISTANCE>(row);
}

// All stages from DISTANCE on, log2(RADIX) in a pass.
template <int64_t DISTANCE>
inline uint32_t later_passes(HadamardRow& row, int64_t block) {
  if constexpr (DISTANCE < MAX_HADAMARD) {
    const int64_t left = block / DISTANCE, radix = left < RADIX ? left : RADIX;
    row.last = left == radix;
    const uint32_t largest = distant_pass<2, DISTANCE>(row, radix);
    return row.last ? largest : later_passes<DISTANCE * RADIX>(row, block);
  }
  return 0;
}

inline float rotation_factor(const Rotation& rotation) {
  return float(1.0 / __builtin_sqrt(double(rotation.block)));
}

// values [padded(columns)] -> out [padded(columns)], rotated and multiplied by `factor` in place of
// that of the rotation; what is past `columns` has no meaning. Returns the largest |value| of out,
// as bits that order like integers, where it is `wanted`.
template <class Values>
inline uint32_t rotate_row(const Values& values, const Rotation& rotation, float factor,
                           int64_t columns, float* out, bool wanted = true) {
  const int64_t block = rotation.block, near = LANES * RADIX;
  uint32_t largest = 0;
  // As many columns as go through all passes in L1: whole blocks.
  for (int64_t begin = 0; begin < columns; begin += MAX_HADAMARD) {
    const int64_t left = columns - begin;
    HadamardRow row = {rotation.signs,
                       begin,
                       left < MAX_HADAMARD ? columns : begin + MAX_HADAMARD,
                       factor,
                       block <= near,
                       wanted,
                       out};
    uint32_t top = block < LANES ? narrow_pass<1>(row, block, values)
                                 : wide_pass<1>(row, block < near ? block / LANES : RADIX, values);
    if (!row.last) top = later_passes<LANES * RADIX>(row, block);
    largest = top > largest ? top : largest;
  }
  return largest;
}

// A token as fp32: where it lies if whole vectors can be read there, else in scratch
// [padded(columns)], with 0 behind it.
inline const float* float_row(const Rows& rows, int64_t token, int64_t columns, float* scratch) {
  const int64_t begin = token * rows.stride;
  if (rows.dtype == Dtype::f32 && columns % ROW_ALIGN == 0)
    return static_cast<const float*>(rows.values) + begin;
  widen_values(rows.values, rows.dtype, begin, columns, scratch);
  for (int64_t k = columns; k < padded(columns); ++k) scratch[k] = 0.0f;
  return scratch;
}

// The token after one: brought into L2 while that one is worked on, a little with every vector.
struct NextRow {
  uintptr_t address;
  int itemsize;

  NextRow(const Rows& rows, int64_t token)
      : address(reinterpret_cast<uintptr_t>(rows.values)),
        itemsize(rows.dtype == Dtype::f32 ? 4 : 2) {
    address += uintptr_t((token + 1) * rows.stride * itemsize);
  }
  TERNC_INLINE void prefetch(int64_t column) const {
    // An address past the end of the tensor is harmless to a prefetch.
    __builtin_prefetch(reinterpret_cast<const void*>(address + uintptr_t(column * itemsize)), 0, 2);
  }
};

inline void hadamard(const HadamardArgs& args, int64_t token_begin, int64_t token_end,
                     float* scratch) {
  const bool direct = args.x.dtype == Dtype::f32 && args.columns % ROW_ALIGN == 0;
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t begin = token * args.columns;
    const float* x = float_row(args.x, token, args.columns, scratch);
    float* out = direct ? static_cast<float*>(args.y) + begin : scratch;
    rotate_row(PlainValues{x}, args.rotation, rotation_factor(args.rotation), args.columns, out,
               false);
    if (!direct) store_values(out, args.columns, args.x.dtype, args.y, begin);
  }
}
