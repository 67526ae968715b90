// Fibers: a stack above a page that traps, and a switch between two of them that AddressSanitizer
// can follow.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FUSEDNORM_ASAN 1
#else
#define FUSEDNORM_ASAN 0
#endif

#if !defined(__x86_64__) && !defined(FUSEDNORM_UCONTEXT)
#define FUSEDNORM_UCONTEXT
#endif
#if defined(FUSEDNORM_UCONTEXT)
#include <ucontext.h>
#endif

namespace fusednorm::host {

// AddressSanitizer puts red zones around locals, and its runtime needs room to report.
constexpr size_t kStackBytes = FUSEDNORM_ASAN ? 256 * 1024 : 64 * 1024;

inline void poison(const void* begin, size_t bytes) {
#if FUSEDNORM_ASAN
  __asan_poison_memory_region(begin, bytes);
#else
  (void)begin, (void)bytes;
#endif
}

inline void unpoison(const void* begin, size_t bytes) {
#if FUSEDNORM_ASAN
  __asan_unpoison_memory_region(begin, bytes);
#else
  (void)begin, (void)bytes;
#endif
}

class Stack {
 public:
  // Unguarded: AddressSanitizer's guard alone, which costs no mapping.
  explicit Stack(bool guarded) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, page_ + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    if (!guarded) {
      poison(memory_, page_);
    } else if (mprotect(memory_, page_, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() {
    unpoison(memory_, page_ + kStackBytes);
    munmap(memory_, page_ + kStackBytes);
  }
  char* bottom() const { return memory_ + page_; }

 private:
  size_t page_;
  char* memory_;
};

// swapcontext makes a system call at every switch, which would be most of a kernel's time; on
// x86-64 a few instructions save what the ABI asks a callee to preserve. Anywhere else, or with
// FUSEDNORM_UCONTEXT defined, swapcontext it is.
#if defined(FUSEDNORM_UCONTEXT)
struct Registers {
  ucontext_t saved;
};

inline void switch_registers(Registers& from, Registers& to) {
  swapcontext(&from.saved, &to.saved);
}

inline void prepare(Registers& registers, char* stack, void (*entry)()) {
  getcontext(&registers.saved);
  registers.saved.uc_stack.ss_sp = stack;
  registers.saved.uc_stack.ss_size = kStackBytes;
  registers.saved.uc_link = nullptr;
  makecontext(&registers.saved, entry, 0);
}
#else
struct Registers {
  void* stack_pointer;
};

[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}

inline void switch_registers(Registers& from, Registers& to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}

inline void prepare(Registers& registers, char* stack, void (*entry)()) {
  // From the top: a zero where an unwinder looks for the entry's caller, the entry as the address
  // that `ret` goes to, six zero registers. The entry then finds the stack aligned as after a call.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(entry);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  registers.stack_pointer = top - 7;
}
#endif

// One side of a switch. AddressSanitizer must be told before leaving which stack comes next, and on
// arrival tells which one was left.
class Context {
 public:
  void prepare_on(const Stack& stack, void (*entry)()) {
    fake_stack_ = nullptr;
    bottom_ = stack.bottom();
    bytes_ = kStackBytes;
    prepare(registers_, stack.bottom(), entry);
  }

  void switch_to(Context& to) {
    leave(&fake_stack_, to);
    switch_registers(registers_, to.registers_);
    arrive(to);
  }

  // The first thing a fiber does: `from` is who started it.
  void begin(Context& from) { arrive(from); }

  // The last thing a fiber does.
  void finish(Context& to) {
    leave(nullptr, to);
    switch_registers(registers_, to.registers_);
  }

 private:
  static void leave(void** fake_stack, const Context& to) {
#if FUSEDNORM_ASAN
    __sanitizer_start_switch_fiber(fake_stack, to.bottom_, to.bytes_);
#else
    (void)fake_stack, (void)to;
#endif
  }

  void arrive(Context& from) {
#if FUSEDNORM_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, &from.bottom_, &from.bytes_);
#else
    (void)from;
#endif
  }

  Registers registers_;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fusednorm::host
