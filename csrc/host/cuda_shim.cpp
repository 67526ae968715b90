// The scheduler behind cuda_shim.h: which blocks run together, in which order their threads do,
// barriers, shuffles, clusters and spins.
//
// A fiber runs until it waits for others, so a block costs threads x barriers switches. Forward and
// reversed drive each block, and in it each warp, as far as it gets before the next one starts,
// which is the largest skew that a missing barrier can meet; shuffled interleaves blocks and warps
// and permutes lanes anew at every step.
#include "cuda_shim.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gang.h"

namespace fusednorm::host {

Gang gang;

void Gang::fiber_main() {
  Fiber& fiber = *gang.current_;
  fiber.context.begin(gang.scheduler_);
  try {
    (*gang.kernel_)();
    if (fiber.copies.pending() > 0) {
      throw std::runtime_error("thread " + std::to_string(fiber.thread.x) +
                               " returned with copy_async in flight: no wait covers it");
    }
  } catch (...) {
    gang.failure_ = std::current_exception();
  }
  fiber.state = State::kReturned;
  fiber.context.finish(gang.scheduler_);
}

void Gang::start(const std::vector<int64_t>& indices) {
  count_ = static_cast<int>(indices.size());
  const int fibers = count_ * threads_;
  while (static_cast<int>(fibers_.size()) < fibers) {
    fibers_.push_back(std::make_unique<Fiber>(fibers_.size() < kGuardedStacks));
  }
  while (static_cast<int>(blocks_.size()) < count_) blocks_.push_back(std::make_unique<Block>());
  for (int b = 0; b < count_; ++b) {
    Block& block = *blocks_[b];
    const int64_t i = indices[b], width = shape_.grid.x, height = shape_.grid.y;
    block.index = {static_cast<unsigned>(i % width), static_cast<unsigned>(i / width % height),
                   static_cast<unsigned>(i / width / height)};
    block.first_fiber = b * threads_;
    block.first_peer = b / cluster() * cluster();
    block.returned = 0;
    block.started = false;
    block.unguarded = false;
    block.arena.reserve(layout_.capacity());
    block.arena.hide();
    for (int t = 0; t < threads_; ++t) {
      Fiber& fiber = *fibers_[block.first_fiber + t];
      const unsigned row = t / blockDim.x;
      fiber.thread = {t % blockDim.x, row % blockDim.y, row / blockDim.y};
      fiber.block = &block;
      // Frames that a failed launch left behind still bear AddressSanitizer's marks.
      if (fiber.state != State::kReturned) unpoison(fiber.stack.bottom(), kStackBytes);
      fiber.state = State::kReady;
      fiber.looked_at = nullptr;
      fiber.copies.reset();
      fiber.context.prepare_on(fiber.stack, fiber_main);
    }
  }
  looking_.clear();
  rounds_without_progress_ = 0;
}

void Gang::resume(Fiber& fiber) {
  Block& block = *fiber.block;
  if (!block.started) {
    block.started = true;
    // What a peer wrote before this block ran is lost.
    if (cluster() > 1) block.arena.hide();
    for (const Array& array : layout_.arrays()) block.arena.show(array);
  }
  current_ = &fiber;
  threadIdx = fiber.thread;
  blockIdx = block.index;
  scheduler_.switch_to(fiber.context);
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  if (fiber.state == State::kYielded || fiber.state == State::kSpin) {
    looking_.push_back(&fiber);
  } else {
    rounds_without_progress_ = 0;
  }
  if (fiber.state == State::kReturned && ++block.returned == threads_) leave(block);
}

// A block has exited.
void Gang::leave(Block& block) {
  if (block.unguarded) {
    throw std::runtime_error("a block asked for a peer's shared memory" + at(block.unguarded_at) +
                             ", and no cluster barrier after it keeps the peer from exiting");
  }
  if (cluster() > 1) block.arena.hide();
}

uint64_t Gang::wait(State state, const Wait& wait, uint64_t value, int source) {
  Fiber& fiber = *current_;
  fiber.state = state;
  fiber.wait = wait;
  fiber.value = value;
  fiber.source = source;
  if (state != State::kYielded && state != State::kSpin) fiber.looked_at = nullptr;
  fiber.context.switch_to(scheduler_);
  return fiber.value;
}

void* Gang::array(const void* site, size_t bytes, size_t alignment) {
  const Arena& arena = current_->block->arena;
  if (const Array* found = layout_.find(site)) return arena.at(found->offset);
  const Array& added = layout_.add(site, bytes, alignment);
  if (static_cast<int64_t>(layout_.total_bytes()) > limits.shared_per_block) {
    throw std::runtime_error("static and dynamic shared memory together exceed " +
                             std::to_string(limits.shared_per_block) + " bytes");
  }
  for (int b = 0; b < count_; ++b) {
    if (blocks_[b]->started && blocks_[b]->returned < threads_) blocks_[b]->arena.show(added);
  }
  return arena.at(added.offset);
}

// The counterpart of an address in another block of the cluster.
void* Gang::peer(void* shared, int rank, Site site) {
  Block& mine = *current_->block;
  const int64_t offset = mine.arena.offset_of(shared);
  if (offset < 0 || rank < 0 || rank >= cluster()) {
    throw std::runtime_error("cluster_peer" + at(site) + ": rank " + std::to_string(rank) + " of " +
                             std::to_string(cluster()) +
                             (offset < 0 ? ", not an address in this block's shared memory" : ""));
  }
  Block& owner = *blocks_[mine.first_peer + rank];
  if (owner.returned == threads_) {
    throw std::runtime_error("block read a peer's shared memory after it had exited" + at(site));
  }
  if (&owner != &mine) {
    mine.unguarded = true;
    mine.unguarded_at = site;
  }
  return owner.arena.at(static_cast<size_t>(offset));
}

void Gang::copy(void* shared, const void* global, Site site) {
  const auto misaligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % Copies::kBytes != 0;
  };
  if (misaligned(shared) || misaligned(global)) {
    throw std::runtime_error("misaligned address in copy_async" + at(site));
  }
  if (current_->block->arena.offset_of(shared) < 0) {
    throw std::runtime_error("copy_async goes to this block's shared memory only" + at(site));
  }
  current_->copies.start(static_cast<char*>(shared), static_cast<const char*>(global));
}

