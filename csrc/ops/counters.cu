// Where counters come from: a static array a device, zeroed when the module is loaded.
//
// Kernels leave the counters they used at zero, so nobody ever clears them and a call has no memset
// node. That holds as long as no two launches that may run at the same time share a counter:
//
//   * Launches of one stream follow each other: a stream has one share of the array, for good.
//     It is known by its id, which is never used again, unlike the handle of a destroyed stream.
//     The per-thread default stream is a stream a thread under one handle: it gets none.
//   * A captured launch runs whenever its graph does, perhaps beside the stream it was captured
//     from, and beside other graphs: it gets counters of its graph's own, which no other graph
//     uses. What one capture records from one stream follows each other there too, and shares
//     them: a graph of a thousand layers takes as many as its largest. Replays of one executable
//     graph follow each other. Whoever instantiates a captured graph twice, and runs both at once,
//     breaks this; torch.cuda.graph does not.
//   * A kernel that was stopped halfway leaves counters behind, but also a context in which nothing
//     can be launched any more.
#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <unordered_map>

#include "counters.h"

namespace fusednorm::ops {

namespace {

// 8 MiB a device: 48 shares, each enough for a counter a cell of the layers that have most of them
// (group norm of a large batch, thousands), and 1.3 million for captured launches.
constexpr int64_t kPool = 1 << 21;
constexpr int64_t kShare = 1 << 14;
constexpr int64_t kStreams = 48;
constexpr int kMaxDevices = 64;

__device__ unsigned counter_pool[kPool];

struct Pool {
  std::mutex mutex;
  unsigned* base = nullptr;
  bool failed = false;
  std::unordered_map<unsigned long long, unsigned*> streams;
  int64_t captured = kStreams * kShare;  // next counter for a captured launch
  // Who took counters in a capture last, and how many: ids of captures are never used again.
  unsigned long long capture = 0;
  cudaStream_t capturing = nullptr;
  unsigned* taken = nullptr;
  int64_t taken_count = 0;
};

std::array<Pool, kMaxDevices> pools;

// Asking for the address may load the module, which a capture in global mode would forbid.
unsigned* pool_base(Pool& pool) {
  if (pool.base || pool.failed) return pool.base;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* address = nullptr;
  if (cudaGetSymbolAddress(&address, counter_pool) == cudaSuccess) {
    pool.base = static_cast<unsigned*>(address);
  } else {
    pool.failed = true;
    cudaGetLastError();
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  return pool.base;
}

}  // namespace

unsigned* take_counters(const Tensor& x, cudaStream_t stream, int64_t count) {
  if (count <= 0 || !x.is_cuda() || stream == cudaStreamPerThread) return nullptr;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0, capture = 0;
  if (cudaStreamGetCaptureInfo(stream, &status, &capture) != cudaSuccess ||
      status == cudaStreamCaptureStatusInvalidated) {
    cudaGetLastError();
    return nullptr;
  }
  const bool capturing = status == cudaStreamCaptureStatusActive;
  if (!capturing && (count > kShare || cudaStreamGetId(stream, &id) != cudaSuccess)) {
    cudaGetLastError();
    return nullptr;
  }
  Pool& pool = pools[x.get_device_index()];
  const std::lock_guard<std::mutex> lock(pool.mutex);
  unsigned* base = pool_base(pool);
  if (!base) return nullptr;
  if (capturing) {
    if (pool.taken && pool.capture == capture && pool.capturing == stream &&
        count <= pool.taken_count) {
      return pool.taken;
    }
    if (pool.captured + count > kPool) return nullptr;
    pool.taken = base + pool.captured;
    pool.taken_count = count;
    pool.capture = capture;
    pool.capturing = stream;
    pool.captured += count;
    return pool.taken;
  }
  const auto known = pool.streams.find(id);
  if (known != pool.streams.end()) return known->second;
  const int64_t shares = static_cast<int64_t>(pool.streams.size());
  if (shares >= kStreams) return nullptr;
  return pool.streams.emplace(id, base + shares * kShare).first->second;
}

}  // namespace fusednorm::ops
