// out[M, N] = x[M, K] W[N, K]^T for the 1 to 16 rows of a decode step, with what stands around the product.
//
// Time is the reading of W, once. So: 16-byte loads, many in flight, issued before the previous kernel is over; each
// warp of a block has its part of K, and the parts are added in a fixed order. The product is on tensor cores whatever
// M is: W is the operand of 16 rows, x that of 8 columns, and both take the same permutation of K, chosen so that a
// lane's 16 bytes are contiguous in memory.
//
// INT8: W is uint8 with zero point 128 and an fp16 scale for each 32 of K, as MatMulNBits stores it. The 64 of K that
// four lanes read lie in two such blocks. Each row of x takes two columns, one zero outside of either block, so that
// the sums of the two come apart and are scaled in fp32.
#include "primitives.h"

// Set for each variant on the compiler's command line.
#ifndef LINEAR_K
#define LINEAR_K 4096
#define LINEAR_BITS 8          // 8, or 16: fp16 weights
#define LINEAR_COLUMN_TILES 1  // of 4 rows of x each at 8 bits, of 8 at 16 bits
#define LINEAR_ROW_TILES 1     // of 16 rows of W each
#define LINEAR_WARPS 8
#define LINEAR_UNROLL 4  // loads of 16 bytes for a row of W in a step
#define LINEAR_DEPTH 2   // steps in flight
#define LINEAR_NORM 0    // 1: x is RMS-normalized first
#define LINEAR_EPILOGUE 0
#define LINEAR_MIN_BLOCKS 1  // of a multiprocessor
#endif

enum Epilogue { kStore = 0, kAddResidual = 1, kGated = 2 };

struct LinearArguments {
  half_bits* out;             // [M, N]; gated: [M, N / 2]
  const half_bits* x;         // [M, K]
  const unsigned char* data;  // [N, K] in uint8 or fp16; gated: the gate's rows, then those of the value
  const half_bits* scales;    // [N, K / 32]
  const half_bits* norm;      // [K]
  const half_bits* residual;  // [M, N]; may be out
  int rows;                   // M
  int n;
  float epsilon;
};

template <int K, int BITS, int COLUMN_TILES, int ROW_TILES, int WARPS, int UNROLL, int DEPTH, bool NORM, int EPILOGUE>
struct Linear {
  static constexpr bool kInt8 = BITS == 8;
  static constexpr int kThreads = WARPS * 32;
  static constexpr int kLane = 128 / BITS;          // of K in a lane's 16 bytes
  static constexpr int kStep = UNROLL * 4 * kLane;  // of K
  static constexpr int kSteps = K / kStep;
  static constexpr int kSums = kInt8 ? 2 : 4;  // of a lane and a pair of tiles
  static constexpr int kAllSums = ROW_TILES * COLUMN_TILES * kSums;
  static constexpr int kRowsOfX = COLUMN_TILES * (kInt8 ? 4 : 8);
  static constexpr int kPitch = K + 32;  // of x in shared memory: two rows apart lie in other banks
  static constexpr int kOutputRowTiles = EPILOGUE == kGated ? ROW_TILES / 2 : ROW_TILES;
  static_assert(UNROLL == 1 || UNROLL % 2 == 0, "scales of whole vectors");
  static_assert(K % kStep == 0 && kSteps >= WARPS, "a step for each warp");
  static_assert(EPILOGUE != kGated || ROW_TILES % 2 == 0, "a gate and a value");

  struct Step {
    uint4 data[ROW_TILES][2][UNROLL];
    unsigned scales[ROW_TILES][2][kInt8 ? UNROLL : 1];
  };

  struct Place {
    int tile, step;
    DEVICE void advance(int warp) {
      step += WARPS;
      if (step >= kSteps) {
        step = warp;
        tile += gridDim.x;
      }
    }
  };

  const LinearArguments& a;
  const int lane, warp, group, quad;
  float sums[ROW_TILES][COLUMN_TILES][kSums];
  float* partial;             // [2, WARPS, kAllSums, 32]
  const half_bits* shared_x;  // [M, kPitch]
  int parity = 0;

