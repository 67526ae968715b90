// What the on-chip kernels share: the slots of a slice, the group that owns it, and the exchange.
//
//   for each slice of the group:
//     load      every access of the CTA's jobs into a slot of its thread, all in flight at once
//     reduce    each job to a State a piece
//     exchange  barrier; merge the pieces of all jobs to cells, in the order of jobs; barrier
//     apply     from the slots
//
// A slot is 16 bytes that only its thread writes and reads: no barrier, no bank conflict. Slots
// arrive in stages, so that the first pass starts before the last bytes are there.
//
//   tier     partial results lie in      barrier
//   block    shared memory               __syncthreads
//   cluster  shared memory of each CTA   barrier.cluster; each CTA merges all cells for itself
//   grid     the workspace               a counter a group, spun on: only under a cooperative
//                                        launch, where all CTAs are resident; each CTA merges its
//                                        share of the cells, and the second barrier publishes them
//
// Hazards. Nobody may leave or write new results while a peer reads the old ones: the second
// barrier. The counters of a group are set back by the last CTA to leave, when none spins any more.
#pragma once

#include "combine.cuh"
#include "cursor.cuh"
#include "gradient.cuh"
#include "plan.h"

namespace fusednorm {

constexpr int kStages = 4;

FUSEDNORM_DEVICE void wait_stage(int stage) {
  switch (stage) {
    case 0:
      return copy_async_wait<kStages - 1>();
    case 1:
      return copy_async_wait<kStages - 2>();
    case 2:
      return copy_async_wait<kStages - 3>();
    default:
      return copy_async_wait<0>();
  }
}

// What is cheap to compute again is not kept: a slice's affine numbers need the registers.
class Group {
 public:
  FUSEDNORM_DEVICE Group(const Plan& plan, unsigned* counters) : plan_(plan), counters_(counters) {}

  FUSEDNORM_DEVICE Tier tier() const { return plan_.tier; }
  FUSEDNORM_DEVICE int rank() const { return int(blockIdx.x % unsigned(plan_.ctas_per_group)); }
  FUSEDNORM_DEVICE int index() const { return int(blockIdx.x / unsigned(plan_.ctas_per_group)); }
  FUSEDNORM_DEVICE int count() const { return int(gridDim.x / unsigned(plan_.ctas_per_group)); }

