// A buffer that is cut into pieces: how an engine lays out its workspace.
#pragma once
#include <cstdint>

namespace fusedrnn {

// Hands out pieces of one buffer, each on a boundary of kAlign bytes. Over a null buffer it only counts, so one layout function
// serves to size and to use it. Always inline: the code of one instruction set must not be linked into another's.
struct Arena {
  static constexpr int64_t kAlign = 64;  // a cache line of a CPU; more than a GPU loads at once
  char* base;
  int64_t used = 0;
  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    char* piece = base ? base + used : nullptr;
    used += (count * int64_t(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(piece);
  }
};

}  // namespace fusedrnn
