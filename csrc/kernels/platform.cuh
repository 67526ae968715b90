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
#define FUSEDNORM_UNROLL

namespace fusednorm {
struct alignas(16) Bits16 {
  uint32_t x, y, z, w;
};
inline Bits16 load_bits(const Bits16* address) {
  return *address;
}
inline void store_bits(Bits16* address, Bits16 bits) {
  *address = bits;
}
}  // namespace fusednorm

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FUSEDNORM_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define FUSEDNORM_SHARED(type, name, count) __shared__ type name[count]
#define FUSEDNORM_UNROLL _Pragma("unroll")

namespace fusednorm {
using Bits16 = uint4;
__device__ __forceinline__ Bits16 load_bits(const Bits16* address) {
  return __ldg(address);
}
__device__ __forceinline__ void store_bits(Bits16* address, Bits16 bits) {
  __stcg(address, bits);
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

}  // namespace fusednorm
