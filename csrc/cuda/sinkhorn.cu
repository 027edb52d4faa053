// A group that fits a block's shared memory is one launch: the matrix, the potentials and the
// sums stay there from the first iteration to the last. A larger one is cut into pieces, a block
// each, and an iteration is a launch: every block joins what all pieces left of the column sums
// (the same joins in each of them), updates its rows and leaves its part of the next. A
// tolerance is looked at there, and the blocks of a group that has stopped return at once.
#include <algorithm>

#include "../sinkhorn.h"
#include "sinkhorn_domains.h"
#include "sinkhorn_system.h"

namespace vmoe::cuda {
namespace {

constexpr int kMostThreads = 1024;

struct Seen {
  double high, low;         // of the logits that are not -inf; NaN stays in high
  int64_t present, broken;  // rows that are not all -inf, and those of them with some -inf
};

__device__ inline Seen join(const Seen& a, const Seen& b) {
  return {
      Largest{}(a.high, b.high), Least{}(a.low, b.low), a.present + b.present, a.broken + b.broken};
}

template <typename T>
__device__ Seen look(const T* logits, int64_t count, int64_t stride, int64_t E, int lanes) {
  __shared__ Seen of_warp[kWarp];
  Seen seen{-kInfinity, kInfinity, 0, 0};
  each_row(count, E, lanes, [&](int64_t t, int lane, int64_t width) {
    int64_t reachable = 0;
    for (int64_t e = lane; e < width; e += lanes) {
      const double x = logits[t * stride + e];
      if (x == -kInfinity) continue;
      ++reachable;
      seen.high = Largest{}(seen.high, x);
      seen.low = Least{}(seen.low, x);
    }
    reachable = join_lanes(reachable, lanes, Sum{});
    seen.present += lane == 0 && reachable > 0;
    seen.broken += lane == 0 && reachable > 0 && reachable < width;
  });
  const WarpTeam team{};
  seen = {
      team.join(seen.high, Largest{}), team.join(seen.low, Least{}), team.join(seen.present, Sum{}),
      team.join(seen.broken, Sum{})};
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = seen;
  __syncthreads();
  seen = of_warp[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) seen = join(seen, of_warp[warp]);
  return seen;
}

// What all kernels of a call know.
template <typename T>
struct Task {
  const T* logits;  // [G, T, E]
  int64_t tokens, E, iterations;
  double inverse_epsilon;
  // What distance of logits, over epsilon, exp(M) and every product with a potential bear in T;
  // csrc/cpu/sinkhorn.cpp says why.
  double spread;

  // Of a group in shared memory: a row's lanes, and from row to row.
  int lanes;
  int64_t stride;

  // Of a group in pieces.
  int64_t pieces, of_piece;  // how many, and tokens of each but the last
  Seen* seen;                // [G, pieces]
  double* parts;             // [2, G, pieces, 2, E], read in turns and written in turns
  double* of_row;            // [G, T] or, for a gradient, [G, 2, T] in pieces
  double* of_column;         // [G, pieces, kColumnVectors, E], or null: in shared memory

