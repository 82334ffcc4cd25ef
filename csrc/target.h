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

#define TERNC_INLINE inline __attribute__((always_inline))
// For code outside the inner loops that would otherwise be copied into every instance of them.
#define TERNC_NOINLINE __attribute__((noinline))
