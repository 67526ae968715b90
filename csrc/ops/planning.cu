// Plans are made once for every problem a thread meets: choosing a tier costs microseconds, and a
// training step asks for the same few dozen plans over and over.
#include "planning.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <unordered_map>

#include "counters.h"

namespace fusednorm::ops {

namespace {

// Shapes that vary without end, as those of detection crops may, must not fill the memory.
constexpr size_t kMostPlans = 4096;

// What a plan depends on, as plain numbers: no padding to compare.
using Key = std::array<int64_t, 8>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (const int64_t number : key) hash = hash * 0x9e3779b97f4a7c15 + static_cast<size_t>(number);
    return hash ^ hash >> 29;
  }
};

struct Sized {
  Plan plan;
  int64_t workspace;  // bytes
};

struct Choice {
  Sized best;
  Sized streaming;  // where a barrier's counters have run out
};

Key key_of(const Problem& q, DType dtype, int device) {
  const Geometry& g = q.geometry;
  const int64_t options = q.channels_last | q.aligned << 1 | q.residual << 2 | q.mask << 3 |
                          q.dresidual << 4 | int64_t(q.direction) << 5 | int64_t(dtype) << 8 |
                          int64_t(q.act) << 12;
  return {g.samples, g.channels, g.spatial, g.groups, g.sets, options, device, 0};
}

// Whether the device holds as many CTAs at once as the plan counts on. Registers and shared memory
// are known to the plan; what else a driver keeps for itself is not.
bool runs_on_device(const NormParams& p, const void* kernel, const Device& device) {
  const Plan& plan = p.plan;
  if (allow_shared(kernel) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  if (plan.tier == Tier::kCluster) {
    if (plan.cluster > 8) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(plan.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(plan.grid));
    config.blockDim = dim3(unsigned(plan.block));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    cudaGetLastError();
    return error == cudaSuccess && clusters > 0;
  }
  int blocks = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, kernel, plan.block, static_cast<size_t>(plan.shared_bytes));
  cudaGetLastError();
  const int64_t wanted = plan.tier == Tier::kGrid ? plan.grid : 1;
  return error == cudaSuccess && int64_t(blocks) * device.num_sms >= wanted;
}

Choice choose(NormParams p, const Problem& problem, const Tensor& x, KernelOf kernel_of) {
  const Device& device = device_of(x);
  p.plan = make_plan(problem, device);
  const Plan streaming = plan_streaming(problem, device);
  const bool on_chip = p.plan.path == Path::kOnChip;
  if (on_chip && x.is_cuda() && !runs_on_device(p, kernel_of(p), device)) p.plan = streaming;
  return {{p.plan, workspace_bytes(problem, p.plan)},
          {streaming, workspace_bytes(problem, streaming)}};
}

const Choice& chosen(const NormParams& p, const Problem& problem, const Tensor& x,
                     KernelOf kernel_of) {
  static thread_local std::unordered_map<Key, Choice, KeyHash> plans;
  const Key key = key_of(problem, p.dtype, x.is_cuda() ? x.get_device_index() : -1);
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans.emplace(key, choose(p, problem, x, kernel_of)).first->second;
}

}  // namespace

Planned::Planned(NormParams& p, Direction direction, const Tensor& x, KernelOf kernel_of) {
  uintptr_t bits = 0;
  for (const void* pointer : {p.x, p.dy, p.residual, const_cast<const void*>(p.out),
                              const_cast<const void*>(p.dresidual)}) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  Problem problem{};
  problem.geometry = p.geometry;
  problem.element_size = element_size(p.dtype);
  problem.channels_last = is_nhwc(x);
  problem.aligned = bits % kVectorBytes == 0;
  problem.direction = direction;
  problem.residual = p.residual != nullptr;
  problem.mask = p.mask != nullptr;
  problem.dresidual = p.dresidual != nullptr;
  problem.act = p.act;
  const Choice& choice = chosen(p, problem, x, kernel_of);
  const Sized* taken = &choice.best;
  p.stream = current_stream(x);
  p.counters = take_counters(x, p.stream, taken->plan.counters);
  const bool barred = taken->plan.path == Path::kOnChip && taken->plan.counters > 0;
  if (barred && !p.counters) {
    taken = &choice.streaming;
    p.counters = take_counters(x, p.stream, taken->plan.counters);
  }
  p.plan = taken->plan;
  if (taken->workspace > 0) {
    workspace_ = new_bytes(taken->workspace, x);
    p.workspace = workspace_->mutable_data_ptr();
  }
}

}  // namespace fusednorm::ops
