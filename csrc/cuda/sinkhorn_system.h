// sinkhorn_system -- the gradient at the fixed point (sinkhorn.h). Let A = grad * plan, and let r
// and c be the row and column sums of the plan. The kernels solve
//   r_t u_t + sum_e plan[t, e] v_e = sum_e A[t, e]
//   sum_t plan[t, e] u_t + c_e v_e = sum_t A[t, e]
// for u and v. Eliminating u leaves an E x E system (diag(c) - plan^T diag(1/r) plan) v = b. The
// gradient of M is A - plan (u + v). All numbers are float64, whatever the dtype of the plan.
#pragma once

#include <algorithm>

#include "matrix.h"

namespace vmoe::cuda {
namespace {

constexpr int kSystemThreads = 256;
constexpr int kSystemTile = 32;

template <typename T>
struct System {
  const T* grad;  // [G, T, E]
  const T* plan;  // [G, T, E]
  T* out;         // [G, T, E]
  int64_t tokens, E;
  double epsilon;
  int lanes;                     // per row
  int64_t pieces, piece_tokens;  // pieces per group; the most tokens per piece
  int64_t splits, split_tokens;  // splits per group, for system_products_kernel; tokens per split
  double* row;                   // [G, T]  r
  double* row_grad;              // [G, T]  sum_e A
  double* column_parts;          // [G, pieces, 2, E]  partial sums of c, and of b
  double* column;                // [G, 2, E]  c; b, and then v
  double* products;              // [G, splits, E, E]  plan^T diag(1/r) plan of each split's tokens,
                                 // the lower triangle

  __device__ int64_t begin(int64_t piece) const { return piece * piece_tokens; }
  __device__ int64_t count(int64_t piece) const {
    const int64_t left = tokens - begin(piece);
    return left < piece_tokens ? left : piece_tokens;
  }
};

template <typename T>
__global__ void __launch_bounds__(kSystemThreads) system_rows_kernel(System<T> system) {
  __shared__ double storage[kSystemThreads];
  const int64_t g = blockIdx.x / system.pieces, piece = blockIdx.x % system.pieces;
  const int64_t E = system.E, first = g * system.tokens + system.begin(piece);
  const T *plan = system.plan + first * E, *grad = system.grad + first * E;
  double *row = system.row + first, *row_grad = system.row_grad + first;
  each_row(system.count(piece), E, system.lanes, [&](int64_t t, int lane, int64_t width) {
    double sum = 0, sum_grad = 0;
    for (int64_t e = lane; e < width; e += system.lanes) {
      const double p = plan[t * E + e];
      sum += p;
      sum_grad += p * grad[t * E + e];
    }
    sum = join_lanes(sum, system.lanes, Sum{});
    sum_grad = join_lanes(sum_grad, system.lanes, Sum{});
    if (lane == 0 && width > 0) {
      row[t] = sum;
      row_grad[t] = sum_grad;
    }
  });
  __syncthreads();
  double* parts = system.column_parts + blockIdx.x * 2 * E;
  each_column(E, storage, parts, Sum{}, [&](int64_t e, int from, int step) {
    double sum = 0;
    for (int64_t t = from; t < system.count(piece); t += step) sum += plan[t * E + e];
    return sum;
  });
  each_column(E, storage, parts + E, Sum{}, [&](int64_t e, int from, int step) {
    double sum = 0;
    for (int64_t t = from; t < system.count(piece); t += step) {
      const double p = plan[t * E + e];
      // A masked token has a row of 0.
      sum += p * grad[t * E + e] - (row[t] == 0 ? 0 : p / row[t] * row_grad[t]);
    }
    return sum;
  });
}

// One tile of plan^T diag(1/r) plan per block, summed over the tokens of a split. Blocks above the
// diagonal return.
template <typename T>
__global__ void __launch_bounds__(kSystemThreads) system_products_kernel(System<T> system) {
  constexpr int kTile = kSystemTile, kEach = kTile * kTile / kSystemThreads;
  __shared__ double shares[kTile][kTile + 1], others[kTile][kTile + 1];  // [token, expert]
  const int64_t E = system.E, tiles = ceil_div(E, kTile);
  const int64_t of_group = blockIdx.x / (tiles * tiles), tile = blockIdx.x % (tiles * tiles);
  const int64_t g = of_group / system.splits, split = of_group % system.splits;
  const int64_t e = tile / tiles * kTile, j = tile % tiles * kTile;
  if (j > e) return;
  const int64_t begin = split * system.split_tokens, left = system.tokens - begin;
  const int64_t end = begin + (left < system.split_tokens ? left : system.split_tokens);
  const int column = static_cast<int>(threadIdx.x) % kTile;
  const int line = static_cast<int>(threadIdx.x) / kTile;
  constexpr int kLines = kSystemThreads / kTile;
  const T* plan = system.plan + g * system.tokens * E;
  const double* row = system.row + g * system.tokens;
  double sums[kEach] = {};
  for (int64_t t = begin; t < end; t += kTile) {
    for (int i = line; i < kTile; i += kLines) {
      const bool present = t + i < end && row[t + i] != 0;
      const T* from = plan + (t + i) * E;
      shares[i][column] = present && e + column < E ? from[e + column] / row[t + i] : 0;
      others[i][column] = present && j + column < E ? static_cast<double>(from[j + column]) : 0;
    }
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        sums[n] += shares[i][line + n * kLines] * others[i][column];
      }
    }
    __syncthreads();
  }
  double* products = system.products + of_group * E * E;
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int64_t at = e + line + n * kLines;
    if (at < E && j + column < E) products[at * E + j + column] = sums[n];
  }
}