  // All threads of all CTAs of the group.
  FUSEDNORM_DEVICE void barrier() {
    if (tier() == Tier::kCluster) return cluster_barrier();
    __syncthreads();
    if (tier() == Tier::kBlock) return;
    if (threadIdx.x == 0) {
      unsigned* const arrivals = counters_ + 2 * index();
      epoch_ += unsigned(plan_.ctas_per_group);
      __threadfence();
      atomicAdd(arrivals, 1u);
      // The difference, so that the count may wrap.
      while (int(load_acquire(arrivals) - epoch_) < 0) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  // The last thing a CTA does.
  FUSEDNORM_DEVICE void leave() {
    if (tier() != Tier::kGrid || threadIdx.x != 0) return;
    unsigned* const arrivals = counters_ + 2 * index();
    if (atomicAdd(arrivals + 1, 1u) + 1u != unsigned(plan_.ctas_per_group)) return;
    arrivals[0] = 0;
    arrivals[1] = 0;
  }

  // This CTA merges cells offset(), offset() + stride(), ...
  FUSEDNORM_DEVICE int stride() const { return tier() == Tier::kGrid ? plan_.ctas_per_group : 1; }
  FUSEDNORM_DEVICE int offset() const { return tier() == Tier::kGrid ? rank() : 0; }
  // Whether what it merges is for it to store.
  FUSEDNORM_DEVICE bool stores() const { return tier() == Tier::kGrid || rank() == 0; }

 private:
  const Plan& plan_;
  unsigned* counters_;
  unsigned epoch_ = 0;
};

// The dynamic shared memory of a CTA, and where a group's results lie. State: Moments or Sums.
template <typename State>
class Chip {
 public:
  FUSEDNORM_DEVICE Chip(const Plan& plan, const Group& group, unsigned char* memory,
                        State* exchange)
      : plan_(plan), group_(group), memory_(memory), exchange_(exchange) {}

  // The s-th access of this thread in the CTA's `job`-th job.
  FUSEDNORM_DEVICE Bits16* slot(int tensor, int job, int s) const {
    const int row = (tensor * plan_.jobs_per_cta + job) * plan_.slots + s;
    return reinterpret_cast<Bits16*>(memory_) + row * int(blockDim.x) + int(threadIdx.x);
  }

  template <typename T>
  FUSEDNORM_DEVICE Vec<T, kMaskWidth<T>> get(int tensor, int job, int s) const {
    Vec<T, kMaskWidth<T>> packed;
    const Bits16 bits = *slot(tensor, job, s);
    std::memcpy(&packed, &bits, sizeof(bits));
    return packed;
  }

  template <typename T>
  FUSEDNORM_DEVICE void set(int tensor, int job, int s, const Vec<T, kMaskWidth<T>>& packed) const {
    Bits16 bits;
    std::memcpy(&bits, &packed, sizeof(bits));
    *slot(tensor, job, s) = bits;
  }

  template <typename S>
  FUSEDNORM_DEVICE S* scratch() const {
    return reinterpret_cast<S*>(memory_ + plan_.scratch_at);
  }
  FUSEDNORM_DEVICE float* sums() const { return reinterpret_cast<float*>(memory_ + plan_.sums_at); }
  FUSEDNORM_DEVICE Sums<float>* stats() const {
    return reinterpret_cast<Sums<float>*>(memory_ + plan_.stats_at);
  }

  // Where this CTA leaves the results of the slice's `job`-th job, and those of any job.
  FUSEDNORM_DEVICE State* own(int job) const {
    if (plan_.tier == Tier::kGrid) {
      return exchange_ + (int64_t(group_.index()) * plan_.jobs + job) * plan_.pieces_per_tile;
    }
    return reinterpret_cast<State*>(memory_ + plan_.results_at) +
           job % plan_.jobs_per_cta * plan_.pieces_per_tile;
  }
  FUSEDNORM_DEVICE State result(int job, int piece) const {
    State* const place = own(job) + piece;
    if (plan_.tier == Tier::kGrid) return load_fresh(place);
    if (plan_.tier == Tier::kBlock) return *place;
    return *cluster_peer(place, job / plan_.jobs_per_cta);
  }

 private:
  const Plan& plan_;
  const Group& group_;
  unsigned char* memory_;
  State* exchange_;
};

// The CTA's jobs of a slice: the slice's jobs begin..end - 1.
struct Share {
  int begin;
  int end;

  FUSEDNORM_DEVICE Share(const Plan& plan, int rank) : begin(rank * plan.jobs_per_cta) {
    end = plan.jobs - begin > plan.jobs_per_cta ? begin + plan.jobs_per_cta : plan.jobs;
  }
};

FUSEDNORM_DEVICE int stage_end(const Plan& plan, int stage) {
  return (stage + 1) * ((plan.slots + kStages - 1) / kStages);
}

// Starts the copies of N tensors' accesses, absent tensors null: in stages if there is one job,
// else all of them as the first stage.
template <typename Tile, int N, typename T, typename State>
FUSEDNORM_DEVICE void load_slice(const SweepArgs<T>& args, const Chip<State>& chip,
                                 const Share& share, int64_t first_job,
                                 const T* const (&tensors)[N]) {
  const Plan& plan = args.plan;
  const bool staged = plan.jobs_per_cta == 1;
  for (int job = share.begin; job < share.end; ++job) {
    const Tile tile(args.geometry, plan, first_job + job);
    Cursor cursor = tile.cursor();
    int s = 0;
    for (int stage = 0; stage < kStages; ++stage) {
      const int end = staged ? stage_end(plan, stage) : plan.slots;
      for (; s < end && cursor.more(); ++s, cursor.step()) {
        FUSEDNORM_UNROLL
        for (int n = 0; n < N; ++n) {
          if (tensors[n]) {
            copy_async(chip.slot(n, job - share.begin, s), tensors[n] + cursor.offset);
          }
        }
      }
      if (staged) copy_async_commit();
    }
  }
  if (staged && share.begin < share.end) return;
  for (int stage = 0; stage < kStages; ++stage) copy_async_commit();
}

// visit(s) for the thread's accesses of a job, as their stages arrive.
template <typename Visit>
FUSEDNORM_DEVICE void for_arriving(const Plan& plan, int accesses, const Visit& visit) {
  int s = 0;
  for (int stage = 0; stage < kStages; ++stage) {
    wait_stage(stage);
    for (; s < stage_end(plan, stage) && s < accesses; ++s) visit(s);
  }
}

// How the jobs of a slice make its cells: `cells` of them, of `width` pieces in each job.
struct Cells {
  int cells;
  int width;

  template <typename Tile>
  FUSEDNORM_DEVICE Cells(const Plan& plan, const Tile& tile) {
    const bool whole = plan.tiles_per_cell == 1;
    width = int(whole ? plan.pieces_per_cell : plan.pieces_per_tile);
    cells = whole ? tile.pieces() / width : 1;
  }
  FUSEDNORM_DEVICE int of(int piece) const { return cells == 1 ? 0 : piece / width; }
};

}  // namespace fusednorm
