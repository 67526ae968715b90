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

// Runs an op of the pipeline on a workspace of exactly `bytes`, all of which it must write.
template <typename Op>
void run_with_workspace(NormParams params, int64_t bytes, const Op& op) {
  const auto workspace = poisoned<char>(static_cast<size_t>(bytes));
  params.workspace = workspace.get();
  op(params);
  const auto check = [&](auto word) {
    const auto* words = reinterpret_cast<const decltype(word)*>(workspace.get());
    if (any_poison(words, bytes / sizeof(word))) {
      throw std::runtime_error("a partial result was not written");
    }
  };
  accumulator_size(params.dtype) == 8 ? check(double{}) : check(float{});
}

inline void run_forward(const NormParams& params) {
  const int64_t bytes =
      forward_workspace_bytes(params.geometry, params.plan, accumulator_size(params.dtype));
  run_with_workspace(params, bytes, [](const NormParams& p) { forward(p); });
}

inline void run_backward(const NormParams& params) {
  const int64_t bytes =
      backward_workspace_bytes(params.geometry, params.plan, accumulator_size(params.dtype));
  run_with_workspace(params, bytes, [](const NormParams& p) { backward(p); });
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
