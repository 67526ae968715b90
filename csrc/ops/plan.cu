// fusednorm::plan: what a call would do on some device, for people to read. Callable without one.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "device.h"

namespace fusednorm::ops {

namespace {

Device device_from(const std::vector<int64_t>& numbers) {
  if (numbers.empty()) return kH200;
  FUSEDNORM_CHECK(numbers.size() == 9, "device has ", numbers.size(),
                  " numbers, expected 9, or none for an H200");
  Device device{};
  device.num_sms = static_cast<int>(numbers[0]);
  device.shared_per_block = static_cast<int>(numbers[1]);
  device.shared_per_sm = static_cast<int>(numbers[2]);
  device.registers_per_sm = static_cast<int>(numbers[3]);
  device.threads_per_sm = static_cast<int>(numbers[4]);
  device.capability = static_cast<int>(numbers[5]);
  device.cooperative = numbers[6] != 0;
  device.max_cluster = static_cast<int>(numbers[7]);
  device.l2_bytes = numbers[8];
  return device;
}

Tensor numbers(const std::vector<int64_t>& values) {
  const int64_t size = static_cast<int64_t>(values.size());
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &size, &stride, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

// sizes: (N, C, S). flags: channels_last, aligned, residual, mask, dresidual, streaming only.
// The order of the result is PLAN_FIELDS of fusednorm/explanation.py.
Tensor plan(std::vector<int64_t> sizes, int64_t num_groups, bool per_sample, int64_t element_size,
            int64_t direction, int64_t act, std::vector<int64_t> flags,
            std::vector<int64_t> device) {
  FUSEDNORM_CHECK(sizes.size() == 3, "sizes has ", sizes.size(), " entries, expected (N, C, S)");
  FUSEDNORM_CHECK(sizes[0] >= 1 && sizes[1] >= 1 && sizes[2] >= 1,
                  "sizes has an entry below 1, for which nothing is launched");
  FUSEDNORM_CHECK(num_groups >= 1 && sizes[1] * sizes[2] % num_groups == 0, "num_groups is ",
                  num_groups, ", expected a divisor of ", sizes[1] * sizes[2]);
  FUSEDNORM_CHECK(element_size == 2 || element_size == 4 || element_size == 8, "element_size is ",
                  element_size, ", expected 2, 4 or 8");
  FUSEDNORM_CHECK(0 <= direction && direction <= 2, "direction is ", direction,
                  ", expected 0 forward, 1 backward or 2 apply");
  FUSEDNORM_CHECK(flags.size() == 6, "flags has ", flags.size(), " entries, expected 6");
  Problem problem{};
  problem.geometry = make_geometry(sizes[0], sizes[1], sizes[2], num_groups, per_sample);
  problem.element_size = static_cast<int>(element_size);
  problem.channels_last = flags[0] != 0;
  problem.aligned = flags[1] != 0;
  problem.direction = static_cast<Direction>(direction);
  problem.residual = flags[2] != 0;
  problem.mask = flags[3] != 0;
  problem.dresidual = flags[4] != 0;
  problem.act = static_cast<int>(act);
  const Device on = device_from(device);
  const Plan p = flags[5] ? plan_streaming(problem, on) : make_plan(problem, on);
  return numbers({int64_t(p.path), int64_t(p.tier), int64_t(p.pattern), p.vector, p.block, p.grid,
                  p.tiles, p.splits, p.nodes, p.cluster, p.ctas_per_group, p.slices, p.slots,
                  p.shared_bytes, p.ctas_per_sm, p.counters, workspace_bytes(problem, p),
                  planned_bytes(problem, p)});
}

// The numbers `plan` takes, of a device of this machine.
Tensor device(int64_t index) {
  const Device& d = device_of(index);
  return numbers({d.num_sms, d.shared_per_block, d.shared_per_sm, d.registers_per_sm,
                  d.threads_per_sm, d.capability, d.cooperative, d.max_cluster, d.l2_bytes});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm, m) {
  m.def(
      "plan(int[] sizes, int num_groups, bool per_sample, int element_size, int direction, int "
      "act, "
      "int[] flags, int[] device) -> Tensor");
  m.def("device(int index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("device", TORCH_BOX(&device));
}

}  // namespace fusednorm::ops
