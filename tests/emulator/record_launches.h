// Compiled in front of a .cu file (emulator kind "record"): every LAUNCH is written down instead of run, so that the report knows
// the threads, the dynamic shared memory and the tensors of a launch at a real shape, at no cost.
#pragma once
#include "cuda_compat.h"
#include <dlfcn.h>
#include <string>
#undef LAUNCH
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  record_launches::add((const void*)(kernel), dim3(grid), dim3(block), smem, ##__VA_ARGS__)

namespace record_launches {
inline std::string lines;
// A line for each launch: offset of the kernel in this library, CTAs, threads, dynamic shared bytes, then each argument's bytes.
template <class... A> void add(const void* kernel, dim3 grid, dim3 block, size_t smem, const A&... args) {
  Dl_info info{};
  dladdr(kernel, &info);
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
  lines += std::to_string(offset) + " " + std::to_string(size_t(grid.x) * grid.y * grid.z) + " " +
           std::to_string(size_t(block.x) * block.y * block.z) + " " + std::to_string(smem);
  auto bytes = [](const void* p, size_t n) {
    lines += ' ';
    for (size_t i = 0; i < n; i++) { char hex[3]; snprintf(hex, sizeof hex, "%02x", static_cast<const unsigned char*>(p)[i]); lines += hex; }
  };
  (bytes(&args, sizeof args), ...);
  lines += '\n';
}
}
extern "C" __attribute__((weak, visibility("default"))) const char* recorded_launches() { return record_launches::lines.c_str(); }
extern "C" __attribute__((weak, visibility("default"))) void forget_launches() { record_launches::lines.clear(); }
