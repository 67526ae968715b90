// The blocks that run together and their threads: what the scheduler of cuda_shim.cpp works on.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_shim.h"
#include "fiber.h"
#include "shared_memory.h"

namespace fusednorm::host {

constexpr int kWarp = 32;
// Rounds of looking, by everyone who still runs, after which a spin has no end.
constexpr int kPatience = 1000;
// Stacks beyond these have no page of their own that traps: a process may map 65530 regions.
constexpr size_t kGuardedStacks = 8192;
// At most so many blocks (or clusters) of an ordinary launch run together in shuffled order.
constexpr int kShuffledRuns = 4;

enum class State { kReady, kYielded, kSpin, kBlockWait, kClusterWait, kWarpWait, kReturned };

// What a thread waits for: one line of the kernel and, for warps, one mask.
struct Wait {
  Word word;
  Site site;
  unsigned mask;
};

inline std::string at(const Site& site) {
  return std::string(" at ") + site.file + ":" + std::to_string(site.line);
}

inline bool operator==(const Wait& a, const Wait& b) {
  return a.word == b.word && a.site.line == b.site.line && a.mask == b.mask &&
         std::strcmp(a.site.file, b.site.file) == 0;
}

struct Block;

struct Fiber {
  explicit Fiber(bool guarded) : stack(guarded) {}

  Stack stack;
  Context context;
  uint3 thread;
  Block* block = nullptr;
  State state = State::kReturned;
  Wait wait;
  // What it brings to the others, then what it gets.
  uint64_t value;
  int source;
  // The last word was a look at this address, and this was there.
  const unsigned* looked_at;
  unsigned seen;
  Copies copies;
};

struct Block {
  uint3 index;
  int first_fiber;
  int first_peer;  // where in the gang its cluster begins
  int returned = 0;
  bool started = false;
  // Another block's memory was asked for here, and no barrier of the cluster came since.
  bool unguarded = false;
  Site unguarded_at;
  Arena arena;
};

// One line for every run of threads that wait for the same thing.
inline std::string stall(const Block& block, const std::unique_ptr<Fiber>* fibers, int threads) {
  const auto describe = [](const Fiber& fiber) -> std::string {
    switch (fiber.state) {
      case State::kReturned:
        return "returned";
      case State::kBlockWait:
        return "wait for the block" + at(fiber.wait.site);
      case State::kClusterWait:
        return "wait for the cluster" + at(fiber.wait.site);
      case State::kWarpWait:
        char mask[16];
        std::snprintf(mask, sizeof(mask), "0x%08x", fiber.wait.mask);
        return std::string("wait for lanes ") + mask + at(fiber.wait.site);
      default:
        return "spin" + at(fiber.wait.site);
    }
  };
  std::string text = " in block (" + std::to_string(block.index.x) + ", " +
                     std::to_string(block.index.y) + ", " + std::to_string(block.index.z) + "):";
  for (int first = 0, i = 1; i <= threads; ++i) {
    if (i < threads && describe(*fibers[i]) == describe(*fibers[first])) continue;
    text += "\n  threads " + std::to_string(first) + "-" + std::to_string(i - 1) + " " +
            describe(*fibers[first]);
    first = i;
  }
  return text;
}

// The blocks that run together: one, those of a cluster, or a whole cooperative grid.
class Gang {
 public:
  void launch(const Shape& shape, const std::function<void()>& kernel);
  uint64_t wait(State state, const Wait& wait, uint64_t value = 0, int source = 0);
  void* array(const void* site, size_t bytes, size_t alignment);
  unsigned look(const unsigned* address, Site site);
  void arrive();
  void* peer(void* shared, int rank, Site site);
  void copy(void* shared, const void* global, Site site);
  Fiber& current() { return *current_; }
  const Array& dynamic() const { return layout_.arrays()[0]; }
  int cluster() const { return static_cast<int>(shape_.cluster); }

 private:
  static void fiber_main();
  void start(const std::vector<int64_t>& indices);
  void run();
  void resume(Fiber& fiber);
  bool advance(Block& block);
  bool step(Block& block, int warp);
  bool complete_exchange(const std::unique_ptr<Fiber>* fibers, int lanes);
  bool complete(int first_fiber, int count, State state);
  bool complete_cluster(int first_block);
  bool wake();
  bool draw_slow();
  void leave(Block& block);
  std::vector<int> permutation(int count);
  [[noreturn]] void fail() const;
  int lanes(int warp) const { return std::min(kWarp, threads_ - warp * kWarp); }

  Shape shape_;
  std::vector<std::unique_ptr<Fiber>> fibers_;  // threads_ of them for each block, in order
  std::vector<std::unique_ptr<Block>> blocks_;
  Layout layout_;
  std::mt19937_64 random_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr failure_;
  Context scheduler_;
  Fiber* current_ = nullptr;
  std::vector<Fiber*> looking_;
  int rounds_without_progress_ = 0;
  std::vector<char> slow_;  // of every warp, in order
  int threads_ = 0;         // of a block
  int warps_ = 0;
  int count_ = 0;  // of blocks
};

extern Gang gang;

}  // namespace fusednorm::host
