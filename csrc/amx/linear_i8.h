// q in tiles, packed weight -> y: int8 tile products, weights decoded on the way.
//
//   for tokens that fit L2 together
//     for each block, for each 32 (up to 16) tokens
//       for each chunk of columns, for each 2 (4) fields of the block: a pass
//         for each 64 columns    decode AHEAD steps on; multiply
//       write outputs
//
// Decoding goes on over the ends of passes, and the next block comes from memory evenly over the
// steps of this one: nothing waits between passes. What was slower (64 and 256 tokens, 2048 and
// 4096 columns, one core of a Xeon): decoded panels shared by all tokens 1.2 to 1.7 times; outputs
// spread over the steps of the next pass 1.0 to 1.17, or in its first steps, without decoding
// there 1.02 to 1.15; the first blocks multiplied while later tokens are read 1.01 to 1.06 times.
constexpr int64_t L2_TOKEN_BYTES = 1 << 20;
// A tile load that meets lines still on their way to L1 waits for them: two or three steps ahead
// are level, one takes a fifth longer. So do eight slots, which do not stay in L1.
constexpr int AHEAD = 3, SLOTS = AHEAD + 1;
constexpr int64_t PAGE = 4096;

// Bytes from `storage` on to the next address that lies in its page where `bytes` does. A load
// waits for an earlier store to the same place of another page: here the packed bytes of a row are
// read before its decoded ones are stored. Slots 64 bytes further apart took a quarter longer.
inline int64_t in_phase(const void* storage, const void* bytes) {
  return int64_t((reinterpret_cast<uintptr_t>(bytes) - reinterpret_cast<uintptr_t>(storage)) %
                 PAGE);
}

// The packed bytes of the next block, a few lines a step, evenly over the passes of this one.
//
// Where a block is one pass, up to 16 tokens, memory is the limit: it is asked for a quarter of the
// next block each in four places, since prefetchers of the core follow a page each, and for this
// block on into L1 (16 tokens, 4096 and 2048 columns: 14 and 9 % less; 64 tokens: 9 % more).
template <int PLANES, bool ONCE>
class NextBytes {
 public:
  TERNC_INLINE NextBytes(const uint8_t* first_block, int64_t block_bytes, int64_t steps)
      : block_(reinterpret_cast<uintptr_t>(first_block)),
        block_bytes_(block_bytes),
        part_(ceil_div(block_bytes, STREAMS * LINE) * LINE),
        lines_(lines_a_step(block_bytes, steps) / 4),
        first_lines_(lines_a_step(block_bytes, steps) - 3 * lines_) {
    start_block();
  }

  template <int Q>
  TERNC_INLINE void quarter() {
    if constexpr (ONCE) {
#pragma GCC unroll 4
      for (int i = 0; i < LINES_A_QUARTER; ++i, next_ += LINE) {
#pragma GCC unroll 4
        for (int stream = 0; stream < STREAMS; ++stream, near_ += LINE) {
          ask<2>(next_ + stream * part_);
          ask<3>(near_);
        }
      }
    } else {
      for (int64_t i = Q == 0 ? first_lines_ : lines_; i > 0; --i, next_ += LINE) ask<2>(next_);
    }
  }

  TERNC_INLINE void end_pass() {
    if (!ONCE) return;
    block_ += block_bytes_;
    start_block();
  }

 private:
  static constexpr uintptr_t NEAR = 4096;
  static constexpr int STREAMS = ONCE ? 4 : 1;
  static constexpr int LINES_A_QUARTER = TILE_STEPS * step_bytes(PLANES) / int(LINE) / STREAMS / 4;

  static int64_t lines_a_step(int64_t block_bytes, int64_t steps) {
    return steps > 0 ? ceil_div(block_bytes, LINE * steps) : 0;
  }
  template <int LOCALITY>
  static TERNC_INLINE void ask(uintptr_t line) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, LOCALITY);
  }
  TERNC_INLINE void start_block() { next_ = block_ + block_bytes_, near_ = block_ + NEAR; }

  uintptr_t block_, block_bytes_, part_, next_, near_;
  int64_t lines_, first_lines_;  // a quarter, the first of a step: where a block is several passes
};

