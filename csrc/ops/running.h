// The launch of update_running, which norm_train shares.
#pragma once

#include "kernels/running.cuh"

namespace fusednorm::ops {

void launch_update_running(const RunningParams& p);

}  // namespace fusednorm::ops