// A thread that looks twice in a row and sees the same spins, and sleeps until there is a change.
unsigned Gang::look(const unsigned* address, Site site) {
  Fiber& fiber = *current_;
  const bool spins = fiber.looked_at == address && fiber.seen == *address;
  if (spins && !shape_.cooperative) {
    throw std::runtime_error("a spin in a launch that is not cooperative" + at(site) +
                             ": the block it waits for need not run before this one ends");
  }
  fiber.looked_at = address;
  fiber.seen = *address;
  wait(spins ? State::kSpin : State::kYielded, {Word::kLook, site, 0});
  return fiber.seen = *address;
}

void Gang::arrive() {
  rounds_without_progress_ = 0;
  current_->looked_at = nullptr;
  if (schedule.order != Order::kShuffled) return;
  wait(State::kYielded, {Word::kLook, {"", 0}, 0});
}

std::vector<int> Gang::permutation(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random_);
  return order;
}

// Lets every ready lane of a warp run until it waits, then completes the exchanges that are ripe.
bool Gang::step(Block& block, int warp) {
  const auto* fibers = &fibers_[block.first_fiber + warp * kWarp];
  const auto ready = [](const auto& fiber) { return fiber->state == State::kReady; };
  bool moved = std::any_of(fibers, fibers + lanes(warp), ready);
  if (moved) {
    for (int lane : permutation(lanes(warp))) {
      if (ready(fibers[lane])) resume(*fibers[lane]);
    }
  }
  return complete_exchange(fibers, lanes(warp)) || moved;
}

