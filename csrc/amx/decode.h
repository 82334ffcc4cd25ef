// Packed weights -> B tiles of signed bytes, FIELDS fields of 16 rows at a time.
//
// Row r of a B tile is k-step r of its 64 columns: 16 lanes of 4 columns, which is a vector of the
// lanes layouts as it lies. Without multipliers a byte is code * 2^carry; with them it is m * code,
// which fits a signed byte, so that the sums need no groups:
//
//   1 plane     a table of m * {-1, 0, 1} by lane and code; its index is the code where it lies
//               beside the lane number: one vpternlogd and one vpermb a vector
//   2, 3 planes (code + bias) * m < 256: two columns in one 16-bit multiplication, then - bias * m

// index byte -> byte of the table [lane][code], for the three places where a code can lie.
constexpr int TABLE_BITS[] = {0, 2, 4};  // lowest bit of the code in the index

struct TableOrder {
  alignas(64) uint8_t lane[3][64];  // the lane number's bits of an index, per byte of a vector
  alignas(64) uint8_t from[3][64];  // index -> 4 * lane + code
};

constexpr TableOrder table_order() {
  TableOrder order = {};
  for (int place = 0; place < 3; ++place) {
    const int bit = TABLE_BITS[place], low_mask = (1 << bit) - 1;
    for (int i = 0; i < 64; ++i) {
      const int lane = i / 4;
      order.lane[place][i] = uint8_t((lane & low_mask) | (lane & ~low_mask) << 2);
      order.from[place][i] = uint8_t(((i & low_mask) | (i >> 2 & ~low_mask)) << 2 | (i >> bit & 3));
    }
  }
  return order;
}
constexpr TableOrder TABLE_ORDER = table_order();

// Multipliers of one group for 16 rows as decoding wants them. One plane: `factor` is the table.
struct FieldMultiplier {
  bytes factor, offset;
};

template <int PLANES, int F>
TERNC_INLINE FieldMultiplier field_multiplier(const uint8_t* multiplier) {
  const i32 m = load_u8_i32(multiplier + F * FIELD_ROWS);
  if constexpr (PLANES == 1) {
    const bytes minus = and_bytes(sub_bytes(splat_i32(0), m), splat_i32(0xff));
    const bytes table = or_bytes(shift_i32_left<16>(m), minus);  // [-m, 0, m, 0] in every lane
    constexpr int PLACE = F < 3 ? F : 2;
    return {_mm512_permutexvar_epi8(load_bytes(TABLE_ORDER.from[PLACE]), table), bytes{}};
  } else {
    return {or_bytes(m, shift_i32_left<16>(m)), mul_i32(m, splat_i32(bias(PLANES) * 0x01010101))};
  }
}

template <int PLANES, int F>
TERNC_INLINE bytes decode_multiplied(const uint8_t* step, const FieldMultiplier& multiplier) {
  if constexpr (PLANES == 1) {
    constexpr int PLACE = F < 3 ? F : 2;
    bytes packed = load_bytes(step);
    if constexpr (F == 3) packed = shift_bytes_right<2>(packed);
    const bytes index = _mm512_ternarylogic_epi32(
        packed, splat_byte(uint8_t(3 << TABLE_BITS[PLACE])), load_bytes(TABLE_ORDER.lane[PLACE]),
        0xea);  // (packed & mask) | lane
    return _mm512_permutexvar_epi8(index, multiplier.factor);
  } else {
    const bytes code = shift_bytes_right<carry(PLANES, F)>(decode<PLANES, F>(step, 0));
    return sub_bytes(_mm512_mullo_epi16(code, multiplier.factor), multiplier.offset);
  }
}

// One pass over the columns of FIELDS fields of a block, a tile of 64 columns at a time.
template <int PLANES, int F0, int FIELDS, bool GROUPS>
class TileDecoder {
 public:
  // fetch: the block comes from memory.
  TERNC_INLINE TileDecoder(const Weight& weight, int64_t block, int64_t steps, bool fetch,
                           Prefetch to)
      : step_(weight.bytes + block * steps * step_bytes(PLANES)),
        left_(steps),
        fetch_(fetch),
        to_(to),
        group_steps_(weight.group_size / STEP_COLUMNS),
        multiplier_(GROUPS ? weight.multiplier + block * weight.groups * block_rows(PLANES)
                           : nullptr) {}

  // Writes FIELDS tiles. Rows past the last step keep what they held: the tokens are 0 there.
  TERNC_INLINE void next(int8_t* tiles) {
    const int64_t count = left_ < TILE_STEPS ? left_ : TILE_STEPS;
    left_ -= count;
    if (fetch_)
      for (int64_t s = 0; s < count; ++s)
        prefetch_step<PLANES>(step_ + s * step_bytes(PLANES), to_);
    if (GROUPS || count < TILE_STEPS) return next_rows(tiles, count);
#pragma GCC unroll 16
    for (int s = 0; s < TILE_STEPS; ++s, step_ += step_bytes(PLANES))
      store_fields<0>(tiles + s * TILE_BYTES);
  }

 private:
  TERNC_INLINE void next_rows(int8_t* tiles, int64_t count) {
    for (int64_t s = 0; s < count;) {
      int64_t run = count - s;
      if constexpr (GROUPS) {
        if (group_left_ == 0) next_group<0>();
        run = run < group_left_ ? run : group_left_;
        group_left_ -= run;
      }
      for (const int64_t end = s + run; s < end; ++s, step_ += step_bytes(PLANES))
        store_fields<0>(tiles + s * TILE_BYTES);
    }
  }

  template <int F>
  TERNC_INLINE void next_group() {
    if constexpr (F < FIELDS) {
      multipliers_[F] = field_multiplier<PLANES, F0 + F>(multiplier_);
      next_group<F + 1>();
    } else {
      multiplier_ += block_rows(PLANES);
      group_left_ = group_steps_;
    }
  }

  template <int F>
  TERNC_INLINE void store_fields(int8_t* row) {
    if constexpr (F < FIELDS) {
      bytes field;
      if constexpr (GROUPS)
        field = decode_multiplied<PLANES, F0 + F>(step_, multipliers_[F]);
      else
        field = decode_signed<PLANES, F0 + F>(step_, 0);
      _mm512_store_si512(row + F * TILE_SIZE, field);
      store_fields<F + 1>(row);
    }
  }

  const uint8_t* step_;
  int64_t left_;  // steps
  bool fetch_;
  Prefetch to_;
  int64_t group_steps_, group_left_ = 0;
  const uint8_t* multiplier_;
  FieldMultiplier multipliers_[FIELDS];
};
