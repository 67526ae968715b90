// Shared memory of the blocks that run together: every array between red zones, NaN to begin with.
//
// The arrays of a launch are laid out once, alike in all blocks, as a compiler would: an address in
// one block has its counterpart in every other block of the cluster.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace fusednorm::host {

// What a device grants to static arrays; the dynamic part is asked for at the launch.
constexpr size_t kStaticBytes = 48 * 1024;
constexpr size_t kRedZone = 128;
constexpr size_t kMaxArrays = 32;

struct Array {
  const void* site;
  size_t offset;
  size_t bytes;
};

class Layout {
 public:
  explicit Layout(size_t dynamic_bytes = 0) {
    // On a multiple of 16 that is no multiple of 32: a device promises no more.
    arrays_.push_back({nullptr, kRedZone + 16, dynamic_bytes});
    statics_ = end_ = after(arrays_[0]);
  }

  const std::vector<Array>& arrays() const { return arrays_; }

  size_t capacity() const { return statics_ + kStaticBytes + (kMaxArrays + 1) * 2 * kRedZone; }

  const Array* find(const void* site) const {
    for (const Array& array : arrays_) {
      if (array.site == site) return &array;
    }
    return nullptr;
  }

  const Array& add(const void* site, size_t bytes, size_t alignment) {
    static_bytes_ += bytes;
    if (static_bytes_ > kStaticBytes || arrays_.size() > kMaxArrays) {
      throw std::runtime_error("a block asks for more than " + std::to_string(kStaticBytes) +
                               " bytes of static shared memory, or more than " +
                               std::to_string(kMaxArrays) + " arrays");
    }
    arrays_.push_back({site, (end_ + alignment - 1) / alignment * alignment, bytes});
    end_ = after(arrays_.back());
    return arrays_.back();
  }

  size_t total_bytes() const { return arrays_[0].bytes + static_bytes_; }

 private:
  // The next array starts a red zone later, on a boundary where poisoning is exact to the byte.
  static size_t after(const Array& array) {
    return (array.offset + array.bytes + kRedZone + 15) / 16 * 16;
  }

  std::vector<Array> arrays_;
  size_t statics_ = 0;
  size_t end_ = 0;
  size_t static_bytes_ = 0;
};

// One block's memory. Outside its arrays, and all of it before the block starts and after it has
// exited, AddressSanitizer lets nobody in, and without it there is NaN.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    unpoison(memory_, bytes_);
    std::free(memory_);
  }

  void reserve(size_t bytes) {
    if (bytes <= bytes_) return;
    unpoison(memory_, bytes_);
    std::free(memory_);
    bytes_ = (bytes + kRedZone - 1) / kRedZone * kRedZone;
    memory_ = static_cast<char*>(std::aligned_alloc(kRedZone, bytes_));
    if (!memory_) throw std::bad_alloc();
  }

  void hide() {
    unpoison(memory_, bytes_);
    std::memset(memory_, 0xff, bytes_);
    poison(memory_, bytes_);
  }

  void show(const Array& array) { unpoison(memory_ + array.offset, array.bytes); }

  char* at(size_t offset) const { return memory_ + offset; }

  // Where an address lies in here, or -1.
  int64_t offset_of(const void* address) const {
    const auto distance =
        reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(memory_);
    return distance < bytes_ ? static_cast<int64_t>(distance) : -1;
  }

 private:
  char* memory_ = nullptr;
  size_t bytes_ = 0;
};

// Asynchronous copies of one thread. A destination belongs to the copy until the wait that covers
// it; the bytes are fetched then, as late as a device may, and the source must not have changed.
class Copies {
 public:
  void reset() {
    pending_.clear();
    open_group_ = 0;
  }

  size_t pending() const { return pending_.size(); }

  void start(char* to, const char* from) {
    Copy copy{to, from, open_group_, {}};
    std::memcpy(copy.bytes, from, kBytes);
    std::memset(to, 0xff, kBytes);
    poison(to, kBytes);
    pending_.push_back(copy);
  }

  void commit() { ++open_group_; }

  // Completes all groups that were committed, but for the newest `allowed`.
  void wait(int64_t allowed) {
    const auto covered = [&](const Copy& copy) { return copy.group < open_group_ - allowed; };
    for (const Copy& copy : pending_) {
      if (covered(copy)) land(copy);
    }
    pending_.erase(std::remove_if(pending_.begin(), pending_.end(), covered), pending_.end());
  }

  static constexpr size_t kBytes = 16;

 private:
  struct Copy {
    char* to;
    const char* from;
    int64_t group;
    char bytes[kBytes];
  };

  static void land(const Copy& copy) {
    unpoison(copy.to, kBytes);
    for (size_t i = 0; i < kBytes; ++i) {
      if (copy.to[i] != '\xff') throw std::runtime_error("written to before copy_async arrived");
    }
    if (std::memcmp(copy.from, copy.bytes, kBytes) != 0) {
      throw std::runtime_error("the source of copy_async was changed before it arrived");
    }
    std::memcpy(copy.to, copy.from, kBytes);
  }

  std::vector<Copy> pending_;
  int64_t open_group_ = 0;
};

}  // namespace fusednorm::host
