// A CUDA runtime without a GPU: what ONNX Runtime's CUDA provider links to and the engine calls. Kernels do nothing.
#include <driver_types.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "noop_journal.h"

using noop::Memory;

namespace {

struct Size {
  unsigned x, y, z;
};

struct Stream {
  bool is_captured = false;
};

Stream default_stream;

struct Launch {
  Size grid, block;
  size_t shared;
  void* stream;
};

thread_local Launch configured;

constexpr size_t kTotalMemory = size_t{80} << 30, kFreeMemory = size_t{78} << 30;
constexpr int kMultiprocessors = 132, kVersion = 13000;

// 0, 1 and 2 are CUDA's names for the default stream.
Stream& stream_of(void* handle) {
  return reinterpret_cast<uintptr_t>(handle) <= 2 ? default_stream : *static_cast<Stream*>(handle);
}

// Compute capability: 90 for 9.0.
int target() {
  const char* given = getenv("NOOP_CUDA_TARGET");
  return given != nullptr ? atoi(given) : 90;
}

cudaError_t launch(const void* kernel) {
  noop::count_kernel(kernel, "kernel");
  return cudaSuccess;
}

// A handle that only has to be one.
cudaError_t make(void** handle) {
  *handle = malloc(1);
  return cudaSuccess;
}

cudaError_t destroy(void* handle) {
  free(handle);
  return cudaSuccess;
}

cudaError_t allocate(void** address, size_t bytes, Memory kind, const char* call) {
  noop::count_if_capturing(call);
  noop::count(call);
  *address = noop::allocate(bytes, kind);
  return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t release(void* address) {
  noop::release(address);
  return cudaSuccess;
}

// What kernels of an H100 may ask; 1 for the rest, most of which are abilities.
int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 49152;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrClockRate:
      return 1980000;
    case cudaDevAttrMultiProcessorCount:
      return kMultiprocessors;
    case cudaDevAttrL2CacheSize:
      return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrComputeCapabilityMajor:
      return target() / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return target() % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return 233472;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 232448;
    default:
      return 1;
  }
}

int encode_tensor_map(...) { return 0; }

}  // namespace

extern "C" {

// Libraries and their kernels.

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* content;
    void* name;
  };
  return static_cast<void**>(noop::add_fat_binary(static_cast<Wrapper*>(wrapper)->content));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** library, const char* function, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  noop::add_kernel(library, function, name);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

cudaError_t cudaLibraryLoadData(void** library, const void*, void*, void*, unsigned, void*, void*, unsigned) {
  return make(library);
}
cudaError_t cudaLibraryUnload(void* library) { return destroy(library); }
cudaError_t cudaLibraryGetKernel(void** kernel, void*, const char* name) {
  make(kernel);
  noop::add_kernel(nullptr, *kernel, name);
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return cudaSuccess;
}

// Launches.

