// norm_backward: checks, allocation, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels/backward.cuh"
#include "planning.h"

namespace fusednorm::ops {

namespace {

// dx = rstd*(w*h - live*mean(w*h) - live*xhat*mean(w*h*xhat)) with h = act'(z)*dy, means over the
// cell; dweight = sum h*xhat, dbias = sum h; dresidual = h if there were a residual, which relu's
// mask may stand for, and an activation, else an empty tensor: then it is dy, or nobody's.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, int64_t num_groups, bool per_sample, double live, int64_t act,
    double slope) {
  const Input in = check_input(x, num_groups, per_sample);
  check_like("dy", dy, x);
  check_cells("mean", mean, in, x);
  check_cells("rstd", rstd, in, x);
  check_channels("weight", weight, in, x);
  check_channels("bias", bias, in, x);
  if (residual) check_like("residual", *residual, x);
  check_activation(act);
  if (mask) {
    FUSEDNORM_CHECK(!residual, "mask and residual are both given, expected one of them");
    FUSEDNORM_CHECK(act == kRelu, "mask is given with act ", act, ", expected ", int(kRelu));
    check_mask(*mask, x);
  }
  require_cuda("norm_backward", x);

  const Guard guard(x);
  const bool wants_dresidual = (residual || mask) && act != kNone;
  const Tensor input = canonical(x);
  const Tensor dx = new_like(input);
  Tensor dweight = new_channels(in, x);
  Tensor dbias = new_channels(in, x);
  const Tensor dresidual = wants_dresidual ? new_like(input) : new_none(x);
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
  p.mask =
      mask ? const_cast<uint8_t*>(static_cast<const uint8_t*>(mask->const_data_ptr())) : nullptr;
  const Planned planned(p, Direction::kBackward, input, &backward_kernel_on_chip);
  if (!x.is_cuda()) return {dx, dweight, dbias, dresidual};
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
