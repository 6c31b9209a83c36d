// Compile a part of a file for an instruction set that the rest of the library does not assume.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

// Ahead of any target region: what the standard library defines inside one would be compiled for it, and the linker
// might take that copy for everybody.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define STARLING_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define STARLING_TARGET_BEGIN(features) \
  STARLING_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define STARLING_TARGET_END STARLING_PRAGMA(clang attribute pop)
#else
#define STARLING_TARGET_BEGIN(features) STARLING_PRAGMA(GCC push_options) STARLING_PRAGMA(GCC target(features))
#define STARLING_TARGET_END STARLING_PRAGMA(GCC pop_options)
#endif
