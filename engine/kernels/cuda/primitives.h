// What the kernels need of the machine, without a CUDA header: halves are carried as bits, two to a word.
// Under HOST_EMULATION the same names are plain C++, so that the kernels run (slowly) without a GPU.
#pragma once

#ifdef HOST_EMULATION
#include "emulation.h"
#else

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
typedef unsigned short half_bits;

DEVICE float to_float(half_bits h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

DEVICE float bfloat_to_float(half_bits h) { return __uint_as_float(static_cast<unsigned>(h) << 16); }

DEVICE half_bits to_half(float f) {
  half_bits h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// Two halves, `low` in the lower bits.
DEVICE unsigned pack(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE unsigned subtract_pair(unsigned a, unsigned b) {
  unsigned d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEVICE unsigned select_bytes(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }

// 16 bytes that no one reads again: past the L1 cache.
DEVICE uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// c[16, 8] += a[16, 16] b[16, 8]; the layout of the fragments is the PTX manual's.
DEVICE void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void shared_add(unsigned* place, unsigned value) { atomicAdd(place, value); }
DEVICE float exponential(float v) { return __expf(v); }

// The next kernel of the stream may start (it waits for this one before it reads a result), and: this one waits so.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// True for the last of `count` blocks that call it; what the others wrote before is then visible. Counts back to 0.
DEVICE bool is_last_block(unsigned* counter, unsigned count, unsigned* shared_flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared_flag = atomicInc(counter, count - 1) == count - 1;
  __syncthreads();
  const bool last = *shared_flag != 0;
  if (last) __threadfence();
  return last;
}

#endif  // HOST_EMULATION

DEVICE float low_half(unsigned pair) { return to_float(static_cast<half_bits>(pair)); }
DEVICE float high_half(unsigned pair) { return to_float(static_cast<half_bits>(pair >> 16)); }

DEVICE float warp_sum(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
