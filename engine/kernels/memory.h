// Memory for weights and for scratch: aligned, on huge pages where Linux gives them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace starling {

// Owns `size` values of T; not initialized. A decode step reads every weight once: on 4 KiB pages it would miss the
// TLB every 4 KiB, so large arrays start on a huge page and ask for them before they are written.
template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t size) : size_(size) {
    const size_t bytes = size * sizeof(T);
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
  }

  T* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

// Scratch of one thread, which grows and is kept: a step allocates nothing once the longest one has been seen.
template <typename T>
T* grown(Array<T>& scratch, size_t size) {
  if (scratch.size() < size) scratch = Array<T>(size + size / 2);
  return scratch.data();
}

// Tell the system that these bytes, which were read from a mapped file, are not needed soon. Loses nothing: what is
// read again comes from the file again.
inline void let_go(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace starling
