// What a caller hands to the launchers, and the switch from its run-time dtype and plan to types.
#pragma once

#include <stdexcept>

#include "columns.cuh"
#include "plan.h"
#include "runs.cuh"
#include "sweep.cuh"

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
  void* var;             // (A, G): forward
  void* out;             // y, or dx
  void* dresidual;       // backward: or null
  void* dweight;         // (C,): backward
  void* dbias;           // (C,): backward
  void* workspace;       // forward_workspace_bytes or backward_workspace_bytes, 16-byte aligned
  double eps;
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
    const bool columns = plan.pattern == Pattern::kColumns;
    if (plan.vector == kVector) {
      columns ? f(Type<Columns<T, kVector>>{}) : f(Type<Runs<T, kVector>>{});
    } else if (plan.vector == 1) {
      columns ? f(Type<Columns<T, 1>>{}) : f(Type<Runs<T, 1>>{});
    } else {
      throw std::logic_error("fusednorm: no kernel has the plan's vector width");
    }
  });
}

template <typename T>
SweepArgs<T> sweep_args(const NormParams& p) {
  using A = Accumulator<T>;
  SweepArgs<T> args{};
  args.geometry = p.geometry;
  args.plan = p.plan;
  args.x = static_cast<const T*>(p.x);
  args.dy = static_cast<const T*>(p.dy);
  args.residual = static_cast<const T*>(p.residual);
  args.out = static_cast<T*>(p.out);
  args.dresidual = static_cast<T*>(p.dresidual);
  args.weight = static_cast<const A*>(p.weight);
  args.bias = static_cast<const A*>(p.bias);
  args.mean = static_cast<const A*>(p.mean);
  args.rstd = static_cast<const A*>(p.rstd);
  args.live = static_cast<A>(p.live);
  args.slope = static_cast<A>(p.slope);
  args.act = p.act;
  return args;
}

}  // namespace fusednorm
