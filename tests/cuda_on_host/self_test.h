// What the self-test's parts share: checks, mistakes that can be planted into its kernels, arrays that a kernel works on.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_on_host.h"

namespace self_test {

using namespace cuda_on_host;

// A mistake in one of the kernels, made when asked for on the command line: if (!no_barrier) __syncthreads();
class Plant {
 public:
  Plant(const char* name, const char* in) : name(name), in(in) { all().push_back(this); }
  explicit operator bool() const { return active; }
  static std::vector<Plant*>& all() {
    static std::vector<Plant*> plants;
    return plants;
  }
  const char *name, *in;  // in: the case to which the kernel belongs
  bool active = false;
};

// One natural use of one thing. run() launches kernels and checks what they computed against plain C++.
struct Case {
  const char* name;
  void (*run)(test::Random&);
};

// Exactly this many elements on the heap, so that AddressSanitizer sees every access past them. Outputs begin as garbage.
template <class T>
struct Array {
  explicit Array(size_t size) : size(size), data(new T[size]) {
    std::memset(static_cast<void*>(data), kPoison, size * sizeof(T));
  }
  ~Array() { delete[] data; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T& operator[](size_t i) { return data[i]; }
  size_t size;
  T* data;
};

template <class T, class Make>
void fill(Array<T>& array, const Make& make) {
  for (size_t i = 0; i < array.size; ++i) array[i] = T(make(i));
}

template <class T, class Want>
void check_all(const char* what, Array<T>& got, const Want& want, double tolerance = 0) {
  for (size_t i = 0; i < got.size; ++i) {
    const double difference = std::fabs(double(got[i]) - double(want(i)));
    CHECK(difference <= tolerance, "%s[%zu] is %g instead of %g", what, i, double(got[i]), double(want(i)));
  }
}

template <class T>
T* take(size_t count) {
  return static_cast<T*>(shared_take(count * sizeof(T)));
}

// A launch in the ordinary way.
inline Launch grid(const char* name, dim3 blocks, dim3 threads, size_t shared_bytes = 0) {
  return {name, blocks, threads, shared_bytes, false};
}
inline Launch cooperative(const char* name, dim3 blocks, dim3 threads, size_t shared_bytes = 0) {
  return {name, blocks, threads, shared_bytes, false, true};
}
inline Launch clusters(const char* name, dim3 blocks, dim3 threads, unsigned cluster, size_t shared_bytes = 0) {
  Launch launch = cooperative(name, blocks, threads, shared_bytes);
  launch.cluster = cluster;
  return launch;
}
inline Launch dependent(const char* name, dim3 blocks, dim3 threads, size_t shared_bytes = 0) {
  return {name, blocks, threads, shared_bytes, true};
}

}  // namespace self_test
