// Everything the outside calls, on raw pointers: forward, apply, backward, update_running.
//
// A caller makes a Geometry, a Plan for it, a workspace of the plan's size, and fills one params
// struct. The params are taken as valid; csrc/ops checks them. Launch errors are left to
// cudaGetLastError.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "running.cuh"
