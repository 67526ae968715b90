// Running statistics, with torch's conventions:
//
//   running_mean <- (1 - f)*running_mean + f*mean
//   running_var  <- (1 - f)*running_var  + f*var*count/(count - 1)
//
// f is the momentum, or 1/num_batches_tracked, counted and read on the device so that the host
// never waits and a CUDA graph replays correctly. One thread an entry, G entries of a few bytes.
#pragma once

#include "launch.cuh"
#include "plan.h"
#include "vec.cuh"

namespace fusednorm {

template <typename T>
struct RunningArgs {
  using A = Accumulator<T>;

  T* running_mean;               // (G,), any dtype that accumulates as mean does
  T* running_var;                // (G,)
  int64_t* num_batches_tracked;  // one counter, or null
  const A* mean;                 // (G,)
  const A* var;                  // (G,), biased
  int64_t groups;
  A momentum;
  A unbias;  // count/(count - 1)
  bool cumulative;
};

// With `cumulative` there is one block: all threads read the counter before one writes it.
template <typename T>
__global__ void __launch_bounds__(kMaxBlock) update_running_kernel(const RunningArgs<T> args) {
  using A = Accumulator<T>;
  A factor = args.momentum;
  if (args.cumulative) {
    // A fp32 number of batches is exact up to 2^24.
    factor = A(1) / A(*args.num_batches_tracked + 1);
    __syncthreads();
  }
  if (args.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0)
    *args.num_batches_tracked += 1;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.groups; i += stride) {
    const A mean = (A(1) - factor) * widen(args.running_mean[i]) + factor * args.mean[i];
    const A var =
        (A(1) - factor) * widen(args.running_var[i]) + factor * (args.var[i] * args.unbias);
    narrow(mean, args.running_mean[i]);
    narrow(var, args.running_var[i]);
  }
}

struct RunningParams {
  DType dtype;  // of the running statistics
  void* running_mean;
  void* running_var;
  int64_t* num_batches_tracked;  // or null
  const void* mean;
  const void* var;
  int64_t groups;
  int64_t count;    // elements of a cell, at least 2
  bool cumulative;  // f = 1/num_batches_tracked instead of momentum
  double momentum;
  cudaStream_t stream;
};

inline void update_running(const RunningParams& p) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    RunningArgs<T> args{};
    args.running_mean = static_cast<T*>(p.running_mean);
    args.running_var = static_cast<T*>(p.running_var);
    args.num_batches_tracked = p.num_batches_tracked;
    args.mean = static_cast<const A*>(p.mean);
    args.var = static_cast<const A*>(p.var);
    args.groups = p.groups;
    args.momentum = static_cast<A>(p.momentum);
    args.unbias = static_cast<A>(double(p.count) / double(p.count - 1));
    args.cumulative = p.cumulative;
    const int64_t grid =
        p.cumulative ? 1 : std::clamp<int64_t>(ceil_div(p.groups, kMaxBlock), 1, kMaxGrid);
    FUSEDNORM_LAUNCH(update_running_kernel<T>, grid, kMaxBlock, p.stream, args);
  });
}

}  // namespace fusednorm
