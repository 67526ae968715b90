// Broken toy kernels, one for each thing the shim promises to notice, and the sound kernel each
// departs from. A detector that was never seen to fire proves nothing.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffers.h"

namespace fusednorm::host {

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

struct Ordered {
  Schedule schedule;
  const char* name;
};
constexpr Ordered kOrders[] = {{{Order::kForward, 0}, "forward"},
                               {{Order::kReversed, 0}, "reversed"},
                               {{Order::kShuffled, 1}, "shuffled"}};

constexpr int kToyThreads = 96;

// y = x reversed, through shared memory. Without the barrier some thread reads what is not yet
// written.
template <bool kBarrier>
void reverse_kernel(const float* x, float* y) {
  FUSEDNORM_SHARED(float, buffer, kToyThreads);
  buffer[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = buffer[kToyThreads - 1 - threadIdx.x];
}

// Two rounds through one buffer: the barrier after a round keeps the next one from overwriting what
// slow threads have yet to read. No poison is ever read here, only the orders disagree.
template <bool kBarrier>
void rotate_kernel(const float* x, float* y) {
  FUSEDNORM_SHARED(float, buffer, kToyThreads);
  float value = x[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    buffer[threadIdx.x] = value;
    __syncthreads();
    value = buffer[(threadIdx.x + 40) % kToyThreads] + 1.0f;
    if (kBarrier) __syncthreads();
  }
  y[threadIdx.x] = value;
}

// Lanes talk through shared memory, which takes a __syncwarp.
template <bool kBarrier>
void neighbour_kernel(const float* x, float* y) {
  FUSEDNORM_SHARED(float, buffer, kToyThreads);
  buffer[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncwarp();
  y[threadIdx.x] = buffer[threadIdx.x ^ 1];
}

using Toy = void (*)(const float*, float*);

inline std::vector<float> run_toy(Toy toy, Schedule order) {
  std::vector<float> x(kToyThreads);
  for (int i = 0; i < kToyThreads; ++i) x[i] = static_cast<float>(i);
  auto y = poisoned<float>(kToyThreads);
  schedule = order;
  launch(1, kToyThreads, [&] { toy(x.data(), y.get()); });
  return std::vector<float>(y.get(), y.get() + kToyThreads);
}

// Bitwise, since NaN differs from itself.
inline bool orders_agree(Toy toy) {
  const std::vector<float> first = run_toy(toy, kOrders[0].schedule);
  for (const Ordered& order : kOrders) {
    const std::vector<float> other = run_toy(toy, order.schedule);
    if (std::memcmp(first.data(), other.data(), sizeof(float) * first.size()) != 0) return false;
  }
  return true;
}

inline void check_barriers_are_needed() {
  expect(orders_agree(reverse_kernel<true>), "reverse gives one result in every order");
  expect(run_toy(reverse_kernel<true>, {})[0] == kToyThreads - 1, "reverse reverses");
  expect(!orders_agree(reverse_kernel<false>), "reverse without a barrier depends on the order");
  expect(any_poison(run_toy(reverse_kernel<false>, {}).data(), kToyThreads), "and reads poison");
  expect(orders_agree(rotate_kernel<true>), "rotate gives one result in every order");
  expect(run_toy(rotate_kernel<true>, {})[0] == 82.0f, "rotate rotates");
  expect(!orders_agree(rotate_kernel<false>), "rotate without a barrier depends on the order");
  expect(orders_agree(neighbour_kernel<true>), "neighbour gives one result in every order");
  expect(!orders_agree(neighbour_kernel<false>),
         "neighbour without __syncwarp depends on the order");
}

template <typename Kernel>
void expect_error(const char* what, const char* part, const Shape& shape, const Kernel& kernel) {
  for (const Ordered& order : kOrders) {
    schedule = order.schedule;
    std::string message;
    try {
      launch(shape, kernel);
    } catch (const std::exception& error) {
      message = error.what();
    }
    const bool found = message.find(part) != std::string::npos;
    expect(found, std::string(what) + " (" + order.name +
                      "): " + (message.empty() ? "no error" : message));
  }
}

template <typename Kernel>
void expect_error(const char* what, const char* part, unsigned threads, const Kernel& kernel) {
  expect_error(what, part, Shape{1, threads}, kernel);
}

inline void check_divergence_is_reported() {
  expect_error("a thread returns before the barrier", "threads 0-39 returned\n  threads 40-63 wait",
               64, [] {
                 if (threadIdx.x < 40) return;
                 __syncthreads();
               });
  expect_error("two barriers at once", "divergent barrier", 64, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  expect_error("a lane misses the shuffle", "threads 0-30 wait for lanes 0xffffffff", 32, [] {
    if (threadIdx.x != 31) __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
  });
  expect_error("half a warp", "threads 32-47 wait for lanes 0xffffffff", 48, [] { __syncwarp(); });
  expect_error("a shuffle and a barrier", "wait for the block", 32, [] {
    if (threadIdx.x < 16) __syncthreads();
    __syncwarp();
  });
  expect_error("masks that disagree", "wait for lanes 0x0000ffff", 32,
               [] { __syncwarp(threadIdx.x < 8 ? 0x0000ffffu : 0xffffffffu); });
  expect_error("reading a lane outside the mask", "does not name both", 32, [] {
    if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, threadIdx.x, 20);
  });
  expect_error("too much shared memory", "49152 bytes", 32, [] {
    FUSEDNORM_SHARED(char, buffer, 49153);
    buffer[0] = 0;
  });
  expect_error("too many threads", "invalid configuration", 1025, [] {});
}

// Lanes of half a warp talk among themselves while the others do something else: no error.
inline void check_words() {
  for (const Ordered& order : kOrders) {
    schedule = order.schedule;
    auto sums = poisoned<unsigned>(64);
    auto votes = poisoned<unsigned>(64);
    auto shifted = poisoned<double>(64);
    unsigned tickets = 0;
    launch({2, 1, 2}, {8, 4, 2}, [&] {
      const unsigned t = threadIdx.x + 8 * (threadIdx.y + 4 * threadIdx.z);
      const unsigned lane = t % 32;
      unsigned sum = t;
      if (lane < 16) {
        for (int bit = 8; bit > 0; bit /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, bit, 16);
      }
      sums[t] = __shfl_sync(0xffffffffu, sum, 0);
      votes[t] = __ballot_sync(0xffffffffu, t % 3 == 0);
      shifted[t] = __shfl_down_sync(0xffffffffu, t + 0.5, 3, 8);
      if (t == 0) atomicAdd(&tickets, 1u);
    });
    expect(tickets == 4 && sums[0] == 120 && sums[63] == 32 * 16 + 120, "shuffles within 16 lanes");
    expect(votes[5] == 0x49249249u && votes[40] == 0x92492492u, "votes");
    expect(shifted[4] == 7.5 && shifted[5] == 5.5 && shifted[32] == 35.5, "shuffles of 8 lanes");
  }
}

inline void check_conversions() {
  for (uint32_t i = 0; i < 0x10000u; ++i) {
    const __half h = {static_cast<uint16_t>(i)};
    const __nv_bfloat16 b = {static_cast<uint16_t>(i)};
    const bool half_nan = (i & 0x7fff) > 0x7c00, bfloat_nan = (i & 0x7fff) > 0x7f80;
    expect(__float2half_rn(__half2float(h)).bits == (half_nan ? 0x7fff : i), "half round trip");
    expect(__float2bfloat16_rn(__bfloat162float(b)).bits == (bfloat_nan ? 0x7fff : i),
           "bfloat16 round trip");
    // Half way to the next number goes to the even one; a touch to either side goes to the near
    // one. The largest finite numbers have infinity for a neighbour, which is as far as the next
    // power of two.
    const uint32_t magnitude = i & 0x7fff, even = i + (i & 1);
    if (magnitude < 0x7c00) {
      const float next =
          magnitude == 0x7bff ? 65536.0f : __half2float({static_cast<uint16_t>(magnitude + 1)});
      const float middle =
          std::copysign(0.5f * (std::fabs(__half2float(h)) + next), __half2float(h));
      expect(__float2half_rn(middle).bits == even, "half ties to even");
      expect(__float2half_rn(std::nextafter(middle, 0.0f)).bits == i, "half rounds down");
      expect(__float2half_rn(std::nextafter(middle, 2.0f * middle)).bits == i + 1,
             "half rounds up");
    }
    if (magnitude < 0x7f80) {
      const float middle = bit_cast<float>(i << 16 | 0x8000u);
      expect(__float2bfloat16_rn(middle).bits == even, "bfloat16 ties to even");
      expect(__float2bfloat16_rn(bit_cast<float>(i << 16 | 0x7fffu)).bits == i,
             "bfloat16 rounds down");
      expect(__float2bfloat16_rn(bit_cast<float>(i << 16 | 0x8001u)).bits == i + 1,
             "bfloat16 rounds up");
    }
  }
}

struct Fatal {
  const char* name;
  const char* report;
  void (*run)();
};

struct alignas(16) FourFloats {
  float at[4];
};

// Each must end the process with this report.
inline const Fatal kFatal[] = {
    {"read past a shared array", "use-after-poison",
     [] {
       launch(1, 32, [] {
         FUSEDNORM_SHARED(float, buffer, 31);
         FUSEDNORM_SHARED(float, other, 32);
         buffer[threadIdx.x % 31] = other[threadIdx.x] = 0.0f;
         __syncwarp();
         other[threadIdx.x] = buffer[threadIdx.x];
       });
     }},
    {"write before a shared array", "use-after-poison",
     [] {
       launch(1, 32, [] {
         FUSEDNORM_SHARED(float, buffer, 32);
         buffer[static_cast<int>(threadIdx.x) - 1] = 0.0f;
       });
     }},
    {"read past a tensor", "heap-buffer-overflow",
     [] {
       auto x = poisoned<float>(33);
       volatile float sink = 0.0f;
       launch(2, 32, [&] { sink = x[blockIdx.x * 32 + threadIdx.x]; });
     }},
    {"overflow of a thread's stack array", "stack-buffer-overflow",
     [] {
       launch(1, 32, [] {
         float local[4] = {};
         float* volatile opaque = local;
         __syncwarp();
         opaque[threadIdx.x / 8 + 1] = 1.0f;
       });
     }},
    {"misaligned vector access", "misaligned address",
     [] {
       auto x = poisoned<float>(8);
       auto y = poisoned<FourFloats>(1);
       launch(1, 1, [&] { y[0] = *reinterpret_cast<const FourFloats*>(x.get() + 1); });
     }},
};

// Runs this program again with `--fatal index` and looks at how it died.
inline void check_fatal(const char* program, const Fatal* fatal, size_t count, size_t first) {
  for (size_t i = 0; i < count; ++i) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    const std::string index = std::to_string(first + i);
    const pid_t child = fork();
    if (child == 0) {
      dup2(ends[1], STDERR_FILENO);
      execl(program, program, "--fatal", index.c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    close(ends[1]);
    std::string report;
    char chunk[4096];
    for (ssize_t n; (n = read(ends[0], chunk, sizeof(chunk))) > 0;) report.append(chunk, n);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    const bool died = !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    expect(died && report.find(fatal[i].report) != std::string::npos,
           std::string(fatal[i].name) + " ends with " + fatal[i].report + ", not with:\n" + report);
  }
}

// A kernel that forgets the last element of an odd tensor.
inline void check_unwritten_is_found() {
  for (const bool forget : {false, true}) {
    auto y = poisoned<float>(33);
    launch(1, 32, [&] {
      for (int i = threadIdx.x; i < (forget ? 32 : 33); i += 32) y[i] = 0.0f;
    });
    expect(any_poison(y.get(), 33) == forget, "an unwritten element is found");
  }
}

inline void check_detectors(const char* program) {
  check_barriers_are_needed();
  check_divergence_is_reported();
  check_words();
  check_conversions();
  check_unwritten_is_found();
  check_fatal(program, kFatal, std::size(kFatal), 0);
}

}  // namespace fusednorm::host
