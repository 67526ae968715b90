// Broken toy kernels for the words of blocks that run together (clusters, cooperative grids,
// arrival counters) and of asynchronous copies, and the sound kernel each departs from.
#pragma once

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "detectors.h"

namespace fusednorm::toys {

constexpr int kThreads = 64;

// out[i] = sum of the cluster's numbers over distributed shared memory, in two rounds. Barriers:
// before peers are read, before the next round overwrites what they read, before anyone exits.
template <bool kBetween, bool kAfter>
void cluster_sum_kernel(const float* x, float* out) {
  FUSEDNORM_SHARED(float, mine, kThreads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    mine[threadIdx.x] = static_cast<float>(round) + x[i];
    cluster_barrier();
    for (int rank = 0; rank < cluster_size(); ++rank)
      sum += *cluster_peer(mine + threadIdx.x, rank);
    if (round == 0 ? kBetween : kAfter) cluster_barrier();
  }
  out[i] = sum;
}

// Every block pushes its number to the next one of its cluster, which must have started.
template <bool kBefore>
void push_kernel(float* out) {
  FUSEDNORM_SHARED(float, inbox, kThreads);
  if (kBefore) cluster_barrier();
  const int next = (cluster_rank() + 1) % cluster_size();
  *cluster_peer(inbox + threadIdx.x, next) = static_cast<float>(blockIdx.x);
  cluster_barrier();
  out[blockIdx.x * blockDim.x + threadIdx.x] = inbox[threadIdx.x];
}

// Two rounds of 16 bytes a thread, double-buffered: out = sum of both. kPending is what the first
// wait allows to be under way.
template <int kPending, bool kCommit, bool kLast>
void copy_kernel(const float* x, float* out) {
  FUSEDNORM_DYNAMIC_SHARED(bytes);
  float* slots = reinterpret_cast<float*>(bytes);
  const int n = blockDim.x, t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    copy_async(slots + 4 * (round * n + t), x + 4 * (round * n + t));
    if (kCommit) copy_async_commit();
  }
  copy_async_wait<kPending>();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = slots[4 * t + i];
  if (kLast) copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * t + i] += slots[4 * (n + t) + i];
}

// All blocks of the grid wait for each other: the counter only grows, so it needs no reset.
inline void grid_barrier(unsigned* counter, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (load_acquire(counter) < round * gridDim.x) {
    }
  }
  __syncthreads();
}

// out[block] = sum over the grid, `rounds` times over two buffers in turn.
template <bool kBarrier>
void grid_sum_kernel(float* buffers, unsigned* counter, float* out, int rounds) {
  for (int round = 1; round <= rounds; ++round) {
    float* buffer = buffers + round % 2 * gridDim.x;
    if (threadIdx.x == 0) buffer[blockIdx.x] = static_cast<float>(round * (blockIdx.x + 1));
    if (kBarrier) grid_barrier(counter, round);
    if (threadIdx.x != blockDim.x - 1) continue;
    out[blockIdx.x] = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) out[blockIdx.x] += buffer[b];
  }
}

// The last block to arrive adds up what all of them wrote, and leaves the counter as it was.
template <bool kBarrier, bool kReset>
void last_arriver_kernel(float* partials, unsigned* counter, float* out, int* last) {
  FUSEDNORM_SHARED(int, is_last, 1);
  partials[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0] || threadIdx.x != 0) return;
  *out = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) *out += partials[i];
  *last = static_cast<int>(blockIdx.x);
  if (kReset) *counter = 0;
}

}  // namespace fusednorm::toys

