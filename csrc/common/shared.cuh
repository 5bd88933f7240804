// Dynamic shared memory: how much of it a block may have on the current device, and a kernel's permission to take that much.
#pragma once
#include "cuda_compat.h"
#include <map>
#include <mutex>
#include <set>
#include <utility>

constexpr int SHARED_DEFAULT = 48 << 10;   // what every device gives to every kernel

// Bytes that one block may have on the current device, static ones included: 99 KB on sm_86, 89 and 120, 163 on 80, 227 on 90 and 100.
inline int block_shared() {
  static std::mutex mutex;
  static std::map<int, int> known;   // by device
  int device = 0, bytes = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (cudaGetDevice(&device) == cudaSuccess) {
    if (known.count(device)) return known[device];
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess) return known[device] = bytes;
  }
  cudaGetLastError();
  return SHARED_DEFAULT;
}
// The same where two blocks share an SM, which keeps 1 KB for each of them and has 1 KB more than one block may take.
inline int half_shared() { return (block_shared() + 1024) / 2 - 1024; }

// Lets `kernel`, which has `fixed` bytes of static shared memory, take all that the current device has. Once a device: a smaller
// figure for a smaller launch would lower the limit under a larger one of another thread.
template <class K> cudaError_t allow_shared(K* kernel, int fixed = 0) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error == cudaSuccess && allowed.count({device, (const void*)kernel}) == 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, block_shared() - fixed);
    if (error == cudaSuccess) allowed.insert({device, (const void*)kernel});
  }
  if (error != cudaSuccess) cudaGetLastError();   // or the next op would report it as its own
  return error;
}
