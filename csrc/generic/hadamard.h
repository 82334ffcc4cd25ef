// x -> (x * signs) blockdiag(H_block) / sqrt(block): block Hadamard transform of a token.
//
// log2(block) stages of butterflies (a, b) -> (a + b, a - b), distance 1 first. The stages run in
// passes over an L1-sized row, each on RADIX vectors in registers: the first pass has the stages
// within a vector and across neighbouring vectors, every later pass the next log2(RADIX) stages.
// The order of the stages is the reference's, so that every instruction set gives its bits.
#pragma once

#include "values.h"

constexpr int RADIX = ACCUMULATORS;  // vectors that one pass keeps in registers

// Stages at distances H, 2 H, ... below WIDTH, within a vector.
template <int WIDTH, int H = 1>
TERNC_INLINE f32 lane_stages(f32 a) {
  if constexpr (H < WIDTH)
    return lane_stages<WIDTH, 2 * H>(butterfly_lanes<H>(a));
  else
    return a;
}

// Stages at distances H, 2 H, ... below R, in vectors.
template <int R, int H = 1>
TERNC_INLINE void vector_stages(f32 (&v)[R]) {
  if constexpr (H < R) {
#pragma GCC unroll 16
    for (int i = 0; i < R / 2; ++i) {
      const int first = i / H * 2 * H + i % H;
      const f32 a = v[first], b = v[first + H];
      v[first] = add_f32(a, b);
      v[first + H] = sub_f32(a, b);
    }
    vector_stages<R, 2 * H>(v);
  }
}

// A row of values on its way through the passes.
struct HadamardRow {
  const int8_t* signs;
  int64_t columns;
  float factor;  // 1 / sqrt(block)
  bool last;     // this pass is the last one: it applies the factor, and finds the largest
  bool wanted;   // the largest
  float* out;
  uint32_t largest;  // |value| as the bits of a float
};

// The values that the first pass starts from: as they lie, or computed on the way.
struct PlainValues {
  const float* in;  // may be the row's `out`
  TERNC_INLINE f32 operator()(int64_t k) const { return load_f32(in + k); }
};

// Results of one pass at k, k + distance, ...; those of the last are scaled.
template <int R>
TERNC_INLINE void store_pass(const HadamardRow& row, const f32 (&v)[R], int64_t k, int64_t distance,
                             i32& largest) {
  float* out = row.out + k;
  if (!row.last) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) store_f32(out + i * distance, v[i]);
    return;
  }
  const f32 factor = splat_f32(row.factor);
  if (!row.wanted) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) store_f32(out + i * distance, mul_f32(v[i], factor));
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const f32 value = mul_f32(v[i], factor);
    store_f32(out + i * distance, value);
    largest = max_i32(largest, magnitude_bits(value));
  }
}

// Sub-blocks of WIDTH * R columns (WIDTH < LANES: of WIDTH, several in a vector). Reads and writes
// whole vectors: past a row of odd length, up to padded(columns).
template <int WIDTH, int R, class Values>
TERNC_NOINLINE void first_pass(HadamardRow& row, const Values& values) {
  i32 largest = splat_i32(0);
  for (int64_t k = 0; k < row.columns; k += R * LANES) {
    f32 v[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) v[i] = values(k + i * LANES);
    if (row.signs != nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) v[i] = with_sign(v[i], row.signs + k + i * LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) v[i] = lane_stages<WIDTH>(v[i]);
    vector_stages<R>(v);
    store_pass<R>(row, v, k, LANES, largest);
  }
  row.largest = uint32_t(max_lanes(largest));
}

// Stages at distances `distance`, ... below R * distance, in place.
template <int R>
TERNC_NOINLINE void later_pass(HadamardRow& row, int64_t distance) {
  i32 largest = splat_i32(0);
  for (int64_t block = 0; block < row.columns; block += R * distance)
    for (int64_t k = block; k < block + distance; k += LANES) {
      f32 v[R];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) v[i] = load_f32(row.out + k + i * distance);
      vector_stages<R>(v);
      store_pass<R>(row, v, k, distance, largest);
    }
  row.largest = uint32_t(max_lanes(largest));
}

// Calls first_pass<width, 1>, the width below a whole vector.
template <int WIDTH, class Values>
TERNC_INLINE void narrow_pass(HadamardRow& row, int64_t width, const Values& values) {
  if constexpr (WIDTH < LANES) {
    if (width > WIDTH) return narrow_pass<2 * WIDTH>(row, width, values);
  }
  first_pass<WIDTH, 1>(row, values);
}

// Calls the pass of `radix` vectors; distance 0: the first.
template <int R, class Values>
TERNC_INLINE void wide_pass(HadamardRow& row, int64_t radix, int64_t distance,
                            const Values& values) {
  if constexpr (R < RADIX) {
    if (radix > R) return wide_pass<2 * R>(row, radix, distance, values);
  }
  if (distance == 0)
    first_pass<LANES, R>(row, values);
  else
    later_pass<R>(row, distance);
}

// values [padded(columns)] -> out [padded(columns)]; what is past `columns` has no meaning. Returns
// the largest |value| of out, as bits that order like integers, where it is `wanted`.
template <class Values>
inline uint32_t rotate_row(const Values& values, const Rotation& rotation, int64_t columns,
                           float* out, bool wanted = true) {
  const int64_t block = rotation.block;
  const float factor = float(1.0 / __builtin_sqrt(double(block)));
  HadamardRow row = {rotation.signs, columns, factor, true, wanted, out, 0};
  if (block <= LANES) {
    narrow_pass<1>(row, block, values);
    return row.largest;
  }
  for (int64_t distance = 0; distance < block;) {
    const int64_t left = block / (distance == 0 ? LANES : distance);
    const int64_t radix = left < RADIX ? left : RADIX;
    const int64_t reached = (distance == 0 ? LANES : distance) * radix;
    row.last = reached == block;
    wide_pass<2>(row, radix, distance, values);
    distance = reached;
  }
  return row.largest;
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
    rotate_row(PlainValues{x}, args.rotation, args.columns, out, false);
    if (!direct) store_values(out, args.columns, args.x.dtype, args.y, begin);
  }
}