  DEVICE explicit Linear(const LinearArguments& arguments, unsigned char* shared)
      : a(arguments),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        group(lane / 4),
        quad(lane % 4),
        partial(reinterpret_cast<float*>(shared)),
        shared_x(reinterpret_cast<half_bits*>(shared + 2 * WARPS * kAllSums * 32 * sizeof(float))) {
    clear();
  }

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kAllSums; ++i) (&sums[0][0][0])[i] = 0.0f;
  }

  DEVICE int tiles() const {
    const int n = EPILOGUE == kGated ? a.n / 2 : a.n;
    return (n + kOutputRowTiles * 16 - 1) / (kOutputRowTiles * 16);
  }

  // The first row of W, and of the output, in a tile of 16. Gated: tiles of gate and value in turn.
  DEVICE int output_row(int tile, int row_tile) const {
    return (tile * kOutputRowTiles + (EPILOGUE == kGated ? row_tile / 2 : row_tile)) * 16;
  }
  DEVICE int weight_row(int tile, int row_tile, int within) const {
    const int row = output_row(tile, row_tile) + within;
    if (EPILOGUE != kGated) return min(row, a.n - 1);
    return min(row, a.n / 2 - 1) + (row_tile % 2 ? a.n / 2 : 0);
  }

  DEVICE void load(Step& step, const Place& place) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const long long row = weight_row(place.tile, r, group + half * 8);
        const unsigned char* data = a.data + (row * K + place.step * kStep + quad * kLane) * (BITS / 8);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) step.data[r][half][u] = load_once(data + u * 64);
        if constexpr (kInt8) {
          const half_bits* scales = a.scales + (row * K + place.step * kStep) / 32;
          load_scales(step.scales[r][half], scales);
        }
      }
    }
  }

  DEVICE static void load_scales(unsigned* into, const half_bits* from) {
    if constexpr (UNROLL % 4 == 0) {
#pragma unroll
      for (int i = 0; i < UNROLL / 4; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[i];
        into[4 * i] = v.x, into[4 * i + 1] = v.y, into[4 * i + 2] = v.z, into[4 * i + 3] = v.w;
      }
    } else if constexpr (UNROLL % 2 == 0) {
#pragma unroll
      for (int i = 0; i < UNROLL / 2; ++i) {
        const uint2 v = reinterpret_cast<const uint2*>(from)[i];
        into[2 * i] = v.x, into[2 * i + 1] = v.y;
      }
    } else {
      *into = *reinterpret_cast<const unsigned*>(from);
    }
  }

  // A lane's part of x for 4 * kLane of K: 16 halves at 8 bits, 8 at 16 bits.
  DEVICE void load_x(uint4* into, int column_tile, int k) const {
    const int m = column_tile * (kInt8 ? 4 : 8) + (kInt8 ? group / 2 : group);
    const bool used = m < a.rows && (!kInt8 || quad / 2 == group % 2);
    const half_bits* x = NORM ? shared_x + m * kPitch : a.x + static_cast<long long>(m) * K;
#pragma unroll
    for (int i = 0; i < kLane / 8; ++i) {
      into[i] = used ? *reinterpret_cast<const uint4*>(x + k + quad * kLane + i * 8) : make_uint4(0, 0, 0, 0);
    }
  }

  DEVICE static unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

  // Bytes 0 and 1, or 2 and 3, less the zero point, as halves: 0x6400 | byte is 1024 + byte.
  DEVICE static unsigned bytes_to_pair(unsigned bytes, bool upper) {
    return subtract_pair(select_bytes(bytes, 0x64646464u, upper ? 0x4342u : 0x4140u), 0x64806480u);
  }

  DEVICE void multiply(const Step& step, const Place& place) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      uint4 x[COLUMN_TILES][kLane / 8];
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; ++c) load_x(x[c], c, place.step * kStep + u * 4 * kLane);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        if constexpr (kInt8) {
          multiply_int8(r, step.data[r][0][u], step.data[r][1][u], x, step.scales[r][0][u], step.scales[r][1][u]);
        } else {
          multiply_fp16(r, step.data[r][0][u], step.data[r][1][u], x);
        }
      }
    }
  }

  DEVICE void multiply_int8(int r, const uint4& upper, const uint4& lower, const uint4 (&x)[COLUMN_TILES][kLane / 8],
                            unsigned upper_scales, unsigned lower_scales) {
    float product[COLUMN_TILES][4];
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) product[c][i] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned u = word(upper, j), l = word(lower, j);
      const unsigned a0 = bytes_to_pair(u, false), a1 = bytes_to_pair(l, false);
      const unsigned a2 = bytes_to_pair(u, true), a3 = bytes_to_pair(l, true);
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; ++c) {
        const uint4& values = x[c][j / 2 * (kLane / 16)];
        multiply_add(product[c], a0, a1, a2, a3, word(values, j % 2 * 2), word(values, j % 2 * 2 + 1));
      }
    }
    const float s0 = low_half(upper_scales), s1 = high_half(upper_scales);
    const float s2 = low_half(lower_scales), s3 = high_half(lower_scales);
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; ++c) {
      float* sum = sums[r][c];
      sum[0] += s0 * product[c][0] + s1 * product[c][1];
      sum[1] += s2 * product[c][2] + s3 * product[c][3];
    }
  }

  DEVICE void multiply_fp16(int r, const uint4& upper, const uint4& lower, const uint4 (&x)[COLUMN_TILES][kLane / 8]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; ++c) {
        multiply_add(reinterpret_cast<float (&)[4]>(sums[r][c]), word(upper, 2 * j), word(lower, 2 * j),
                     word(upper, 2 * j + 1), word(lower, 2 * j + 1), word(x[c][0], 2 * j), word(x[c][0], 2 * j + 1));
      }
    }
  }

  // All warps' sums of a tile, added and written. Two buffers in turn, so that one barrier does.
  DEVICE void finish(int tile) {
    float* buffer = partial + parity * WARPS * kAllSums * 32;
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < kAllSums; ++i) buffer[(warp * kAllSums + i) * 32 + lane] = (&sums[0][0][0])[i];
    clear();
    block_barrier();
    constexpr int kOutputs = kOutputRowTiles * COLUMN_TILES * kSums * 32;
    for (int index = threadIdx.x; index < kOutputs; index += kThreads) {
      const int of_lane = index % 32, sum = index / 32 % kSums, c = index / 32 / kSums % COLUMN_TILES;
      const int r = index / 32 / kSums / COLUMN_TILES;
      const int m = kInt8 ? c * 4 + of_lane % 4 : c * 8 + of_lane % 4 * 2 + sum % 2;
      const int row_tile = EPILOGUE == kGated ? 2 * r : r;
      const int n = output_row(tile, row_tile) + of_lane / 4 + (kInt8 ? sum : sum / 2) * 8;
      const int width = EPILOGUE == kGated ? a.n / 2 : a.n;
      if (m >= a.rows || n >= width) continue;
      const int i = (row_tile * COLUMN_TILES + c) * kSums + sum;
      float value = added(buffer, i, of_lane);
      const long long at = static_cast<long long>(m) * width + n;
      if (EPILOGUE == kGated) {
        value = value / (1.0f + exponential(-value)) * added(buffer, i + COLUMN_TILES * kSums, of_lane);
      }
      if (EPILOGUE == kAddResidual) value += to_float(a.residual[at]);
      a.out[at] = to_half(value);
    }
  }

  DEVICE static float added(const float* buffer, int sum, int of_lane) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) value += buffer[(w * kAllSums + sum) * 32 + of_lane];
    return value;
  }

  // x / sqrt(mean(x^2) + epsilon) * norm, into shared memory, by the whole block.
  DEVICE void normalize() {
    half_bits* x = const_cast<half_bits*>(shared_x);
    float* squares = partial;  // [M, WARPS]
    for (int m = 0; m < a.rows; ++m) {
      float square = 0.0f;
      for (int i = threadIdx.x; i < K / 8; i += kThreads) {
        const uint4 v = *reinterpret_cast<const uint4*>(a.x + static_cast<long long>(m) * K + i * 8);
        *reinterpret_cast<uint4*>(x + m * kPitch + i * 8) = v;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float low = low_half(word(v, j)), high = high_half(word(v, j));
          square += low * low + high * high;
        }
      }
      square = warp_sum(square);
      if (lane == 0) squares[m * WARPS + warp] = square;
    }
    block_barrier();
    for (int m = 0; m < a.rows; ++m) {
      float square = 0.0f;
      for (int w = 0; w < WARPS; ++w) square += squares[m * WARPS + w];
      const float factor = rsqrtf(square / K + a.epsilon);
      for (int i = threadIdx.x; i < K / 8; i += kThreads) {
        uint4* at = reinterpret_cast<uint4*>(x + m * kPitch + i * 8);
        const uint4 v = *at, g = *reinterpret_cast<const uint4*>(a.norm + i * 8);
        *at = make_uint4(scaled(v.x, g.x, factor), scaled(v.y, g.y, factor), scaled(v.z, g.z, factor),
                         scaled(v.w, g.w, factor));
      }
    }
    block_barrier();
  }

  DEVICE static unsigned scaled(unsigned v, unsigned g, float factor) {
    return pack(low_half(v) * factor * low_half(g), high_half(v) * factor * high_half(g));
  }

  // The steps in flight, as a list and not an array: an index could move them out of the registers.
  template <int LENGTH, int = 0>
  struct Steps {
    Step step;
    Steps<LENGTH - 1> rest;
  };
  template <int UNUSED>
  struct Steps<0, UNUSED> {};

  template <int LENGTH>
  DEVICE void load_all(Steps<LENGTH>& steps, Place& ahead, int end) const {
    if constexpr (LENGTH > 0) {
      if (ahead.tile < end) load(steps.step, ahead);
      ahead.advance(warp);
      load_all(steps.rest, ahead, end);
    }
  }

  // Each step in turn: multiplied, then loaded anew. False where none is left.
  template <int LENGTH>
  DEVICE bool multiply_all(Steps<LENGTH>& steps, Place& now, Place& ahead, int end) {
    if constexpr (LENGTH > 0) {
      if (now.tile >= end) return false;
      multiply(steps.step, now);
      if (ahead.tile < end) load(steps.step, ahead);
      ahead.advance(warp);
      const int tile = now.tile;
      now.advance(warp);
      if (now.tile != tile) finish(tile);
      return multiply_all(steps.rest, now, ahead, end);
    }
    return true;
  }

  DEVICE void run() {
    const int end = tiles();
    Place now{static_cast<int>(blockIdx.x), warp}, ahead = now;
    Steps<DEPTH> steps;
    load_all(steps, ahead, end);
    let_next_start();
    wait_for_previous();
    if (NORM) normalize();
    while (multiply_all(steps, now, ahead, end)) {
    }
  }
};

extern "C" __global__ void __launch_bounds__(LINEAR_WARPS * 32, LINEAR_MIN_BLOCKS)
    linear(const LinearArguments arguments) {
  DYNAMIC_SHARED(shared);
  Linear<LINEAR_K, LINEAR_BITS, LINEAR_COLUMN_TILES, LINEAR_ROW_TILES, LINEAR_WARPS, LINEAR_UNROLL, LINEAR_DEPTH,
         LINEAR_NORM != 0, LINEAR_EPILOGUE>(arguments, shared)
      .run();
}

#ifdef HOST_EMULATION
extern "C" void emulate_linear(const LinearArguments* arguments, unsigned grid) {
  static LinearArguments now;
  now = *arguments;
  emulation::launch({grid}, {LINEAR_WARPS * 32}, [] { linear(now); });
}
#endif
