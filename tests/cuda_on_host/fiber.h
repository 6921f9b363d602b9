// A fiber: a stack with a guard page below it, and the switch from one fiber to another. Who runs when is not its concern.
//
// The switch is a dozen instructions on x86-64. Elsewhere, or with -DCUDA_ON_HOST_UCONTEXT, it is swapcontext, which makes
// a system call each time.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <string>

#include "error.h"
#include "sanitize.h"

#if !defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_UCONTEXT 1
#endif
#ifdef CUDA_ON_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_on_host {

#ifndef CUDA_ON_HOST_UCONTEXT
// Saves the registers that a callee must preserve on this stack, leaves its pointer in *save, and continues on the other.
// noipa: nothing may be concluded from its body, which the compiler believes to touch no memory.
__attribute__((naked, noipa, no_stack_protector, no_sanitize_thread, no_sanitize_address))
inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

class Fiber {
 public:
  // The fiber that the host already runs on.
  Fiber() = default;

  // A fiber that will run entry(), which must never return.
  Fiber(size_t stack_bytes, void (*entry)()) : size_((stack_bytes + kPage - 1) / kPage * kPage) {
    void* memory = mmap(nullptr, kPage + size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("cuda_on_host: no memory for the stacks of so many threads");
    mapped_ = static_cast<char*>(memory);
    mprotect(mapped_, kPage, PROT_NONE);  // where the system refuses ever more mappings, a stack without guard must do
    bottom_ = mapped_ + kPage;
#ifdef CUDA_ON_HOST_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = mapped_ + kPage;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    // Stacks begin at different places within a page, lest all of them compete for the same few cache lines.
    static unsigned count = 0;
    char* begin = mapped_ + kPage + size_ - count++ % 32 * 128;
    // What switch_stack pops: six registers, then where to return to. entry itself finds a null return address, and a stack
    // pointer that a call would have left.
    void** top = reinterpret_cast<void**>(begin);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#endif
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  ~Fiber() {
    if (!mapped_) return;
#if defined(__SANITIZE_THREAD__)
    if (!abandoned_) __tsan_destroy_fiber(tsan_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom_, size_);
#endif
    munmap(mapped_, kPage + size_);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The fiber will not run again, wherever it is: all it did comes before `end`. ThreadSanitizer's part of one that stops
  // amid one of the emulator's functions cannot be destroyed (it dies of "finished with ignores enabled"), and is lost.
  void abandon(HappensBefore& end) {
    (void)end;
    abandoned_ = true;
#if defined(__SANITIZE_THREAD__)
    void* caller = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
    end.release();
    __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
#endif
  }
  bool abandoned() const { return abandoned_; }

  // To be called by the host before it first switches.
  void adopt_host() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // Continues `to`; returns when someone continues this fiber, which must be the one that runs now. Only the host and the
  // fibers that it continued switch to each other, so that who comes back is always `to`.
  __attribute__((no_sanitize_thread)) void switch_to(Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&asan_, to.bottom_, to.size_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUDA_ON_HOST_UCONTEXT
    swapcontext(&context_, &to.context_);
#else
    switch_stack(&stack_pointer_, to.stack_pointer_);
#endif
    arrive(to);
  }

  // The rest of a switch: what a fiber's entry must call first, with the fiber that it was started from.
  void arrive(Fiber& from) {
    (void)from;
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    __sanitizer_finish_switch_fiber(asan_, &bottom, &from.size_);
    from.bottom_ = static_cast<char*>(const_cast<void*>(bottom));
#endif
  }

 private:
  static constexpr size_t kPage = 4096;
  char* mapped_ = nullptr;
  char* bottom_ = nullptr;
  size_t size_ = 0;
  bool abandoned_ = false;
#ifdef CUDA_ON_HOST_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* asan_ = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
};

}  // namespace cuda_on_host