// The lower triangle of the system of one group. Columns are eliminated from the first to the last
// (L D L^T, where the columns of L are not divided by D). The system is positive semi-definite:
// adding a constant to v and subtracting the constant from u changes nothing. So at least one pivot
// is 0. v is set to 0 at such a pivot.
struct Triangle {
  double* A;  // [E, stride]
  int64_t stride, E;
  const double* c;  // [E]
  double* v;        // [E]  in: the right-hand side b; out: the solution

  __device__ double& at(int64_t i, int64_t j) const { return A[i * stride + j]; }
  __device__ bool is_free(int64_t j) const { return j == E - 1 || at(j, j) <= 1e-12 * c[j]; }

  // Eliminates column j from row k > j, by one warp.
  __device__ void eliminate(int64_t j, int64_t k) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const double factor = at(k, j) / at(j, j);
    for (int64_t i = j + 1 + lane; i <= k; i += kWarp) at(k, i) -= factor * at(i, j);
    if (lane == 0) v[k] -= factor * v[j];
  }

  // Back substitution by one block, after all columns are eliminated.
  __device__ void substitute() const {
    for (int64_t j = threadIdx.x; j < E; j += blockDim.x) {
      v[j] = is_free(j) ? 0 : v[j] / at(j, j);
    }
    for (int64_t j = E - 1; j > 0; --j) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < j; i += blockDim.x) {
        if (!is_free(i)) v[i] -= at(j, i) / at(i, i) * v[j];
      }
    }
    __syncthreads();
  }
};

// Entry (i, j) of the system, summed over the splits.
template <typename T>
__device__ double entry_of(
    const System<T>& system, int64_t g, const double* c, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t split = 0; split < system.splits; ++split) {
    sum += system.products[((g * system.splits + split) * system.E + i) * system.E + j];
  }
  return (i == j ? c[i] : 0) - sum;
}

// Entry e of c (which = 0) or b (which = 1), summed over the pieces.
template <typename T>
__device__ double column_of(const System<T>& system, int64_t g, int64_t which, int64_t e) {
  double sum = 0;
  for (int64_t piece = 0; piece < system.pieces; ++piece) {
    sum += system.column_parts[((g * system.pieces + piece) * 2 + which) * system.E + e];
  }
  return sum;
}

// One block per group solves the system in shared memory.
template <typename T>
__global__ void __launch_bounds__(kSystemThreads) solve_kernel(System<T> system) {
  const int64_t g = blockIdx.x, E = system.E;
  auto* c = dynamic_shared<double>();
  const Triangle triangle{c + 2 * E, E | 1, E, c, c + E};
  for (int64_t i = threadIdx.x; i < 2 * E; i += kSystemThreads) {
    c[i] = column_of(system, g, i / E, i % E);
  }
  __syncthreads();
  each_entry(E, E, [&](int64_t i, int64_t j) {
    if (j <= i) triangle.at(i, j) = entry_of(system, g, c, i, j);
  });
  for (int64_t j = 0; j < E; ++j) {
    __syncthreads();
    if (triangle.is_free(j)) continue;
    for (int64_t k = j + 1 + threadIdx.x / kWarp; k < E; k += kSystemThreads / kWarp) {
      triangle.eliminate(j, k);
    }
  }
  __syncthreads();
  triangle.substitute();
  for (int64_t e = threadIdx.x; e < E; e += kSystemThreads) {
    system.column[(g * 2 + 1) * E + e] = triangle.v[e];
  }
}

// A system that is too large for shared memory overwrites the products in device memory. Four kinds
// of kernels solve such a system: system_columns_kernel, system_entries_kernel, one
// eliminate_kernel per column, and substitute_kernel.
template <typename T>
__device__ Triangle triangle_of(const System<T>& system, int64_t g) {
  const int64_t E = system.E;
  double* c = system.column + g * 2 * E;
  return {system.products + g * system.splits * E * E, E, E, c, c + E};
}

