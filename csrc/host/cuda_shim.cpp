// The scheduler behind cuda_shim.h: the order threads run in, barriers, shuffles, the shared arena.
//
// A fiber runs until it waits for others, so a block costs threads x barriers switches. Forward and
// reversed drive each warp as far as it gets before the next one starts, which is the largest skew
// that a missing barrier can meet; shuffled interleaves the warps and permutes their lanes anew at
// every step.
#include "cuda_shim.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace fusednorm::host {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
// What a device grants a kernel without being asked for more.
constexpr size_t kSharedBytes = 48 * 1024;
constexpr size_t kRedZone = 128;
constexpr size_t kMaxArrays = 32;

enum class State { kReady, kBlockWait, kWarpWait, kReturned };

// What a thread waits for: one line of the kernel and, for warps, one mask.
struct Wait {
  Word word;
  Site site;
  unsigned mask;
};

bool operator==(const Wait& a, const Wait& b) {
  return a.word == b.word && a.site.line == b.site.line && a.mask == b.mask &&
         std::strcmp(a.site.file, b.site.file) == 0;
}

struct Fiber {
  Stack stack;
  Context context;
  uint3 thread;
  State state = State::kReturned;
  Wait wait;
  // What it brings to the others, then what it gets.
  uint64_t value;
  int source;
};

struct Array {
  const void* site;
  char* begin;
};

class Block {
 public:
  void run(const std::function<void()>& kernel, std::mt19937_64& random);
  uint64_t wait(State state, const Wait& wait, uint64_t value, int source);
  void* array(const void* site, size_t bytes, size_t alignment);

 private:
  static void fiber_main();
  void start(const std::function<void()>& kernel);
  void resume(int index);
  bool step(int warp, std::mt19937_64& random);
  bool complete_exchange(int warp);
  bool complete_barrier();
  std::string stall() const;
  int lanes(int warp) const { return std::min(kWarp, threads_ - warp * kWarp); }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<char> arena_ = std::vector<char>(kSharedBytes + 2 * kRedZone * (kMaxArrays + 1));
  std::vector<Array> arrays_;
  char* arena_end_ = nullptr;
  size_t shared_bytes_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr failure_;
  Context scheduler_;
  Fiber* current_ = nullptr;
  int threads_ = 0;
};

Block block;

void Block::fiber_main() {
  Fiber& fiber = *block.current_;
  fiber.context.begin(block.scheduler_);
  try {
    (*block.kernel_)();
  } catch (...) {
    block.failure_ = std::current_exception();
  }
  fiber.state = State::kReturned;
  fiber.context.finish(block.scheduler_);
}

void Block::start(const std::function<void()>& kernel) {
  kernel_ = &kernel;
  threads_ = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  while (static_cast<int>(fibers_.size()) < threads_) fibers_.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < threads_; ++i) {
    const unsigned row = i / blockDim.x;
    fibers_[i]->thread = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
    // Frames that a failed launch left behind still bear AddressSanitizer's marks.
    if (fibers_[i]->state != State::kReturned) unpoison(fibers_[i]->stack.bottom(), kStackBytes);
    fibers_[i]->state = State::kReady;
    fibers_[i]->context.prepare_on(fibers_[i]->stack, fiber_main);
  }
  unpoison(arena_.data(), arena_.size());
  std::memset(arena_.data(), 0xff, arena_.size());
  poison(arena_.data(), arena_.size());
  arrays_.clear();
  arena_end_ = arena_.data() + kRedZone;
  shared_bytes_ = 0;
}

