// q in tiles, packed weight -> y: int8 tile products, weights decoded on the way.
//
//   for tokens that fit L2 together
//     for each block, for 4 (up to 16 tokens) or 2 of its fields
//       for each 16 or 32 tokens
//         for each 64 columns    decode AHEAD tiles on; multiply
//       y = (total * sx) * s + b
//
// Decoding again for every 32 tokens costs less than writing decoded weights to L2 and reading them
// back (2.6 against 1.8 TOP/s, 64 tokens, 4096 -> 4096, one Sapphire Rapids core).
constexpr int64_t L2_TOKEN_BYTES = 1 << 20;
// A tile load that meets lines still on their way to L1 waits for them: 303 us one step ahead,
// 264 us two ahead (16 tokens, 4096 -> 4096).
constexpr int AHEAD = 3, SLOTS = AHEAD + 1;

constexpr int fields_at_once(int planes, int tiles) {
  return tiles == 1 && fields(planes) >= 4 ? 4 : 2;
}

// 16 * TILES tokens from `token` on x FIELDS fields of a block.
struct Unit {
  const LinearI8Args* args;
  int64_t block, token, token_end;
  bool first;  // of the units that read these weights
};

template <int PLANES, int F0, int FIELDS, int TILES, bool GROUPS>
TERNC_NOINLINE void multiply_unit(const Unit& unit, int32_t (&sums)[4][TILE_ROWS][FIELD_ROWS]) {
  alignas(64) int8_t ring[SLOTS][FIELDS * TILE_SIZE];
  const Tokens& tokens = unit.args->tokens;
  const int64_t steps = tokens.stride / STEP_COLUMNS, count = ceil_div(steps, TILE_STEPS);
  const int64_t next = count * TILE_SIZE;  // from 16 tokens to the next 16
  const int8_t* a = tokens.tiles + unit.token / TILE_ROWS * next;
  TileDecoder<PLANES, F0, FIELDS, GROUPS> decoder(unit.args->weight, unit.block, steps,
                                                  unit.first && F0 == 0, unit.args->prefetch);
  zero_sums();
  for (int64_t k = 0; k < AHEAD && k < count; ++k) decoder.next(ring[k]);
  for (int64_t k = 0; k < count; ++k) {
    if (k + AHEAD < count) decoder.next(ring[(k + AHEAD) % SLOTS]);
    multiply_tiles<TILES, FIELDS>(a + k * TILE_SIZE, next, ring[k % SLOTS]);
  }
  store_sums(sums);
}

// float(sum >> carry) of the fields of one token.
template <int PLANES, int F0, int FIELDS, int TILES, bool GROUPS, int F = 0>
TERNC_INLINE void take_totals(const int32_t (&sums)[4][TILE_ROWS][FIELD_ROWS], int64_t token,
                              float* total) {
  if constexpr (F < FIELDS) {
    constexpr int CARRY = GROUPS ? 0 : carry(PLANES, F0 + F);
    const int tile = int(F * TILES + token / TILE_ROWS);
    const i32 sum = load_i32(sums[tile][token % TILE_ROWS]);
    store_f32(total + F * FIELD_ROWS, to_f32(shift_i32_right<CARRY>(sum)));
    take_totals<PLANES, F0, FIELDS, TILES, GROUPS, F + 1>(sums, token, total);
  }
}

template <int PLANES, int F0, int TILES, bool GROUPS>
inline void run_unit(const Unit& unit, const RowFactors& factors) {
  constexpr int FIELDS = fields_at_once(PLANES, TILES);
  alignas(64) int32_t sums[4][TILE_ROWS][FIELD_ROWS];
  alignas(64) float total[FIELDS * FIELD_ROWS];
  multiply_unit<PLANES, F0, FIELDS, TILES, GROUPS>(unit, sums);
  const LinearI8Args& args = *unit.args;
  for (int64_t token = unit.token; token < unit.token_end; ++token) {
    take_totals<PLANES, F0, FIELDS, TILES, GROUPS>(sums, token - unit.token, total);
    store_outputs(total, args.tokens.scale[token], factors, args.weight, args.out, token);
  }
}

