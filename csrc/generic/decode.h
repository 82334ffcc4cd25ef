// One field (16 rows x 4 columns) of a step as unsigned bytes code + bias, times 2^carry.
//
// A field is masked where it lies, not shifted down, as long as the carried byte is one that
// dot() takes: the sum then carries 2^carry, and one exact shift at the end removes it.
#pragma once

constexpr int PARTS = FIELD_ROWS / LANES;  // vectors that hold the rows of one field
constexpr int PART_BYTES = STEP_COLUMNS * LANES;
constexpr int64_t L1_AHEAD = 4096;
// The same for several tokens and one block at a time where nothing is fetched into L2: three take
// 102 us, not 114 (4096 -> 4096, one Zen 5 core; one token 2 to 6 % more).
constexpr int64_t L1_FURTHER_AHEAD = 12288;
// The next WINDOW comes from PLACES places of it in turn, since prefetchers of the core follow a
// page each.
constexpr uintptr_t WINDOW = 32768, PLACES = 4;
constexpr int WINDOW_STEPS = 4;  // from one fetch to the next

constexpr int fields(int planes) { return block_rows(planes) / FIELD_ROWS; }
// Bytes of INT8 are signed codes already.
constexpr int bias(int planes) { return planes == INT8 ? 0 : code_max(planes); }

// Bit at which field F starts in its byte (not 3 planes).
constexpr int field_bit(int planes, int field) {
  if (planes == 2) return 4 * (field & 1);
  return field < 4 ? 2 * field : 6;
}

constexpr int carry(int planes, int field) {
  if (planes == 3 || planes == INT8) return 0;
  const int bit = field_bit(planes, field);
  return (2 * code_max(planes)) << bit <= MAX_FIELD ? bit : 0;
}

// 2^-carry, exact.
constexpr float carry_inverse(int planes, int field) {
  return 1.0f / float(1 << carry(planes, field));
}

// The two vectors of EXPANDED from one of DENSE; only instruction sets with byte permutations.
bytes dense_four(bytes packed);
bytes dense_fifth(bytes packed);

template <int PLANES, int F>
TERNC_INLINE bytes decode(const uint8_t* step, int part) {
  const uint8_t* at = step + part * PART_BYTES;
  if constexpr (PLANES == INT8) {
    return load_bytes(at + F * 64);
  } else if constexpr (PLANES == 3) {
    const bytes nibbles = load_bytes(at + F / 2 * 64), fifth = load_bytes(at + 256);
    bytes low = nibbles, high = fifth;
    if constexpr (F % 2 == 1) low = shift_bytes_right<4>(low);
    if constexpr (F < 4) high = shift_bytes_left<4 - F>(high);
    if constexpr (F > 4) high = shift_bytes_right<F - 4>(high);
    return or_bytes(and_bytes(low, splat_byte(0x0f)), and_bytes(high, splat_byte(0x10)));
  } else {
    constexpr int BIT = field_bit(PLANES, F), CARRY = carry(PLANES, F);
    constexpr int MASK = PLANES == 2 ? 15 : 3;
    bytes packed = load_bytes(PLANES == EXPANDED && F == 4 ? at + 64 : at);
    if constexpr (PLANES == DENSE) packed = F == 4 ? dense_fifth(packed) : dense_four(packed);
    if constexpr (BIT != CARRY) packed = shift_bytes_right<BIT - CARRY>(packed);
    return and_bytes(packed, splat_byte(uint8_t(MASK << CARRY)));
  }
}

// The same as signed bytes code * 2^carry.
template <int PLANES, int F>
TERNC_INLINE bytes decode_signed(const uint8_t* step, int part) {
  if constexpr (PLANES == INT8) return decode<PLANES, F>(step, part);
  return sub_bytes(decode<PLANES, F>(step, part),
                   splat_byte(uint8_t(bias(PLANES) << carry(PLANES, F))));
}

// How a walk over packed bytes fetches them ahead, and where the bytes end.
struct Ahead {
  Prefetch to;
  uintptr_t end;
};

// An address past the end of the buffer is harmless to a prefetch, but not to pointer rules.
template <int PLANES>
TERNC_INLINE void prefetch_step(const uint8_t* step, int64_t distance = L1_AHEAD) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(step) + uintptr_t(distance);
  for (int line = 0; line < step_bytes(PLANES); line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at + uintptr_t(line)), 0, 3);
}

// Called at step `s` of a walk, which now is at `step`.
template <int PLANES>
TERNC_INLINE void prefetch_window(const uint8_t* step, int64_t s, const Ahead& ahead) {
  if (ahead.to == Prefetch::l1 || s % WINDOW_STEPS != 0) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(step), next = (at / WINDOW + 1) * WINDOW;
  if (next >= ahead.end) return;
#pragma GCC unroll 5
  for (int line = 0; line < WINDOW_STEPS * step_bytes(PLANES) / int(PLACES); line += 64)
#pragma GCC unroll 4
    for (uintptr_t place = 0; place < PLACES; ++place) {
      const uintptr_t first = next + place * (WINDOW / PLACES) + at % WINDOW / PLACES;
      __builtin_prefetch(reinterpret_cast<const void*>(first + uintptr_t(line)), 0, 2);
    }
}

// The multipliers of a group come once in thousands of bytes: too rarely to be foreseen.
TERNC_INLINE void prefetch_multiplier(const uint8_t* multiplier, int rows) {
  constexpr int64_t GROUPS_AHEAD = 16;
  const uintptr_t at = reinterpret_cast<uintptr_t>(multiplier) + uintptr_t(GROUPS_AHEAD * rows);
  for (int line = 0; line < rows; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at + line), 0, 3);
}
