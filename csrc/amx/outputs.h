// Sums of a pass -> y, a few tokens at a time: while the next pass multiplies, so that outputs take
// no time from the tiles.
//
// Stores go to memory in order. One of y that misses the caches would hold up the decoded weights
// behind it, and with them the tiles (a quarter to a third of all time at 256 tokens), so the lines
// of y are asked for OUTPUTS_AHEAD tokens before they are written.
constexpr int64_t OUTPUTS_AHEAD = 8;

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

template <int PLANES, int TILES, bool GROUPS>
class Outputs {
 public:
  Outputs(const LinearI8Args& args, int64_t token_end) : args_(args), token_end_(token_end) {}

  // `sums` are those of this pass and stay until it is written.
  void start(const Passes<PLANES, TILES>& pass, const Sums& sums) {
    sums_ = &sums;
    if (pass.block != block_)
      load_factors(args_.weight, args_.out, block_rows(PLANES), pass.block, factors_);
    block_ = pass.block;
    first_row_ = pass.part * FIELDS * FIELD_ROWS;
    first_ = written_ = fetched_ = pass.token;
    const int64_t left = token_end_ - first_;
    end_ = first_ + (left < TOKENS_AT_ONCE ? left : TOKENS_AT_ONCE);
    if (args_.out.dtype == Dtype::f32) choose<Dtype::f32>(pass.part);
    if (args_.out.dtype == Dtype::bf16) choose<Dtype::bf16>(pass.part);
    if (args_.out.dtype == Dtype::f16) choose<Dtype::f16>(pass.part);
  }

  // Calls of advance(1) from start() to the last token: TOKENS_AT_ONCE + OUTPUTS_AHEAD at most.
  TERNC_INLINE void advance(int64_t tokens) {
    if (written_ == end_) return;
    for (int64_t i = 0; i < tokens && written_ < end_; ++i, ++fetched_) {
      if (fetched_ < end_) fetch(fetched_);
      if (fetched_ - first_ >= OUTPUTS_AHEAD) write_(*this, written_ + 1);
    }
  }
  TERNC_INLINE void write_all() {
    if (written_ < end_) write_(*this, end_);
  }

 private:
  static constexpr int FIELDS = fields_at_once(PLANES, TILES);
  static constexpr int64_t TOKENS_AT_ONCE = Passes<PLANES, TILES>::TOKENS_AT_ONCE, LINE = 64;

  int64_t index(int64_t token, int64_t row) const {
    return token * args_.weight.rows + factors_.first + row;
  }

  TERNC_INLINE void fetch(int64_t token) const {
    // Addresses past the end are harmless to a prefetch, but not to pointer rules.
    const int64_t size = size_of(args_.out.dtype), offset = index(token, first_row_) * size;
    const uintptr_t y = reinterpret_cast<uintptr_t>(args_.out.values) + uintptr_t(offset);
    for (int64_t line = 0; line < FIELDS * FIELD_ROWS * size; line += LINE)
      __builtin_prefetch(reinterpret_cast<void*>(y + uintptr_t(line)), 1);
  }

  template <Dtype D, int PART = 0>
  void choose(int part) {
    if constexpr (PART * FIELDS < fields(PLANES)) {
      if (part == PART)
        write_ = write_tokens<D, PART * FIELDS>;
      else
        choose<D, PART + 1>(part);
    }
  }

  template <Dtype D, int F0>
  static void write_tokens(Outputs& self, int64_t end) {
    for (; self.written_ < end; ++self.written_) self.write_fields<D, F0>();
  }

  template <Dtype D, int F0, int F = 0>
  TERNC_INLINE void write_fields() {
    if constexpr (F < FIELDS) {
      constexpr int64_t ROW = (F0 + F) * FIELD_ROWS;
      const int64_t count = factors_.count - ROW;
      if (count <= 0) return;
      const Tokens& tokens = args_.tokens;
      const Output& out = args_.out;
      const int32_t sum_of_q = GROUPS || PLANES == INT8 ? 0 : tokens.sums[written_];
      const i32 total = total_of<PLANES, TILES, GROUPS, F0, F>(*sums_, written_ - first_, sum_of_q);
      f32 y = mul_f32(mul_f32(to_f32(total), splat_f32(tokens.scale[written_])),
                      load_f32(factors_.scale + ROW));
      if (factors_.bias != nullptr) y = add_f32(y, load_f32(factors_.bias + ROW));
      const int64_t at = index(written_, ROW);
      if (count < FIELD_ROWS) return store_ragged<D>(y, out, at, count);
      if (out.residual != nullptr) y = add_f32(rounded<D>(y), load_vector<D>(out.residual, at));
      store_vector<D>(out.values, at, y);
      write_fields<D, F0, F + 1>();
    }
  }

  const LinearI8Args& args_;
  int64_t token_end_, block_ = -1, first_row_ = 0;
  int64_t first_ = 0, end_ = 0, fetched_ = 0, written_ = 0;  // tokens
  const Sums* sums_ = nullptr;
  void (*write_)(Outputs&, int64_t) = nullptr;
  RowFactors factors_;
};
