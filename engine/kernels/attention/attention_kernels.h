// Attention over a KV cache: the data, and what an instruction set offers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace starling {

constexpr int kChunk = 128;    // positions that one softmax covers before it is joined with the next
constexpr int kMostKeys = 64;  // positions that any of the kernels takes at a time

// Query rows that see the same head of keys and values: row i is query head i % heads of token i / heads, and the token
// stands at `position` + i / heads. It sees the keys up to its own, at most `window` of them (0: all).
struct AttentionRows {
  const float* queries;  // [count][head_dim], scaled
  const void* keys;      // [positions][head_dim], of the cache's type
  const void* values;    // [positions][head_dim]
  int count;
  int head_dim;
  int heads;
  int position;
  int window;
};

// A softmax not yet divided by its total: by row, the greatest score, the total of e^(score - greatest), and the values
// added up with these weights.
struct Partial {
  float* greatest;  // [count]
  float* totals;    // [count]
  float* sums;      // [count][head_dim]
};

// A position's row of the rotary tables.
struct Angles {
  const float* cos;
  const float* sin;
  int count;  // half of the rotated dimensions; 0: nothing is rotated
};

constexpr int kMostHeadDim = 256;

// What the KV cache holds; numbers are multiplied as the kernels say, whatever it is.
enum class CacheType : uint8_t { kFloat32, kFloat16, kBFloat16 };
constexpr size_t kCacheTypes = 3;

// The functions of one instruction set for one type of cache. Head dimensions are multiples of 16 up to kMostHeadDim.
struct AttentionKernels {
  void (*rotate)(const float* x, const Angles& angles, bool interleaved, int head_dim, float scale, float* out);
  void (*store)(const float* row, int head_dim, void* to);  // into the cache
  // Attention over positions [begin, end) of one chunk; `scratch` holds attend_scratch(rows.count, head_dim) floats.
  void (*attend)(const AttentionRows& rows, int begin, int end, float* scratch, const Partial& out);
  void (*join)(const AttentionRows& rows, const Partial& next, const Partial& into);
};

// Keys, values and queries in the form in which they are multiplied, and keys or values as float32.
constexpr size_t attend_scratch(int rows, int head_dim) { return (3 * size_t{kMostKeys} + rows) * head_dim; }

// By type of cache.
extern const AttentionKernels kAttentionAmx[kCacheTypes];   // the same by tiles
extern const AttentionKernels kAttentionBf16[kCacheTypes];  // AVX-512 with products of bfloat16
extern const AttentionKernels kAttentionAvx512[kCacheTypes];
extern const AttentionKernels kAttentionAvx2[kCacheTypes];
extern const AttentionKernels kAttentionNeon[kCacheTypes];

// The best this processor can run; nullptr where it can run none. `reduced` allows products of bfloat16.
const AttentionKernels* attention_kernels(bool reduced, CacheType type);

}  // namespace starling
