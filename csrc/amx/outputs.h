// Sums of a pass -> y, at once.
//
// Stores go to memory in order. One of y that misses the caches holds up the decoded weights behind
// it, and with them the tiles: large outputs are streamed past the caches (64 and 256 tokens, 4096
// -> 4096, one Sapphire Rapids core: 5 and 10 % faster than written while the next pass multiplies,
// their lines asked for before). Of fp32 that lies across lines the whole ones are streamed (256
// tokens, 1277 -> 4759 and 755 -> 3769: 2.3 and 1.2 ms without, 1.5 and 0.8 with).
constexpr int64_t STREAMED_BYTES = 1 << 20, LINE = 64;

enum class Stores { cached, streamed, streamed_across };

inline Stores stores_of(const LinearI8Args& args) {
  const int64_t row_bytes = args.weight.rows * size_of(args.out.dtype);
  if (args.out.read_at_once || args.tokens.count * row_bytes < STREAMED_BYTES)
    return Stores::cached;
  const auto first = reinterpret_cast<uintptr_t>(args.out.values);
  if (row_bytes % LINE == 0 && first % LINE == 0) return Stores::streamed;
  const bool whole_values = args.out.dtype == Dtype::f32 && first % sizeof(float) == 0;
  return whole_values ? Stores::streamed_across : Stores::cached;
}

// sum: of a field whose codes are unsigned and carry 2^CARRY. bias_sum: bias of the codes times sum
// of q, of which the sum has 2^CARRY as well.
template <int CARRY>
TERNC_INLINE i32 without_bias(i32 sum, i32 bias_sum) {
  return shift_i32_right<CARRY>(sub_i32(sum, shift_i32_left<CARRY>(bias_sum)));
}

template <Dtype D>
TERNC_INLINE f32 rounded(f32 y) {
  if constexpr (D == Dtype::bf16) return round_bf16(y);
  if constexpr (D == Dtype::f16) return round_f16(y);
  return y;
}

// y + residual -> out[at, at + count).
template <Dtype D>
TERNC_NOINLINE void store_ragged(f32 y, const Output& out, int64_t at, int64_t count) {
  float values[LANES], residual[LANES];
  store_f32(values, y);
  if (out.residual != nullptr) {
    widen_values(out.residual, D, at, count, residual);
    round_values(values, count, D);
    for (int64_t i = 0; i < count; ++i) values[i] += residual[i];
  }
  store_values(values, count, D, out.values, at);
}

// 16 values past the caches; aligned.
template <Dtype D>
TERNC_INLINE void stream_vector(void* values, int64_t i, f32 y) {
  if constexpr (D == Dtype::f32) return _mm512_stream_ps(static_cast<float*>(values) + i, y);
  alignas(32) uint16_t halves[LANES];
  store_vector<D>(halves, 0, y);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(values) + i),
                      *reinterpret_cast<const __m256i*>(halves));
}

// Vectors one after the other: values of the first line, whole lines past the caches, the rest. No
// store reaches into a line that is streamed, not even with what its mask leaves out.
template <int COUNT>
TERNC_INLINE void stream_across(float* values, const f32 (&y)[COUNT]) {
  const int before = int((-reinterpret_cast<uintptr_t>(values)) % LINE / sizeof(float));
  const i32 order = add_i32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                            splat_i32(before));
  const auto rest = __mmask16(0xffff >> before);  // of a line, behind the first values
  float* line = values + before;
  if (before > 0)
    _mm512_mask_store_ps(line - LANES, __mmask16(~rest), _mm512_permutexvar_ps(order, y[0]));
#pragma GCC unroll 4
  for (int f = 0; f + 1 < COUNT; ++f, line += LANES)
    _mm512_stream_ps(line, _mm512_permutex2var_ps(y[f], order, y[f + 1]));
  _mm512_mask_store_ps(line, rest, _mm512_permutexvar_ps(order, y[COUNT - 1]));
}

template <int PLANES, int TILES, bool GROUPS>
class Outputs {
 public:
  using Order = Passes<PLANES, TILES, GROUPS>;

  explicit Outputs(const LinearI8Args& args) : args_(args), stores_(stores_of(args)) {}
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;
  ~Outputs() {
    if (stores_ != Stores::cached) _mm_sfence();
  }

  // Tokens from that of the pass up to `end`.
  void write(const Order& pass, const Sums& sums, int64_t end) {
    if (pass.block != block_)
      load_factors(args_.weight, args_.out, block_rows(PLANES), pass.block, factors_);
    block_ = pass.block;
    const int64_t next = pass.token + Order::TOKENS_AT_ONCE;
    const PassTokens tokens = {sums, pass.token, end < next ? end : next};
    if (args_.out.dtype == Dtype::f32) choose<Dtype::f32>(tokens, pass.part);
    if (args_.out.dtype == Dtype::bf16) choose<Dtype::bf16>(tokens, pass.part);
    if (args_.out.dtype == Dtype::f16) choose<Dtype::f16>(tokens, pass.part);
  }

 private:
  static constexpr int FIELDS = fields_at_once(PLANES, TILES);
  static constexpr bool BIASED = !GROUPS && PLANES != INT8;  // codes are unsigned
  struct PassTokens {
    const Sums& sums;
    int64_t begin, end;
  };

