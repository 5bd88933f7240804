// A small correct kernel and its broken forms, one planted bug each: what the emulator's three builds must catch.
// y = x - mean(x) by row of 4 THREADS floats; total = sum over rows of the mean. Run by plants_main.cpp.
#include "async.cuh"
#include "shared.cuh"
#include <cstdint>

enum Plant { CLEAN, NO_BARRIER, GLOBAL_END, SHARED_END, MISALIGNED, UNWRITTEN, DIVERGENT, LOST_ADD, NO_WAIT, WRONG_SPACE, EARLY, LOWERED, LARGE };
constexpr int THREADS = 64, WARPS = THREADS / 32, COLUMNS = 4 * THREADS;

template <int PLANT>
__global__ void __launch_bounds__(THREADS) centre_kernel(const float* __restrict__ x, float* __restrict__ y, float* total) {
  SHARED(float4, row, [THREADS]);
  SHARED(float, part, [WARPS]);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const float* in = x + (size_t)blockIdx.x * COLUMNS + (PLANT == MISALIGNED ? 1 : 0);
  float* out = y + (size_t)blockIdx.x * COLUMNS;
  if constexpr (PLANT == MISALIGNED) row[t] = reinterpret_cast<const float4*>(in)[t < THREADS - 1 ? t : 0];
  else copy16_async(&row[t], in + 4 * t);
  copy_commit();
  if (PLANT == EARLY) copy_commit();   // all but the last two groups: for none
  if (PLANT != NO_WAIT) copy_wait_but(PLANT == EARLY ? 2 : 0);
  if (PLANT == WRONG_SPACE) __stcs(&row[t], row[t]);   // st.global with an address in shared memory
  float sum = row[t].x + row[t].y + row[t].z + row[t].w;
#pragma unroll
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (lane == 0) part[warp] = sum;
  if (PLANT == DIVERGENT && t == 13) __syncthreads();
  if (PLANT != NO_BARRIER) __syncthreads();
  float mean = 0;
  for (int w = 0; w < WARPS + (PLANT == SHARED_END ? 1 : 0); w++) mean += part[w];
  mean /= COLUMNS;
  const int columns = COLUMNS + (PLANT == GLOBAL_END ? 1 : PLANT == UNWRITTEN ? -1 : 0);
  const float* values = reinterpret_cast<const float*>(row);
  for (int i = t; i < columns; i += THREADS) out[i] = values[i < COLUMNS ? i : 0] - mean;   // reads other threads' copies
  if (t == 0) {
    if (PLANT == LOST_ADD) *total += mean;
    else atomicAdd(total, mean);
  }
}

// LOWERED: a smaller limit than the one before; LARGE: the static memory of a kernel that takes all that a block may have.
template <int PLANT> int limit() {
  int bytes = PLANT == LARGE ? block_shared() : 0;
  if (PLANT == LOWERED || PLANT == LARGE) cudaFuncSetAttribute(centre_kernel<PLANT>, cudaFuncAttributeMaxDynamicSharedMemorySize, block_shared());
  if (PLANT == LOWERED) cudaFuncSetAttribute(centre_kernel<PLANT>, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  return bytes;
}
#define PLANTED(P) case P: LAUNCH(centre_kernel<P>, dim3(rows), dim3(THREADS), limit<P>(), (cudaStream_t)stream, \
                                  (const float*)x, (float*)y, (float*)total); break;
extern "C" int centre(const void* x, void* y, void* total, int64_t rows, int64_t plant, void* stream) {
  switch (plant) {
    PLANTED(CLEAN) PLANTED(NO_BARRIER) PLANTED(GLOBAL_END) PLANTED(SHARED_END) PLANTED(MISALIGNED) PLANTED(UNWRITTEN)
    PLANTED(DIVERGENT) PLANTED(LOST_ADD) PLANTED(NO_WAIT) PLANTED(WRONG_SPACE)
    PLANTED(EARLY) PLANTED(LOWERED) PLANTED(LARGE)
    default: return (int)cudaErrorInvalidValue;
  }
  return (int)cudaGetLastError();
}