void Block::resume(int index) {
  current_ = fibers_[index].get();
  threadIdx = current_->thread;
  scheduler_.switch_to(current_->context);
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

uint64_t Block::wait(State state, const Wait& wait, uint64_t value, int source) {
  Fiber& fiber = *current_;
  fiber.state = state;
  fiber.wait = wait;
  fiber.value = value;
  fiber.source = source;
  fiber.context.switch_to(scheduler_);
  return fiber.value;
}

void* Block::array(const void* site, size_t bytes, size_t alignment) {
  for (const Array& array : arrays_) {
    if (array.site == site) return array.begin;
  }
  shared_bytes_ += bytes;
  if (shared_bytes_ > kSharedBytes || arrays_.size() == kMaxArrays) {
    throw std::runtime_error("a block asks for more than " + std::to_string(kSharedBytes) +
                             " bytes of shared memory, or more than " + std::to_string(kMaxArrays) +
                             " arrays");
  }
  const auto address = reinterpret_cast<uintptr_t>(arena_end_);
  char* begin = arena_end_ + (alignment - address % alignment) % alignment;
  unpoison(begin, bytes);
  // The next array starts a red zone later, on a boundary where poisoning is exact to the byte.
  arena_end_ = begin + (bytes + kRedZone + 15) / 16 * 16;
  arrays_.push_back({site, begin});
  return begin;
}

std::vector<int> permutation(int count, std::mt19937_64& random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Lets every ready lane of a warp run until it waits, then completes the exchanges that are ripe.
bool Block::step(int warp, std::mt19937_64& random) {
  bool moved = false;
  for (int lane : permutation(lanes(warp), random)) {
    if (fibers_[warp * kWarp + lane]->state != State::kReady) continue;
    resume(warp * kWarp + lane);
    moved = true;
  }
  return complete_exchange(warp) || moved;
}

bool Block::complete_exchange(int warp) {
  const auto* fibers = &fibers_[warp * kWarp];
  bool completed = false;
  for (int leader = 0; leader < lanes(warp); ++leader) {
    if (fibers[leader]->state != State::kWarpWait) continue;
    const Wait wait = fibers[leader]->wait;
    uint64_t values[kWarp] = {};
    unsigned arrived = 0, votes = 0;
    for (int lane = 0; lane < lanes(warp); ++lane) {
      if (fibers[lane]->state != State::kWarpWait || !(fibers[lane]->wait == wait)) continue;
      values[lane] = fibers[lane]->value;
      arrived |= 1u << lane;
      if (values[lane]) votes |= 1u << lane;
    }
    if (arrived != wait.mask) continue;
    for (int lane = 0; lane < lanes(warp); ++lane) {
      if (!(wait.mask >> lane & 1u)) continue;
      fibers[lane]->state = State::kReady;
      fibers[lane]->value = wait.word == Word::kVote ? votes : values[fibers[lane]->source];
    }
    completed = true;
  }
  return completed;
}

// Releases the block if all of its threads wait at one barrier.
bool Block::complete_barrier() {
  for (int i = 0; i < threads_; ++i) {
    const Fiber& fiber = *fibers_[i];
    if (fiber.state != State::kBlockWait || !(fiber.wait == fibers_[0]->wait)) return false;
  }
  for (int i = 0; i < threads_; ++i) fibers_[i]->state = State::kReady;
  return true;
}

// One line for every run of threads that wait for the same thing.
std::string Block::stall() const {
  const auto describe = [](const Fiber& fiber) -> std::string {
    if (fiber.state == State::kReturned) return "returned";
    const std::string where =
        std::string(" at ") + fiber.wait.site.file + ":" + std::to_string(fiber.wait.site.line);
    if (fiber.state == State::kBlockWait) return "wait for the block" + where;
    char mask[16];
    std::snprintf(mask, sizeof(mask), "0x%08x", fiber.wait.mask);
    return std::string("wait for lanes ") + mask + where;
  };
  std::string text = "divergent barrier or shuffle in block (" + std::to_string(blockIdx.x) + ", " +
                     std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "):";
  for (int first = 0, i = 1; i <= threads_; ++i) {
    if (i < threads_ && describe(*fibers_[i]) == describe(*fibers_[first])) continue;
    text += "\n  threads " + std::to_string(first) + "-" + std::to_string(i - 1) + " " +
            describe(*fibers_[first]);
    first = i;
  }
  return text;
}

void Block::run(const std::function<void()>& kernel, std::mt19937_64& random) {
  start(kernel);
  const int warps = (threads_ + kWarp - 1) / kWarp;
  do {
    for (bool moved = true; moved;) {
      moved = false;
      for (int warp : permutation(warps, random)) {
        while (step(warp, random)) {
          moved = true;
          if (schedule.order == Order::kShuffled) break;
        }
      }
    }
  } while (complete_barrier());
  for (int i = 0; i < threads_; ++i) {
    if (fibers_[i]->state != State::kReturned) throw std::runtime_error(stall());
  }
}

}  // namespace

uint64_t exchange(Word word, unsigned mask, uint64_t value, int source, Site site) {
  const int lane = host::lane();
  if (!(mask >> lane & 1u) || (word == Word::kShuffle && !(mask >> source & 1u))) {
    throw std::runtime_error("lane " + std::to_string(lane) + " reads lane " +
                             std::to_string(source) + ", but the mask at " + site.file + ":" +
                             std::to_string(site.line) + " does not name both");
  }
  return block.wait(State::kWarpWait, {word, site, mask}, value, source);
}

void barrier(Site site) {
  block.wait(State::kBlockWait, {Word::kBarrier, site, 0}, 0, 0);
}

void* shared_bytes(const void* site, size_t bytes, size_t alignment) {
  return block.array(site, bytes, alignment);
}

void launch(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  const auto within = [](dim3 size, unsigned x, unsigned y, unsigned z) {
    return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;
  };
  if (!within(grid, 0x7fffffffu, 65535, 65535) || !within(threads, kMaxThreads, kMaxThreads, 64) ||
      uint64_t{threads.x} * threads.y * threads.z > kMaxThreads) {
    throw std::invalid_argument("invalid configuration: a device takes no such grid or block");
  }
  ++launches;
  gridDim = grid;
  blockDim = threads;
  std::mt19937_64 random(schedule.seed);
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  for (int64_t i : permutation(static_cast<int>(blocks), random)) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    block.run(kernel, random);
  }
}

}  // namespace fusednorm::host
