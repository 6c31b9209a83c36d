// AMX: tiles of 16 query rows by 16 keys or dimensions, of the same pairs of bfloat16 as attention_bf16.cpp's.
#include "attention/attention_kernels.h"
#include "simd/amx.h"

#if STARLING_HAS_AMX
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c,fma,amx-tile,amx-bf16")

// clang-format off: the order matters
#include "simd/vector_avx512.h"
#include "simd/vector_math.h"
#include "simd/halves_avx512.h"
#include "attention/attention_core.h"
#include "attention/bfloat16_pairs.h"
// clang-format on

namespace starling {
namespace {

constexpr int kWords = 16;     // of a tile's row
constexpr int kTileRows = 16;  // query rows of a tile
constexpr int kWordBytes = 4;

// Tiles 0 to 3: sums of `rows` rows; 4 and 6, 7: their queries and weights; 5: keys or values.
void load_config(int rows) {
  TileConfig config;
  for (int tile : {0, 1, 2, 3, 4, 6, 7}) config.rows[tile] = static_cast<uint8_t>(rows);
  config.rows[5] = kWords;
  memory_is_read(&config);
  _tile_loadconfig(&config);
}

// scores [rows][kKeys] of the rows from `query` on, [rows][head_dim / 2] words.
void score(const float* query, const KeyBlock& block, int words, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int word = 0; word < words; word += kWords) {
    const float* keys = block.keys + word * kKeys;
    _tile_loadd(4, query + word, words * kWordBytes);
    _tile_loadd(5, keys, kKeys * kWordBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, keys + 16, kKeys * kWordBytes);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, keys + 32, kKeys * kWordBytes);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, keys + 48, kKeys * kWordBytes);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, scores, kKeys * kWordBytes);
  _tile_stored(1, scores + 16, kKeys * kWordBytes);
  _tile_stored(2, scores + 32, kKeys * kWordBytes);
  _tile_stored(3, scores + 48, kKeys * kWordBytes);
}

// acc [rows][head_dim] += weights [rows][kKeys / 2] words · values.
void add_weighted(const float* weights, const KeyBlock& block, int head_dim, float* acc) {
  const int stride = head_dim * kWordBytes;
  _tile_loadd(6, weights, kKeys / 2 * kWordBytes);
  _tile_loadd(7, weights + kWords, kKeys / 2 * kWordBytes);
  for (int column = 0; column < head_dim; column += 16) {
    _tile_loadd(0, acc + column, stride);
    _tile_loadd(5, block.values + column, stride);
    _tile_dpbf16ps(0, 6, 5);
    _tile_loadd(5, block.values + kWords * head_dim + column, stride);
    _tile_dpbf16ps(0, 7, 5);
    _tile_stored(0, acc + column, stride);
  }
}

// The keys that a block does not have weigh nothing, and their values must be numbers.
void clear_missing_values(const KeyBlock& block, int head_dim) {
  const int words = (block.count + 1) / 2;
  float* rest = const_cast<float*>(block.values) + static_cast<size_t>(words) * head_dim;
  std::fill_n(rest, static_cast<size_t>(kKeys / 2 - words) * head_dim, 0.0f);
}

template <typename Cache>
void attend_tiles(const AttentionRows& rows, int begin, int end, float* scratch, const Partial& out) {
  if (rows.head_dim % (2 * kWords) != 0) return attend_chunk<BFloat16Pairs, Cache>(rows, begin, end, scratch, out);
  alignas(64) float scores[kTileRows * kKeys], weights[kTileRows * kKeys / 2];
  int loaded = 0;
  each_block<BFloat16Pairs, Cache>(rows, begin, end, scratch, out, [&](const float* queries, const KeyBlock& block) {
    clear_missing_values(block, rows.head_dim);
    for (int row = 0; row < rows.count; row += kTileRows) {
      const int count = std::min(rows.count - row, kTileRows);
      if (count != loaded) load_config(count);
      loaded = count;
      memory_is_read();
      score(queries + static_cast<size_t>(row) * rows.head_dim / 2, block, rows.head_dim / 2, scores);
      for (int r = 0; r < count; ++r) {
        Vector of[kVectors];
        for (int v = 0; v < kVectors; ++v) of[v] = Vector::load(scores + r * kKeys + v * Vector::width);
        weigh<BFloat16Pairs>(rows, row + r, block, of, weights + r * kKeys / 2, out);
      }
      memory_is_read(weights);
      add_weighted(weights, block, rows.head_dim, out.sums + static_cast<size_t>(row) * rows.head_dim);
    }
  });
  _tile_release();
}

template <typename Cache>
constexpr AttentionKernels tile_kernels = {rotate, store_row<Cache>, attend_tiles<Cache>, join};

}  // namespace
}  // namespace starling

const starling::AttentionKernels starling::kAttentionAmx[] = {tile_kernels<Floats>, tile_kernels<Float16>,
                                                              tile_kernels<BFloat16>};

STARLING_TARGET_END
#endif
