#include "noop_journal.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <unordered_map>
#include <vector>

namespace noop {
namespace {

struct Allocation {
  size_t bytes;
  Memory kind;
};

struct Kernel {
  std::string name;
  const void* fat_binary;
};

struct Journal {
  std::mutex mutex;
  std::map<std::string, long> counts;
  std::map<uintptr_t, Allocation> memory;
  std::unordered_map<const void*, Kernel> kernels;
  size_t device_bytes = 0;
  int captures = 0;
};

// Never destroyed: libraries ask for it while the process ends.
Journal& journal() {
  static Journal* one = new Journal;
  return *one;
}

using Lock = std::lock_guard<std::mutex>;

const char* name_of(Memory kind) {
  return kind == Memory::kDevice ? "device" : kind == Memory::kPinned ? "pinned" : "pageable";
}

}  // namespace

void count(const std::string& what) {
  Journal& all = journal();
  Lock lock(all.mutex);
  ++all.counts[(all.captures > 0 ? "captured " : "") + what];
}

void count_if_capturing(const char* call) {
  Journal& all = journal();
  Lock lock(all.mutex);
  if (all.captures > 0) ++all.counts[std::string("illegal in a capture: ") + call];
}

void begin_capture() {
  count("capture");
  Lock lock(journal().mutex);
  ++journal().captures;
}

void end_capture() {
  Lock lock(journal().mutex);
  --journal().captures;
}

void* allocate(size_t bytes, Memory kind) {
  const size_t size = bytes > 0 ? bytes : 1;
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return nullptr;
  Journal& all = journal();
  Lock lock(all.mutex);
  all.memory[reinterpret_cast<uintptr_t>(address)] = {size, kind};
  if (kind == Memory::kDevice) all.device_bytes += size;
  return address;
}

void release(void* address) {
  Journal& all = journal();
  Lock lock(all.mutex);
  const auto found = all.memory.find(reinterpret_cast<uintptr_t>(address));
  if (found == all.memory.end()) return;
  if (found->second.kind == Memory::kDevice) all.device_bytes -= found->second.bytes;
  munmap(address, found->second.bytes);
  all.memory.erase(found);
}

Memory kind_of(const void* address) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  Journal& all = journal();
  Lock lock(all.mutex);
  auto after = all.memory.upper_bound(place);
  if (after == all.memory.begin()) return Memory::kPageable;
  const auto& [start, allocation] = *--after;
  return place < start + allocation.bytes ? allocation.kind : Memory::kPageable;
}

size_t device_bytes() {
  Lock lock(journal().mutex);
  return journal().device_bytes;
}

void copy(void* to, const void* from, size_t bytes, const char* how) {
  std::ostringstream what;
  what << how << ' ' << name_of(kind_of(from)) << " to " << name_of(kind_of(to)) << ", ";
  if (bytes <= kMostDone) {
    memmove(to, from, bytes);
    what << bytes << " bytes";
  } else {
    what << "large";
  }
  count(what.str());
}

void set(void* address, int value, size_t bytes) {
  if (bytes <= kMostDone) memset(address, value, bytes);
  count("memset");
}

void* add_fat_binary(const void* content) { return new const void*(content); }

void add_kernel(void* fat_binary, const void* function, const char* name) {
  Lock lock(journal().mutex);
  journal().kernels[function] = {name, fat_binary == nullptr ? nullptr : *static_cast<const void**>(fat_binary)};
}

void count_kernel(const void* function, const char* how) {
  std::string name = "?";
  {
    Lock lock(journal().mutex);
    const auto found = journal().kernels.find(function);
    if (found != journal().kernels.end()) name = found->second.name;
  }
  count(std::string(how) + " " + name);
}

}  // namespace noop

// For the tests, by ctypes.
extern "C" {

// Lines of a count, a tab and what was counted, until the next call.
const char* noop_counts() {
  static std::string text;
  std::ostringstream lines;
  {
    noop::Lock lock(noop::journal().mutex);
    for (const auto& [what, times] : noop::journal().counts) lines << times << '\t' << what << '\n';
  }
  text = lines.str();
  return text.c_str();
}

// Lines of a kernel's name, a tab and the address of its fat binary, until the next call.
const char* noop_kernels() {
  static std::string text;
  std::ostringstream lines;
  {
    noop::Lock lock(noop::journal().mutex);
    for (const auto& [_, kernel] : noop::journal().kernels) {
      lines << kernel.name << '\t' << reinterpret_cast<uintptr_t>(kernel.fat_binary) << '\n';
    }
  }
  text = lines.str();
  return text.c_str();
}

size_t noop_device_bytes() { return noop::device_bytes(); }
}