// The products of all passes, a step of 64 columns at a time, AHEAD steps behind the decoder.
template <int PLANES, int TILES, bool GROUPS>
class Products {
 public:
  using Order = Passes<PLANES, TILES, GROUPS>;
  using Decoding = Decoder<PLANES, TILES, GROUPS>;
  static constexpr int FIELDS = Order::FIELDS;

  TERNC_INLINE Products(const LinearI8Args& args, const Range& range, int8_t* ring)
      : args_(args),
        steps_(args.tokens.stride / STEP_COLUMNS),
        count_(ceil_div(steps_, TILE_STEPS)),
        ring_(ring),
        decoder_(args, range),
        next_bytes_(args.weight.bytes + range.block_begin * block_bytes(), block_bytes(),
                    ceil_div(range.token_end - range.token_begin, Order::TOKENS_AT_ONCE) *
                        Order::PARTS_A_BLOCK * count_) {
    for (; made_ < AHEAD; ++made_) decoder_.step(slot(made_));
  }

  // Adds one pass to the tiles of sums.
  TERNC_INLINE void multiply(const Order& pass) {
    k_ = pass.step / TILE_STEPS;
    tokens_ = args_.tokens.tiles + pass.token / TILE_ROWS * next_tokens() + k_ * TILE_SIZE;
    packed_ = args_.weight.bytes + pass.block * block_bytes() + pass.step * step_bytes(PLANES);
    for (const int64_t end = k_ + ceil_div(pass.count(), TILE_STEPS); k_ < end;) {
      const int64_t whole = decoder_.whole_steps(), left = end - k_;
      if (whole > 0)
        run(pass.part, whole < left ? whole : left);
      else
        decode_first(pass.part);
    }
    next_bytes_.end_pass();
  }

 private:
  // What is done between the tile instructions of a step. PART: that of the decoder, which may be
  // in the next pass; -1: nothing is decoded.
  template <int PART>
  struct Between {
    Products& products;
    int8_t* slot;

    template <int Q>
    TERNC_INLINE void run() {
      products.next_bytes_.template quarter<Q>();
      if constexpr (PART >= 0) products.decoder_.template quarter<PART, Q>(slot);
      order_memory();
    }
  };

  int64_t block_bytes() const { return steps_ * step_bytes(PLANES); }
  int64_t next_tokens() const { return count_ * TILE_SIZE; }  // from 16 tokens to the next 16
  TERNC_INLINE int8_t* slot(int64_t step) const {
    return ring_ + uint64_t(step) % SLOTS * Decoding::SLOT_BYTES;
  }

  // `steps` steps, each with one that is decoded whole on the way.
  template <int PART = 0>
  TERNC_INLINE void run(int part, int64_t steps) {
    if constexpr (PART < Order::PARTS_A_BLOCK) {
      if (decoder_.part() != PART) return run<PART + 1>(part, steps);
      for (; steps > 0; --steps, ++made_) {
        decoder_.template begin<PART>();
        multiply_step<PART>(part);
        decoder_.end();
      }
      decoder_.start_next_pass();
    }
  }

  TERNC_INLINE void decode_first(int part) {
    decoder_.step(slot(made_++));
    multiply_step<-1>(part);
  }

  template <int PART>
  TERNC_INLINE void multiply_step(int part) {
    Between<PART> between = {*this, slot(made_)};
    multiply_tiles<TILES, FIELDS, !GROUPS && PLANES != INT8>(tokens_, next_tokens(),
                                                             weight_tiles(part), between);
    ++used_, ++k_;
    tokens_ += TILE_SIZE;
    packed_ += TILE_STEPS * step_bytes(PLANES);
  }

  // Those of INT8 are read as they lie, unless columns are missing.
  TERNC_INLINE WeightTiles weight_tiles(int part) const {
    constexpr bool PACKED = PLANES == INT8;
    WeightTiles tiles = {{}, PACKED ? step_bytes(INT8) : TILE_BYTES};
    const int8_t* at = slot(used_);
    if (PACKED) {
      if ((k_ + 1) * TILE_STEPS <= steps_) at = reinterpret_cast<const int8_t*>(packed_);
      at += part * FIELDS * TILE_BYTES;
    }
#pragma GCC unroll 4
    for (int f = 0; f < FIELDS; ++f) tiles.at[f] = at + f * (PACKED ? TILE_BYTES : TILE_SIZE);
    return tiles;
  }

