// Memory for weights and for scratch: aligned, on huge pages where Linux gives them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace starling {

constexpr size_t kHugePage = size_t{2} << 20;

// Bytes that start on a huge page and ask for more of them before they are written: a decode step reads every weight
// once, and on 4 KiB pages it would miss the TLB every 4 KiB.
inline std::shared_ptr<uint8_t> huge_bytes(size_t bytes) {
  const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(kHugePage, size));
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data, size, MADV_HUGEPAGE);
#endif
  return {data, [](uint8_t* memory) { std::free(memory); }};
}

// Bytes on huge pages that the weights of many operators share, since those of one seldom fill a page. Memory goes back
// when the last array in a piece of it is gone.
inline std::shared_ptr<uint8_t> pooled_bytes(size_t bytes) {
  constexpr size_t kPiece = 16 * kHugePage;  // what is not written to is not taken from the system
  static std::mutex mutex;
  static std::weak_ptr<uint8_t> newest;
  static size_t used = 0;
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > kPiece / 4) return huge_bytes(bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<uint8_t> piece = newest.lock();
  if (piece == nullptr || used + bytes > kPiece) {
    piece = huge_bytes(kPiece);
    newest = piece;
    used = 0;
  }
  uint8_t* place = piece.get() + used;
  used += bytes;
  return {piece, place};
}

// `size` values of T for weights; not initialized.
template <typename T>
class Weights {
 public:
  Weights() = default;
  explicit Weights(size_t size) : bytes_(pooled_bytes(size * sizeof(T))) {}

  T* data() const { return reinterpret_cast<T*>(bytes_.get()); }

 private:
  std::shared_ptr<uint8_t> bytes_;
};

// `size` values of T for scratch; not initialized.
template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t size)
      : data_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64))), size_(size) {
    if (data_ == nullptr) throw std::bad_alloc();
  }

  T* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

// Scratch of one thread, which grows and is kept: a step allocates nothing once the longest one has been seen.
template <typename T>
T* grow(Array<T>& scratch, size_t size) {
  if (scratch.size() < size) scratch = Array<T>(size + size / 2);
  return scratch.data();
}

// Tell the system that these bytes are not needed soon. Loses nothing: bytes mapped from a file are read again.
inline void page_out(const void* data, size_t bytes) {
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
