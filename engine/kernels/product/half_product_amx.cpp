// AMX: tdpbf16ps multiplies a tile of 16 rows of 32 bfloat16 by one of 32 x 16, and adds to 16 x 16 float32.
//
// An activation is two bfloat16, its nearest one and what that leaves: 16 bits of it instead of 8. They are rows of a
// tile of their own, multiplied like any other, and added at the end. A row's sums depend on no other row of a tile.
#include "product/half_product.h"
#include "simd/amx.h"

#if STARLING_HAS_AMX
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")

// clang-format off: the order matters
#include "simd/vector_avx512.h"
#include "simd/vector_math.h"
#include "product/projection_core.h"
// clang-format on

namespace starling {
namespace {

constexpr int kPlanes = 2;
constexpr int kTileBytes = 1024, kLine = 64;  // a tile, and a row of it
constexpr int kPlaneBytes = kHalfBlock * 2;

__m512i to_bfloat16(Vector low, Vector high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }
Vector widened(__m256i halves) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))}; }

// [groups of 8 rows][blocks][8 rows][2 planes][32]: a tile for each block.
void prepare(const float* row, int inputs, const Norm& norm, const PreparedRows& out, int index) {
  const bool normed = norm.weight != nullptr;
  const Vector factor = Vector::all(normed ? inverse_root_mean_square(row, inputs, norm.epsilon) : 1.0f);
  uint8_t* to = out.values + static_cast<size_t>(index / kRowsTogether) * out.blocks * kTileBytes +
                index % kRowsTogether * kPlanes * kPlaneBytes;
  for (int block = 0; block < out.blocks; ++block, to += kTileBytes) {
    Vector x[2];
    for (int i = 0; i < 2; ++i) {
      const int at = block * kHalfBlock + i * Vector::width;
      const Vector::Mask mask = Vector::first(inputs - at);
      x[i] = Vector::load(row + at, mask);
      if (normed) x[i] = x[i] * factor * Vector::load(norm.weight + at, mask);
    }
    const __m512i near = to_bfloat16(x[0], x[1]);
    const Vector left[2] = {x[0] - widened(_mm512_castsi512_si256(near)),
                            x[1] - widened(_mm512_extracti64x4_epi64(near, 1))};
    _mm512_storeu_si512(to, near);
    _mm512_storeu_si512(to + kPlaneBytes, to_bfloat16(left[0], left[1]));
  }
}

// Tiles 0, 1: sums of the first eight rows, 2, 3: of the next; 4, 5: activations; 6, 7: weights.
void load_config(int first, int second) {
  TileConfig config;
  for (int tile : {0, 1, 4}) config.rows[tile] = static_cast<uint8_t>(first * kPlanes);
  for (int tile : {2, 3, 5}) config.rows[tile] = static_cast<uint8_t>(std::max(second, 1) * kPlanes);
  config.rows[6] = config.rows[7] = kTile;
  memory_is_read(&config);
  _tile_loadconfig(&config);
}

template <bool Both>
void multiply_tiles(const uint8_t* x, size_t group, const uint16_t* weights, int blocks) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int block = 0; block < blocks; ++block) {
    _tile_loadd(4, x, kLine);
    _tile_loadd(6, weights, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + kHalfTileSize, kLine);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Both) {
      _tile_loadd(5, x + group, kLine);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    x += kTileBytes;
    weights += 2 * kHalfTileSize;
  }
}

struct alignas(64) Sums {
  float of[4][kRowsTogether][kPlanes][kTile];
};

void finish_rows(const HalfWeights& weights, const Epilogue& epilogue, int row, int count, int pair, const Sums& sums,
                 int tile) {
  const auto whole = [&](int at, int r) { return Vector::load(sums.of[at][r][0]) + Vector::load(sums.of[at][r][1]); };
  for (int r = 0; r < count; ++r) finish(weights, epilogue, row + r, pair, 0, whole(tile, r), whole(tile + 1, r));
}

void multiply(const HalfWeights& weights, const PreparedRows& rows, int first, int last, int pair,
              const Epilogue& epilogue) {
  const size_t group = static_cast<size_t>(rows.blocks) * kTileBytes;
  Sums sums;
  for (int row = first, loaded = 0; row < last; row += 2 * kRowsTogether) {
    const int here = std::min(last - row, kRowsTogether), next = std::min(last - row - here, kRowsTogether);
    if (here + next != loaded) load_config(here, next);
    loaded = here + next;
    const uint8_t* x = rows.values + row / kRowsTogether * group;
    if (next > 0) {
      multiply_tiles<true>(x, group, weights.block(pair, 0), rows.blocks);
      _tile_stored(2, sums.of[2], kLine);
      _tile_stored(3, sums.of[3], kLine);
    } else {
      multiply_tiles<false>(x, group, weights.block(pair, 0), rows.blocks);
    }
    _tile_stored(0, sums.of[0], kLine);
    _tile_stored(1, sums.of[1], kLine);
    finish_rows(weights, epilogue, row, here, pair, sums, 0);
    finish_rows(weights, epilogue, row + here, next, pair, sums, 2);
  }
  _tile_release();
}

}  // namespace

const HalfKernels kHalfAmx = {"amx-bf16", prepare, multiply};

}  // namespace starling

STARLING_TARGET_END
#endif
