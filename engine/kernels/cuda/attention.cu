// Grouped-query attention of a decode step: one new position of each row. Rotates q and k, appends k and v to the
// cache, and attends to the positions that are there, by blocks that take a part of them each; the last block of a
// key/value head to finish adds the parts up, in their order. The row's length is read here, so that a captured launch
// serves every step.
//
// A warp takes 16 positions at a time. Scores come from tensor cores (16 positions by up to 8 query heads); the values
// are weighted lane by lane, 4 of the head's 128 dimensions each.
#include "primitives.h"

#ifndef ATTENTION_GROUP
#define ATTENTION_GROUP 4  // query heads of a key/value head, at most 8
#define ATTENTION_WARPS 4
#define ATTENTION_EARLY 1  // reads the cache before the previous kernel is over: where that one doesn't write it
#endif

struct AttentionArguments {
  half_bits* out;            // [rows, heads, 128]
  const half_bits* qkv;      // [rows, heads + 2 kv_heads, 128]
  half_bits* keys;           // [rows, kv_heads, max_positions, 128]
  half_bits* values;         // likewise
  const half_bits* cosines;  // [positions, 64]
  const half_bits* sines;
  const int* lengths;  // [rows]: positions in the cache, which is where the new one goes
  float* parts;        // [rows, kv_heads, splits, group, 130]
  unsigned* counters;  // [rows, kv_heads], zero between launches
  int max_positions;
  int window;  // positions that are seen, the new one among them; 0: all
  float scale;
};

constexpr int kHead = 128, kTile = 16, kPart = kHead + 2;
constexpr float kNone = -1e30f;

template <int GROUP, int WARPS, bool EARLY>
struct Attention {
  static constexpr int kThreads = WARPS * 32;
  static_assert(GROUP <= 8, "eight columns");

  struct Shared {
    half_bits q[8][kHead];
    half_bits key[kHead], value[kHead];
    float weights[WARPS][kTile][8];
    float factors[WARPS][8];
    float parts[WARPS][GROUP][kPart];
    unsigned flag;
  };

  struct Tile {
    uint4 keys[2][4];     // rows group and group + 8, 8 halves of each 32
    uint2 values[kTile];  // 4 halves
  };

  const AttentionArguments& a;
  Shared& shared;
  const int lane, warp, group, quad;
  const int kv_head, row, kv_heads, past;
  int first, last, active;
  half_bits *keys, *values;

  DEVICE Attention(const AttentionArguments& arguments, Shared& memory)
      : a(arguments),
        shared(memory),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        group(lane / 4),
        quad(lane % 4),
        kv_head(blockIdx.y),
        row(blockIdx.z),
        kv_heads(gridDim.y),
        past(arguments.lengths[blockIdx.z]) {
    const int begin = a.window > 0 ? max(0, past + 1 - a.window) : 0;
    const int count = past + 1 - begin, splits = gridDim.x, least = WARPS * kTile;
    const int each = ((count + splits - 1) / splits + least - 1) / least * least;
    active = (count + each - 1) / each;
    first = begin + static_cast<int>(blockIdx.x) * each;
    last = min(first + each, past + 1);
    const long long start = static_cast<long long>(row * kv_heads + kv_head) * a.max_positions * kHead;
    keys = a.keys + start;
    values = a.values + start;
  }

  DEVICE int position(int tile, int i) const { return min(tile + i, last - 1); }

