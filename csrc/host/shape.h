// The shape of a launch, and what a device refuses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fusednorm::host {

// What the pretended device has; the defaults are an H200's. Launches beyond it are refused.
struct Limits {
  int64_t sms = 132;
  int64_t threads_per_sm = 2048;
  int64_t blocks_per_sm = 32;
  int64_t shared_per_sm = 228 * 1024;
  int64_t shared_per_block = 227 * 1024;
  int64_t max_cluster = 16;
};
inline Limits limits;

// A launch with all its attributes. Blocks of a cluster have consecutive numbers and run together;
// those of a cooperative grid all do.
struct Shape {
  dim3 grid;
  dim3 block;
  int64_t shared_bytes = 0;
  int64_t cluster = 1;
  bool cooperative = false;
};

// Throws std::invalid_argument for a shape that a device would refuse.
inline void check(const Shape& s) {
  constexpr unsigned kMaxThreads = 1024;
  // What a device keeps of its shared memory for itself, a block.
  constexpr int64_t kReservedShared = 1024;
  const auto refuse = [](const std::string& why) {
    throw std::invalid_argument("invalid configuration: " + why);
  };
  const auto within = [](dim3 size, unsigned x, unsigned y, unsigned z) {
    return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;
  };
  const int64_t threads = int64_t{s.block.x} * s.block.y * s.block.z;
  if (!within(s.grid, 0x7fffffffu, 65535, 65535) ||
      !within(s.block, kMaxThreads, kMaxThreads, 64) || threads > kMaxThreads) {
    refuse("a device takes no such grid or block");
  }
  if (s.shared_bytes > limits.shared_per_block) {
    refuse(std::to_string(s.shared_bytes) + " bytes of dynamic shared memory, at most " +
           std::to_string(limits.shared_per_block));
  }
  if (s.cluster < 1 || s.cluster > limits.max_cluster || s.grid.x % s.cluster != 0) {
    refuse("clusters of " + std::to_string(s.cluster) + ", at most " +
           std::to_string(limits.max_cluster) + ", in a grid of " + std::to_string(s.grid.x));
  }
  if (!s.cooperative) return;
  const int64_t resident =
      limits.sms *
      std::min({limits.blocks_per_sm, limits.threads_per_sm / ((threads + 31) / 32 * 32),
                limits.shared_per_sm / (s.shared_bytes + kReservedShared)});
  const int64_t blocks = int64_t{s.grid.x} * s.grid.y * s.grid.z;
  if (blocks > resident) {
    refuse("a cooperative grid of " + std::to_string(blocks) + " blocks where " +
           std::to_string(resident) + " fit");
  }
}

}  // namespace fusednorm::host
