// dot() in AVX-VNNI: one instruction.
constexpr int MAX_FIELD = 255;  // vpdpbusd sums four byte products in 32 bits

// acc + sum over each lane's four bytes of unsigned u * signed s.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