  DEVICE void load(Tile& into, int tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const half_bits* key = keys + position(tile, group + half * 8) * kHead + quad * 8;
#pragma unroll
      for (int c = 0; c < 4; ++c) into.keys[half][c] = *reinterpret_cast<const uint4*>(key + c * 32);
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      into.values[i] = *reinterpret_cast<const uint2*>(values + position(tile, i) * kHead + lane * 4);
    }
  }

  // The new position is not in the cache yet, or may not be: it comes from shared memory.
  DEVICE void take_new(Tile& into, int tile) const {
    if (position(tile, kTile - 1) != past) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (position(tile, group + half * 8) == past) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          into.keys[half][c] = *reinterpret_cast<const uint4*>(shared.key + quad * 8 + c * 32);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (position(tile, i) == past) into.values[i] = *reinterpret_cast<const uint2*>(shared.value + lane * 4);
    }
  }

  DEVICE void rotate(const half_bits* from, half_bits* to, int i) const {
    const float cosine = to_float(a.cosines[past * (kHead / 2) + i]), sine = to_float(a.sines[past * (kHead / 2) + i]);
    const float low = to_float(from[i]), high = to_float(from[i + kHead / 2]);
    to[i] = to_half(low * cosine - high * sine);
    to[i + kHead / 2] = to_half(high * cosine + low * sine);
  }

  // q of the group, and the new k and v, which the block that has the last position also appends.
  DEVICE void prepare() {
    const int heads = kv_heads * GROUP;
    const half_bits* qkv = a.qkv + static_cast<long long>(row) * (heads + 2 * kv_heads) * kHead;
    for (int i = threadIdx.x; i < GROUP * kHead / 2; i += kThreads) {
      const int head = i / (kHead / 2);
      rotate(qkv + (kv_head * GROUP + head) * kHead, shared.q[head], i % (kHead / 2));
    }
    if (last == past + 1) {
      for (int i = threadIdx.x; i < kHead / 2; i += kThreads) {
        rotate(qkv + (heads + kv_head) * kHead, shared.key, i);
        const half_bits* value = qkv + (heads + kv_heads + kv_head) * kHead;
        half_bits *new_key = keys + past * kHead, *new_value = values + past * kHead;
#pragma unroll
        for (int at = i; at < kHead; at += kHead / 2) {
          new_key[at] = shared.key[at];
          new_value[at] = shared.value[at] = value[at];
        }
      }
    }
    block_barrier();
  }

  DEVICE static unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

  DEVICE static float group_max(float v) {
    for (int mask = 4; mask < 32; mask *= 2) v = max(v, shuffle_xor(v, mask));
    return v;
  }
  DEVICE static float group_sum(float v) {
    for (int mask = 4; mask < 32; mask *= 2) v += shuffle_xor(v, mask);
    return v;
  }

  DEVICE void run() {
    if (static_cast<int>(blockIdx.x) >= active) {
      wait_for_previous();
      return;
    }
    int tile = first + warp * kTile;
    Tile now;
    if (EARLY && tile < last) load(now, tile);
    let_next_start();
    wait_for_previous();
    prepare();
    if (!EARLY && tile < last) load(now, tile);

    uint4 q[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4* from = reinterpret_cast<const uint4*>(shared.q[group] + c * 32 + quad * 8);
      q[c] = group < GROUP ? *from : make_uint4(0, 0, 0, 0);
    }
    float most[2] = {kNone, kNone}, total[2] = {0.0f, 0.0f};  // of heads 2 quad and 2 quad + 1
    float sums[GROUP][4] = {};
    while (tile < last) {
      take_new(now, tile);
      float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          multiply_add(scores, word(now.keys[0][c], 2 * j), word(now.keys[1][c], 2 * j),
                       word(now.keys[0][c], 2 * j + 1), word(now.keys[1][c], 2 * j + 1), word(q[c], 2 * j),
                       word(q[c], 2 * j + 1));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[i] = tile + group + i / 2 * 8 < last ? scores[i] * a.scale : kNone;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float before = most[i];
        most[i] = max(before, group_max(max(scores[i], scores[i + 2])));
        const float factor = exponential(before - most[i]);
        const float upper = exponential(scores[i] - most[i]), lower = exponential(scores[i + 2] - most[i]);
        total[i] = total[i] * factor + upper + lower;
        shared.weights[warp][group][2 * quad + i] = upper;
        shared.weights[warp][group + 8][2 * quad + i] = lower;
        if (group == 0) shared.factors[warp][2 * quad + i] = factor;
      }
      warp_barrier();
#pragma unroll
      for (int h = 0; h < GROUP; ++h) {
#pragma unroll
        for (int d = 0; d < 4; ++d) sums[h][d] *= shared.factors[warp][h];
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const uint2 v = now.values[i];
        const float value[4] = {low_half(v.x), high_half(v.x), low_half(v.y), high_half(v.y)};
#pragma unroll
        for (int h = 0; h < GROUP; ++h) {
          const float weight = shared.weights[warp][i][h];
#pragma unroll
          for (int d = 0; d < 4; ++d) sums[h][d] += weight * value[d];
        }
      }
      warp_barrier();
      tile += WARPS * kTile;
      if (tile < last) load(now, tile);
    }
    join_warps(most, total, sums);
  }

  DEVICE void join_warps(const float (&most)[2], const float (&total)[2], const float (&sums)[GROUP][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float all = group_sum(total[i]);
      if (group == 0 && 2 * quad + i < GROUP) {
        shared.parts[warp][2 * quad + i][kHead] = most[i];
        shared.parts[warp][2 * quad + i][kHead + 1] = all;
      }
    }
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
#pragma unroll
      for (int d = 0; d < 4; ++d) shared.parts[warp][h][lane * 4 + d] = sums[h][d];
    }
    block_barrier();
    const int pair = row * kv_heads + kv_head;
    half_bits* out = a.out + static_cast<long long>(pair) * GROUP * kHead;
    float* parts = a.parts + static_cast<long long>(pair) * gridDim.x * GROUP * kPart;
    const float* of_warps = &shared.parts[0][0][0];
    if (active == 1) {
      for (int i = threadIdx.x; i < GROUP * kHead; i += kThreads) {
        const Sum sum = joined(of_warps, WARPS, i);
        out[i] = to_half(sum.value / sum.total);
      }
      return;
    }
    float* part = parts + blockIdx.x * GROUP * kPart;
    for (int i = threadIdx.x; i < GROUP * kHead; i += kThreads) {
      const Sum sum = joined(of_warps, WARPS, i);
      float* to = part + i / kHead * kPart;
      to[i % kHead] = sum.value;
      if (i % kHead == 0) {
        to[kHead] = sum.most;
        to[kHead + 1] = sum.total;
      }
    }
    if (!is_last_block(a.counters + pair, active, &shared.flag)) return;
    for (int i = threadIdx.x; i < GROUP * kHead; i += kThreads) {
      const Sum sum = joined(parts, active, i);
      out[i] = to_half(sum.value / sum.total);
    }
  }

  struct Sum {
    float value, most, total;
  };

  // Parts [count, GROUP, kPart] of element i of [GROUP, kHead], each weighted by its own largest score.
  DEVICE static Sum joined(const float* parts, int count, int i) {
    const float* part = parts + i / kHead * kPart;
    Sum sum{0.0f, kNone, 0.0f};
#pragma unroll 8
    for (int p = 0; p < count; ++p) sum.most = max(sum.most, part[p * GROUP * kPart + kHead]);
#pragma unroll 8
    for (int p = 0; p < count; ++p) {
      const float* from = part + p * GROUP * kPart;
      const float weight = exponential(from[kHead] - sum.most);
      sum.value += weight * from[i % kHead];
      sum.total += weight * from[kHead + 1];
    }
    return sum;
  }
};

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32) attention(const AttentionArguments arguments) {
  using Kernel = Attention<ATTENTION_GROUP, ATTENTION_WARPS, ATTENTION_EARLY != 0>;
  DYNAMIC_SHARED(shared);
  Kernel(arguments, *reinterpret_cast<Kernel::Shared*>(shared)).run();
}

#ifdef HOST_EMULATION
extern "C" void emulate_attention(const AttentionArguments* arguments, unsigned x, unsigned y, unsigned z) {
  static AttentionArguments now;
  now = *arguments;
  emulation::launch({x, y, z}, {ATTENTION_WARPS * 32}, [] { attention(now); });
}
#endif
