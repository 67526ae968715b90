// The few words in which a kernel is allowed to know where it runs.
//
// Every header of this folder compiles twice: by nvcc for the GPU, and as plain C++17 under
// FUSEDNORM_HOST, where csrc/host/cuda_shim.h gives each CUDA thread a fiber. Beyond standard C++
// the kernels use exactly this, and the shim provides it:
//   built-ins   dim3, threadIdx.x, blockIdx.x, blockDim.x, gridDim.x; launches have one dimension
//   barriers    __syncthreads()
//   shuffles    __shfl_down_sync(mask, float or double, delta)
//   types       __half, __nv_bfloat16 with __half2float, __float2half_rn, __bfloat162float,
//               __float2bfloat16_rn; cudaStream_t
//   keywords    __global__, __device__, __host__, __forceinline__, __launch_bounds__
// and this is defined here:
//   FUSEDNORM_LAUNCH(kernel, grid, block, stream, args...)
//               grid and block are integers; a template-id with commas goes in parentheses
//   FUSEDNORM_SHARED(type, name, count)
//               static shared array of a trivial type; the shim's lies between red zones
//   FUSEDNORM_UNROLL
//               unrolls the loop that follows; a hint, nothing depends on it
//   load_bits, store_bits
//               one 16-byte access. By intrinsic on the device: a plain copy of a struct is four or
//               eight scalars to the compiler, which it does not always put together again. What is
//               loaded so, the kernel never writes.
#pragma once

#include <cstdint>

#ifdef FUSEDNORM_HOST

#include "cuda_shim.h"

#define FUSEDNORM_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), ::fusednorm::host::launch((grid), (block), [=] { kernel(__VA_ARGS__); }))
#define FUSEDNORM_LAUNCH_SHAPED(kernel, shape, stream, ...) \
  ((void)(stream), ::fusednorm::host::launch_shaped((shape), [=] { kernel(__VA_ARGS__); }))
#define FUSEDNORM_UNROLL
#define FUSEDNORM_SITE ::fusednorm::host::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace fusednorm {
struct alignas(16) Bits16 {
  uint32_t x, y, z, w;
};
inline Bits16 load_bits(const Bits16* address) {
  return *address;
}
inline Bits16 load_bits_last(const Bits16* address) {
  return *address;
}
inline void store_bits(Bits16* address, Bits16 bits) {
  *address = bits;
}
template <typename T>
T load_fresh(const T* address) {
  return *address;
}
inline int64_t recomputed(int64_t value) {
  return value;
}
inline int cluster_rank() {
  return host::cluster_rank();
}
inline int cluster_size() {
  return host::cluster_size();
}
inline void cluster_barrier(FUSEDNORM_SITE) {
  host::cluster_barrier(site);
}
template <typename T>
T* cluster_peer(T* shared, int rank, FUSEDNORM_SITE) {
  return static_cast<T*>(host::cluster_peer(shared, rank, site));
}
inline void copy_async(void* shared, const void* global, FUSEDNORM_SITE) {
  host::copy_async(shared, global, site);
}
inline void copy_async_commit() {
  host::copy_async_commit();
}
template <int N>
void copy_async_wait() {
  host::copy_async_wait(N);
}
inline unsigned load_acquire(const unsigned* address, FUSEDNORM_SITE) {
  return host::load_acquire(address, site);
}
inline void store_release(unsigned* address, unsigned value) {
  host::arrive();
  *address = value;
}
}  // namespace fusednorm

#undef FUSEDNORM_SITE

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FUSEDNORM_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define FUSEDNORM_LAUNCH_SHAPED(kernel, shape, stream, ...) \
  ::fusednorm::launch_shaped((kernel), (shape), (stream), __VA_ARGS__)
#define FUSEDNORM_SHARED(type, name, count) __shared__ type name[count]
#define FUSEDNORM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FUSEDNORM_UNROLL _Pragma("unroll")

namespace fusednorm {
using Bits16 = uint4;
__device__ __forceinline__ Bits16 load_bits(const Bits16* address) {
  return __ldg(address);
}
__device__ __forceinline__ Bits16 load_bits_last(const Bits16* address) {
  return __ldcs(address);
}
__device__ __forceinline__ void store_bits(Bits16* address, Bits16 bits) {
  __stcs(address, bits);
}
template <typename T>
__device__ __forceinline__ T load_fresh(const T* address) {
  T value;
  if constexpr (sizeof(T) % 16 == 0) {
    for (unsigned i = 0; i < sizeof(T) / 16; ++i) {
      reinterpret_cast<uint4*>(&value)[i] = __ldcg(reinterpret_cast<const uint4*>(address) + i);
    }
  } else if constexpr (sizeof(T) == 8) {
    reinterpret_cast<uint2&>(value) = __ldcg(reinterpret_cast<const uint2*>(address));
  } else {
    static_assert(sizeof(T) == 4, "4, 8, or 16 bytes at a time");
    reinterpret_cast<unsigned&>(value) = __ldcg(reinterpret_cast<const unsigned*>(address));
  }
  return value;
}
__device__ __forceinline__ int64_t recomputed(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(unsigned* address, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
// Clusters came with sm_90: before it every block is one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
template <typename T>
__device__ __forceinline__ T* cluster_peer(T* shared, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
}
#else
__device__ __forceinline__ int cluster_rank() {
  return 0;
}
__device__ __forceinline__ int cluster_size() {
  return 1;
}
__device__ __forceinline__ void cluster_barrier() {
  __syncthreads();
}
template <typename T>
__device__ __forceinline__ T* cluster_peer(T* shared, int) {
  return shared;
}
#endif

// Lets a kernel have as much dynamic shared memory as a block can. The most, not what one launch
// needs: the limit is the kernel's, and no thread may lower it under another one's launch.
inline cudaError_t allow_shared(const void* kernel) {
  int device = 0;
  int most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// The launch with its attributes; errors are left to cudaGetLastError. More than 48 KB a block, and
// clusters of more than 8, were asked for when the plan was made: three calls of the runtime, once.
template <typename Shape, typename... Parameters, typename... Arguments>
void launch_shaped(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(static_cast<unsigned>(shape.block));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
}  // namespace fusednorm

#endif

#define FUSEDNORM_DEVICE __device__ __forceinline__
#define FUSEDNORM_HOST_DEVICE __host__ __device__ __forceinline__

namespace fusednorm {

// Threads of the largest block any plan asks for; shared arrays are sized by it.
constexpr int kMaxBlock = 256;
constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// What a launch asks for beyond a grid of blocks. Blocks of a cluster have consecutive numbers.
struct LaunchShape {
  int64_t grid;      // blocks
  int block;         // threads
  int shared_bytes;  // dynamic shared memory of a block
  int cluster;       // blocks of a cluster, 1 for none
  bool cooperative;  // all blocks run at the same time
};

}  // namespace fusednorm
