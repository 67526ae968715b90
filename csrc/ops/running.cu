// update_running: checks and the launch.
#include "running.h"

#include <torch/csrc/stable/library.h>

#include "device.h"

namespace fusednorm::ops {

namespace {

void check_vector(const char* name, const Tensor& t, const Tensor& running_mean, ScalarType dtype) {
  FUSEDNORM_CHECK(t.dim() == 1 && t.numel() == running_mean.numel(), name, " has shape ",
                  shape_name(t), ", expected ", shape_name(running_mean), " as running_mean");
  FUSEDNORM_CHECK(t.scalar_type() == dtype, name, " has dtype ", dtype_name(t.scalar_type()),
                  ", expected ", dtype_name(dtype));
  check_same_device(name, t, "running_mean", running_mean);
}

// running_mean and running_var move towards mean and var*count/(count - 1), and the counter by one.
void update_running(const Tensor& running_mean, const Tensor& running_var,
                    const OptionalTensor& num_batches_tracked, const Tensor& mean,
                    const Tensor& var, std::optional<double> momentum, int64_t count) {
  const ScalarType dtype = running_mean.scalar_type();
  const std::optional<DType> kernel_dtype = dtype_of(dtype);
  FUSEDNORM_CHECK(kernel_dtype.has_value(), "running_mean has dtype ", dtype_name(dtype),
                  ", expected float32, float16, bfloat16 or float64");
  FUSEDNORM_CHECK(running_mean.dim() == 1, "running_mean has shape ", shape_name(running_mean),
                  ", expected one dimension");
  const ScalarType accumulator = accumulator_of(*kernel_dtype);
  check_vector("mean", mean, running_mean, accumulator);
  check_vector("var", var, running_mean, accumulator);
  check_running(running_mean, running_var, num_batches_tracked, momentum, running_mean.numel(),
                running_mean);
  FUSEDNORM_CHECK(count >= 2, "count is ", count, ", expected at least 2 values a cell");
  require_cuda("update_running", running_mean);

  const Guard guard(running_mean);
  const Tensor dense_mean = dense(mean);
  const Tensor dense_var = dense(var);
  RunningParams p{};
  p.dtype = *kernel_dtype;
  p.running_mean = running_mean.mutable_data_ptr();
  p.running_var = running_var.mutable_data_ptr();
  if (num_batches_tracked) {
    p.num_batches_tracked = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  p.mean = dense_mean.const_data_ptr();
  p.var = dense_var.const_data_ptr();
  p.groups = running_mean.numel();
  p.count = count;
  p.cumulative = !momentum;
  p.momentum = momentum.value_or(0);
  p.stream = current_stream(running_mean);
  if (!running_mean.is_cuda()) return;
  launch_update_running(p);
  check_launch("update_running");
}

}  // namespace

void launch_update_running(const RunningParams& p) {
  fusednorm::update_running(p);
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CUDA, m) {
  m.impl("update_running", TORCH_BOX(&update_running));
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CPU, m) {
  m.impl("update_running", TORCH_BOX(&update_running));
}

}  // namespace fusednorm::ops
