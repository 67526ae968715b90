// norm_forward, norm_train and norm_apply: checks, allocation, launches.
#include "kernels/forward.cuh"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "planning.h"
#include "running.h"

namespace fusednorm::ops {

namespace {

struct Call {
  const Tensor& x;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  double eps;
  int64_t act;
  double slope;
  bool save_mask;
};

// What a training step updates beside; nothing if mean is null.
struct Running {
  const Tensor* mean;
  const Tensor* var;
  const OptionalTensor& num_batches_tracked;
  std::optional<double> momentum;
};

struct Results {
  Tensor y, mean, rstd, mask;
  OptionalTensor var;
};

Input check_call(const Call& call, int64_t num_groups, bool per_sample) {
  const Input in = check_input(call.x, num_groups, per_sample);
  check_channels("weight", call.weight, in, call.x);
  check_channels("bias", call.bias, in, call.x);
  if (call.residual) check_like("residual", *call.residual, call.x);
  FUSEDNORM_CHECK(call.eps >= 0, "eps is ", call.eps, ", expected at least 0");
  check_activation(call.act);
  return in;
}

// A cumulative average, whose weight the device counts, is a launch of its own.
void update_afterwards(const Running& running, const Results& out, const Input& in, int64_t count,
                       cudaStream_t stream) {
  RunningParams p{};
  p.dtype = in.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  p.running_mean = running.mean->mutable_data_ptr();
  p.running_var = running.var->mutable_data_ptr();
  p.num_batches_tracked = static_cast<int64_t*>(running.num_batches_tracked->mutable_data_ptr());
  p.mean = out.mean.const_data_ptr();
  p.var = out.var->const_data_ptr();
  p.groups = in.num_groups;
  p.count = count;
  p.cumulative = true;
  p.stream = stream;
  launch_update_running(p);
}

Results run(const char* op, const Call& call, const Input& in, const Running& running,
            bool wants_var) {
  const Tensor& x = call.x;
  const Guard guard(x);
  const Tensor input = canonical(x);
  const bool cumulative = running.mean && !running.momentum;
  Results out{new_like(input), new_cells(in, x), new_cells(in, x),
              new_bytes(call.save_mask ? mask_size(x) : 0, x), std::nullopt};
  if (wants_var || cumulative) out.var = new_cells(in, x);
  if (in.empty) {
    torch::stable::zero_(out.mean);
    if (out.var) torch::stable::zero_(*out.var);
    torch::stable::fill_(out.rstd, 1 / std::sqrt(call.eps));
    return out;
  }
  const Operands operands(input, call.weight, call.bias, call.residual);
  NormParams p = operands.params(in);
  p.mean = out.mean.mutable_data_ptr();
  p.rstd = out.rstd.mutable_data_ptr();
  p.var = out.var ? out.var->mutable_data_ptr() : nullptr;
  p.out = out.y.mutable_data_ptr();
  p.mask = call.save_mask ? static_cast<uint8_t*>(out.mask.mutable_data_ptr()) : nullptr;
  p.eps = call.eps;
  p.act = static_cast<int>(call.act);
  p.slope = call.slope;
  if (running.mean && !cumulative) {
    p.running_mean = running.mean->mutable_data_ptr();
    p.running_var = running.var->mutable_data_ptr();
    p.momentum = *running.momentum;
    if (running.num_batches_tracked) {
      p.num_batches_tracked =
          static_cast<int64_t*>(running.num_batches_tracked->mutable_data_ptr());
    }
  }
  const Planned planned(p, Direction::kForward, input, &forward_kernel_on_chip);
  if (!x.is_cuda()) return out;
  forward(p);
  if (cumulative) update_afterwards(running, out, in, p.geometry.count(), p.stream);
  check_launch(op);
  return out;
}

// y = act(z), z = (x - mean)*rstd*weight[c] + bias[c] (+ residual), and the statistics it used.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, int64_t num_groups, bool per_sample, double eps, int64_t act,
    double slope, bool save_mask) {
  const Call call{x, weight, bias, residual, eps, act, slope, save_mask};
  const Input in = check_call(call, num_groups, per_sample);
  require_cuda("norm_forward", x);
  Results out = run("norm_forward", call, in, {nullptr, nullptr, std::nullopt, std::nullopt}, true);
  return {out.y, out.mean, out.rstd, *out.var, out.mask};
}

// The same with everything that Python checks for the other operators, and with the running
// statistics in the same launch: all there is to a training step of a small layer.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_train(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    int64_t num_groups, bool per_sample, double eps, std::optional<double> momentum, int64_t act,
    double slope, bool save_mask) {
  const Call call{x, weight, bias, residual, eps, act, slope, save_mask};
  const Input in = check_call(call, num_groups, per_sample);
  const int64_t samples = per_sample ? 1 : in.samples;
  const int64_t count = samples * (in.channels * in.spatial / num_groups);
  FUSEDNORM_CHECK(count >= 2 || (per_sample && in.samples == 0), "x has ", count,
                  " values a cell for shape ", shape_name(x), " and num_groups ", num_groups,
                  ", expected at least 2");
  FUSEDNORM_CHECK(running_mean.has_value() == running_var.has_value(),
                  "running_mean and running_var: expected both or neither");
  if (running_mean) {
    FUSEDNORM_CHECK(!per_sample,
                    "running_mean is given, which statistics of a sample have no use for");
    FUSEDNORM_CHECK(running_mean->scalar_type() == in.accumulator, "running_mean has dtype ",
                    dtype_name(running_mean->scalar_type()), ", expected ",
                    dtype_name(in.accumulator));
    check_running(*running_mean, *running_var, num_batches_tracked, momentum, num_groups, x);
  }
  require_cuda("norm_train", x);
  const Running running{running_mean ? &*running_mean : nullptr,
                        running_var ? &*running_var : nullptr, num_batches_tracked, momentum};
  Results out = run("norm_train", call, in, running, false);
  return {std::move(out.y), std::move(out.mean), std::move(out.rstd), std::move(out.mask)};
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

  const Guard guard(x);
  const Tensor input = canonical(x);
  const Tensor y = new_like(input);
  if (in.empty) return y;
  const Operands operands(input, weight, bias, residual);
  const Statistics statistics(mean, rstd);
  NormParams p = operands.params(in);
  statistics.fill(p);
  p.out = y.mutable_data_ptr();
  p.act = static_cast<int>(act);
  p.slope = slope;
  const Planned planned(p, Direction::kApply, input);
  if (!x.is_cuda()) return y;
  apply(p);
  check_launch("norm_apply");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_train", TORCH_BOX(&norm_train));
  m.impl("norm_apply", TORCH_BOX(&norm_apply));
}

// On the CPU the same functions check their arguments and then refuse: callable without a card.
STABLE_TORCH_LIBRARY_IMPL(fusednorm, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_train", TORCH_BOX(&norm_train));
  m.impl("norm_apply", TORCH_BOX(&norm_apply));
}

}  // namespace fusednorm::ops
