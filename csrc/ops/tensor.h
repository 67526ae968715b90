// What the operators share: checks with messages for people, memory layouts, allocation.
//
// Entry points check, kernels assume. Every message starts with "fusednorm: " and names the
// argument, what came and what is allowed. Only the LibTorch stable ABI is used (torch/csrc/stable,
// torch/headeronly).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/launch.cuh"

namespace fusednorm::ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fusednorm: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that the parts of the message are made only when it is needed: an operator makes some
// twenty checks, and printing a shape takes as long as a launch.
#define FUSEDNORM_CHECK(condition, ...)                    \
  do {                                                     \
    if (!(condition)) ::fusednorm::ops::fail(__VA_ARGS__); \
  } while (false)

// As torch prints them: [2, 3], float32, cuda:0.
std::string shape_name(const Tensor& t);
std::string dtype_name(ScalarType dtype);
std::string device_name(const Tensor& t);

// x of an operator: (N, C, *), its kernel dtype, the dtype of its statistics and parameters.
struct Input {
  DType dtype;
  ScalarType accumulator;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t num_groups;
  bool per_sample;
  bool empty;
};

// The kernels' name of a dtype, if they have one, and the dtype they accumulate it in.
std::optional<DType> dtype_of(ScalarType dtype);
ScalarType accumulator_of(DType dtype);

Input check_input(const Tensor& x, int64_t num_groups, bool per_sample);
void check_activation(int64_t act);

// Shape, dtype and device of a second tensor against the first.
void check_like(const char* name, const Tensor& t, const Tensor& x);
void check_channels(const char* name, const OptionalTensor& t, const Input& in, const Tensor& x);
void check_cells(const char* name, const Tensor& t, const Input& in, const Tensor& x);

// The mask of x's elements, see fusednorm/ops/mask.py.
int64_t mask_size(const Tensor& x);
void check_mask(const Tensor& mask, const Tensor& x);

// Buffers of `size` entries to be updated in place, and the counter beside them.
void check_running(const Tensor& mean, const Tensor& var, const OptionalTensor& tracked,
                   std::optional<double> momentum, int64_t size, const Tensor& x);
void check_same_device(const char* name, const Tensor& t, const char* other, const Tensor& x);

// t itself if it is: asking the dispatcher for as much takes half a microsecond.
Tensor dense(const Tensor& t);

// x itself if it is dense NCHW or NHWC of any rank, else a dense copy in the layout it leans
// towards; the Python side's fake kernels follow the same rule (fusednorm/layout.py).
Tensor canonical(const Tensor& x);
bool is_nhwc(const Tensor& x);

// t with the strides of x, which is canonical: t itself where it has them.
Tensor like(const Tensor& t, const Tensor& x);

// Uninitialised memory. Through the dispatcher these would cost as much as a launch.
Tensor new_like(const Tensor& x);
Tensor new_cells(const Input& in, const Tensor& x);
Tensor new_channels(const Input& in, const Tensor& x);
Tensor new_bytes(int64_t bytes, const Tensor& x);
Tensor new_none(const Tensor& x);  // (0,) of x's dtype

// x, which is canonical, with its parameters and residual as the kernels want them: dense, in x's
// layout. Holds the copies that took, so it has to outlive the launches.
class Operands {
 public:
  Operands(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
           const OptionalTensor& residual);

  // Geometry, dtype and these pointers; the rest is null.
  NormParams params(const Input& in) const;

 private:
  Tensor x_;
  OptionalTensor weight_;
  OptionalTensor bias_;
  OptionalTensor residual_;
};

// Given mean and rstd, likewise.
class Statistics {
 public:
  Statistics(const Tensor& mean, const Tensor& rstd);
  void fill(NormParams& p) const;

 private:
  Tensor mean_;
  Tensor rstd_;
};

}  // namespace fusednorm::ops
