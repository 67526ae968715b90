// Counters by which the last block of a launch to arrive knows itself, or a grid meets.
#pragma once

#include "device.h"

namespace fusednorm::ops {

// `count` zeroed counters that no other launch can touch while this one runs, or null if there are
// none to be had: then the plan has to do without. The tensor's device is the current one.
unsigned* take_counters(const Tensor& x, cudaStream_t stream, int64_t count);

}  // namespace fusednorm::ops