template <typename T>
__global__ void __launch_bounds__(kSystemThreads) system_columns_kernel(System<T> system) {
  const int64_t g = blockIdx.x, E = system.E;
  for (int64_t i = threadIdx.x; i < 2 * E; i += kSystemThreads) {
    system.column[g * 2 * E + i] = column_of(system, g, i / E, i % E);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSystemThreads) system_entries_kernel(System<T> system) {
  const int64_t E = system.E, g = blockIdx.x / E, i = blockIdx.x % E;
  const Triangle triangle = triangle_of(system, g);
  for (int64_t j = threadIdx.x; j <= i; j += kSystemThreads) {
    triangle.at(i, j) = entry_of(system, g, triangle.c, i, j);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSystemThreads)
    eliminate_kernel(System<T> system, int64_t j, int64_t blocks) {
  const Triangle triangle = triangle_of(system, blockIdx.x / blocks);
  const int64_t k = j + 1 + blockIdx.x % blocks * (kSystemThreads / kWarp) + threadIdx.x / kWarp;
  if (k < system.E && !triangle.is_free(j)) triangle.eliminate(j, k);
}

template <typename T>
__global__ void __launch_bounds__(kSystemThreads) substitute_kernel(System<T> system) {
  triangle_of(system, blockIdx.x).substitute();
}

template <typename T>
__global__ void __launch_bounds__(kSystemThreads) system_apply_kernel(System<T> system) {
  const int64_t g = blockIdx.x / system.pieces, piece = blockIdx.x % system.pieces;
  const int64_t E = system.E, first = g * system.tokens + system.begin(piece);
  const T *plan = system.plan + first * E, *grad = system.grad + first * E;
  T* out = system.out + first * E;
  const double* v = system.column + (g * 2 + 1) * E;
  each_row(system.count(piece), E, system.lanes, [&](int64_t t, int lane, int64_t width) {
    double taken = 0;
    for (int64_t e = lane; e < width; e += system.lanes) taken += plan[t * E + e] * v[e];
    taken = join_lanes(taken, system.lanes, Sum{});
    const double row = width > 0 ? system.row[first + t] : 0;
    const double u = row == 0 ? 0 : (system.row_grad[first + t] - taken) / row;
    for (int64_t e = lane; e < width; e += system.lanes) {
      const int64_t i = t * E + e;
      out[i] = static_cast<T>(plan[i] * (grad[i] - u - v[e]) / system.epsilon);
    }
  });
}

// The sizes and the workspace of a call, without the tensors, which run_system adds.
// sinkhorn_implicit_backward_workspace and run_system both use this struct, so that they agree on
// the size.
template <typename T>
struct SystemLayout {
  SystemLayout(int64_t G_, int64_t tokens, int64_t E, void* memory) : G(G_) {
    if (G == 0 || tokens == 0 || E == 0) return;
    constexpr int64_t kLeastPiece = 64, kMostPieces = 128, kLeastSplit = 512, kTiles = 64;
    tiles = ceil_div(E, kSystemTile) * ceil_div(E, kSystemTile);
    system.tokens = tokens;
    system.E = E;
    system.lanes = lanes_of_rows(E);
    system.piece_tokens = ceil_div(tokens, std::min(ceil_div(tokens, kLeastPiece), kMostPieces));
    system.pieces = ceil_div(tokens, system.piece_tokens);
    system.split_tokens =
        ceil_div(tokens, std::clamp<int64_t>(kTiles / tiles, 1, ceil_div(tokens, kLeastSplit)));
    system.splits = ceil_div(tokens, system.split_tokens);
    Workspace workspace(memory);
    system.row = workspace.take<double>(G * tokens);
    system.row_grad = workspace.take<double>(G * tokens);
    system.column_parts = workspace.take<double>(G * system.pieces * 2 * E);
    system.column = workspace.take<double>(G * 2 * E);
    system.products = workspace.take<double>(G * system.splits * E * E);
    bytes = workspace.size();
  }

  System<T> system{};
  int64_t G, tiles = 0;  // tiles of the E x E products; 0 if a size is 0
  size_t bytes = 0;
};

template <typename T>
void run_system(
    const SystemLayout<T>& layout, const T* grad, const T* plan, T* out, double epsilon,
    cudaStream_t stream) {
  if (layout.tiles == 0) return;
  System<T> system = layout.system;
  system.grad = grad;
  system.plan = plan;
  system.out = out;
  system.epsilon = epsilon;
  const int64_t G = layout.G, E = system.E;
  const auto limit = static_cast<size_t>(std::max<int64_t>(shared_limit(), 0));
  const auto shared = static_cast<size_t>(E * (E | 1) + 2 * E) * sizeof(double);
  const auto with = [&](auto kernel, int64_t blocks, size_t dynamic = 0) {
    launch(kernel, blocks, kSystemThreads, dynamic, stream, system);
  };
  with(system_rows_kernel<T>, G * system.pieces);
  with(system_products_kernel<T>, G * system.splits * layout.tiles);
  if (shared <= limit) {
    with(solve_kernel<T>, G, shared);
  } else {
    with(system_columns_kernel<T>, G);
    with(system_entries_kernel<T>, G * E);
    for (int64_t j = 0; j + 1 < E; ++j) {
      const int64_t blocks = ceil_div(E - 1 - j, kSystemThreads / kWarp);
      launch(eliminate_kernel<T>, G * blocks, kSystemThreads, 0, stream, system, j, blocks);
    }
    with(substitute_kernel<T>, G);
  }
  with(system_apply_kernel<T>, G * system.pieces);
}

}  // namespace
}  // namespace vmoe::cuda
