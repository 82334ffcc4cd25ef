// Regions of a file compiled for one instruction set, whatever flags the file is compiled with.
// Use after every #include: code of standard headers inside a region would leak to the linker.
#pragma once

#define TERNC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
  #define TERNC_TARGET_BEGIN(features) \
    TERNC_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
  #define TERNC_TARGET_END TERNC_PRAGMA(clang attribute pop)
#else
  #define TERNC_TARGET_BEGIN(features) \
    TERNC_PRAGMA(GCC push_options)     \
    TERNC_PRAGMA(GCC target(features))
  #define TERNC_TARGET_END TERNC_PRAGMA(GCC pop_options)
#endif

// Tile instructions: GCC 11, clang 11.
#if defined(__x86_64__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>))
  #define TERNC_HAS_AMX 1
#endif

#if defined(__x86_64__) && __has_include(<avxvnniintrin.h>)  // GCC 11, clang 12
  #define TERNC_HAS_AVX_VNNI 1
#endif

#define TERNC_INLINE inline __attribute__((always_inline))
// For code outside the inner loops that would otherwise be copied into every instance of them.
#define TERNC_NOINLINE __attribute__((noinline))
// An inner loop and its epilogue. GCC 12's partial redundancy elimination moves part of the
// epilogue into the loop as 26 register moves a step; without it 315 -> 357 GMAC/s (1 plane, 64
// tokens, 4096 -> 1024, one Zen 5 core).
#if defined(__clang__)
  #define TERNC_TILE TERNC_NOINLINE
#else
  #define TERNC_TILE __attribute__((noinline, optimize("no-tree-pre")))
#endif
