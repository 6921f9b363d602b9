// In place of csrc/arena.h, an Arena whose pieces lie between pages that nobody may touch: a kernel that leaves its piece of
// the workspace crashes there and then, rather than read or write the next one.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace fusedrnn {

struct Arena {
  static constexpr int64_t kAlign = 64, kPage = 4096;
  char* base;  // of whole pages
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = up_to(count * int64_t(sizeof(T)), kAlign), pages = up_to(bytes, kPage);
    char* piece = base ? base + used + pages - bytes : nullptr;
    used += pages + kPage;
    if (base && mprotect(base + used - kPage, size_t(kPage), PROT_NONE)) std::abort();
    return reinterpret_cast<T*>(piece);
  }
  static int64_t up_to(int64_t count, int64_t size) { return (count + size - 1) / size * size; }
};

}  // namespace fusedrnn
