// What an Error says, that launches are checked as CUDA checks them, and that the emulator works on after an Error.
#pragma once
#include "self_test.h"

namespace self_test {

// The message of the Error that this launch ends in, or "".
inline std::string message(const Launch& how, const std::function<void()>& body) {
  try {
    launch(how, body);
    synchronize();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

inline void expect(const std::string& got, std::initializer_list<const char*> parts) {
  for (const char* part : parts) CHECK(got.find(part) != std::string::npos, "\"%s\" lacks \"%s\"", got.c_str(), part);
}

inline void errors(test::Random&) {
  auto nothing = [] {};
  for (const dim3& none : {dim3(0), dim3(1, 0), dim3(1, 1, 0)}) {
    expect(message(grid("none", none, 32), nothing), {"none: cannot be launched", "grid"});
    expect(message(grid("none", 1, none), nothing), {"none: cannot be launched", "block"});
  }
  expect(message(grid("much", 1, dim3(1025)), nothing), {"much: cannot be launched", "block (1025,1,1)"});
  expect(message(grid("much", 1, dim3(32, 33)), nothing), {"more than 1024 threads"});
  expect(message(grid("much", 1, dim3(1, 1, 65)), nothing), {"exceeds (1024,1024,64)"});
  expect(message(grid("much", dim3(1, 65536), 1), nothing), {"grid (1,65536,1) exceeds"});
  expect(message(grid("much", dim3(1, 1, 65536), 1), nothing), {"exceeds (2^31-1,65535,65535)"});
  expect(message(grid("much", dim3(1u << 31), 1), nothing), {"grid (2147483648,1,1) exceeds"});
  expect(message(grid("much", 1, 1, (227 << 10) + 1), nothing), {"232449 bytes of shared memory"});
  expect(message(cooperative("much", 1000000, 32), nothing), {"cooperative grid", "cannot be resident"});
  expect(message(clusters("much", 4, 32, 3), nothing), {"much: cannot be launched", "clusters of 3 blocks"});
  expect(message(clusters("much", 16, 32, 16), nothing), {"clusters of 16 blocks"});
  Launch crowded = cooperative("much", 5, 32);
  crowded.most_resident = 4;
  expect(message(crowded, nothing), {"its blocks wait for each other, and there is room for 4 at once"});
  CHECK(message(grid("fits", dim3(1, 2, 3), dim3(32, 8, 4), 227 << 10), nothing).empty(), "must be launched");

  expect(message(grid("diverges", 2, 64), [] {
           if (threadIdx.x == 40 && blockIdx.x == 1) __syncthreads();
           else __syncthreads();
         }), {"diverges: __syncthreads at self_test_errors.h:", "barrier divergence", "block (1,0,0) thread ("});
  expect(message(grid("leaves", 1, 64), [] {
           if (threadIdx.x < 63) __syncthreads();
         }), {"leaves: ", "barrier divergence", "exit"});
  expect(message(grid("hangs", 1, dim3(32, 2)), [] {
           if (threadIdx.y == 1) named_sync(3, 64);
         }), {"deadlock: 32 threads of block (0,0,0) of hangs in bar.sync at self_test_errors.h:"});
  expect(message(grid("shuffles", 1, 32), [] {
           if (threadIdx.x < 31) __shfl_sync(~0u, 1, 0);
         }), {"shuffles: ", "warp divergence", "__shfl_sync at self_test_errors.h:"});
  expect(message(grid("shuffles", 1, 32), [] { __shfl_sync(threadIdx.x == 5 ? 0x3u : ~0u, 1, 0); }), {"not in its mask"});
  expect(message(grid("shuffles", 1, 16), [] { __shfl_sync(~0u, 1, 0); }), {"exited or never were"});
  expect(message(grid("throws", 1, 1), [] { throw std::runtime_error("why"); }), {"throws: ", "why", "thread (0,0,0)"});
  expect(message(grid("joins", 2, 1), [] { grid_sync(); }), {"joins: grid_sync", "not cooperative"});
  expect(message(cooperative("joins", 2, 1), [] {
           if (blockIdx.x == 1) grid_sync();
         }), {"joins: ", "barrier divergence"});
  expect(message(clusters("joins", 4, 1, 2), [] {
           if (blockIdx.x != 3) cluster_sync();
         }), {"joins: ", "barrier divergence"});
  expect(message(clusters("maps", 2, 1, 2, 64), [] { shared_of_rank(static_cast<int*>(shared_take(64)), 2); }), {"rank 2 in a cluster of 2"});
  expect(message(clusters("maps", 2, 1, 2, 64), [] {
           int* mine = static_cast<int*>(shared_take(64));
           shared_of_rank(mine + 16, 1 - blockIdx.x);
         }), {"not an address in an array"});
  expect(message(clusters("maps", 2, 1, 2, 64), [] { shared_of_rank(static_cast<int*>(shared_take(64)), 1 - blockIdx.x); }), {"has not begun, or has ended"});
  CHECK(message(clusters("meets", 4, 3, 2), [] { for (int i = 0; i < 5; ++i) cluster_sync(); }).empty(), "clusters meet alone");
  const unsigned never = 0;
  expect(message(cooperative("spins", 2, 1), [&] {
           while (!ld_acquire(&never)) spin_pause();
         }), {"spins: spin_pause at self_test_errors.h:", "threads only spin"});
  expect(message(grid("spins", 1, 1), [&] { while (!ld_acquire(&never)) continue; }), {"livelock", "without spin_pause"});
  expect(message(grid("names", 1, 32), [] { named_sync(16, 32); }), {"not one of 0 to 15"});
  expect(message(grid("names", 1, 32), [] { named_sync(1, 48); }), {"whole warps"});
  expect(message(grid("copies", 1, 1, 64), [] { cp_async(shared_take(64), nullptr, 12, 0); }), {"12 bytes"});
  expect(message(grid("copies", 1, 1, 64), [] { cp_async(shared_take(64), nullptr, 8, 16); }), {"more bytes to read"});
  expect(message(grid("starts", 1, 1), [] { synchronize(); }), {"in a kernel"});
  expect(message(dependent("alone", 1, 1), nothing), {"without grid_dependency_wait"});
  CHECK(message(dependent("alone", 1, 1), [] { grid_dependency_wait(); }).empty(), "nobody to wait for");

  // After an Error nothing is left of what was queued.
  int runs = 0;
  launch(grid("fails", 1, 32), [] { named_sync(1, 48); });
  launch(grid("follows", 1, 1), [&] { ++runs; });
  CHECK(!message(grid("follows", 1, 1), [&] { ++runs; }).empty() && runs == 0, "ran after an error");
  launch(grid("queued", 1, 1), [&] { ++runs; });
  expect(message(grid("much", 1, 1025), nothing), {"cannot be launched"});
  CHECK(message(grid("follows", 1, 1), [&] { ++runs; }).empty() && runs == 1, "must run again, and alone");
}

}  // namespace self_test
