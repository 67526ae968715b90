// The CUDA words our kernels use, as C++17 for a CPU: the .cuh files compile unchanged and run with
// one fiber a CUDA thread. Slow, but what a device shows by chance shows here every time:
//
//   missing barrier     threads and blocks run forward, reversed or shuffled: a result is wrong if
//                       it depends on the order, or on the NaN that shared memory starts with
//   divergent barrier   some threads wait where others returned or wait elsewhere, or a shuffle's
//                       mask names a lane that does not come: std::runtime_error
//   out of bounds       shared arrays lie between red zones, fiber stacks above a page that traps:
//                       AddressSanitizer
//   missing copy wait   what copy_async brings arrives at the wait and not before; until then the
//                       destination is NaN, and AddressSanitizer's
//   exit too early      a block whose shared memory another may still read: std::runtime_error, or
//                       NaN and AddressSanitizer
//   deadlock            a spin that nobody is left to end, or any spin where blocks need not run at
//                       the same time: std::runtime_error
//   launch too large    blocks, shared memory, clusters, cooperative grids beyond `limits`:
//                       std::invalid_argument
//
// A word that is missing here does not compile, rather than being guessed. The blocks of a cluster
// and of a cooperative grid run together, others one after another; memory is sequentially
// consistent, so a missing fence goes unseen.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

#include "float16.h"
#include "shape.h"

using cudaStream_t = void*;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// `type* name`, one array of `count` for the block. The static tells declarations apart the way the
// compiler does on the device: one array for every function and every instantiation of a template.
#define FUSEDNORM_SHARED(type, name, count) \
  static const char name##_site = 0;        \
  type* const name = ::fusednorm::host::shared<type>(&name##_site, count)

#define FUSEDNORM_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::fusednorm::host::dynamic_shared()

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace fusednorm::host {

enum class Order { kForward, kReversed, kShuffled };

// The order in which the threads of a block and the blocks of a grid run; the seed shuffles them.
struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;
};
inline Schedule schedule;

// Launches since the program started.
inline int64_t launches = 0;

// Runs `kernel` for every thread of every block. Throws std::invalid_argument for a shape that a
// device would refuse, std::runtime_error for a detector's finding.
void launch(const Shape& shape, const std::function<void()>& kernel);

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  launch(Shape{grid, block}, kernel);
}

// The kernels' own LaunchShape, whose numbers may exceed a device's.
template <typename S>
void launch_shaped(const S& shape, const std::function<void()>& kernel) {
  if (shape.grid < 1 || shape.grid > 0x7fffffff || shape.block < 1 || shape.shared_bytes < 0) {
    throw std::invalid_argument("invalid configuration: no such grid, block or shared memory");
  }
  launch(Shape{static_cast<unsigned>(shape.grid), static_cast<unsigned>(shape.block),
               shape.shared_bytes, shape.cluster, shape.cooperative},
         kernel);
}

// A line of the kernel's source, as the default argument of the words below.
struct Site {
  const char* file;
  int line;
};

enum class Word { kBarrier, kCluster, kLook, kShuffle, kVote };

// Waits for the block.
void barrier(Site site);

// Clusters: this block's place in its own, how many there are, all of it waiting for each other,
// and where in block `rank` the counterpart of an address lies.
int cluster_rank();
int cluster_size();
void cluster_barrier(Site site);
void* cluster_peer(void* shared, int rank, Site site);

// 16 bytes to shared memory, there after the wait that leaves `allowed` newer groups pending.
void copy_async(void* shared, const void* global, Site site);
void copy_async_commit();
void copy_async_wait(int allowed);

// Lets the others run before it looks.
unsigned load_acquire(const unsigned* address, Site site);
// Before an atomic or a release: whoever is first may be anyone.
void arrive();

unsigned char* dynamic_shared();

// Waits for the lanes of `mask`; the value of lane `source`, or for a vote the lanes whose value is
// not zero.
uint64_t exchange(Word word, unsigned mask, uint64_t value, int source, Site site);

void* shared_bytes(const void* site, size_t bytes, size_t alignment);

template <typename T>
T* shared(const void* site, size_t count) {
  static_assert(std::is_trivially_copyable<T>::value, "shared memory is never constructed");
  return static_cast<T*>(shared_bytes(site, count * sizeof(T), alignof(T)));
}

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a device shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(Word::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace fusednorm::host

#define FUSEDNORM_SITE ::fusednorm::host::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(FUSEDNORM_SITE) {
  fusednorm::host::barrier(site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FUSEDNORM_SITE) {
  using namespace fusednorm::host;
  return static_cast<unsigned>(exchange(Word::kVote, mask, predicate != 0, 0, site));
}

inline void __syncwarp(unsigned mask = 0xffffffffu, FUSEDNORM_SITE) {
  __ballot_sync(mask, 0, site);
}

// As on the device, a source outside the lane's segment of `width` lanes gives the lane its own
// value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FUSEDNORM_SITE) {
  const int lane = fusednorm::host::lane();
  return fusednorm::host::shuffle(mask, value, (lane & -width) | (source & (width - 1)), site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, FUSEDNORM_SITE) {
  const int lane = fusednorm::host::lane();
  const int source = lane ^ bits;
  return fusednorm::host::shuffle(mask, value, source < (lane & -width) + width ? source : lane,
                                  site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FUSEDNORM_SITE) {
  const int lane = fusednorm::host::lane();
  const int source = lane + static_cast<int>(delta);
  return fusednorm::host::shuffle(mask, value, source < (lane & -width) + width ? source : lane,
                                  site);
}

// One fiber runs at a time, so a plain read-modify-write is atomic. Floats are left out on purpose.
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral<T>::value, "float atomics would make results depend on the order");
  fusednorm::host::arrive();
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}

// Counts up to `limit` and then starts again from 0.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  fusednorm::host::arrive();
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

inline void __threadfence() {}
