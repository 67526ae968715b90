// Memory that tells: heap buffers of exactly the size asked for, so that AddressSanitizer sees the
// first access past the end, filled with 0xff, which is NaN in every float type, so that what stays
// unwritten shows.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "kernels/pipeline.cuh"

namespace fusednorm::host {

template <typename T>
std::unique_ptr<T[]> poisoned(size_t count) {
  std::unique_ptr<T[]> buffer(new T[count]);
  std::memset(static_cast<void*>(buffer.get()), 0xff, count * sizeof(T));
  return buffer;
}

template <typename T>
bool any_poison(const T* buffer, size_t count) {
  T pattern;
  std::memset(static_cast<void*>(&pattern), 0xff, sizeof(T));
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(&buffer[i], &pattern, sizeof(T)) == 0) return true;
  }
  return false;
}

// The problem that a call with these parameters has been planned for.
inline Problem problem_of(const NormParams& p, Direction direction) {
  Problem problem{};
  problem.geometry = p.geometry;
  problem.element_size = element_size(p.dtype);
  problem.direction = direction;
  return problem;
}

// Runs an op of the pipeline on a workspace of exactly its size, and with exactly as many counters
// as the plan asks for, or none; they must be zero again afterwards.
template <typename Op>
void run(NormParams params, Direction direction, bool counted, const Op& op) {
  const int64_t bytes = workspace_bytes(problem_of(params, direction), params.plan);
  const auto workspace = poisoned<char>(static_cast<size_t>(bytes));
  params.workspace = workspace.get();
  const std::unique_ptr<unsigned[]> counters(new unsigned[params.plan.counters]());
  params.counters = counted && params.plan.counters > 0 ? counters.get() : nullptr;
  op(params);
  for (int64_t i = 0; i < params.plan.counters; ++i) {
    if (counters[i] != 0) throw std::runtime_error("a counter was not set back to zero");
  }
}

// 16-byte accesses need every activation on a 16-byte boundary; absent ones do not mind.
inline bool aligned(const NormParams& params) {
  for (const void* pointer :
       {params.x, params.dy, params.residual, static_cast<const void*>(params.out),
        static_cast<const void*>(params.dresidual)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % kVectorBytes != 0) return false;
  }
  return true;
}

}  // namespace fusednorm::host
