// Around cuBLAS, for products of many rows: weights to float16 before it, silu(gate) * value after it.
#include "primitives.h"

struct DequantizeArguments {
  half_bits* out;             // [blocks, 32]
  const unsigned char* data;  // likewise, with zero point 128
  const half_bits* scales;    // [blocks]
  long long blocks;
};

struct GateArguments {
  half_bits* out;      // [rows, width]
  const half_bits* x;  // [rows, 2, width]: gates, then values
  int rows, width;     // width: a multiple of 8
};

constexpr int kThreads = 256;

DEVICE unsigned dequantized(unsigned bytes, int first, float scale) {
  const float low = static_cast<float>(static_cast<int>(bytes >> (8 * first) & 255u) - 128);
  const float high = static_cast<float>(static_cast<int>(bytes >> (8 * first + 8) & 255u) - 128);
  return pack(low * scale, high * scale);
}

// A thread takes 8 weights.
extern "C" __global__ void __launch_bounds__(kThreads) dequantize(const DequantizeArguments a) {
  let_next_start();
  wait_for_previous();
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.blocks * 4) return;
  const uint2 bytes = reinterpret_cast<const uint2*>(a.data)[i];
  const float scale = to_float(a.scales[i / 4]);
  reinterpret_cast<uint4*>(a.out)[i] = make_uint4(dequantized(bytes.x, 0, scale), dequantized(bytes.x, 2, scale),
                                                  dequantized(bytes.y, 0, scale), dequantized(bytes.y, 2, scale));
}

DEVICE float gated(float gate, float value) { return gate / (1.0f + exponential(-gate)) * value; }
DEVICE unsigned gated_pair(unsigned gate, unsigned value) {
  return pack(gated(low_half(gate), low_half(value)), gated(high_half(gate), high_half(value)));
}

// A thread takes 8 columns of a row. The grid has no more threads than there are of those, rounded up to its blocks.
extern "C" __global__ void __launch_bounds__(kThreads) gate(const GateArguments a) {
  let_next_start();
  wait_for_previous();
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  const int each = a.width / 8;
  const long long row = i / each;
  const int column = static_cast<int>(i % each);
  if (row >= a.rows) return;
  const uint4* x = reinterpret_cast<const uint4*>(a.x) + row * 2 * each + column;
  const uint4 g = x[0], v = x[each];
  reinterpret_cast<uint4*>(a.out)[i] =
      make_uint4(gated_pair(g.x, v.x), gated_pair(g.y, v.y), gated_pair(g.z, v.z), gated_pair(g.w, v.w));
}

#ifdef HOST_EMULATION
extern "C" void emulate_dequantize(const DequantizeArguments* arguments, unsigned grid) {
  static DequantizeArguments now;
  now = *arguments;
  emulation::launch({grid}, {kThreads}, [] { dequantize(now); });
}
extern "C" void emulate_gate(const GateArguments* arguments, unsigned grid) {
  static GateArguments now;
  now = *arguments;
  emulation::launch({grid}, {kThreads}, [] { gate(now); });
}
#endif
