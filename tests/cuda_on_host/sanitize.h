// What the sanitizers must be told: which accesses are the emulator's and which the kernel's, and what orders memory.
//
// To ThreadSanitizer every CUDA thread is a fiber of its own, and a mere switch between fibers orders nothing. Two CUDA
// threads are ordered only by what orders them on a GPU, which the emulator says with HappensBefore. So a race is found in
// whatever order the threads happened to run. Without sanitizers all of this is empty.
#pragma once
#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif

namespace cuda_on_host {

#if defined(__SANITIZE_THREAD__)

constexpr bool kThreadSanitizer = true;

// While one lives, accesses are the emulator's own and no CUDA thread's.
class Quiet {
 public:
  __attribute__((no_sanitize_thread)) Quiet() { __tsan_ignore_thread_begin(); }
  __attribute__((no_sanitize_thread)) ~Quiet() { __tsan_ignore_thread_end(); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

// Who acquires comes after all who have released. The address is heap memory of its own: freeing it is the one way to make
// ThreadSanitizer forget what was released, and a reused block must not know what its predecessor's threads did.
class HappensBefore {
 public:
  void release() { __tsan_release(address()); }
  void acquire() { __tsan_acquire(address()); }
  void forget() { address_.reset(); }

 private:
  void* address() {
    Quiet quiet;
    if (!address_) address_ = std::make_unique<char>();
    return address_.get();
  }
  std::unique_ptr<char> address_;
};

// The calling CUDA thread reads or writes, here in the kernel, memory that the emulator will touch in its stead.
inline void note_read(const void* from, size_t bytes) { __tsan_read_range(const_cast<void*>(from), bytes); }
inline void note_write(void* to, size_t bytes) { __tsan_write_range(to, bytes); }

#else

constexpr bool kThreadSanitizer = false;

struct Quiet {
  Quiet() {}  // written out, so that a Quiet nobody reads is no unused variable
};

struct HappensBefore {
  void release() {}
  void acquire() {}
  void forget() {}
};

#if defined(__SANITIZE_ADDRESS__)
inline void note_read(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) (void)static_cast<const volatile char*>(from)[i];
}
#else
inline void note_read(const void*, size_t) {}
#endif
inline void note_write(void*, size_t) {}

#endif

}  // namespace cuda_on_host
