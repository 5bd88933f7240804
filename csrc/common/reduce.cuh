// Sums over threads, in one fixed order and without atomics: equal bits at every run.
#pragma once
#include "cuda_compat.h"
#include <stdint.h>

__device__ __forceinline__ float warp_sum(float x) {   // in all lanes
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// A block seen as `rows` x `columns` threads (row-major; threads beyond them hold zeros): q[k][j] summed over the rows of each
// column goes to out[k * stride + column * V + j] for the channels below `width`. `red`: K * V * (parts * columns + 1)
// floats of shared memory, with parts as column_parts() says. Ends with a barrier.
__host__ __device__ inline bool column_shuffles(int columns) { return columns <= 32 && (columns & (columns - 1)) == 0; }
__host__ __device__ inline int column_parts(int columns, int rows, int threads) {
  return column_shuffles(columns) ? threads / 32 : rows;
}

template <int K, int V>
__device__ __forceinline__ void column_sums(float (&q)[K][V], int columns, int rows, float* red, float* out, int stride, int width) {
  const int t = threadIdx.x;
  int part = t / columns;
  bool writes = part < rows;
  if (column_shuffles(columns)) {   // every warp holds whole rows: first add them up inside the warp
    for (int o = columns; o < 32; o <<= 1) {
#pragma unroll
      for (int k = 0; k < K; k++) {
#pragma unroll
        for (int j = 0; j < V; j++) q[k][j] += __shfl_xor_sync(~0u, q[k][j], o);
      }
    }
    part = t / 32;
    writes = (t & 31) < columns;
  }
  const int parts = column_parts(columns, rows, blockDim.x);
  const int step = parts * columns + 1;   // + 1: neighbouring j fall into different banks
  if (writes) {
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
      for (int j = 0; j < V; j++) red[(k * V + j) * step + part * columns + t % columns] = q[k][j];
    }
  }
  __syncthreads();
  for (int i = t; i < K * columns * V; i += blockDim.x) {
    const int k = i / (columns * V), c = i % (columns * V);
    const float* from = red + (k * V + c % V) * step + c / V;
    float sum = 0.f;
    for (int s = 0; s < parts; s++) sum += from[s * columns];
    if (c < width) out[k * stride + c] = sum;
  }
  __syncthreads();
}
