// Sums over threads, in one fixed order and without atomics: equal bits at every run.
#pragma once
#include "cuda_compat.h"
#include <stdint.h>

__device__ __forceinline__ float warp_sum(float x) {   // in all lanes
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// A block seen as rows x columns: teams of `team` threads hold whole rows, team / columns each (what is left of a team idles). A
// team is a warp, which adds its rows up by itself, where that leaves few threads idle; else it is the block.
struct Teams {
  int columns, rows, threads, team;
  Teams() = default;
  Teams(int columns_, int threads_) : columns(columns_), threads(threads_) {
    team = columns <= 32 && 32 / columns * columns >= 28 ? 32 : threads;
    rows = threads / team * (team / columns);
  }
  __host__ __device__ int parts() const { return team == 32 ? threads / 32 : rows; }
  __host__ __device__ int step() const { return parts() * columns | 1; }   // odd: neighbouring channels fall into different banks
  int workspace(int sums, int lanes) const { return (sums * lanes * step() + 3) / 4 * 4; }   // of column_sums, in floats
  __device__ int column() const { return int(threadIdx.x) % team % columns; }
  __device__ int row() const {   // `rows` for an idle thread
    const int of_team = team / columns, row = int(threadIdx.x) % team / columns;
    return row < of_team ? int(threadIdx.x) / team * of_team + row : rows;
  }
};

// q[k][j] summed over the rows of each column goes to out[k * stride + column * V + j] for the channels below `width`; idle threads
// hold zeros. `red`: workspace() floats of shared memory. Ends with a barrier.
template <int K, int V>
__device__ __forceinline__ void column_sums(float (&q)[K][V], const Teams& teams, float* red, float* out, int stride, int width) {
  const int t = threadIdx.x, columns = teams.columns, column = teams.column(), step = teams.step();
  int part = teams.row();
  bool writes = part < teams.rows;
  if (teams.team == 32) {
    const int row = t % 32 / columns;
#pragma unroll 1
    for (int rows = 32 / columns; rows > 1; rows = (rows + 1) / 2) {
      const int half = (rows + 1) / 2;
      const bool adds = row < rows - half;
#pragma unroll
      for (int k = 0; k < K; k++) {
#pragma unroll
        for (int j = 0; j < V; j++) {
          const float other = __shfl_down_sync(~0u, q[k][j], half * columns);
          if (adds) q[k][j] += other;
        }
      }
    }
    part = t / 32;
    writes = t % 32 < columns;
  }
  if (writes) {
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
      for (int j = 0; j < V; j++) red[(k * V + j) * step + part * columns + column] = q[k][j];
    }
  }
  __syncthreads();
  const int parts = teams.parts();
  for (int i = t; i < K * columns * V; i += blockDim.x) {
    const int k = i / (columns * V), c = i % (columns * V);
    const float* from = red + (k * V + c % V) * step + c / V;
    float sum = 0.f;
    for (int s = 0; s < parts; s++) sum += from[s * columns];
    if (c < width) out[k * stride + c] = sum;
  }
  __syncthreads();
}