// Tokens [token_begin, token_end) x one block: all fields, 32 tokens at a time, then up to 16.
template <int PLANES, int TILES, bool GROUPS, int F0 = 0>
inline void run_block(const LinearI8Args& args, const Range& tokens, int64_t block) {
  if constexpr (F0 < fields(PLANES)) {
    constexpr int FIELDS = fields_at_once(PLANES, TILES), TOKENS_AT_ONCE = TILES * TILE_ROWS;
    RowFactors factors;
    load_factors(args.weight, args.out, FIELDS * FIELD_ROWS, (block * fields(PLANES) + F0) / FIELDS,
                 factors);
    if (factors.count <= 0) return;
    for (int64_t token = tokens.token_begin; token < tokens.token_end; token += TOKENS_AT_ONCE) {
      const int64_t left = tokens.token_end - token;
      const Unit unit = {&args, block, token,
                         token + (left < TOKENS_AT_ONCE ? left : TOKENS_AT_ONCE),
                         token == tokens.token_begin};
      run_unit<PLANES, F0, TILES, GROUPS>(unit, factors);
    }
    run_block<PLANES, TILES, GROUPS, F0 + FIELDS>(args, tokens, block);
  }
}

template <int PLANES, bool GROUPS>
inline void run_blocks(const LinearI8Args& args, const Range& range) {
  constexpr int64_t PAIR = 2 * TILE_ROWS;
  const int64_t fit = L2_TOKEN_BYTES / (args.tokens.stride + 1) / PAIR * PAIR;
  const int64_t chunk = fit < PAIR ? PAIR : fit;
  for (int64_t begin = range.token_begin; begin < range.token_end; begin += chunk) {
    const int64_t left = range.token_end - begin;
    const int64_t end = begin + (left < chunk ? left : chunk);
    const int64_t last = (end - begin) % PAIR;
    // Up to 16 tokens at the end are one tile.
    const int64_t middle = last > 0 && last <= TILE_ROWS ? end - last : end;
    for (int64_t block = range.block_begin; block < range.block_end; ++block) {
      if (begin < middle)
        run_block<PLANES, 2, GROUPS>(args, {block, block + 1, begin, middle}, block);
      if (middle < end) run_block<PLANES, 1, GROUPS>(args, {block, block + 1, middle, end}, block);
    }
  }
}

template <int PLANES>
inline void linear_i8(const LinearI8Args& args, const Range& range) {
  if (args.tokens.tiles == nullptr || args.weight.scale_kind == ScaleKind::group)
    return avx512vnni::kernels.linear_i8[kind_index(PLANES)](args, range);
  const int64_t tokens = range.token_end - range.token_begin, most = 2 * TILE_ROWS;
  if (tokens == 0) return;  // tiles of no rows are a fault
  configure_tiles(tokens < most ? tokens : most);
  if (args.weight.multiplier == nullptr)
    run_blocks<PLANES, false>(args, range);
  else
    run_blocks<PLANES, true>(args, range);
  _tile_release();
}

// q [M, stride] of tokens [begin, end) -> tiles; what lies past the last token or column is 0.
inline void tile_tokens(const Tokens& tokens, int64_t token_begin, int64_t token_end) {
  const int64_t count = ceil_div(tokens.stride, TILE_BYTES);
  const int64_t whole = ceil_div(tokens.count, TILE_ROWS) * TILE_ROWS;
  const int64_t end = token_end == tokens.count ? whole : token_end;
  for (int64_t token = token_begin; token < end; ++token)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t left = token < tokens.count ? tokens.stride - k * TILE_BYTES : 0;
      const uint64_t mask = left >= TILE_BYTES ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
      const int64_t row = (token / TILE_ROWS * count + k) * TILE_ROWS + token % TILE_ROWS;
      const int8_t* from = tokens.q + (left > 0 ? token * tokens.stride + k * TILE_BYTES : 0);
      _mm512_store_si512(tokens.tiles + row * TILE_BYTES, _mm512_maskz_loadu_epi8(mask, from));
    }
}
