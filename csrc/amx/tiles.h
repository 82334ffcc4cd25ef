// The eight tile registers: their configuration, and one step of 64 columns.
//
//   tokens    C tiles (16 tokens x 16 rows, int32)     A (tokens)   B (weights)
//   1..16     0, 1, 2, 3: fields 0..3                  4            5, 6, 7 in turn
//   17..32    0, 2: fields 0, 1; 1, 3: 16 tokens on    4, 5         6, 7
//
// The tile instructions name their registers in their encoding, so there are no arrays of tiles.
constexpr int TILE_ROWS = TILE_TOKENS, TILE_BYTES = TILE_COLUMNS,
              TILE_SIZE = TILE_ROWS * TILE_BYTES;
constexpr int TILE_STEPS = TILE_BYTES / STEP_COLUMNS;  // k-steps of a tile

struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Configures the tiles of this thread for products of up to 16 or up to 32 tokens; fewer rows take
// less time. Whoever used the tiles of this thread before left another configuration.
TERNC_NOINLINE void configure_tiles(int64_t tokens) {
  TileConfig config;
  __builtin_memset(&config, 0, sizeof config);
  config.palette = 1;
  const bool two = tokens > TILE_ROWS;
  const int64_t first = two ? TILE_ROWS : tokens, left = tokens - TILE_ROWS;
  const int64_t second = left < TILE_ROWS ? left : TILE_ROWS;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = TILE_BYTES, config.rows[i] = TILE_ROWS;
  for (int i = 0; i < 5; ++i) config.rows[i] = uint8_t(first);
  if (two) config.rows[1] = config.rows[3] = config.rows[5] = uint8_t(second);
  // GCC 12 takes ldtilecfg for a read of 8 bytes and would drop the other stores.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

TERNC_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Adds one step: `a` one tile of tokens, or two `next` bytes apart; `b` FIELDS tiles of weights.
// To GCC the tile loads read no memory: what they read must be stored before, and may change only
// after, hence the barriers.
template <int TILES, int FIELDS>
TERNC_INLINE void multiply_tiles(const int8_t* a, int64_t next, const int8_t* b) {
  __asm__ volatile("" : : "r"(a), "r"(b) : "memory");
  _tile_loadd(4, a, TILE_BYTES);
  if constexpr (TILES == 2) {
    _tile_loadd(6, b, TILE_BYTES);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, a + next, TILE_BYTES);
    _tile_dpbssd(1, 5, 6);
    _tile_loadd(7, b + TILE_SIZE, TILE_BYTES);
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_loadd(5, b, TILE_BYTES);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, b + TILE_SIZE, TILE_BYTES);
    _tile_dpbssd(1, 4, 6);
    if constexpr (FIELDS == 4) {
      _tile_loadd(7, b + 2 * TILE_SIZE, TILE_BYTES);
      _tile_dpbssd(2, 4, 7);
      _tile_loadd(5, b + 3 * TILE_SIZE, TILE_BYTES);
      _tile_dpbssd(3, 4, 5);
    }
  }
  __asm__ volatile("" : : "r"(a), "r"(b) : "memory");
}

// The sums of the tiles 0..3, each [16 tokens][16 rows].
TERNC_INLINE void store_sums(int32_t (&sums)[4][TILE_ROWS][FIELD_ROWS]) {
  _tile_stored(0, sums[0], TILE_BYTES);
  _tile_stored(1, sums[1], TILE_BYTES);
  _tile_stored(2, sums[2], TILE_BYTES);
  _tile_stored(3, sums[3], TILE_BYTES);
}
