// Sums of a pass -> y, at once.
//
// Stores go to memory in order. One of y that misses the caches holds up the decoded weights behind
// it, and with them the tiles: large outputs are streamed past the caches (64 and 256 tokens, 4096
// -> 4096, one Sapphire Rapids core: 5 and 10 % faster than written while the next pass multiplies,
// their lines asked for before).
constexpr int64_t STREAMED_BYTES = 1 << 20;

inline bool is_streamed(const LinearI8Args& args) {
  const int64_t row_bytes = args.weight.rows * size_of(args.out.dtype), line = 64;
  return !args.out.read_at_once && args.tokens.count * row_bytes >= STREAMED_BYTES &&
         row_bytes % line == 0 && reinterpret_cast<uintptr_t>(args.out.values) % line == 0;
}

// Sums of 16 rows of one token, without the bias of the codes and the carry of the field.
template <int PLANES, int TILES, bool GROUPS, int F0, int F>
TERNC_INLINE i32 total_of(const Sums& sums, int64_t token, int32_t sum_of_q) {
  const i32 sum = load_i32(sums[F * TILES + token / TILE_ROWS][token % TILE_ROWS]);
  if constexpr (GROUPS || PLANES == INT8) return sum;
  constexpr int CARRY = carry(PLANES, F0 + F);
  const auto bias_sum = int32_t(uint32_t(bias(PLANES)) * uint32_t(sum_of_q) << CARRY);
  return shift_i32_right<CARRY>(sub_i32(sum, splat_i32(bias_sum)));
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

template <int PLANES, int TILES, bool GROUPS>
class Outputs {
 public:
  explicit Outputs(const LinearI8Args& args) : args_(args), streamed_(is_streamed(args)) {}
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;
  ~Outputs() {
    if (streamed_) _mm_sfence();
  }

  // Tokens from that of the pass up to `end`.
  void write(const Passes<PLANES, TILES>& pass, const Sums& sums, int64_t end) {
    if (pass.block != block_)
      load_factors(args_.weight, args_.out, block_rows(PLANES), pass.block, factors_);
    block_ = pass.block;
    const int64_t next = pass.token + Passes<PLANES, TILES>::TOKENS_AT_ONCE;
    const PassTokens tokens = {sums, pass.token, end < next ? end : next};
    if (args_.out.dtype == Dtype::f32) choose<Dtype::f32>(tokens, pass.part);
    if (args_.out.dtype == Dtype::bf16) choose<Dtype::bf16>(tokens, pass.part);
    if (args_.out.dtype == Dtype::f16) choose<Dtype::f16>(tokens, pass.part);
  }

 private:
  static constexpr int FIELDS = fields_at_once(PLANES, TILES);
  struct PassTokens {
    const Sums& sums;
    int64_t begin, end;
  };

  template <Dtype D, int PART = 0>
  void choose(const PassTokens& tokens, int part) {
    if constexpr (PART * FIELDS < fields(PLANES)) {
      if (part != PART) return choose<D, PART + 1>(tokens, part);
      streamed_ ? write_tokens<D, PART * FIELDS, true>(tokens)
                : write_tokens<D, PART * FIELDS, false>(tokens);
    }
  }

  template <Dtype D, int F0, bool STREAMED>
  void write_tokens(const PassTokens& tokens) {
    for (int64_t token = tokens.begin; token < tokens.end; ++token)
      write_fields<D, F0, STREAMED>(tokens.sums, token, token - tokens.begin);
  }

  // `at`: of the token among those of the pass.
  template <Dtype D, int F0, bool STREAMED, int F = 0>
  TERNC_INLINE void write_fields(const Sums& sums, int64_t token, int64_t at) {
    if constexpr (F < FIELDS) {
      constexpr int64_t ROW = (F0 + F) * FIELD_ROWS;
      const int64_t count = factors_.count - ROW;
      if (count <= 0) return;
      const Output& out = args_.out;
      const int32_t sum_of_q = GROUPS || PLANES == INT8 ? 0 : args_.tokens.sums[token];
      const i32 total = total_of<PLANES, TILES, GROUPS, F0, F>(sums, at, sum_of_q);
      f32 y = mul_f32(mul_f32(to_f32(total), splat_f32(args_.tokens.scale[token])),
                      load_f32(factors_.scale + ROW));
      if (factors_.bias != nullptr) y = add_f32(y, load_f32(factors_.bias + ROW));
      const int64_t i = token * args_.weight.rows + factors_.first + ROW;
      if (count < FIELD_ROWS) return store_ragged<D>(y, out, i, count);
      if (out.residual != nullptr) y = add_f32(rounded<D>(y), load_vector<D>(out.residual, i));
      STREAMED ? stream_vector<D>(out.values, i, y) : store_vector<D>(out.values, i, y);
      write_fields<D, F0, STREAMED, F + 1>(sums, token, at);
    }
  }

  const LinearI8Args& args_;
  const bool streamed_;
  int64_t block_ = -1;
  RowFactors factors_;
};
