// out[M, width] = x / sqrt(mean(x^2) + epsilon) * weight: a block for each row. For products of so many rows that each
// of their blocks would take long to normalize them all.
#include "primitives.h"

struct NormArguments {
  half_bits* out;
  const half_bits* x;
  const half_bits* weight;
  int width;
  float epsilon;
};

constexpr int kThreads = 512;

DEVICE float square(unsigned pair) {
  const float low = low_half(pair), high = high_half(pair);
  return low * low + high * high;
}

DEVICE unsigned scaled(unsigned v, unsigned g, float factor) {
  return pack(low_half(v) * factor * low_half(g), high_half(v) * factor * high_half(g));
}

extern "C" __global__ void __launch_bounds__(kThreads) rms_norm(const NormArguments a) {
  DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // of the warps
  let_next_start();
  wait_for_previous();
  const uint4* x = reinterpret_cast<const uint4*>(a.x + static_cast<long long>(blockIdx.x) * a.width);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < a.width / 8; i += kThreads) {
    const uint4 v = x[i];
    sum += square(v.x) + square(v.y) + square(v.z) + square(v.w);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  block_barrier();
  sum = 0.0f;
  for (int w = 0; w < kThreads / 32; ++w) sum += sums[w];
  const float factor = rsqrtf(sum / a.width + a.epsilon);
  const uint4* weight = reinterpret_cast<const uint4*>(a.weight);
  uint4* out = reinterpret_cast<uint4*>(a.out + static_cast<long long>(blockIdx.x) * a.width);
  for (int i = threadIdx.x; i < a.width / 8; i += kThreads) {
    const uint4 v = x[i], g = weight[i];
    out[i] = make_uint4(scaled(v.x, g.x, factor), scaled(v.y, g.y, factor), scaled(v.z, g.z, factor),
                        scaled(v.w, g.w, factor));
  }
}

#ifdef HOST_EMULATION
extern "C" void emulate_rms_norm(const NormArguments* arguments, unsigned rows) {
  static NormArguments now;
  now = *arguments;
  emulation::launch({rows}, {kThreads}, [] { rms_norm(now); });
}
#endif
