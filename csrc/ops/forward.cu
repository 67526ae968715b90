// norm_forward and norm_apply: checks, allocation, launches.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "kernels/forward.cuh"
#include "tensor.h"

namespace fusednorm::ops {

namespace {

// y = act(z), z = (x - mean)*rstd*weight[c] + bias[c] (+ residual), and the statistics it used.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias,
                                                        const OptionalTensor& residual,
                                                        int64_t num_groups, bool per_sample,
                                                        double eps, int64_t act, double slope) {
  const Input in = check_input(x, num_groups, per_sample);
  check_channels("weight", weight, in, x);
  check_channels("bias", bias, in, x);
  if (residual) check_like("residual", *residual, x);
  check_activation(act);
  require_cuda("norm_forward", x);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor input = canonical(x);
  const Tensor y = torch::stable::empty_like(input);
  Tensor mean = new_cells(in, x);
  Tensor rstd = new_cells(in, x);
  Tensor var = new_cells(in, x);
  if (in.empty) {
    torch::stable::zero_(mean);
    torch::stable::zero_(var);
    torch::stable::fill_(rstd, 1 / std::sqrt(eps));
    return {y, mean, rstd, var};
  }
  const Operands operands(input, weight, bias, residual);
  NormParams p = operands.params(in);
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  p.out = y.mutable_data_ptr();
  p.eps = eps;
  p.act = static_cast<int>(act);
  p.slope = slope;
  plan_sweeps(p, input);
  const Tensor workspace =
      new_bytes(forward_workspace_bytes(p.geometry, p.plan, accumulator_size(p.dtype)), x);
  p.workspace = workspace.mutable_data_ptr();
  forward(p);
  check_launch("norm_forward");
  return {y, mean, rstd, var};
}

// y with given statistics.
Tensor norm_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                  const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, int64_t num_groups, bool per_sample, int64_t act,
                  double slope) {
  const Input in = check_input(x, num_groups, per_sample);
  check_cells("mean", mean, in, x);
  check_cells("rstd", rstd, in, x);
  check_channels("weight", weight, in, x);
  check_channels("bias", bias, in, x);
  if (residual) check_like("residual", *residual, x);
  check_activation(act);
  require_cuda("norm_apply", x);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor input = canonical(x);
  const Tensor y = torch::stable::empty_like(input);
  if (in.empty) return y;
  const Operands operands(input, weight, bias, residual);
  const Statistics statistics(mean, rstd);
  NormParams p = operands.params(in);
  statistics.fill(p);
  p.out = y.mutable_data_ptr();
  p.act = static_cast<int>(act);
  p.slope = slope;
  plan_sweeps(p, input);
  apply(p);
  check_launch("norm_apply");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_apply", TORCH_BOX(&norm_apply));
}

// On the CPU the same functions check their arguments and then refuse: callable without a card.
STABLE_TORCH_LIBRARY_IMPL(fusednorm, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_apply", TORCH_BOX(&norm_apply));
}

}  // namespace fusednorm::ops
