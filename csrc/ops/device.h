// The CUDA context as operators need it: device properties, streams, guards, errors, and the switch
// that leaves launches out so that the host's share of a call can be measured without a card.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "tensor.h"

// It lives in torch's CUDA library. Weak, so that this library also loads where there is none.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace fusednorm::ops {

// With null launches on, operators take CPU tensors too: they check, plan for an H200, allocate,
// and stop there. Outputs are then uninitialised memory.
bool null_launch();

// Makes the tensor's device the current one; nothing for a CPU tensor.
class Guard {
 public:
  explicit Guard(const Tensor& x) {
    if (x.is_cuda()) guard_.emplace(x.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// What plans ask of a device, queried once; a CPU tensor's is an H200.
const Device& device_of(int64_t index);
const Device& device_of(const Tensor& x);

// Null for a CPU tensor.
cudaStream_t current_stream(const Tensor& x);

// The last check of each operator.
void require_cuda(const char* op, const Tensor& x);

void check_cuda(const char* what, cudaError_t error);
void check_launch(const char* op);

}  // namespace fusednorm::ops