  __device__ Facts facts(const Seen& seen) const {
    return {
        seen.high, static_cast<double>(seen.present) / static_cast<double>(E),
        seen.broken == 0 && seen.high > -kInfinity &&
            (seen.high - seen.low) * inverse_epsilon <= spread};
  }
};

template <typename T>
struct Outputs {
  T* plan;          // [G, T, E]
  double* history;  // [G, I, E]
  double* error;    // [G]
  int32_t* steps;   // [G]
};

// ---- A group a block ----

// Cuts the block's shared memory.
template <typename T>
__device__ Piece whole_group(const Task<T>& task, int row_vectors, T*& matrix) {
  auto* of_row = dynamic_shared<double>();
  double* of_column = of_row + row_vectors * task.tokens;
  double* storage = of_column + kColumnVectors * task.E;
  matrix = reinterpret_cast<T*>(storage + blockDim.x);
  return {task.tokens, task.E, task.lanes, task.inverse_epsilon, of_row, of_column, storage};
}

template <typename T>
size_t shared_of_group(
    int64_t tokens, int64_t E, int64_t stride, int threads, int row_vectors, int matrices) {
  return static_cast<size_t>(row_vectors * tokens + kColumnVectors * E + threads) * sizeof(double) +
         static_cast<size_t>(matrices * tokens * stride) * sizeof(T);
}

template <typename T>
__device__ void load_group(const Task<T>& task, const T* from, T* to) {
  each_entry(task.tokens, task.E, [&](int64_t t, int64_t e) {
    to[t * task.stride + e] = from[t * task.E + e];
  });
}

template <typename T, typename Domain>
__device__ void iterate(
    Domain&& domain, const Task<T>& task, const T* matrix, double tolerance,
    const Outputs<T>& out) {
  const int64_t g = blockIdx.x, E = task.E;
  double* history = out.history + g * task.iterations * E;
  domain.start(matrix, task.stride);
  domain.sum_columns(domain.total(), domain.peak());
  domain.close();
  int64_t step = 0;
  for (; step < task.iterations; ++step) {
    if (tolerance > 0 && step > 0) {
      if (domain.error() <= tolerance) break;
      __syncthreads();  // before the potentials change
    }
    domain.update_columns(history + step * E);
    domain.update_rows();
    domain.sum_columns(domain.total(), domain.peak());
    domain.close();
  }
  const int64_t behind = (task.iterations - step) * E;
  for (int64_t i = threadIdx.x; i < behind; i += blockDim.x) history[step * E + i] = 0;
  const double error = domain.error();
  if (threadIdx.x == 0) {
    out.error[g] = error;
    out.steps[g] = static_cast<int32_t>(step);
  }
  domain.write_plan(out.plan + g * task.tokens * E);
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads)
    group_kernel(Task<T> task, double tolerance, Outputs<T> out) {
  T* matrix;
  const Piece piece = whole_group(task, 1, matrix);
  load_group(task, task.logits + blockIdx.x * task.tokens * task.E, matrix);
  __syncthreads();
  const Facts facts = task.facts(look(matrix, task.tokens, task.stride, task.E, task.lanes));
  if (facts.scaling) {
    iterate(Scaling<T>(piece, facts, matrix, task.stride), task, matrix, tolerance, out);
  } else {
    iterate(Logarithms<T>(piece, facts, matrix, task.stride), task, matrix, tolerance, out);
  }
}

// The iterations done, as a caller's steps may be anything.
__device__ inline int64_t steps_done(int32_t steps, int64_t iterations) {
  return steps < 0 ? 0 : steps < iterations ? steps : iterations;
}

template <typename T, typename Domain>
__device__ void go_back(
    Domain&& domain, const Task<T>& task, const T* matrix, T* rest, const double* history,
    int64_t steps, T* grad_logits) {
  const int64_t E = task.E;
  domain.start_gradient(matrix, task.stride);
  domain.begin_gradient(
      steps > 0 ? history + (steps - 1) * E : nullptr, rest, task.stride, domain.total());
  for (int64_t step = steps; step > 0; --step) {
    domain.take_step(
        history + (step - 1) * E, step > 1 ? history + (step - 2) * E : nullptr, rest, task.stride,
        domain.total());
  }
  domain.write_gradient(rest, task.stride, grad_logits);
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads) group_backward_kernel(
    Task<T> task,
    const T* __restrict__ grad,          // [G, T, E]
    const double* __restrict__ history,  // [G, I, E]
    const int32_t* __restrict__ steps,   // [G]
    T* __restrict__ grad_logits) {       // [G, T, E]
  const int64_t g = blockIdx.x, at = g * task.tokens * task.E;
  T* matrix;
  const Piece piece = whole_group(task, 2, matrix);
  T* rest = matrix + task.tokens * task.stride;
  load_group(task, task.logits + at, matrix);
  load_group(task, grad + at, rest);
  __syncthreads();
  const Facts facts = task.facts(look(matrix, task.tokens, task.stride, task.E, task.lanes));
  const double* kept = history + g * task.iterations * task.E;
  const int64_t done = steps_done(steps[g], task.iterations);
  if (facts.scaling && done > 0) {
    go_back(
        Scaling<T>(piece, facts, matrix, task.stride), task, matrix, rest, kept, done,
        grad_logits + at);
  } else {
    go_back(
        Logarithms<T>(piece, facts, matrix, task.stride), task, matrix, rest, kept, done,
        grad_logits + at);
  }
}

// ---- A group in pieces ----

constexpr int kPieceThreads = 512;

struct Place {
  int64_t group, piece, begin, count;
};

template <typename T>
__device__ Place place_of(const Task<T>& task) {
  const int64_t g = blockIdx.x / task.pieces, p = blockIdx.x % task.pieces;
  const int64_t begin = p * task.of_piece, left = task.tokens - begin;
  return {g, p, begin, left < task.of_piece ? left : task.of_piece};
}

template <typename T>
__device__ Piece piece_of(const Task<T>& task, const Place& place, int row_vectors) {
  auto* storage = dynamic_shared<double>();
  double* of_column = task.of_column ? task.of_column + blockIdx.x * kColumnVectors * task.E
                                     : storage + kPieceThreads;
  double* of_row = task.of_row + row_vectors * (place.group * task.tokens + place.begin);
  return {place.count, task.E, task.lanes, task.inverse_epsilon, of_row, of_column, storage};
}

template <typename T>
__device__ Parts parts_of(const Task<T>& task, int64_t turn, int64_t g, int64_t G) {
  return {task.parts + (turn % 2 * G + g) * task.pieces * 2 * task.E, task.pieces, task.E};
}

template <typename T>
__device__ Facts facts_of(const Task<T>& task, int64_t g) {
  Seen seen = task.seen[g * task.pieces];
  for (int64_t i = 1; i < task.pieces; ++i) seen = join(seen, task.seen[g * task.pieces + i]);
  return task.facts(seen);
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads) look_kernel(Task<T> task) {
  const Place place = place_of(task);
  const T* from = task.logits + (place.group * task.tokens + place.begin) * task.E;
  const Seen seen = look(from, place.count, task.E, task.E, task.lanes);
  if (threadIdx.x == 0) task.seen[blockIdx.x] = seen;
}

// Where a group is in its iterations. Read in turns and written in turns, as the parts.
struct State {
  Facts facts;
  double log_scale;
  int32_t steps;
  int32_t stopped;
};

template <typename T, typename Body>
__device__ void in_domain(
    const Task<T>& task, const Place& place, const Piece& piece, const Facts& facts, T* K,
    Body&& body) {
  const int64_t at = (place.group * task.tokens + place.begin) * task.E;
  if (facts.scaling) {
    body(Scaling<T>(piece, facts, K + at, task.E));
  } else {
    body(Logarithms<T>(piece, facts, task.logits + at, task.E));
  }
}

// K lies in the plan until that is written.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads)
    start_kernel(Task<T> task, State* states /* [2, G] */, Outputs<T> out) {
  const Place place = place_of(task);
  const int64_t G = gridDim.x / task.pieces;
  const Facts facts = facts_of(task, place.group);
  const Piece piece = piece_of(task, place, 1);
  in_domain(task, place, piece, facts, out.plan, [&](auto&& domain) {
    domain.start(task.logits + (place.group * task.tokens + place.begin) * task.E, task.E);
    const Parts parts = parts_of(task, 0, place.group, G);
    domain.sum_columns(parts.sum(place.piece), parts.peak(place.piece));
    if (place.piece == 0 && threadIdx.x == 0) {
      states[place.group] = {facts, domain.log_scale(), 0, 0};
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads) step_kernel(
    Task<T> task, State* states /* [2, G] */, double tolerance, int64_t step, Outputs<T> out) {
  const Place place = place_of(task);
  const int64_t G = gridDim.x / task.pieces, g = place.group, E = task.E;
  State state = states[step % 2 * G + g];
  double* history = out.history + g * task.iterations * E;
  if (!state.stopped) {
    const Piece piece = piece_of(task, place, 1);
    in_domain(task, place, piece, state.facts, out.plan, [&](auto&& domain) {
      domain.set_log_scale(state.log_scale);
      domain.gather(parts_of(task, step, g, G));
      domain.close();
      if (tolerance > 0 && step > 0) {
        domain.set_columns(history + (step - 1) * E);
        state.stopped = domain.error() <= tolerance;
        __syncthreads();  // before the potentials change
      }
      if (state.stopped) return;
      domain.update_columns(place.piece == 0 ? history + step * E : nullptr);
      domain.update_rows();
      const Parts parts = parts_of(task, step + 1, g, G);
      domain.sum_columns(parts.sum(place.piece), parts.peak(place.piece));
      state.log_scale = domain.log_scale();
      ++state.steps;
    });
  }
  // The last thread has the scale (Scaling::update_columns).
  if (place.piece == 0 && threadIdx.x == blockDim.x - 1) {
    states[(step + 1) % 2 * G + g] = state;
  }
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads)
    finish_kernel(Task<T> task, const State* states /* [2, G] */, Outputs<T> out) {
  const Place place = place_of(task);
  const int64_t G = gridDim.x / task.pieces, g = place.group, E = task.E;
  const State state = states[task.iterations % 2 * G + g];
  const Piece piece = piece_of(task, place, 1);
  double* history = out.history + g * task.iterations * E;
  in_domain(task, place, piece, state.facts, out.plan, [&](auto&& domain) {
    domain.set_log_scale(state.log_scale);
    domain.gather(parts_of(task, state.steps, g, G));
    domain.close();
    domain.set_columns(history + (state.steps - 1) * E);
    const double error = domain.error();
    if (place.piece == 0) {
      const int64_t behind = (task.iterations - state.steps) * E;
      for (int64_t i = threadIdx.x; i < behind; i += blockDim.x) {
        history[state.steps * E + i] = 0;
      }
      if (threadIdx.x == 0) {
        out.error[g] = error;
        out.steps[g] = state.steps;
      }
    }
    domain.write_plan(out.plan + (g * task.tokens + place.begin) * E);
  });
}

template <typename T>
struct Backward {
  const T* grad;          // [G, T, E]
  const double* history;  // [G, I, E]
  const int32_t* steps;   // [G]
  T* grad_logits;         // [G, T, E], and until the end what is left of it
  T* K;                   // [G, T, E]
  Facts* facts;           // [G]
};

// Step -1 is the start, step I the end; in between, those that a group has not done are nothing.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads)
    step_back_kernel(Task<T> task, Backward<T> back, int64_t turn) {
  const Place place = place_of(task);
  const int64_t G = gridDim.x / task.pieces, g = place.group, E = task.E;
  const int64_t at = (g * task.tokens + place.begin) * E;
  const int64_t done = steps_done(back.steps[g], task.iterations), step = done - turn;
  if (step <= 0 && turn >= 0 && turn < task.iterations) return;
  Facts facts;
  if (turn < 0) {
    facts = facts_of(task, g);
    facts.scaling = facts.scaling && done > 0;
    if (place.piece == 0 && threadIdx.x == 0) back.facts[g] = facts;
  } else {
    facts = back.facts[g];
  }
  const Piece piece = piece_of(task, place, 2);
  T* rest = back.grad_logits + at;
  const double* history = back.history + g * task.iterations * E;
  in_domain(task, place, piece, facts, back.K, [&](auto&& domain) {
    double* sums = parts_of(task, turn + 1, g, G).sum(place.piece);
    if (turn < 0) {
      each_entry(place.count, E, [&](int64_t t, int64_t e) {
        rest[t * E + e] = back.grad[at + t * E + e];
      });
      domain.start_gradient(task.logits + at, E);
      domain.begin_gradient(done > 0 ? history + (done - 1) * E : nullptr, rest, E, sums);
    } else if (turn < task.iterations) {
      gather_sums(piece, parts_of(task, turn, g, G), domain.total());
      domain.take_step(
          history + (step - 1) * E, step > 1 ? history + (step - 2) * E : nullptr, rest, E, sums);
    } else {
      domain.write_gradient(rest, E, rest);
    }
  });
}

// ---- Choosing ----

int threads_of_group(int64_t tokens, int64_t E) {
  const int64_t size = tokens * E;
  return size <= 2048 ? 128 : size <= 16384 ? 512 : kMostThreads;
}

// Fills in how the groups are worked on, and takes what pieces need from the workspace. True where
// a group is a block's.
template <typename T>
bool plan_task(
    Task<T>& task, int64_t G, int row_vectors, int matrices, int& threads, size_t& shared,
    Workspace& workspace) {
  const int64_t tokens = task.tokens, E = task.E;
  threads = threads_of_group(tokens, E);
  task.lanes = lanes_of_rows(tokens, E, threads);
  task.stride = stride_of_rows(E, task.lanes);
  shared = shared_of_group<T>(tokens, E, task.stride, threads, row_vectors, matrices);
  const auto limit = static_cast<size_t>(std::max<int64_t>(shared_limit(), 0));
  if (shared <= limit) return true;
  constexpr int64_t kLeastPiece = 64, kMostPieces = 128;
  task.pieces = std::clamp<int64_t>(ceil_div(tokens, kLeastPiece), 1, kMostPieces);
  task.of_piece = ceil_div(tokens, task.pieces);
  task.pieces = tokens > 0 ? ceil_div(tokens, task.of_piece) : 1;
  task.lanes = lanes_of_rows(E);
  task.seen = workspace.take<Seen>(G * task.pieces);
  task.parts = workspace.take<double>(2 * G * task.pieces * 2 * E);
  task.of_row = workspace.take<double>(G * row_vectors * tokens);
  const int64_t columns = kColumnVectors * E;
  threads = kPieceThreads;
  shared = static_cast<size_t>(threads + columns) * sizeof(double);
  if (shared > limit) {
    shared = static_cast<size_t>(threads) * sizeof(double);
    task.of_column = workspace.take<double>(G * task.pieces * columns);
  }
  return false;
}

// Launches if there are outputs; returns how large the workspace must be.
template <typename T>
size_t run(
    Task<T> task, const Outputs<T>& out, int64_t G, double tolerance, void* memory, bool go,
    cudaStream_t stream) {
  Workspace workspace(memory);
  int threads;
  size_t shared;
  if (plan_task(task, G, 1, 1, threads, shared, workspace)) {
    if (go) launch(group_kernel<T>, G, threads, shared, stream, task, tolerance, out);
    return workspace.size();
  }
  auto* states = workspace.take<State>(2 * G);
  if (!go) return workspace.size();
  const int64_t blocks = G * task.pieces;
  launch(look_kernel<T>, blocks, threads, 0, stream, task);
  launch(start_kernel<T>, blocks, threads, shared, stream, task, states, out);
  for (int64_t step = 0; step < task.iterations; ++step) {
    launch(step_kernel<T>, blocks, threads, shared, stream, task, states, tolerance, step, out);
  }
  launch(finish_kernel<T>, blocks, threads, shared, stream, task, states, out);
  return workspace.size();
}

template <typename T>
size_t run_back(
    Task<T> task, Backward<T> back, int64_t G, void* memory, bool go, cudaStream_t stream) {
  Workspace workspace(memory);
  int threads;
  size_t shared;
  if (plan_task(task, G, 2, 2, threads, shared, workspace)) {
    if (go) {
      launch(
          group_backward_kernel<T>, G, threads, shared, stream, task, back.grad, back.history,
          back.steps, back.grad_logits);
    }
    return workspace.size();
  }
  back.K = workspace.take<T>(G * task.tokens * task.E);
  back.facts = workspace.take<Facts>(G);
  if (!go) return workspace.size();
  const int64_t blocks = G * task.pieces;
  launch(look_kernel<T>, blocks, threads, 0, stream, task);
  for (int64_t turn = -1; turn <= task.iterations; ++turn) {
    launch(step_back_kernel<T>, blocks, threads, shared, stream, task, back, turn);
  }
  return workspace.size();
}

template <typename T>
Task<T> task_of(
    const T* logits, int64_t tokens, int64_t E, int64_t iterations, double epsilon,
    double tolerance) {
  // Rounding of float32 sums alone is an error of about 1e-7: an aim near it needs float64.
  const bool narrow = sizeof(T) == sizeof(float);
  const double spread = !narrow ? 200 : tolerance > 0 && tolerance < 1e-4 ? -1 : 40;
  Task<T> task{};
  task.logits = logits;
  task.tokens = E > 0 ? tokens : 0;
  task.E = E;
  task.iterations = iterations;
  task.inverse_epsilon = 1 / epsilon;
  task.spread = spread;
  return task;
}

}  // namespace

template <typename T>
size_t sinkhorn_workspace(int64_t G, int64_t tokens, int64_t E) {
  return run<T>(task_of<T>(nullptr, tokens, E, 0, 1, 0), {}, G, 0, nullptr, false, nullptr);
}

template <typename T>
void sinkhorn(
    const T* logits, T* plan, double* history, double* error, int32_t* steps, int64_t G,
    int64_t tokens, int64_t E, int64_t iterations, double epsilon, double tolerance,
    void* workspace, CUstream_st* stream) {
  run<T>(
      task_of(logits, tokens, E, iterations, epsilon, tolerance), {plan, history, error, steps}, G,
      tolerance, workspace, true, stream);
}

template <typename T>
size_t sinkhorn_backward_workspace(int64_t G, int64_t tokens, int64_t E) {
  return run_back<T>(task_of<T>(nullptr, tokens, E, 0, 1, 0), {}, G, nullptr, false, nullptr);
}

template <typename T>
void sinkhorn_backward(
    const T* grad, const T* logits, const double* history, const int32_t* steps, T* grad_logits,
    int64_t G, int64_t tokens, int64_t E, int64_t iterations, double epsilon, void* workspace,
    CUstream_st* stream) {
  run_back<T>(
      task_of(logits, tokens, E, iterations, epsilon, 0),
      {grad, history, steps, grad_logits, nullptr, nullptr}, G, workspace, true, stream);
}

template <typename T>
size_t sinkhorn_implicit_backward_workspace(int64_t G, int64_t tokens, int64_t E) {
  return run_system<T>(nullptr, nullptr, nullptr, G, tokens, E, 1, nullptr, false, nullptr);
}

template <typename T>
void sinkhorn_implicit_backward(
    const T* grad, const T* plan, T* grad_logits, int64_t G, int64_t tokens, int64_t E,
    double epsilon, void* workspace, CUstream_st* stream) {
  run_system(grad, plan, grad_logits, G, tokens, E, epsilon, workspace, true, stream);
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template size_t sinkhorn_workspace<T>(int64_t, int64_t, int64_t);                                \
  template void sinkhorn(                                                                          \
      const T*, T*, double*, double*, int32_t*, int64_t, int64_t, int64_t, int64_t, double,        \
      double, void*, CUstream_st*);                                                                \
  template size_t sinkhorn_backward_workspace<T>(int64_t, int64_t, int64_t);                       \
  template void sinkhorn_backward(                                                                 \
      const T*, const T*, const double*, const int32_t*, T*, int64_t, int64_t, int64_t, int64_t,   \
      double, void*, CUstream_st*);                                                                \
  template size_t sinkhorn_implicit_backward_workspace<T>(int64_t, int64_t, int64_t);              \
  template void sinkhorn_implicit_backward(                                                        \
      const T*, const T*, T*, int64_t, int64_t, int64_t, double, void*, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
