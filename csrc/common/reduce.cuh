// Sums over threads and over samples, in one fixed order and without atomics: equal bits at every run.
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

// out[k][c] = sum over n of partials[k][n][c] for up to three results (null: not wanted), each of count[k] of the c columns.
struct SumOverN { const float* partials; float* out[3]; int count[3]; int64_t n; int c; };

static __global__ void sum_over_n_kernel(SumOverN a) {
  SHARED(float, part, [8][32]);
  const int column = blockIdx.x * 32 + threadIdx.x, k = blockIdx.y;
  float* out = k == 0 ? a.out[0] : k == 1 ? a.out[1] : a.out[2];   // a variable index would put the arrays on the stack
  const bool wanted = out != nullptr && column < (k == 0 ? a.count[0] : k == 1 ? a.count[1] : a.count[2]);
  float sum = 0.f;
  if (wanted)
    for (int64_t n = threadIdx.y; n < a.n; n += 8) sum += a.partials[(k * a.n + n) * a.c + column];
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && wanted) {
#pragma unroll
    for (int y = 1; y < 8; y++) sum += part[y][threadIdx.x];
    out[column] = sum;
  }
}

inline int sum_over_n(const SumOverN& a, int results, void* stream) {
  bool wanted = false;
  for (int k = 0; k < results; k++) wanted = wanted || a.out[k] != nullptr;
  if (!wanted) return (int)cudaSuccess;
  LAUNCH(sum_over_n_kernel, dim3((a.c + 31) / 32, results), dim3(32, 8), 0, (cudaStream_t)stream, a);
  return (int)cudaGetLastError();
}