unsigned __cudaPushCallConfiguration(Size grid, Size block, size_t shared, void* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(Size* grid, Size* block, size_t* shared, void* stream) {
  *grid = configured.grid;
  *block = configured.block;
  *shared = configured.shared;
  *static_cast<void**>(stream) = configured.stream;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void* kernel, Size, Size, void**, size_t, void*) { return launch(kernel); }
cudaError_t cudaLaunchKernel(const void* kernel, Size, Size, void**, size_t, void*) { return launch(kernel); }
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, Size, Size, void**, size_t, void*) {
  return launch(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launch(kernel); }
cudaError_t cudaLaunchHostFunc(void*, void (*function)(void*), void* argument) {
  noop::count("host function");
  function(argument);
  return cudaSuccess;
}

// Memory.

cudaError_t cudaMalloc(void** address, size_t bytes) { return allocate(address, bytes, Memory::kDevice, "cudaMalloc"); }
cudaError_t cudaMallocFromPoolAsync(void** address, size_t bytes, void*, void*) {
  return allocate(address, bytes, Memory::kDevice, "cudaMallocFromPoolAsync");
}
cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return allocate(address, bytes, Memory::kPinned, "cudaMallocHost");
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return allocate(address, bytes, Memory::kPinned, "cudaHostAlloc");
}
cudaError_t cudaFree(void* address) { return release(address); }
cudaError_t cudaFreeAsync(void* address, void*) { return release(address); }
cudaError_t cudaFreeHost(void* address) { return release(address); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  noop::count_if_capturing("cudaMemcpy");
  noop::copy(to, from, bytes, "waiting copy");
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, void*) {
  noop::copy(to, from, bytes, "copy");
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, void*) {
  noop::count("copy of rows");
  if (width * height > noop::kMostDone) return cudaSuccess;
  for (size_t row = 0; row < height; ++row) {
    memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void*, size_t bytes, size_t, cudaMemcpyKind) {
  noop::count("copy from a symbol");
  memset(to, 0, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  noop::set(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, void*) {
  noop::set(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *total = kTotalMemory;
  *free_bytes = kFreeMemory - noop::device_bytes();
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  memset(attributes, 0, sizeof *attributes);
  const Memory kind = noop::kind_of(address);
  attributes->type = kind == Memory::kDevice   ? cudaMemoryTypeDevice
                     : kind == Memory::kPinned ? cudaMemoryTypeHost
                                               : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}
cudaError_t cudaMemPoolCreate(void** pool, const void*) { return make(pool); }
cudaError_t cudaMemPoolDestroy(void* pool) { return destroy(pool); }
cudaError_t cudaMemPoolGetAttribute(void*, int, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(void*, int, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(void*, size_t) { return cudaSuccess; }

// Streams, events, graphs.

cudaError_t cudaDeviceSynchronize() {
  noop::count_if_capturing("cudaDeviceSynchronize");
  noop::count("wait for the device");
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(void* stream) {
  noop::count("wait for a stream");
  if (!stream_of(stream).is_captured) return cudaSuccess;
  noop::count_if_capturing("cudaStreamSynchronize");
  return cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamCreate(void** stream) {
  *stream = new Stream;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(void* stream) {
  delete static_cast<Stream*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(void*, void*, unsigned) {
  noop::count("a stream waits for an event");
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(void* stream, int* status) {
  *status = stream_of(stream).is_captured ? 1 : 0;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(void* stream, int) {
  noop::begin_capture();
  stream_of(stream).is_captured = true;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(void* stream, void** graph) {
  stream_of(stream).is_captured = false;
  noop::end_capture();
  return make(graph);
}
cudaError_t cudaGraphInstantiate(void** executable, void*, unsigned long long) { return make(executable); }
cudaError_t cudaGraphDestroy(void* graph) { return destroy(graph); }
cudaError_t cudaGraphExecDestroy(void* executable) { return destroy(executable); }
cudaError_t cudaGraphLaunch(void*, void*) {
  noop::count("graph launch");
  return cudaSuccess;
}
cudaError_t cudaEventCreate(void** event) { return make(event); }
cudaError_t cudaEventCreateWithFlags(void** event, unsigned) { return make(event); }
cudaError_t cudaEventDestroy(void* event) { return destroy(event); }
cudaError_t cudaEventRecord(void*, void*) {
  noop::count("event");
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(void* event, void* stream, unsigned) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventSynchronize(void*) {
  noop::count("wait for an event");
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 1;
  return cudaSuccess;
}

// The device.

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetAttribute(int* value, int which, int) {
  *value = attribute(which);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  snprintf(properties->name, sizeof properties->name, "CUDA that does nothing");
  properties->totalGlobalMem = kTotalMemory;
  properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  properties->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->reservedSharedMemPerBlock = 1024;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->totalConstMem = 65536;
  properties->memPitch = 2147483647;
  properties->major = target() / 10;
  properties->minor = target() % 10;
  properties->multiProcessorCount = kMultiprocessors;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  properties->memoryBusWidth = 5120;
  properties->asyncEngineCount = 3;
  properties->canMapHostMemory = properties->concurrentKernels = properties->cooperativeLaunch = 1;
  properties->managedMemory = properties->unifiedAddressing = properties->memoryPoolsSupported = 1;
  properties->clusterLaunch = 1;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->binaryVersion = attributes->ptxVersion = target();
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(void*, int, int, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, int* found) {
  *function = reinterpret_cast<void*>(encode_tensor_map);
  if (found != nullptr) *found = 0;
  return cudaSuccess;
}

// Errors: there are none.

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "none"; }
const char* cudaGetErrorString(cudaError_t) { return "no error is ever given"; }
}
