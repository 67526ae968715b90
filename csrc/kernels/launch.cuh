// What a caller hands to the launchers, and the switch from its run-time dtype and plan to types.
#pragma once

#include <stdexcept>

#include "columns.cuh"
#include "gradient.cuh"
#include "plan.h"
#include "runs.cuh"

namespace fusednorm {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

inline int element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline int accumulator_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

// Pointers of forward, apply and backward. Activations (x, dy, residual, out, dresidual) have x's
// dtype and layout; all others the accumulation type.
struct NormParams {
  Geometry geometry;
  Plan plan;
  DType dtype;
  const void* x;
  const void* dy;        // backward
  const void* residual;  // or null
  const void* weight;    // (C,) or null
  const void* bias;      // (C,) or null
  void* mean;            // (A, G): written by forward, read by apply and backward, as is rstd
  void* rstd;            // (A, G)
  void* var;             // (A, G): forward, or null
  void* out;             // y, or dx
  void* dresidual;       // backward: or null
  void* dweight;         // (C,): backward
  void* dbias;           // (C,): backward
  void* workspace;       // workspace_bytes, 16-byte aligned
  // Bit j of byte i is y[i*W + j] > 0 in memory order, W = 16/element_size: written by forward and
  // apply if not null; backward takes it for relu'(z) and reads no residual.
  uint8_t* mask;
  // plan.counters zeros, left zero, not shared with a launch that may run at the same time; or
  // null: one more kernel instead (streaming only).
  unsigned* counters;
  // Updated by forward if not null; statistics of the batch (A = 1) only.
  void* running_mean;            // (G,)
  void* running_var;             // (G,)
  int64_t* num_batches_tracked;  // + 1
  double eps;
  double momentum;
  double live;
  double slope;
  int act;
  cudaStream_t stream;
};

template <typename X>
struct Type {
  using type = X;
};

// f(Type<T>{}) for the element type of dtype.
template <typename F>
void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kFloat16:
      return f(Type<__half>{});
    case DType::kBFloat16:
      return f(Type<__nv_bfloat16>{});
    case DType::kFloat64:
      return f(Type<double>{});
  }
}

// f(Type<Tile>{}) for the access pattern and vector width of the plan.
template <typename F>
void dispatch_tile(DType dtype, const Plan& plan, const F& f) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    // What make_plan chooses from; double has the scalar width only.
    constexpr int kVector = sizeof(T) == 8 ? 1 : kVectorBytes / int(sizeof(T));
    const bool runs = plan.pattern == Pattern::kRuns;
    if (plan.vector == kVector) {
      runs ? f(Type<Runs<T, kVector>>{}) : f(Type<Columns<T, kVector>>{});
    } else if (plan.vector == 1) {
      runs ? f(Type<Runs<T, 1>>{}) : f(Type<Columns<T, 1>>{});
    } else {
      throw std::logic_error("fusednorm: no kernel has the plan's vector width");
    }
  });
}

// Likewise for plans that keep slices on the chip: vectors of float, half and bfloat16 only.
template <typename F>
void dispatch_chip_tile(DType dtype, const Plan& plan, const F& f) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 8) {
      throw std::logic_error("fusednorm: no kernel keeps double on the chip");
    } else {
      constexpr int kVector = kVectorBytes / int(sizeof(T));
      plan.pattern == Pattern::kRuns ? f(Type<Runs<T, kVector>>{}) : f(Type<Columns<T, kVector>>{});
    }
  });
}

inline bool folds(const NormParams& p) {
  return p.plan.folded && (p.plan.counters == 0 || p.counters != nullptr);
}

// What sweeps and combines read and write, but for the workspace.
template <typename T>
SweepArgs<T> sweep_args(const NormParams& p) {
  using A = Accumulator<T>;
  SweepArgs<T> args{};
  args.geometry = p.geometry;
  args.plan = p.plan;
  args.x = static_cast<const T*>(p.x);
  args.dy = static_cast<const T*>(p.dy);
  args.residual = static_cast<const T*>(p.residual);
  args.mask = p.mask;
  args.out = static_cast<T*>(p.out);
  args.dresidual = static_cast<T*>(p.dresidual);
  args.weight = static_cast<const A*>(p.weight);
  args.bias = static_cast<const A*>(p.bias);
  args.mean = static_cast<const A*>(p.mean);
  args.rstd = static_cast<const A*>(p.rstd);
  args.live = static_cast<A>(p.live);
  args.slope = static_cast<A>(p.slope);
  args.act = p.act;
  args.folded = folds(p);

  CombineArgs<A>& combine = args.combine;
  combine.geometry = p.geometry;
  combine.splits = p.plan.splits;
  combine.counters = p.counters;
  combine.weight = args.weight;
  combine.mean = static_cast<A*>(p.mean);
  combine.rstd = static_cast<A*>(p.rstd);
  combine.var = static_cast<A*>(p.var);
  combine.dweight = static_cast<A*>(p.dweight);
  combine.dbias = static_cast<A*>(p.dbias);
  combine.running_mean = static_cast<A*>(p.running_mean);
  combine.running_var = static_cast<A*>(p.running_var);
  combine.num_batches_tracked = p.num_batches_tracked;
  combine.eps = static_cast<A>(p.eps);
  combine.momentum = static_cast<A>(p.momentum);
  // torch refuses running statistics of single values, and so do the operators.
  const int64_t count = p.geometry.count();
  combine.unbias = count > 1 ? static_cast<A>(double(count) / double(count - 1)) : A(1);
  combine.closed = p.geometry.sets == 1 && p.geometry.groups == p.geometry.channels;
  return args;
}

}  // namespace fusednorm