  template <Dtype D, int PART = 0>
  void choose(const PassTokens& tokens, int part) {
    if constexpr (PART * FIELDS < fields(PLANES)) {
      if (part != PART) return choose<D, PART + 1>(tokens, part);
      constexpr int F0 = PART * FIELDS;
      if (stores_ == Stores::cached) return write_tokens<D, F0, Stores::cached>(tokens);
      if (stores_ == Stores::streamed) return write_tokens<D, F0, Stores::streamed>(tokens);
      if constexpr (D == Dtype::f32) write_tokens<D, F0, Stores::streamed_across>(tokens);
    }
  }

  template <Dtype D, int F0, Stores S>
  void write_tokens(const PassTokens& tokens) {
    const bool whole = factors_.count >= (F0 + FIELDS) * FIELD_ROWS;
    if (whole && factors_.bias == nullptr && args_.out.residual == nullptr)
      return write_whole<D, F0, S>(tokens);
    for (int64_t token = tokens.begin; token < tokens.end; ++token)
      write_fields<D, F0, S>(tokens.sums, token, token - tokens.begin, whole);
  }

  // All rows of all fields, nothing added: what no token changes is read once.
  template <Dtype D, int F0, Stores S>
  void write_whole(const PassTokens& tokens) {
    const float* const scale = args_.tokens.scale;
    const int32_t* const sum_of_q = args_.tokens.sums;
    void* const values = args_.out.values;
    const int64_t rows = args_.weight.rows;
    f32 row_scale[FIELDS], y[FIELDS];
    for (int f = 0; f < FIELDS; ++f)
      row_scale[f] = load_f32(factors_.scale + (F0 + f) * FIELD_ROWS);
    int64_t i = tokens.begin * rows + factors_.first + F0 * FIELD_ROWS;
    const int32_t* sums = tokens.sums[0][0];
    for (int64_t token = tokens.begin; token < tokens.end; ++token, i += rows, sums += FIELD_ROWS) {
      i32 totals[FIELDS];
      totals_of<F0>(sums, BIASED ? sum_of_q[token] : 0, totals);
      const f32 step = splat_f32(scale[token]);
#pragma GCC unroll 4
      for (int f = 0; f < FIELDS; ++f)
        y[f] = mul_f32(mul_f32(to_f32(totals[f]), step), row_scale[f]);
      write_vectors<D, S>(values, i, y);
    }
  }

  // Sums of one token, of 16 rows a field, without bias and carry.
  template <int F0, int F = 0>
  TERNC_INLINE static void totals_of(const int32_t* sums, int32_t sum_of_q, i32 (&totals)[FIELDS]) {
    if constexpr (F < FIELDS) {
      totals[F] = load_i32(sums + F * TILES * TILE_ROWS * FIELD_ROWS);
      if constexpr (BIASED)
        totals[F] = without_bias<carry(PLANES, F0 + F)>(
            totals[F], splat_i32(int32_t(uint32_t(bias(PLANES)) * uint32_t(sum_of_q))));
      totals_of<F0, F + 1>(sums, sum_of_q, totals);
    }
  }

  template <Dtype D, Stores S>
  TERNC_INLINE static void write_vectors(void* values, int64_t i, const f32 (&y)[FIELDS]) {
    if constexpr (S == Stores::streamed_across) {
      stream_across(static_cast<float*>(values) + i, y);
      return;
    }
#pragma GCC unroll 4
    for (int f = 0; f < FIELDS; ++f)
      if constexpr (S == Stores::streamed)
        stream_vector<D>(values, i + f * FIELD_ROWS, y[f]);
      else
        store_vector<D>(values, i + f * FIELD_ROWS, y[f]);
  }

  // `at`: of the token among those of the pass.
  template <Dtype D, int F0, Stores S>
  TERNC_INLINE void write_fields(const Sums& sums, int64_t token, int64_t at, bool whole) {
    const Output& out = args_.out;
    const int64_t first = token * args_.weight.rows + factors_.first;
    i32 totals[FIELDS];
    f32 y[FIELDS];
    totals_of<F0>(sums[0][0] + at * FIELD_ROWS, BIASED ? args_.tokens.sums[token] : 0, totals);
    const f32 step = splat_f32(args_.tokens.scale[token]);
    for (int f = 0; f < FIELDS; ++f) {
      const int64_t row = (F0 + f) * FIELD_ROWS, count = factors_.count - row;
      if (count <= 0) return;
      y[f] = mul_f32(mul_f32(to_f32(totals[f]), step), load_f32(factors_.scale + row));
      if (factors_.bias != nullptr) y[f] = add_f32(y[f], load_f32(factors_.bias + row));
      if (count < FIELD_ROWS) return store_ragged<D>(y[f], out, first + row, count);
      if (out.residual != nullptr)
        y[f] = add_f32(rounded<D>(y[f]), load_vector<D>(out.residual, first + row));
      if (!whole) store_vector<D>(out.values, first + row, y[f]);
    }
    if (whole) write_vectors<D, S>(out.values, first + F0 * FIELD_ROWS, y);
  }

  const LinearI8Args& args_;
  const Stores stores_;
  int64_t block_ = -1;
  RowFactors factors_;
};
