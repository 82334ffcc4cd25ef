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

// The sums of the tiles 0..3.
using Sums = int32_t[4][TILE_ROWS][FIELD_ROWS];

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

// To GCC the tile loads read no memory and the tile stores write none.
TERNC_INLINE void order_memory() { __asm__ volatile("" : : : "memory"); }

TERNC_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

TERNC_INLINE void load_sums(const Sums& sums) {
  order_memory();
  _tile_loadd(0, sums[0], TILE_BYTES);
  _tile_loadd(1, sums[1], TILE_BYTES);
  _tile_loadd(2, sums[2], TILE_BYTES);
  _tile_loadd(3, sums[3], TILE_BYTES);
}

TERNC_INLINE void store_sums(Sums& sums) {
  _tile_stored(0, sums[0], TILE_BYTES);
  _tile_stored(1, sums[1], TILE_BYTES);
  _tile_stored(2, sums[2], TILE_BYTES);
  _tile_stored(3, sums[3], TILE_BYTES);
  order_memory();
}

// C += A x B, the bytes of A signed, those of B signed or not. Tile numbers have to be literals.
template <bool UNSIGNED, int C>
TERNC_INLINE void multiply_pair() {
  if constexpr (UNSIGNED) {
    if constexpr (C == 0) _tile_dpbsud(0, 4, 6);
    if constexpr (C == 1) _tile_dpbsud(1, 5, 6);
    if constexpr (C == 2) _tile_dpbsud(2, 4, 7);
    if constexpr (C == 3) _tile_dpbsud(3, 5, 7);
  } else {
    if constexpr (C == 0) _tile_dpbssd(0, 4, 6);
    if constexpr (C == 1) _tile_dpbssd(1, 5, 6);
    if constexpr (C == 2) _tile_dpbssd(2, 4, 7);
    if constexpr (C == 3) _tile_dpbssd(3, 5, 7);
  }
}
template <bool UNSIGNED, int C>
TERNC_INLINE void multiply_one() {
  if constexpr (UNSIGNED) {
    if constexpr (C == 0) _tile_dpbsud(0, 4, 5);
    if constexpr (C == 1) _tile_dpbsud(1, 4, 6);
    if constexpr (C == 2) _tile_dpbsud(2, 4, 7);
    if constexpr (C == 3) _tile_dpbsud(3, 4, 5);
  } else {
    if constexpr (C == 0) _tile_dpbssd(0, 4, 5);
    if constexpr (C == 1) _tile_dpbssd(1, 4, 6);
    if constexpr (C == 2) _tile_dpbssd(2, 4, 7);
    if constexpr (C == 3) _tile_dpbssd(3, 4, 5);
  }
}

// Where the B tiles of one step lie, with rows `stride` bytes apart.
struct WeightTiles {
  const int8_t* at[4];
  int64_t stride;
};

// Adds one step. a: one tile of tokens, or two `next` bytes apart. between.run<0..3>(): other work,
// a quarter of it between any two products, so that it keeps none of them waiting.
template <int TILES, int FIELDS, bool UNSIGNED, class Between>
TERNC_INLINE void multiply_tiles(const int8_t* a, int64_t next, const WeightTiles& b,
                                 Between& between) {
  order_memory();
  _tile_loadd(4, a, TILE_BYTES);
  if constexpr (TILES == 2) {
    _tile_loadd(6, b.at[0], b.stride);
    between.template run<0>();
    multiply_pair<UNSIGNED, 0>();
    _tile_loadd(5, a + next, TILE_BYTES);
    between.template run<1>();
    multiply_pair<UNSIGNED, 1>();
    _tile_loadd(7, b.at[1], b.stride);
    between.template run<2>();
    multiply_pair<UNSIGNED, 2>();
    between.template run<3>();
    multiply_pair<UNSIGNED, 3>();
  } else {
    _tile_loadd(5, b.at[0], b.stride);
    between.template run<0>();
    multiply_one<UNSIGNED, 0>();
    _tile_loadd(6, b.at[1], b.stride);
    between.template run<1>();
    multiply_one<UNSIGNED, 1>();
    if constexpr (FIELDS == 4) _tile_loadd(7, b.at[2], b.stride);
    between.template run<2>();
    if constexpr (FIELDS == 4) {
      multiply_one<UNSIGNED, 2>();
      _tile_loadd(5, b.at[3], b.stride);
    }
    between.template run<3>();
    if constexpr (FIELDS == 4) multiply_one<UNSIGNED, 3>();
  }
  order_memory();
}