namespace fusednorm::host {

// `run(out)` launches into a poisoned buffer; the bits of every order, the first being forward.
template <typename Run>
std::vector<std::vector<float>> in_every_order(size_t count, const Run& run) {
  std::vector<std::vector<float>> results;
  for (const Ordered& order : kOrders) {
    schedule = order.schedule;
    const auto out = poisoned<float>(count);
    run(out.get());
    results.emplace_back(out.get(), out.get() + count);
  }
  return results;
}

// NaN counts as wrong.
inline bool all_equal(const std::vector<std::vector<float>>& results, float wanted) {
  for (const auto& result : results) {
    for (const float value : result) {
      if (!(value == wanted)) return false;
    }
  }
  return true;
}

inline void check_clusters() {
  using namespace toys;
  for (const unsigned cluster : {1u, 2u, 3u, 16u}) {
    const unsigned grid = 2 * cluster;
    const std::vector<float> x(grid * kThreads, 1.0f);
    const auto sum = [&](auto kernel) {
      return in_every_order(x.size(), [&](float* out) {
        launch(Shape{grid, kThreads, 0, cluster}, [&] { kernel(x.data(), out); });
      });
    };
    const float wanted = 3.0f * static_cast<float>(cluster);
    expect(all_equal(sum(cluster_sum_kernel<true, true>), wanted), "a cluster adds up its blocks");
    if (cluster == 1) continue;
    expect(!all_equal(sum(cluster_sum_kernel<false, true>), wanted),
           "no barrier between reading peers and overwriting depends on the order");
    const auto out = poisoned<float>(x.size());
    expect_error("no barrier after a peer is read", "no cluster barrier after it",
                 Shape{grid, kThreads, 0, cluster},
                 [&] { cluster_sum_kernel<true, false>(x.data(), out.get()); });
  }
  const auto push = [](auto kernel) {
    bool right = true;
    for (const auto& out : in_every_order(4 * kThreads, [&](float* out) {
           launch(Shape{4, kThreads, 0, 2}, [&] { kernel(out); });
         })) {
      for (int i = 0; i < 4 * kThreads; ++i)
        right &= out[i] == static_cast<float>(i / kThreads ^ 1);
    }
    return right;
  };
  expect(push(push_kernel<true>), "what a peer pushes arrives");

  const Shape pair{2, 32, 0, 2};
  // Block 0 exits first or block 1 asks first.
  for (const Ordered& order : {kOrders[0], kOrders[1]}) {
    schedule = order.schedule;
    std::string message;
    try {
      launch(pair, [] {
        FUSEDNORM_SHARED(float, mine, 32);
        fusednorm::cluster_barrier();
        if (blockIdx.x == 1) fusednorm::cluster_peer(mine, 0);
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    const char* part = order.schedule.order == Order::kForward ? "after it had exited"
                                                               : "no cluster barrier after it";
    expect(message.find(part) != std::string::npos, std::string(part) + ", not: " + message);
  }
  expect_error("a peer returns before the cluster barrier", "wait for the cluster", pair, [] {
    if (blockIdx.x == 0) fusednorm::cluster_barrier();
  });
  expect_error("two cluster barriers at once", "divergent barrier", pair, [] {
    if (blockIdx.x == 0) {
      fusednorm::cluster_barrier();
    } else {
      fusednorm::cluster_barrier();
    }
  });
  expect_error("a barrier of the block against one of the cluster", "wait for the cluster", pair,
               [] { blockIdx.x == 0 ? fusednorm::cluster_barrier() : __syncthreads(); });
  expect_error("a peer beyond the cluster", "rank 2 of 2", pair, [] {
    FUSEDNORM_SHARED(float, mine, 32);
    fusednorm::cluster_peer(mine, 2);
  });
  expect_error("a peer of what is not shared", "not an address in this block's", pair, [] {
    float local = 0;
    fusednorm::cluster_peer(&local, 0);
  });
}

inline void check_shapes() {
  const auto nothing = [] {};
  const int64_t most = limits.shared_per_block;
  expect_error("a cluster of 17", "clusters of 17", Shape{17, 32, 0, 17}, nothing);
  expect_error("half a cluster", "clusters of 2", Shape{3, 32, 0, 2}, nothing);
  expect_error("dynamic shared memory", "dynamic shared", Shape{1, 32, most + 1}, nothing);
  expect_error("dynamic and static", "together exceed", Shape{1, 32, most}, [] {
    FUSEDNORM_SHARED(float, buffer, 1);
    buffer[0] = 0;
  });
  expect_error("a cooperative grid beyond the threads", "where 528 fit",
               Shape{529, 512, 0, 1, true}, nothing);
  expect_error("a cooperative grid beyond the memory", "where 132 fit",
               Shape{133, 32, most, 1, true}, nothing);
  // Two such blocks leave less than the two kilobytes that the device keeps.
  expect_error("a cooperative grid beyond all of the memory", "where 132 fit",
               Shape{133, 32, (limits.shared_per_sm - 1024) / 2, 1, true}, nothing);
  for (const Ordered& order : kOrders) {
    schedule = order.schedule;
    bool fresh = true;
    launch(Shape{3, 32, most}, [&] {
      FUSEDNORM_DYNAMIC_SHARED(bytes);
      for (int64_t i = threadIdx.x; i < most; i += 32) fresh &= bytes[i] == 0xff;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < most; i += 32) bytes[i] = 0;
      fresh &= reinterpret_cast<uintptr_t>(bytes) % 32 == 16;
    });
    expect(fresh,
           "every block finds poison in its dynamic shared memory, aligned to 16 bytes only");
  }
}

inline void check_copies() {
  using namespace toys;
  std::unique_ptr<float[]> x(new float[8 * kThreads]);
  std::fill_n(x.get(), 8 * kThreads, 1.5f);
  const Shape shape{1, kThreads, 32 * kThreads};
  const auto sums = in_every_order(4 * kThreads, [&](float* out) {
    launch(shape, [&] { copy_kernel<1, true, true>(x.get(), out); });
  });
  expect(all_equal(sums, 3.0f), "copies have arrived after their waits");

  const auto out = poisoned<float>(4 * kThreads);
  expect_error("no wait at all", "in flight", Shape{1, kThreads, 1024}, [&] {
    FUSEDNORM_DYNAMIC_SHARED(bytes);
    fusednorm::copy_async(bytes + 16 * threadIdx.x, x.get());
    fusednorm::copy_async_commit();
  });
  expect_error("no commit", "in flight", Shape{1, kThreads, 1024}, [&] {
    FUSEDNORM_DYNAMIC_SHARED(bytes);
    fusednorm::copy_async(bytes + 16 * threadIdx.x, x.get());
    fusednorm::copy_async_wait<0>();
  });
  expect_error("a misaligned source", "misaligned address", Shape{1, 1, 16}, [&] {
    FUSEDNORM_DYNAMIC_SHARED(bytes);
    fusednorm::copy_async(bytes, x.get() + 1);
  });
  expect_error("a copy to global memory", "this block's shared", Shape{1, 1, 16},
               [&] { fusednorm::copy_async(x.get(), x.get() + 4); });
  expect_error("a source that changes", "was changed", Shape{1, 1, 16}, [&] {
    FUSEDNORM_DYNAMIC_SHARED(bytes);
    fusednorm::copy_async(bytes, x.get());
    fusednorm::copy_async_commit();
    x[0] += 1.0f;
    fusednorm::copy_async_wait<0>();
  });
}

inline void check_cooperation() {
  using namespace toys;
  // As large as plans get, and small enough for a hundred rounds.
  const struct {
    unsigned grid, threads;
    int rounds;
  } kGrids[] = {{48, 512, 2}, {5, 64, 100}};
  for (const auto& [grid, threads, rounds] : kGrids) {
    const auto sums = [&, grid = grid, threads = threads, rounds = rounds](auto kernel) {
      return in_every_order(grid, [&](float* out) {
        const auto buffers = poisoned<float>(2 * grid);
        unsigned counter = 0;
        launch(Shape{grid, threads, 0, 1, true},
               [&] { kernel(buffers.get(), &counter, out, rounds); });
      });
    };
    const float wanted = static_cast<float>(rounds * grid * (grid + 1) / 2);
    expect(all_equal(sums(grid_sum_kernel<true>), wanted), "a cooperative grid adds up its blocks");
    expect(!all_equal(sums(grid_sum_kernel<false>), wanted),
           "a cooperative grid without its barrier depends on the order");
  }

  const Shape grid{4, 64, 0, 1, true};
  unsigned counter = 0, other = 0;
  expect_error("a block does not arrive", "deadlock: nobody is left to end a spin", grid, [&] {
    if (blockIdx.x != 2) grid_barrier(&counter, 1u << 20);
  });
  expect_error("a spin on two counters in turn", "deadlock", grid, [&] {
    while (fusednorm::load_acquire(&counter) != 1u << 30 &&
           fusednorm::load_acquire(&other) != 1u << 30) {
    }
  });
  expect_error("a spin in an ordinary launch", "not cooperative", Shape{4, 64},
               [&] { grid_barrier(&counter, 1u << 20); });
  expect_error("a spin in a cluster", "not cooperative", Shape{4, 64, 0, 4},
               [&] { grid_barrier(&counter, 1u << 20); });
  // Whoever resets a counter that others still wait to see full leaves them waiting.
  expect_error("a reset too early", "deadlock", grid, [&] {
    if (threadIdx.x != 0) return;
    if (atomicAdd(&other, 1u) == gridDim.x - 1) {
      other = 0;
    } else {
      while (fusednorm::load_acquire(&other) != gridDim.x) {
      }
    }
  });
}

inline void check_arrivals() {
  using namespace toys;
  constexpr unsigned kGrid = 6;
  bool right = true, unguarded = true, unreset = true;
  std::set<int> last_ones;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    schedule = seed == 0   ? kOrders[0].schedule
               : seed == 1 ? kOrders[1].schedule
                           : Schedule{Order::kShuffled, seed};
    unsigned counter = 0;
    const auto run = [&](auto kernel) {
      const auto partials = poisoned<float>(kGrid * kThreads);
      float out = -1.0f;
      int last = -1;
      launch(kGrid, kThreads, [&] { kernel(partials.get(), &counter, &out, &last); });
      last_ones.insert(last);
      return out == kGrid * kThreads;
    };
    // Twice on one counter, as launches in a stream do.
    right &= run(last_arriver_kernel<true, true>) && run(last_arriver_kernel<true, true>);
    unguarded &= run(last_arriver_kernel<false, true>);
    counter = 0;
    unreset &= run(last_arriver_kernel<true, false>) && run(last_arriver_kernel<true, false>);
  }
  expect(right, "the last arriver sees what all blocks wrote");
  expect(last_ones.size() > kGrid / 2, "many a block is the last to arrive");
  expect(!unguarded, "an arrival before the block is through depends on the order");
  expect(!unreset, "a counter that is not reset is noticed");
  unsigned wrapped = 0;
  launch(3, 1, [&] { atomicInc(&wrapped, 2); });
  expect(wrapped == 0, "atomicInc wraps");
}

inline const Fatal kFatalTogether[] = {
    {"read past the dynamic shared memory", "use-after-poison",
     [] {
       launch(Shape{1, 32, 31 * 4}, [] {
         FUSEDNORM_DYNAMIC_SHARED(bytes);
         reinterpret_cast<float*>(bytes)[threadIdx.x] = 0.0f;
       });
     }},
    {"read of a peer that has exited", "use-after-poison",
     [] {
       volatile float sink = 0.0f;
       launch(Shape{2, 32, 0, 2}, [&] {
         FUSEDNORM_SHARED(float, mine, 32);
         mine[threadIdx.x] = 0.0f;
         const float* peer = fusednorm::cluster_peer(mine, 0);
         fusednorm::cluster_barrier();
         sink = peer[threadIdx.x];
       });
     }},
    {"read of a peer that has not started", "use-after-poison",
     [] {
       volatile float sink = 0.0f;
       launch(Shape{2, 32, 0, 2}, [&] {
         FUSEDNORM_SHARED(float, mine, 32);
         sink = fusednorm::cluster_peer(mine, 1)[threadIdx.x];
         fusednorm::cluster_barrier();
       });
     }},
    {"write to a peer that has not started", "use-after-poison",
     [] {
       const auto out = poisoned<float>(4 * toys::kThreads);
       launch(Shape{4, toys::kThreads, 0, 2}, [&] { toys::push_kernel<false>(out.get()); });
     }},
    {"read before the wait", "use-after-poison",
     [] {
       const auto x = poisoned<float>(8 * toys::kThreads),
                  out = poisoned<float>(4 * toys::kThreads);
       launch(Shape{1, toys::kThreads, 32 * toys::kThreads},
              [&] { toys::copy_kernel<2, true, true>(x.get(), out.get()); });
     }},
    {"read after a wait that allows one group too many", "use-after-poison",
     [] {
       const auto x = poisoned<float>(8 * toys::kThreads),
                  out = poisoned<float>(4 * toys::kThreads);
       launch(Shape{1, toys::kThreads, 32 * toys::kThreads},
              [&] { toys::copy_kernel<1, true, false>(x.get(), out.get()); });
     }},
    {"read without a commit", "use-after-poison",
     [] {
       const auto x = poisoned<float>(8 * toys::kThreads),
                  out = poisoned<float>(4 * toys::kThreads);
       launch(Shape{1, toys::kThreads, 32 * toys::kThreads},
              [&] { toys::copy_kernel<0, false, true>(x.get(), out.get()); });
     }},
    {"copy_async past a tensor", "heap-buffer-overflow",
     [] {
       const auto x = poisoned<float>(6);
       launch(Shape{1, 1, 16}, [&] {
         FUSEDNORM_DYNAMIC_SHARED(bytes);
         fusednorm::copy_async(bytes, x.get() + 4);
       });
     }},
    {"copy_async past the shared memory", "use-after-poison",
     [] {
       const auto x = poisoned<float>(4);
       launch(Shape{1, 1, 16}, [&] {
         FUSEDNORM_DYNAMIC_SHARED(bytes);
         fusednorm::copy_async(bytes + 16, x.get());
       });
     }},
};

inline void check_together() {
  check_clusters();
  check_shapes();
  check_copies();
  check_cooperation();
  check_arrivals();
}

}  // namespace fusednorm::host
