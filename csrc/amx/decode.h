// Packed weights -> B tiles, FIELDS fields of 16 rows at a time.
//
// Row r of a B tile is k-step r of its 64 columns: 16 lanes of 4 columns, which is a vector of the
// lanes layouts as it lies. Without multipliers a byte is unsigned, (code + bias) * 2^carry, the
// field masked where it lies. Bytes of INT8 are tiles already.
//
// With multipliers a byte is m * code, which fits a signed byte, so that the sums need no groups:
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

// The compiler would load the packed bytes for each field anew, on the way that tiles take as well.
TERNC_INLINE bytes load_once(const uint8_t* step) {
  bytes packed = load_bytes(step);
  __asm__("" : "+v"(packed));
  return packed;
}

template <int PLANES, int F>
TERNC_INLINE bytes decode_multiplied(const uint8_t* step, const FieldMultiplier& multiplier) {
  if constexpr (PLANES == 1) {
    constexpr int PLACE = F < 3 ? F : 2;
    bytes packed = load_once(step);
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

constexpr int fields_at_once(int planes, int tiles) {
  return tiles == 1 && fields(planes) >= 4 ? 4 : 2;
}

// Columns of a pass whose tokens and packed bytes are still in L1 when the other fields of the
// block need them: 1 to 4 % less time than all columns at once (64 and 256 tokens of 2048 columns,
// 64 of 4096; 256 of 4096: 1 % more), 256 or 1024 columns 0 to 9 % more. With multipliers decoding,
// not reading, is what products wait for.
constexpr int64_t CHUNK_COLUMNS = 512;
constexpr bool in_chunks(int planes, int tiles, bool groups) {
  return planes == 1 && tiles == 2 && !groups;
}

// The passes in order: 16 * TILES tokens x FIELDS fields of a block x a chunk of columns; all parts
// of a block, then the next chunk, more tokens, the next block. Every other chunk takes the parts
// backwards: the sums of a part stay in the tiles where one chunk ends and the next begins.
template <int PLANES, int TILES, bool GROUPS>
struct Passes {
  static constexpr int FIELDS = fields_at_once(PLANES, TILES);
  static constexpr int PARTS_A_BLOCK = fields(PLANES) / FIELDS;
  static constexpr int64_t TOKENS_AT_ONCE = TILES * TILE_ROWS;
  static constexpr bool CHUNKS = in_chunks(PLANES, TILES, GROUPS);
  static constexpr int64_t CHUNK_STEPS = CHUNK_COLUMNS / STEP_COLUMNS;

  TERNC_INLINE Passes(const Range& all, int64_t all_steps)
      : range(all), steps(all_steps), block(all.block_begin), token(all.token_begin) {}

  TERNC_INLINE bool done() const { return block == range.block_end; }
  TERNC_INLINE void next() {
    if (part != last_part()) {
      part += backwards ? -1 : 1;
      return;
    }
    if (!ends()) {
      step += CHUNK_STEPS;
      backwards = !backwards;
      return;
    }
    part = 0, step = 0, backwards = false;
    token += TOKENS_AT_ONCE;
    if (token < range.token_end) return;
    token = range.token_begin;
    ++block;
  }

  // Of the columns: the first chunk, the last one.
  TERNC_INLINE bool begins() const { return step == 0; }
  TERNC_INLINE bool ends() const { return !CHUNKS || steps - step <= CHUNK_STEPS; }
  // Its sums are in the tiles before, after it.
  TERNC_INLINE bool goes_on() const { return !begins() && part == first_part(); }
  TERNC_INLINE bool stays() const { return !ends() && part == last_part(); }
  TERNC_INLINE int64_t count() const { return ends() ? steps - step : CHUNK_STEPS; }

  TERNC_INLINE int first_part() const { return backwards ? PARTS_A_BLOCK - 1 : 0; }
  TERNC_INLINE int last_part() const { return backwards ? 0 : PARTS_A_BLOCK - 1; }

  Range range;
  int64_t steps;         // k-steps of all columns
  int64_t block, token;  // token: the first of the pass
  int64_t step = 0;      // k-step: the first of the pass
  int part = 0;          // fields from part * FIELDS on
  bool backwards = false;
};

// The weights of all passes one after the other, a step of 64 columns at a time. Rows of tiles past
// the last column keep what they held: the tokens are 0 there.
//
// Nearly all steps are whole and lie in one group. Those are decoded between products, with the
// part of the pass known to the compiler: begin<PART>(), the four quarters, end(). step() decodes
// any step at once.
template <int PLANES, int TILES, bool GROUPS>
class Decoder {
 public:
  using Order = Passes<PLANES, TILES, GROUPS>;
  static constexpr int FIELDS = Order::FIELDS;
  static constexpr int SLOT_BYTES =
      PLANES == INT8 ? TILE_STEPS * step_bytes(INT8) : FIELDS * TILE_SIZE;

  TERNC_INLINE Decoder(const LinearI8Args& args, const Range& range)
      : weight_(args.weight),
        steps_(args.tokens.stride / STEP_COLUMNS),
        group_steps_(GROUPS ? args.weight.group_size / STEP_COLUMNS : TILE_STEPS),
        passes_(range, steps_) {
    start_pass();
  }

  TERNC_INLINE bool done() const { return passes_.done(); }
  TERNC_INLINE int part() const { return passes_.part; }

  // The next steps of this pass that the quarters can decode.
  TERNC_INLINE int64_t whole_steps() const {
    return group_steps_ % TILE_STEPS == 0 ? left_ / TILE_STEPS : 0;
  }

  template <int PART>
  TERNC_INLINE void begin() {
    if constexpr (GROUPS) {
      if (group_left_ == 0) next_group<PART * FIELDS>();
      group_left_ -= TILE_STEPS;
    }
  }

  template <int PART, int Q>
  TERNC_INLINE void quarter(int8_t* slot) {
    if constexpr (PLANES != INT8) {
      constexpr int ROWS = TILE_STEPS / 4;
#pragma GCC unroll 4
      for (int s = Q * ROWS; s < (Q + 1) * ROWS; ++s) store_fields<PART * FIELDS>(s, slot);
    }
  }

  TERNC_INLINE void end() { skip(TILE_STEPS); }

  TERNC_INLINE void start_next_pass() {
    if (left_ > 0 || done()) return;
    passes_.next();
    start_pass();
  }

  TERNC_INLINE void step(int8_t* slot) {
    if (done()) return;
    const int64_t count = left_ < TILE_STEPS ? left_ : TILE_STEPS;
    decode_part(slot, count);
    skip(count);
    start_next_pass();
  }

 private:
  TERNC_INLINE void start_pass() {
    left_ = done() ? 0 : passes_.count();
    group_left_ = 0;
    if (done()) return;
    step_ = weight_.bytes + (passes_.block * steps_ + passes_.step) * step_bytes(PLANES);
    if (GROUPS)
      multiplier_ = weight_.multiplier + passes_.block * weight_.groups * block_rows(PLANES);
  }

  TERNC_INLINE void skip(int64_t count) {
    left_ -= count;
    step_ += count * step_bytes(PLANES);
  }

  template <int PART = 0>
  TERNC_INLINE void decode_part(int8_t* slot, int64_t count) {
    if constexpr (PLANES == INT8) {
      copy_ragged(slot, count);
    } else if constexpr (PART < Order::PARTS_A_BLOCK) {
      if (passes_.part != PART) return decode_part<PART + 1>(slot, count);
      for (int64_t s = 0; s < count; ++s) {
        if constexpr (GROUPS) {
          if (group_left_ == 0) next_group<PART * FIELDS>();
          --group_left_;
        }
        store_fields<PART * FIELDS>(s, slot);
      }
    }
  }

  // Whole steps are read where they lie.
  TERNC_INLINE void copy_ragged(int8_t* slot, int64_t count) {
    if (count == TILE_STEPS) return;
    for (int64_t i = 0; i < count * step_bytes(PLANES); i += TILE_BYTES)
      _mm512_store_si512(slot + i, load_bytes(step_ + i));
  }

  template <int F0, int F = 0>
  TERNC_INLINE void next_group() {
    if constexpr (F < FIELDS) {
      multipliers_[F] = field_multiplier<PLANES, F0 + F>(multiplier_);
      next_group<F0, F + 1>();
    } else {
      fetch_next_block();
      multiplier_ += block_rows(PLANES);
      group_left_ = group_steps_;
    }
  }

  // The multipliers of this group in the next block: they come too rarely to be foreseen.
  TERNC_INLINE void fetch_next_block() const {
    const auto group = reinterpret_cast<uintptr_t>(multiplier_);
    const auto next = group + uintptr_t(weight_.groups * block_rows(PLANES));
    for (int line = 0; line < block_rows(PLANES); line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(next + line), 0, 2);
  }

  // Row s of the tiles. All fields are decoded before the first is stored: behind a store the
  // compiler reads the packed bytes again (7 to 12 % of the whole kernel).
  template <int F0>
  TERNC_INLINE void store_fields(int64_t s, int8_t* slot) {
    bytes fields[FIELDS];
    decode_fields<F0>(step_ + s * step_bytes(PLANES), fields);
#pragma GCC unroll 4
    for (int f = 0; f < FIELDS; ++f)
      _mm512_store_si512(slot + f * TILE_SIZE + s * TILE_BYTES, fields[f]);
  }

  template <int F0, int F = 0>
  TERNC_INLINE void decode_fields(const uint8_t* step, bytes (&fields)[FIELDS]) {
    if constexpr (F < FIELDS) {
      if constexpr (GROUPS)
        fields[F] = decode_multiplied<PLANES, F0 + F>(step, multipliers_[F]);
      else
        fields[F] = decode<PLANES, F0 + F>(step, 0);
      decode_fields<F0, F + 1>(step, fields);
    }
  }

  const Weight& weight_;
  const int64_t steps_, group_steps_;
  Order passes_;
  const uint8_t* step_ = nullptr;
  int64_t left_ = 0, group_left_ = 0;  // steps of the pass, of the group
  const uint8_t* multiplier_ = nullptr;
  FieldMultiplier multipliers_[FIELDS];
};
