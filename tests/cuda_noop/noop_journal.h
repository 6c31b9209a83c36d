// What this room's libraries share: counts of what was asked of CUDA, and whose memory is whose.
//
// Device memory is memory of the host. Copies and sets of up to kMostDone bytes are done, larger ones are counted
// alone: no kernel computes anything, so that nothing reads weights and caches, and a model of 14 GB takes no memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace noop {

constexpr size_t kMostDone = 1 << 20;

enum class Memory { kPageable, kDevice, kPinned };

// One more of it. While a stream is captured, it is of what the capture holds.
void count(const std::string& what);
// A call that CUDA forbids while a stream is captured.
void count_if_capturing(const char* call);

void begin_capture();
void end_capture();

void* allocate(size_t bytes, Memory kind);
void release(void* address);
Memory kind_of(const void* address);
size_t device_bytes();

void copy(void* to, const void* from, size_t bytes, const char* how);
void set(void* address, int value, size_t bytes);

// The kernels of a loaded library, by their functions on the host.
void* add_fat_binary(const void* content);
void add_kernel(void* fat_binary, const void* function, const char* name);
void count_kernel(const void* function, const char* how);

}  // namespace noop
