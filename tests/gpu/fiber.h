// A fiber: a function with a stack of its own that pauses and goes on where it paused.
#pragma once
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_cpu {

#if defined(__x86_64__)

struct Context {
  void* stack_pointer = nullptr;
};

// Five nanoseconds, where swapcontext takes 400 (a system call).
__attribute__((naked, noinline)) static void switch_context(Context*, Context*) {
  __asm__(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov (%rsi), %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<void**>(stack + bytes) - 2;
  *--top = nullptr;  // where entry would return to: it never does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_context(Context* from, Context* to) { swapcontext(&from->state, &to->state); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

// Where fibers are resumed from.
struct Scheduler {
  Context context;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t bytes = 0;
};

class Fiber {
 public:
  static constexpr size_t kStack = 128 << 10;
  char* stack = nullptr;

  // entry must call enter() first and pause(true) last.
  void start(void (*entry)()) { make_context(context_, stack, kStack, entry); }

  // Called by the scheduler: runs the fiber until it pauses.
  void resume() {
    leave(&scheduler_.fake_stack, stack, kStack);
    switch_context(&scheduler_.context, &context_);
    arrive(scheduler_.fake_stack);
  }

  void enter() { arrive_from_scheduler(nullptr); }

  void pause(bool for_ever = false) {
    leave(for_ever ? nullptr : &fake_stack_, scheduler_.stack, scheduler_.bytes);
    switch_context(&context_, &scheduler_.context);
    arrive_from_scheduler(fake_stack_);
  }

 private:
  // AddressSanitizer wants to know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
  static void leave(void** fake, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, stack, bytes);
  }
  static void arrive(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
  static void arrive_from_scheduler(void* fake) {
    __sanitizer_finish_switch_fiber(fake, &scheduler_.stack, &scheduler_.bytes);
  }
#else
  static void leave(void**, const void*, size_t) {}
  static void arrive(void*) {}
  static void arrive_from_scheduler(void*) {}
#endif

  static inline Scheduler scheduler_;
  Context context_;
  void* fake_stack_ = nullptr;
};

}  // namespace cuda_cpu
