// Device properties and the null launch of device.h.
#include "device.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <mutex>

namespace fusednorm::ops {

namespace {

constexpr int kMaxDevices = 64;

std::atomic<bool> null_launch_on{false};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda("device properties", cudaDeviceGetAttribute(&value, name, device));
  return value;
}

Device query(int index) {
  Device device{};
  device.num_sms = attribute(cudaDevAttrMultiProcessorCount, index);
  device.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  device.registers_per_sm = attribute(cudaDevAttrMaxRegistersPerMultiprocessor, index);
  device.threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, index);
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                      attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  // Clusters of 16 are not portable: the data centre parts have them. What a device really runs is
  // asked before a plan is used.
  const bool data_centre = device.capability >= 90 && device.capability < 120;
  device.max_cluster = data_centre ? 16 : device.capability >= 90 ? 8 : 1;
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  return device;
}

void set_null_launch(bool on) {
  null_launch_on = on;
}

}  // namespace

bool null_launch() {
  return null_launch_on.load(std::memory_order_relaxed);
}

const Device& device_of(const Tensor& x) {
  return x.is_cuda() ? device_of(x.get_device_index()) : kH200;
}

const Device& device_of(int64_t index) {
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<Device, kMaxDevices> devices;
  FUSEDNORM_CHECK(0 <= index && index < kMaxDevices, "device index is ", index,
                  ", expected less than ", kMaxDevices);
  std::call_once(once[index], [index] { devices[index] = query(int(index)); });
  return devices[index];
}

cudaStream_t current_stream(const Tensor& x) {
  if (!x.is_cuda()) return nullptr;
  FUSEDNORM_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void require_cuda(const char* op, const Tensor& x) {
  FUSEDNORM_CHECK(x.is_cuda() || null_launch(), op, " expects CUDA tensors, got ", device_name(x));
}

void check_cuda(const char* what, cudaError_t error) {
  FUSEDNORM_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  FUSEDNORM_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm, m) {
  m.def("_set_null_launch(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CompositeExplicitAutograd, m) {
  m.impl("_set_null_launch", TORCH_BOX(&set_null_launch));
}

}  // namespace fusednorm::ops
