// The primitives in plain C++, and blocks of threads as fibers on one thread: the kernels' logic without a GPU.
// A fiber runs until a barrier, a shuffle or a product of tiles; the fibers' order is drawn anew for each block, and
// shared memory is filled with NaN, so that a missing barrier or an unset word shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::shared_memory()
typedef unsigned short half_bits;

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max;
using std::min;
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

namespace emulation {

constexpr size_t kStack = 256 << 10, kSharedMemory = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  dim3 thread;
  bool done = false;
  int waits_for = 0;  // barriers of its group passed, when it may go on
};

struct Group {  // threads that meet at a barrier
  int size = 0, arrived = 0, passed = 0;
};

struct Block {
  dim3 grid, block, index;
  std::vector<Fiber> fibers;
  std::vector<Group> warps;
  Group all;
  std::vector<float> exchange;  // a few words of each thread
  ucontext_t scheduler;
  int current = 0;
  void (*body)() = nullptr;
};

inline Block& state() {
  static Block block;
  return block;
}
inline unsigned char* shared_memory() {
  alignas(128) static unsigned char memory[kSharedMemory];
  return memory;
}
inline std::mt19937& random() {
  static std::mt19937 engine(7);
  return engine;
}
inline Fiber& self() { return state().fibers[state().current]; }
inline int warp_of_self() { return state().current / 32; }

inline void meet(Group& group) {
  const int ticket = group.passed + 1;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    group.passed = ticket;
  }
  while (group.passed < ticket) swapcontext(&self().context, &state().scheduler);
}

inline void fiber_main() {
  state().body();
  self().done = true;
  while (true) swapcontext(&self().context, &state().scheduler);
}

inline void run_block() {
  Block& b = state();
  const int threads = b.block.x * b.block.y;
  std::memset(shared_memory(), 0xff, kSharedMemory);
  b.fibers.resize(threads);
  b.warps.assign((threads + 31) / 32, {32});
  b.all = {threads};
  b.exchange.assign(threads * 16, 0.0f);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = b.fibers[t];
    fiber.done = false;
    fiber.thread = {t % b.block.x, t / b.block.x, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random());
  for (int left = threads; left > 0;) {
    for (int t : order) {
      if (b.fibers[t].done) continue;
      b.current = t;
      swapcontext(&b.scheduler, &b.fibers[t].context);
      if (b.fibers[t].done) --left;
    }
  }
}

inline void launch(dim3 grid, dim3 block, void (*body)()) {
  Block& b = state();
  b.grid = grid, b.block = block, b.body = body;
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random());
  for (unsigned i : order) {
    b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block();
  }
}

}  // namespace emulation

#define threadIdx (emulation::self().thread)
#define blockIdx (emulation::state().index)
#define gridDim (emulation::state().grid)
#define blockDim (emulation::state().block)

inline float to_float(half_bits h) {
  _Float16 v;
  std::memcpy(&v, &h, 2);
  return static_cast<float>(v);
}
inline float bfloat_to_float(half_bits h) {
  const unsigned bits = static_cast<unsigned>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline half_bits to_half(float f) {
  const _Float16 v = static_cast<_Float16>(f);
  half_bits h;
  std::memcpy(&h, &v, 2);
  return h;
}
inline unsigned pack(float low, float high) { return to_half(low) | static_cast<unsigned>(to_half(high)) << 16; }
inline float half_of(unsigned pair, int i) { return to_float(static_cast<half_bits>(pair >> 16 * i)); }
inline unsigned subtract_pair(unsigned a, unsigned b) {
  return pack(half_of(a, 0) - half_of(b, 0), half_of(a, 1) - half_of(b, 1));
}
inline unsigned select_bytes(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline uint4 load_once(const void* address) { return *static_cast<const uint4*>(address); }

inline void warp_barrier() { emulation::meet(emulation::state().warps[emulation::warp_of_self()]); }
inline void block_barrier() { emulation::meet(emulation::state().all); }
inline void shared_add(unsigned* place, unsigned value) { *place += value; }

inline float shuffle_xor(float v, int mask) {
  auto& b = emulation::state();
  const int t = b.current;
  b.exchange[t * 16] = v;
  warp_barrier();
  const float other = b.exchange[(t ^ mask) * 16];
  warp_barrier();
  return other;
}

inline void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  auto& block = emulation::state();
  const int t = block.current, first = t / 32 * 32, group = t % 32 / 4, quad = t % 4;
  const unsigned words[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(&block.exchange[t * 16], words, sizeof words);
  warp_barrier();
  auto word = [&](int lane, int i) {
    unsigned w;
    std::memcpy(&w, &block.exchange[(first + lane) * 16 + i], 4);
    return w;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = quad * 2 + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float a = half_of(word(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2), k % 2);
      const float b = half_of(word(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
      sum += a * b;
    }
    c[i] += sum;
  }
  warp_barrier();
}

inline float exponential(float v) { return std::exp(v); }
inline void let_next_start() {}
inline void wait_for_previous() {}

inline bool is_last_block(unsigned* counter, unsigned count, unsigned* shared_flag) {
  block_barrier();
  if (emulation::state().current == 0) {
    const unsigned before = *counter;
    *counter = before >= count - 1 ? 0 : before + 1;
    *shared_flag = before == count - 1;
  }
  block_barrier();
  return *shared_flag != 0;
}
