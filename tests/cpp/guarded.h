// Memory between two pages that nothing may touch: whoever reads or writes a byte behind it (or, placed at the start,
// before it) crashes there and then, and what it wrote into the rest of the page is seen afterwards. Works in every build.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "check.h"

extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace test {

class Guarded {
 public:
  enum Place { kAtEnd, kAtStart };

  // No memory and a null pointer for 0 bytes, as torch's empty tensors have.
  explicit Guarded(int64_t bytes = 0, Place place = kAtEnd) : bytes_(bytes) {
    if (bytes == 0) return;
    const int64_t page = sysconf(_SC_PAGESIZE);
    inside_ = (bytes + page - 1) / page * page;
    whole_ = inside_ + 2 * page;
    void* mapped = mmap(nullptr, size_t(whole_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    base_ = static_cast<unsigned char*>(mapped) + page;
    if (mprotect(base_, size_t(inside_), PROT_READ | PROT_WRITE)) std::abort();
    data_ = place == kAtEnd ? base_ + inside_ - bytes : base_;
    std::memset(base_, kSlack, size_t(inside_));
    poison();
  }
  ~Guarded() {
    if (base_) munmap(base_ - (whole_ - inside_) / 2, size_t(whole_));
  }
  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // A NaN in every format.
  void poison() {
    if (bytes_) std::memset(data_, 0xff, size_t(bytes_));
  }
  // Whether nobody wrote beside the data.
  bool intact() const {
    for (unsigned char* p = base_; p < base_ + inside_; ++p)
      if ((p < data_ || p >= data_ + bytes_) && *p != kSlack) return false;
    return true;
  }

 private:
  static constexpr unsigned char kSlack = 0xa5;
  int64_t bytes_ = 0, inside_ = 0, whole_ = 0;
  unsigned char *base_ = nullptr, *data_ = nullptr;

  void swap(Guarded& other) {
    std::swap(bytes_, other.bytes_);
    std::swap(inside_, other.inside_);
    std::swap(whole_, other.whole_);
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
  }
};

// Says at a crash what was being tested, in words of our own or behind a sanitizer's report.
inline void print_context() {
  for (const char* text : {"\ncrashed in: ", static_cast<const char*>(context), "\n"})
    if (write(STDERR_FILENO, text, std::strlen(text)) < 0) return;
}
inline void print_context_at_crash() {
  if (__sanitizer_set_death_callback) return __sanitizer_set_death_callback(print_context);
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
    std::signal(number, [](int number) {
      print_context();
      std::signal(number, SIG_DFL);
      std::raise(number);
    });
}

}  // namespace test
