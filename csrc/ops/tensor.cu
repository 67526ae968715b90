// The checks and tensors of tensor.h.
#include "tensor.h"

#include <array>

#include "kernels/activation.cuh"

namespace fusednorm::ops {

namespace {

std::string list_name(const int64_t* values, int64_t count) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < count; ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

int32_t device_type(const Tensor& t) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  FUSEDNORM_CHECK(t.scalar_type() == expected, name, " has dtype ", dtype_name(t.scalar_type()),
                  ", expected ", dtype_name(expected));
}

void check_shape(const char* name, const Tensor& t, const int64_t* expected, int64_t rank,
                 const char* meaning) {
  bool same = t.dim() == rank;
  for (int64_t i = 0; same && i < rank; ++i) same = t.size(i) == expected[i];
  FUSEDNORM_CHECK(same, name, " has shape ", shape_name(t), ", expected ",
                  list_name(expected, rank), meaning);
}

Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t rank, int32_t dtype,
                   const Tensor& x) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      rank, sizes, strides, dtype, device_type(x), x.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor new_vector(int64_t size, int32_t dtype, const Tensor& x) {
  const int64_t stride = 1;
  return new_strided(&size, &stride, 1, dtype, x);
}

int32_t dtype_code(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

int32_t accumulator_code(const Input& in) {
  return in.dtype == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

}  // namespace

std::string shape_name(const Tensor& t) {
  return list_name(t.sizes().data(), t.dim());
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string device_name(const Tensor& t) {
  const int32_t type = device_type(t);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "device type " + std::to_string(type);
}

std::optional<DType> dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

ScalarType accumulator_of(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

Input check_input(const Tensor& x, int64_t num_groups, bool per_sample) {
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  FUSEDNORM_CHECK(dtype.has_value(), "x has dtype ", dtype_name(x.scalar_type()),
                  ", expected float32, float16, bfloat16 or float64");
  FUSEDNORM_CHECK(x.dim() >= 2, "x has shape ", shape_name(x), ", expected (N, C, *)");
  Input in{};
  in.dtype = *dtype;
  in.accumulator = accumulator_of(*dtype);
  in.samples = x.size(0);
  in.channels = x.size(1);
  in.spatial = 1;
  for (int64_t i = 2; i < x.dim(); ++i) in.spatial *= x.size(i);
  in.num_groups = num_groups;
  in.per_sample = per_sample;
  in.empty = x.numel() == 0;
  const int64_t size = in.channels * in.spatial;
  FUSEDNORM_CHECK(num_groups >= 1 && size % num_groups == 0, "num_groups is ", num_groups,
                  ", expected a divisor of the ", size, " elements a sample of x, which has shape ",
                  shape_name(x));
  return in;
}

void check_activation(int64_t act) {
  FUSEDNORM_CHECK(0 <= act && act < kActivations, "act is ", act, ", expected 0 to ",
                  kActivations - 1);
}

void check_same_device(const char* name, const Tensor& t, const char* other, const Tensor& x) {
  FUSEDNORM_CHECK(device_type(t) == device_type(x) && t.get_device_index() == x.get_device_index(),
                  name, " is on ", device_name(t), ", but ", other, " is on ", device_name(x));
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  check_shape(name, t, x.sizes().data(), x.dim(), " as x");
  check_dtype(name, t, x.scalar_type());
  check_same_device(name, t, "x", x);
}

void check_channels(const char* name, const OptionalTensor& t, const Input& in, const Tensor& x) {
  if (!t) return;
  check_shape(name, *t, &in.channels, 1, ", one entry a channel of x");
  check_dtype(name, *t, in.accumulator);
  check_same_device(name, *t, "x", x);
}

void check_cells(const char* name, const Tensor& t, const Input& in, const Tensor& x) {
  const std::array<int64_t, 2> shape{in.samples, in.num_groups};
  if (in.per_sample) {
    check_shape(name, t, shape.data(), 2, ", one entry a sample and group");
  } else {
    check_shape(name, t, &shape[1], 1, ", one entry a group");
  }
  check_dtype(name, t, in.accumulator);
  check_same_device(name, t, "x", x);
}

int64_t mask_size(const Tensor& x) {
  const int64_t vector = 16 / x.element_size();
  return (x.numel() + vector - 1) / vector;
}

void check_mask(const Tensor& mask, const Tensor& x) {
  const int64_t size = mask_size(x);
  check_shape("mask", mask, &size, 1, ", one byte for 16 of x");
  check_dtype("mask", mask, ScalarType::Byte);
  check_same_device("mask", mask, "x", x);
  FUSEDNORM_CHECK(mask.is_contiguous(), "mask is not contiguous");
}

void check_running(const Tensor& mean, const Tensor& var, const OptionalTensor& tracked,
                   std::optional<double> momentum, int64_t size, const Tensor& x) {
  check_shape("running_mean", mean, &size, 1, ", one entry a group");
  check_shape("running_var", var, &size, 1, ", one entry a group");
  check_dtype("running_var", var, mean.scalar_type());
  check_same_device("running_mean", mean, "x", x);
  check_same_device("running_var", var, "x", x);
  // They are updated in place, so a contiguous copy would not do.
  FUSEDNORM_CHECK(mean.is_contiguous(), "running_mean is not contiguous");
  FUSEDNORM_CHECK(var.is_contiguous(), "running_var is not contiguous");
  FUSEDNORM_CHECK(momentum || tracked, "momentum is None, which needs num_batches_tracked");
  if (!tracked) return;
  FUSEDNORM_CHECK(tracked->numel() == 1, "num_batches_tracked has shape ", shape_name(*tracked),
                  ", expected one element");
  check_dtype("num_batches_tracked", *tracked, ScalarType::Long);
  check_same_device("num_batches_tracked", *tracked, "x", x);
}

bool is_nhwc(const Tensor& x) {
  if (x.dim() < 3 || x.is_contiguous()) return false;
  // Innermost first: channel, spatial axes from the last, sample. Axes of length 1 have no stride.
  int64_t expected = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t axis = i == 0 ? 1 : i == x.dim() - 1 ? 0 : x.dim() - i;
    if (x.size(axis) != 1 && x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor canonical(const Tensor& x) {
  if (x.is_contiguous() || is_nhwc(x)) return x;
  const bool leans = (x.dim() == 4 || x.dim() == 5) && x.stride(1) == 1;
  const auto channels_last =
      x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  return torch::stable::contiguous(x, leans ? channels_last : MemoryFormat::Contiguous);
}

Tensor like(const Tensor& t, const Tensor& x) {
  if (!is_nhwc(x)) return dense(t);
  if (is_nhwc(t)) return t;
  // empty_like keeps dense strides of any rank, which no memory format of torch's can name.
  Tensor out = torch::stable::empty_like(x);
  return torch::stable::copy_(out, t);
}

Tensor new_like(const Tensor& x) {
  return new_strided(x.sizes().data(), x.strides().data(), x.dim(), dtype_code(x), x);
}

Tensor new_cells(const Input& in, const Tensor& x) {
  const std::array<int64_t, 2> sizes{in.samples, in.num_groups};
  const std::array<int64_t, 2> strides{in.num_groups, 1};
  const int first = in.per_sample ? 0 : 1;
  return new_strided(&sizes[first], &strides[first], 2 - first, accumulator_code(in), x);
}

Tensor new_channels(const Input& in, const Tensor& x) {
  return new_vector(in.channels, accumulator_code(in), x);
}

Tensor new_bytes(int64_t bytes, const Tensor& x) {
  return new_vector(bytes, aoti_torch_dtype_uint8(), x);
}

Tensor new_none(const Tensor& x) {
  return new_vector(0, dtype_code(x), x);
}

Operands::Operands(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual)
    : x_(x) {
  if (weight) weight_ = dense(*weight);
  if (bias) bias_ = dense(*bias);
  if (residual) residual_ = like(*residual, x);
}

NormParams Operands::params(const Input& in) const {
  NormParams p{};
  p.geometry = make_geometry(in.samples, in.channels, in.spatial, in.num_groups, in.per_sample);
  p.dtype = in.dtype;
  p.x = x_.const_data_ptr();
  p.weight = weight_ ? weight_->const_data_ptr() : nullptr;
  p.bias = bias_ ? bias_->const_data_ptr() : nullptr;
  p.residual = residual_ ? residual_->const_data_ptr() : nullptr;
  return p;
}

Statistics::Statistics(const Tensor& mean, const Tensor& rstd)
    : mean_(dense(mean)), rstd_(dense(rstd)) {}

void Statistics::fill(NormParams& p) const {
  // Read only: apply and backward share the field with forward, which writes it.
  p.mean = const_cast<void*>(mean_.const_data_ptr());
  p.rstd = const_cast<void*>(rstd_.const_data_ptr());
}

}  // namespace fusednorm::ops