bool Gang::complete_exchange(const std::unique_ptr<Fiber>* fibers, int lanes) {
  bool completed = false;
  for (int leader = 0; leader < lanes; ++leader) {
    if (fibers[leader]->state != State::kWarpWait) continue;
    const Wait wait = fibers[leader]->wait;
    uint64_t values[kWarp] = {};
    unsigned arrived = 0, votes = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      if (fibers[lane]->state != State::kWarpWait || !(fibers[lane]->wait == wait)) continue;
      values[lane] = fibers[lane]->value;
      arrived |= 1u << lane;
      if (values[lane]) votes |= 1u << lane;
    }
    if (arrived != wait.mask) continue;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(wait.mask >> lane & 1u)) continue;
      fibers[lane]->state = State::kReady;
      fibers[lane]->value = wait.word == Word::kVote ? votes : values[fibers[lane]->source];
    }
    completed = true;
  }
  return completed;
}

// Releases these fibers if all of them wait at one barrier.
bool Gang::complete(int first_fiber, int count, State state) {
  const auto first = fibers_.begin() + first_fiber;
  const bool together = std::all_of(first, first + count, [&](const auto& fiber) {
    return fiber->state == state && fiber->wait == (*first)->wait;
  });
  if (together) std::for_each(first, first + count, [](auto& f) { f->state = State::kReady; });
  return together;
}

bool Gang::complete_cluster(int first_block) {
  const int first_fiber = blocks_[first_block]->first_fiber;
  if (!complete(first_fiber, cluster() * threads_, State::kClusterWait)) return false;
  for (int b = 0; b < cluster(); ++b) blocks_[first_block + b]->unguarded = false;
  return true;
}

// Lets a block run, in shuffled order by one step of each warp, else until it waits for others.
bool Gang::advance(Block& block) {
  const bool shuffled = schedule.order == Order::kShuffled;
  bool moved = false;
  for (bool again = block.returned < threads_; again;) {
    again = false;
    for (int warp : permutation(warps_)) {
      if (slow_[(block.first_fiber / threads_) * warps_ + warp]) continue;
      while (step(block, warp)) {
        again = true;
        if (shuffled) break;
      }
    }
    again |= complete(block.first_fiber, threads_, State::kBlockWait);
    moved |= again;
    if (shuffled) break;
  }
  return moved;
}

// Readies those who may look again: it is somebody else's turn in between.
bool Gang::wake() {
  const auto asleep = [](const Fiber* f) {
    return f->state == State::kSpin && *f->looked_at == f->seen;
  };
  const auto end = std::partition(looking_.begin(), looking_.end(), asleep);
  const bool woke = end != looking_.end();
  for (auto i = end; i != looking_.end(); ++i) (*i)->state = State::kReady;
  looking_.erase(end, looking_.end());
  return woke;
}

// Some warps, and all warps of some blocks, in shuffled order where several blocks run together.
bool Gang::draw_slow() {
  slow_.assign(static_cast<size_t>(count_) * warps_, false);
  if (schedule.order != Order::kShuffled || count_ == 1) return false;
  for (int b = 0; b < count_; ++b) {
    const bool slow_block = random_() % 4 == 0;
    for (int w = 0; w < warps_; ++w) slow_[b * warps_ + w] = slow_block || random_() % 4 == 0;
  }
  return true;
}

void Gang::run() {
  // Slow warps wait until nobody else gets any further: for then and a new draw.
  for (bool fair = !draw_slow();;) {
    bool moved = false;
    for (int b : permutation(count_)) moved |= advance(*blocks_[b]);
    for (int b = 0; b < count_; b += cluster()) moved |= complete_cluster(b);
    moved |= wake();
    if (moved && ++rounds_without_progress_ > kPatience) fail();
    if (!moved && fair) break;
    if (fair) {
      fair = !draw_slow();
    } else if (!moved || rounds_without_progress_ > kPatience / 2) {
      std::fill(slow_.begin(), slow_.end(), false);
      fair = true;
    }
  }
  for (int b = 0; b < count_; ++b) {
    if (blocks_[b]->returned < threads_) fail();
  }
}