  const LinearI8Args& args_;
  const int64_t steps_, count_;  // of a pass: of 4 columns, of 64
  int8_t* const ring_;
  Decoding decoder_;
  NextBytes<PLANES, TILES == 1 && Order::PARTS_A_BLOCK == 1> next_bytes_;
  int64_t made_ = 0, used_ = 0, k_ = 0;  // steps decoded and multiplied; of this pass
  const int8_t* tokens_ = nullptr;
  const uint8_t* packed_ = nullptr;
};

// All blocks of the range x all its tokens.
template <int PLANES, int TILES, bool GROUPS>
TERNC_NOINLINE void multiply_passes(const LinearI8Args& args, const Range& range) {
  using Order = Passes<PLANES, TILES, GROUPS>;
  alignas(64) int8_t ring[SLOTS * Decoder<PLANES, TILES, GROUPS>::SLOT_BYTES + PAGE];
  alignas(64) Sums sums[Order::CHUNKS ? Order::PARTS_A_BLOCK : 1];
  Outputs<PLANES, TILES, GROUPS> outputs(args);
  Products<PLANES, TILES, GROUPS> products(args, range, ring + in_phase(ring, args.weight.bytes));
  for (Order pass(range, args.tokens.stride / STEP_COLUMNS); !pass.done(); pass.next()) {
    Sums& own = sums[Order::CHUNKS ? pass.part : 0];
    if (pass.begins()) zero_sums();
    if (!pass.begins() && !pass.goes_on()) load_sums(own);
    products.multiply(pass);
    if (pass.stays()) continue;
    store_sums(own);
    if (pass.ends()) outputs.write(pass, own, range.token_end);
  }
}

template <int PLANES, bool GROUPS>
inline void multiply_range(const LinearI8Args& args, const Range& range) {
  constexpr int64_t PAIR = 2 * TILE_ROWS;
  const int64_t stride = args.tokens.stride;
  const int64_t fit = (stride > 0 ? L2_TOKEN_BYTES / stride : PAIR) / PAIR * PAIR;
  const int64_t chunk = fit < PAIR ? PAIR : fit;
  for (int64_t begin = range.token_begin; begin < range.token_end; begin += chunk) {
    const int64_t left = range.token_end - begin;
    const int64_t end = begin + (left < chunk ? left : chunk);
    const int64_t last = (end - begin) % PAIR;
    // Up to 16 tokens at the end are one tile.
    const int64_t middle = last > 0 && last <= TILE_ROWS ? end - last : end;
    if (begin < middle)
      multiply_passes<PLANES, 2, GROUPS>(args, {range.block_begin, range.block_end, begin, middle});
    if (middle < end)
      multiply_passes<PLANES, 1, GROUPS>(args, {range.block_begin, range.block_end, middle, end});
  }
}

template <int PLANES>
inline void linear_i8(const LinearI8Args& args, const Range& range) {
  const bool groups = args.weight.multiplier != nullptr;
  if (args.tokens.tiles == nullptr || !reads_tiles(PLANES, args.weight))
    return avx512vnni::kernels.linear_i8[kind_index(PLANES)](args, range);
  const int64_t tokens = range.token_end - range.token_begin, most = 2 * TILE_ROWS;
  if (tokens == 0) return;  // tiles of no rows are a fault
  configure_tiles(tokens < most ? tokens : most);
  if constexpr (PLANES == INT8)
    multiply_range<PLANES, false>(args, range);
  else if (groups)
    multiply_range<PLANES, true>(args, range);
  else
    multiply_range<PLANES, false>(args, range);
  _tile_release();
}

// q [stride] of one token -> its rows of tiles; columns past the last are 0, and all without q.
inline void tile_token(const int8_t* q, int64_t stride, int64_t token, int8_t* tiles) {
  const int64_t count = ceil_div(stride, TILE_BYTES);
  int8_t* row = tiles + (token / TILE_ROWS * count * TILE_ROWS + token % TILE_ROWS) * TILE_BYTES;
  for (int64_t k = 0; k < count; ++k, row += TILE_SIZE) {
    const int64_t left = q == nullptr ? 0 : stride - k * TILE_BYTES;
    const uint64_t mask = left >= TILE_BYTES ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    const int8_t* from = q == nullptr ? tiles : q + k * TILE_BYTES;
    _mm512_store_si512(row, _mm512_maskz_loadu_epi8(mask, from));
  }
}
