// From a call's parameters to a plan that the device at hand can run, and its scratch.
#pragma once

#include "device.h"

namespace fusednorm::ops {

// The kernel that an on-chip plan launches. Passed in, so that kernels are compiled in one place.
using KernelOf = const void* (*)(const NormParams& p);

// Set once all activation pointers of p are; the scratch lives as long as this does.
class Planned {
 public:
  // Fills in p's plan, counters, workspace and stream. x: the operator's, canonical.
  Planned(NormParams& p, Direction direction, const Tensor& x, KernelOf kernel_of = nullptr);

 private:
  OptionalTensor workspace_;
};

}  // namespace fusednorm::ops