void Gang::fail() const {
  constexpr int kShown = 4;
  std::string text = looking_.empty() && rounds_without_progress_ <= kPatience
                         ? "divergent barrier or shuffle"
                         : "deadlock: nobody is left to end a spin";
  int stalled = 0;
  for (int b = 0; b < count_; ++b) {
    if (blocks_[b]->returned < threads_ && ++stalled <= kShown)
      text += stall(*blocks_[b], &fibers_[b * threads_], threads_) + "\n";
  }
  text += "  " + std::to_string(stalled) + " of " + std::to_string(count_) + " blocks wait";
  throw std::runtime_error(text);
}

void Gang::launch(const Shape& shape, const std::function<void()>& kernel) {
  check(shape);
  ++launches;
  shape_ = shape;
  gridDim = shape.grid;
  blockDim = shape.block;
  kernel_ = &kernel;
  layout_ = Layout(static_cast<size_t>(shape.shared_bytes));
  random_.seed(schedule.seed);
  threads_ = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  warps_ = (threads_ + kWarp - 1) / kWarp;
  // Runs of `cluster` blocks in the schedule's order. A cooperative grid runs together; of others
  // a few may in shuffled order, as chance will have it on a device.
  const int64_t runs = int64_t{gridDim.x} * gridDim.y * gridDim.z / cluster();
  std::vector<int64_t> together;
  const std::vector<int> order = permutation(static_cast<int>(runs));
  for (size_t i = 0; i < order.size();) {
    size_t share = 1;
    if (schedule.order == Order::kShuffled) share += random_() % kShuffledRuns;
    if (shape.cooperative) share = order.size();
    together.clear();
    for (const size_t end = std::min(i + share, order.size()); i < end; ++i) {
      for (int64_t b = 0; b < cluster(); ++b) together.push_back(order[i] * shape.cluster + b);
    }
    start(together);
    run();
  }
}

uint64_t exchange(Word word, unsigned mask, uint64_t value, int source, Site site) {
  const int lane = host::lane();
  if (!(mask >> lane & 1u) || (word == Word::kShuffle && !(mask >> source & 1u))) {
    throw std::runtime_error("lane " + std::to_string(lane) + " reads lane " +
                             std::to_string(source) + ", but the mask" + at(site) +
                             " does not name both");
  }
  return gang.wait(State::kWarpWait, {word, site, mask}, value, source);
}

void barrier(Site site) {
  gang.wait(State::kBlockWait, {Word::kBarrier, site, 0});
}

int cluster_size() {
  return gang.cluster();
}

int cluster_rank() {
  return static_cast<int>(blockIdx.x) % gang.cluster();
}

void cluster_barrier(Site site) {
  gang.wait(State::kClusterWait, {Word::kCluster, site, 0});
}

void* cluster_peer(void* shared, int rank, Site site) {
  return gang.peer(shared, rank, site);
}

void copy_async(void* shared, const void* global, Site site) {
  gang.copy(shared, global, site);
}

void copy_async_commit() {
  gang.current().copies.commit();
}

void copy_async_wait(int allowed) {
  gang.current().copies.wait(allowed);
}

unsigned load_acquire(const unsigned* address, Site site) {
  return gang.look(address, site);
}

void arrive() {
  gang.arrive();
}

void* shared_bytes(const void* site, size_t bytes, size_t alignment) {
  return gang.array(site, bytes, alignment);
}

unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(gang.current().block->arena.at(gang.dynamic().offset));
}

void launch(const Shape& shape, const std::function<void()>& kernel) {
  gang.launch(shape, kernel);
}

}  // namespace fusednorm::host
