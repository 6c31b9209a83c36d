// Whether the compiler knows AMX, and whether this process may use its tiles.
#pragma once

#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define STARLING_HAS_AMX 1
#endif
#endif

#include <cstdint>

namespace starling {

// What ldtilecfg reads: `rows` of each tile of 64 bytes a row; 0 where it is not used.
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// In front of instructions on tiles, whose intrinsics do not say that they read memory.
inline void memory_is_read() { asm volatile("" : : : "memory"); }
inline void memory_is_read(const void* by) { asm volatile("" : : "r"(by) : "memory"); }

// Asks Linux for the tiles' state, once; false where the processor or the system has none, or grants none.
bool may_use_amx();

}  // namespace starling
