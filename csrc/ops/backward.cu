// norm_backward: checks, allocation, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels/backward.cuh"
#include "tensor.h"

namespace fusednorm::ops {

namespace {

// dx = rstd*(w*h - live*mean(w*h) - live*xhat*mean(w*h*xhat)) with h = act'(z)*dy, means over the
// cell; dweight = sum h*xhat, dbias = sum h; dresidual = h if there are a residual and an
// activation, else an empty tensor: then it is dy, or nobody's.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    int64_t num_groups, bool per_sample, double live, int64_t act, double slope) {
  const Input in = check_input(x, num_groups, per_sample);
  check_like("dy", dy, x);
  check_cells("mean", mean, in, x);
  check_cells("rstd", rstd, in, x);
  check_channels("weight", weight, in, x);
  check_channels("bias", bias, in, x);
  if (residual) check_like("residual", *residual, x);
  check_activation(act);
  require_cuda("norm_backward", x);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool wants_dresidual = residual && act != kNone;
  const Tensor input = canonical(x);
  const Tensor dx = torch::stable::empty_like(input);
  Tensor dweight = new_channels(in, x);
  Tensor dbias = new_channels(in, x);
  const Tensor dresidual =
      wants_dresidual ? torch::stable::empty_like(input) : torch::stable::new_empty(x, {0});
  if (in.empty) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias, dresidual};
  }
  // Without an activation h = dy whatever z is, and the residual is never read.
  const Operands operands(input, weight, bias, act == kNone ? std::nullopt : residual);
  const Statistics statistics(mean, rstd);
  const Tensor upstream = like(dy, input);
  NormParams p = operands.params(in);
  statistics.fill(p);
  p.dy = upstream.const_data_ptr();
  p.out = dx.mutable_data_ptr();
  p.dresidual = wants_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  p.live = live;
  p.act = static_cast<int>(act);
  p.slope = slope;
  plan_sweeps(p, input);
  const Tensor workspace =
      new_bytes(backward_workspace_bytes(p.geometry, p.plan, accumulator_size(p.dtype)), x);
  p.workspace = workspace.mutable_data_ptr();
  backward(p);
  check_launch("norm_backward");
  return {dx, dweight, dbias, dresidual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CUDA, m) {
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CPU, m) {
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fusednorm::ops
