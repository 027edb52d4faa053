// sinkhorn and sinkhorn_backward are one launch each. sinkhorn_system.h has the implicit backward.
// A group that fits in a block's shared memory is computed by one block: the matrix, the potentials
// and the column sums stay in shared memory for all iterations.
//
// A larger group is divided into pieces of its tokens, one block per piece. The blocks of one group
// are a crew. The blocks of all crews are co-resident (a cooperative launch, at most one block per
// multiprocessor), so they may wait for each other. In every iteration each block writes its
// partial column sums to device memory and waits at the crew's barrier. Then each block adds up all
// partial sums in the same order and gets the same bits. So all blocks compute the same column
// potentials and stop in the same iteration. A piece too large for shared memory stays in device
// memory, with the vectors of its rows.
//
// If there are more groups than crews, each crew computes several groups, one after another.
// docs/cuda.md estimates the time of an iteration.
#include <algorithm>

#include "../sinkhorn.h"
#include "block_barrier.h"
#include "sinkhorn_domains.h"
#include "sinkhorn_system.h"

namespace vmoe::cuda {
namespace {

constexpr int kMostThreads = 1024;

struct Range {
  double high, low;          // of the logits other than -inf; a NaN among them makes `high` NaN
  int64_t present, partial;  // number of present tokens; number of these with a logit of -inf
};

// Joins `count` ranges. Every warp computes the result for itself.
__device__ inline Range join_all(const Range* each, int64_t count) {
  const WarpTeam team{};
  const auto joined = [&](auto Range::* what, auto first, auto join) {
    return join_all(team, count, first, join, [&](int64_t i) { return each[i].*what; });
  };
  return {
      joined(&Range::high, -kInfinity, Largest{}), joined(&Range::low, kInfinity, Least{}),
      joined(&Range::present, int64_t{0}, Sum{}), joined(&Range::partial, int64_t{0}, Sum{})};
}

// The range of the block's rows logits [count, stride].
template <typename T>
__device__ Range scan(const T* logits, int64_t count, int64_t stride, int64_t E, int lanes) {
  __shared__ Range of_warp[kWarp];
  Range range{-kInfinity, kInfinity, 0, 0};
  each_row(count, E, lanes, [&](int64_t t, int lane, int64_t width) {
    int64_t reachable = 0;
    for (int64_t e = lane; e < width; e += lanes) {
      const double x = logits[t * stride + e];
      if (x == -kInfinity) continue;
      ++reachable;
      range.high = Largest{}(range.high, x);
      range.low = Least{}(range.low, x);
    }
    reachable = join_lanes(reachable, lanes, Sum{});
    range.present += lane == 0 && reachable > 0;
    range.partial += lane == 0 && reachable > 0 && reachable < width;
  });
  const WarpTeam team{};
  range = {
      team.join(range.high, Largest{}), team.join(range.low, Least{}),
      team.join(range.present, Sum{}), team.join(range.partial, Sum{})};
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = range;
  __syncthreads();
  return join_all(of_warp, blockDim.x / kWarp);
}

template <typename T>
struct Task {
  const T* logits;  // [G, T, E]
  int64_t groups, tokens, E, iterations;
  double inverse_epsilon;
  // The largest (high - low) / epsilon of a group for which exp(M) and its products with the
  // potentials stay normal numbers of T (csrc/cpu/sinkhorn/group.h derives it).
  double spread;

  int64_t crews;         // groups that are computed at the same time
  int64_t pieces;        // pieces per group, which is also the number of blocks per crew
  int64_t piece_tokens;  // tokens per piece; the last piece may have fewer
  int lanes;             // per row
  int64_t stride;        // entries from row to row of K and, in the backward, of the gradient

  // Exchange between blocks, if a crew has several.
  Range* ranges;      // [2, crews, pieces]
  double* parts;      // [2, crews, pieces, 2, E]
  unsigned* arrived;  // [crews], counters of BlockBarrier

  // Vectors of pieces that are too large for shared memory.
  double* of_row;     // [crews, pieces, row vectors, tokens of the piece]
  double* of_column;  // [crews, pieces, kColumnVectors, E], or null: in shared memory

  __device__ Facts facts(const Range& range) const {
    return {
        range.high, static_cast<double>(range.present) / static_cast<double>(E),
        range.partial == 0 && range.high > -kInfinity &&
            (range.high - range.low) * inverse_epsilon <= spread};
  }
};

// One block's view of its crew. The blocks of a crew compute one group, one piece per block.
//
// The buffers of the exchange are double-buffered. Data written in turn i is read after the barrier
// of turn i. Its buffer is written again in turn i + 2, after the barrier of turn i + 1. No block
// reaches that barrier before it has read the data of turn i.
template <typename T>
class Crew {
 public:
  explicit __device__ Crew(const Task<T>& task)
      : task_(task),
        index_(blockIdx.x / static_cast<unsigned>(task.pieces)),
        piece_(blockIdx.x % static_cast<unsigned>(task.pieces)),
        barrier_(alone() ? nullptr : task.arrived + index_, task.pieces) {}

  __device__ int64_t index() const { return index_; }
  // Whether this block writes the results that are written once per group.
  __device__ bool leads() const { return piece_ == 0; }
  // This block's tokens of the group are [begin, begin + count).
  __device__ int64_t begin() const { return piece_ * task_.piece_tokens; }
  __device__ int64_t count() const {
    const int64_t left = task_.tokens - begin();
    return left < task_.piece_tokens ? left : task_.piece_tokens;
  }

  // The range of the whole group, from the range of this block's piece.
  __device__ Range join(const Range& range) {
    if (alone()) return range;
    Range* each = task_.ranges + place();
    if (threadIdx.x == 0) each[piece_] = range;
    barrier_.wait();
    ++turn_;
    return join_all(each, task_.pieces);
  }

  // Where this block writes its partial column sums and peaks. If the crew has only this block, its
  // sums are the whole sums, so it writes them to `total`.
  __device__ double* sum(double* total) const { return alone() ? total : parts().sum(piece_); }
  __device__ double* peak(double* total) const { return alone() ? total : parts().peak(piece_); }

  // Waits for all blocks of the crew. Then calls gather(parts), which adds up the partial sums of
  // these blocks and ends with a barrier of this block.
  template <typename Gather>
  __device__ void meet(Gather&& gather) {
    if (alone()) return;
    barrier_.wait();
    gather(parts());
    ++turn_;
  }

 private:
  __device__ bool alone() const { return task_.pieces == 1; }
  __device__ int64_t place() const { return (turn_ % 2 * task_.crews + index_) * task_.pieces; }
  __device__ Parts parts() const {
    return {task_.parts + place() * 2 * task_.E, task_.pieces, task_.E};
  }

  const Task<T>& task_;
  unsigned index_, piece_, turn_ = 0;  // 32 bits, to save registers
  BlockBarrier barrier_;
};

// The piece of this block, with memory for its vectors. With kInShared all vectors are in shared
// memory, and `matrices` is set to shared memory for the matrices. Without kInShared the vectors of
// the rows are in device memory. The vectors of the columns are then in device memory only if they
// are too large for shared memory.
template <bool kInShared, typename T>
__device__ Piece piece_of(const Task<T>& task, const Crew<T>& crew, int row_vectors, T*& matrices) {
  const int64_t count = crew.count();
  double* storage = dynamic_shared<double>();
  double* of_column = storage + blockDim.x;
  double* of_row;
  if constexpr (kInShared) {
    of_row = of_column + kColumnVectors * task.E;
    matrices = reinterpret_cast<T*>(of_row + row_vectors * count);
  } else {
    if (task.of_column) of_column = task.of_column + blockIdx.x * kColumnVectors * task.E;
    of_row = task.of_row + row_vectors * (crew.index() * task.tokens + crew.begin());
  }
  return {count, task.E, task.lanes, task.inverse_epsilon, of_row, of_column, storage};
}

// Bytes of shared memory for a piece of `count` tokens.
template <typename T>
size_t shared_of_piece(
    int64_t count, int64_t E, int64_t stride, int threads, int row_vectors, int matrices) {
  return static_cast<size_t>(row_vectors * count + kColumnVectors * E + threads) * sizeof(double) +
         static_cast<size_t>(matrices * count * stride) * sizeof(T);
}

template <typename T>
__device__ void load(const Task<T>& task, int64_t count, const T* from, T* to) {
  each_entry(
      count, task.E, [&](int64_t t, int64_t e) { to[t * task.stride + e] = from[t * task.E + e]; });
}

template <typename T>
struct Outputs {
  T* plan;          // [G, T, E]
  double* history;  // [G, I, E]
  double* error;    // [G]
  int32_t* steps;   // [G]
};

template <typename T, typename Domain>
__device__ void iterate(
    Domain&& domain, Crew<T>& crew, const Task<T>& task, const T* logits, double tolerance,
    int64_t g, const Outputs<T>& out) {
  const int64_t E = task.E;
  double* history = out.history + g * task.iterations * E;
  domain.start(logits, task.stride);
  int64_t step = 0;
  for (;; ++step) {
    domain.sum_columns(crew.sum(domain.total()), crew.peak(domain.peak()));
    crew.meet([&](const Parts& parts) { domain.gather(parts); });
    domain.close();
    if (step == task.iterations) break;
    if (tolerance > 0 && step > 0) {
      if (domain.error() <= tolerance) break;
      __syncthreads();  // all threads have read the potentials, which change below
    }
    domain.step_columns(crew.leads() ? history + step * E : nullptr);
    domain.step_rows();
  }
  const double error = domain.error();
  if (crew.leads()) {
    const int64_t unused = (task.iterations - step) * E;
    for (int64_t i = threadIdx.x; i < unused; i += blockDim.x) history[step * E + i] = 0;
    if (threadIdx.x == 0) {
      out.error[g] = error;
      out.steps[g] = static_cast<int32_t>(step);
    }
  }
  domain.write_plan(out.plan + (g * task.tokens + crew.begin()) * E);
}

// Without kInShared, K is stored in the memory of the plan until the plan is written.
template <typename T, bool kInShared>
__global__ void __launch_bounds__(kMostThreads)
    forward_kernel(Task<T> task, double tolerance, Outputs<T> out) {
  Crew<T> crew(task);
  T* K;
  const Piece piece = piece_of<kInShared>(task, crew, kRowVectors, K);
  for (int64_t g = crew.index(); g < task.groups; g += task.crews) {
    const int64_t at = (g * task.tokens + crew.begin()) * task.E;
    const T* logits = task.logits + at;
    if constexpr (kInShared) {
      load(task, piece.count, logits, K);
      logits = K;
      __syncthreads();
    } else {
      K = out.plan + at;
    }
    const Range range = scan(logits, piece.count, task.stride, task.E, task.lanes);
    const Facts facts = task.facts(crew.join(range));
    if (facts.scaling) {
      iterate(
          ScalingDomain<T>(piece, facts, K, task.stride), crew, task, logits, tolerance, g, out);
    } else {
      iterate(
          LogDomain<T>(piece, facts, logits, task.stride), crew, task, logits, tolerance, g, out);
    }
    __syncthreads();  // shared memory is reused for the next group
  }
}

template <typename T>
struct Backward {
  const T* grad;          // [G, T, E]
  const double* history;  // [G, I, E]
  const int32_t* steps;   // [G]
  T* grad_logits;         // [G, T, E]
  T* K;                   // [crews, T, E] if the matrices are in device memory, else null
};

// The backward of the `steps` iterations of a group. `rest` holds grad at first and is overwritten.
template <typename T, typename Domain>
__device__ void go_back(
    Domain&& domain, const Piece& piece, Crew<T>& crew, const Task<T>& task, const T* logits,
    T* rest, const double* history, int64_t steps, T* grad_logits) {
  const auto after = [&](int64_t step) -> const double* {
    return step > 0 ? history + (step - 1) * task.E : nullptr;
  };
  domain.start_gradient(logits, task.stride);
  domain.begin_gradient(after(steps), rest, task.stride, crew.sum(domain.total()));
  for (int64_t step = steps; step > 0; --step) {
    crew.meet([&](const Parts& parts) { gather_sums(piece, parts, domain.total()); });
    domain.take_step(after(step), after(step - 1), rest, task.stride, crew.sum(domain.total()));
  }
  domain.write_gradient(rest, task.stride, grad_logits);
}

// Without kInShared, `rest` is stored in the memory of the result.
template <typename T, bool kInShared>
__global__ void __launch_bounds__(kMostThreads) backward_kernel(Task<T> task, Backward<T> back) {
  Crew<T> crew(task);
  T* K;
  const Piece piece = piece_of<kInShared>(task, crew, kRowVectorsOfGradient, K);
  if constexpr (!kInShared) K = back.K + (crew.index() * task.tokens + crew.begin()) * task.E;
  for (int64_t g = crew.index(); g < task.groups; g += task.crews) {
    const int64_t at = (g * task.tokens + crew.begin()) * task.E;
    const T* logits = task.logits + at;
    T* rest = back.grad_logits + at;
    if constexpr (kInShared) {
      load(task, piece.count, logits, K);
      logits = K;
      rest = K + piece.count * task.stride;
    }
    load(task, piece.count, back.grad + at, rest);
    __syncthreads();
    const Range range = scan(logits, piece.count, task.stride, task.E, task.lanes);
    const Facts facts = task.facts(crew.join(range));
    const double* history = back.history + g * task.iterations * task.E;
    // The caller's steps are untrusted: clamp them to [0, iterations].
    const int64_t steps = back.steps[g], done = steps < 0                 ? 0
                                                : steps < task.iterations ? steps
                                                                          : task.iterations;
    if (facts.scaling && done > 0) {
      go_back(
          ScalingDomain<T>(piece, facts, K, task.stride), piece, crew, task, logits, rest, history,
          done, back.grad_logits + at);
    } else {
      go_back(
          LogDomain<T>(piece, facts, logits, task.stride), piece, crew, task, logits, rest, history,
          done, back.grad_logits + at);
    }
    __syncthreads();  // shared memory is reused for the next group
  }
}

// ---- Launches ----

int threads_of_group(int64_t tokens, int64_t E) {
  const int64_t size = tokens * E;
  return size <= 2048 ? 128 : size <= 16384 ? 512 : kMostThreads;
}

struct Launch {
  int threads;
  size_t shared;
  bool in_shared;  // whether the matrices are in shared memory
};

// Divides the groups among crews and blocks, and takes the memory of the crews from the workspace.
template <typename T>
Launch prepare(Task<T>& task, int row_vectors, int matrices, Workspace& workspace) {
  const int64_t tokens = task.tokens, E = task.E, G = std::max<int64_t>(task.groups, 1);
  const auto limit = static_cast<size_t>(std::max<int64_t>(shared_limit(), 0));
  const int64_t blocks = multiprocessors();
  Launch launch{};
  const auto share_out = [&](int64_t crews, int64_t pieces, int threads) {
    task.crews = crews;
    task.piece_tokens = ceil_div(tokens, pieces);
    task.pieces = tokens > 0 ? ceil_div(tokens, task.piece_tokens) : 1;
    task.lanes = lanes_of_rows(task.piece_tokens, E, threads);
    task.stride = stride_of_rows(E, task.lanes);
    launch.threads = threads;
    launch.shared =
        shared_of_piece<T>(task.piece_tokens, E, task.stride, threads, row_vectors, matrices);
    launch.in_shared = launch.shared <= limit;
  };
  // Forms at most `most` crews: the smallest number of crews that needs as few rounds as `most`
  // crews. Fewer crews have more blocks each.
  const auto form_crews = [&](int64_t most) {
    constexpr int64_t kLeastPiece = 64;
    const int64_t crews = ceil_div(G, ceil_div(G, most));
    const int64_t pieces = std::min(blocks / crews, ceil_div(tokens, kLeastPiece));
    share_out(crews, std::max<int64_t>(pieces, 1), kMostThreads);
  };
  share_out(G, 1, threads_of_group(tokens, E));
  for (int64_t most = std::min(G, blocks); !launch.in_shared && most > 0; --most) form_crews(most);
  if (!launch.in_shared) {
    form_crews(std::min(G, blocks));
    task.lanes = lanes_of_rows(E);
    task.stride = E;
    task.of_row = workspace.take<double>(task.crews * row_vectors * tokens);
    const int64_t columns = kColumnVectors * E;
    launch.shared = static_cast<size_t>(launch.threads + columns) * sizeof(double);
    if (launch.shared > limit) {
      launch.shared = static_cast<size_t>(launch.threads) * sizeof(double);
      task.of_column = workspace.take<double>(task.crews * task.pieces * columns);
    }
  }
  if (task.pieces > 1) {
    task.ranges = workspace.take<Range>(2 * task.crews * task.pieces);
    task.parts = workspace.take<double>(2 * task.crews * task.pieces * 2 * E);
    task.arrived = workspace.take<unsigned>(task.crews);
  }
  return launch;
}

template <typename T, typename... Args>
void start(
    void (*kernel)(Task<T>, Args...), const Launch& with, const Task<T>& task, cudaStream_t stream,
    Args... args) {
  const bool cooperative = task.pieces > 1;
  if (task.groups == 0) return;
  if (cooperative) cudaMemsetAsync(task.arrived, 0, task.crews * sizeof(unsigned), stream);
  launch_blocks(
      cooperative, kernel, task.crews * task.pieces, with.threads, with.shared, stream, task,
      args...);
}

template <typename T>
Task<T> task_of(
    const T* logits, int64_t G, int64_t tokens, int64_t E, int64_t iterations, double epsilon,
    double tolerance) {
  // Sums in float32 have a rounding error of about 1e-7. A tolerance near it needs float64, so no
  // group may iterate on exp(M) in float32: a spread of -1 admits none.
  const bool narrow = sizeof(T) == sizeof(float);
  const double spread = !narrow ? 200 : tolerance > 0 && tolerance < 1e-4 ? -1 : 40;
  Task<T> task{};
  task.logits = logits;
  task.groups = G;
  task.tokens = E > 0 ? tokens : 0;
  task.E = E;
  task.iterations = iterations;
  task.inverse_epsilon = 1 / epsilon;
  task.spread = spread;
  return task;
}

// The task, the launch and the workspace of a call. <op>_workspace and <op> both use this struct,
// so that they agree on the size of the workspace.
template <typename T>
struct Layout {
  Layout(Task<T> task_, int row_vectors, int matrices, void* memory) : task(task_) {
    Workspace workspace(memory);
    launch = prepare(task, row_vectors, matrices, workspace);
    // Matrices in device memory: the first is stored in the output, a second needs workspace.
    if (!launch.in_shared && matrices > 1) {
      K = workspace.take<T>(task.crews * task.tokens * task.E);
    }
    bytes = workspace.size();
  }
  static Layout forward(const Task<T>& task, void* memory) {
    return {task, kRowVectors, 1, memory};
  }
  static Layout backward(const Task<T>& task, void* memory) {
    return {task, kRowVectorsOfGradient, 2, memory};
  }

  Task<T> task;
  Launch launch;
  T* K = nullptr;  // [crews, T, E], for a backward in device memory
  size_t bytes = 0;
};

}  // namespace

template <typename T>
size_t sinkhorn_workspace(int64_t G, int64_t tokens, int64_t E) {
  return Layout<T>::forward(task_of<T>(nullptr, G, tokens, E, 0, 1, 0), nullptr).bytes;
}

template <typename T>
void sinkhorn(
    const T* logits, T* plan, double* history, double* error, int32_t* steps, int64_t G,
    int64_t tokens, int64_t E, int64_t iterations, double epsilon, double tolerance,
    void* workspace, CUstream_st* stream) {
  const auto layout =
      Layout<T>::forward(task_of(logits, G, tokens, E, iterations, epsilon, tolerance), workspace);
  const auto kernel = layout.launch.in_shared ? forward_kernel<T, true> : forward_kernel<T, false>;
  start(
      kernel, layout.launch, layout.task, stream, tolerance,
      Outputs<T>{plan, history, error, steps});
}

template <typename T>
size_t sinkhorn_backward_workspace(int64_t G, int64_t tokens, int64_t E) {
  return Layout<T>::backward(task_of<T>(nullptr, G, tokens, E, 0, 1, 0), nullptr).bytes;
}

template <typename T>
void sinkhorn_backward(
    const T* grad, const T* logits, const double* history, const int32_t* steps, T* grad_logits,
    int64_t G, int64_t tokens, int64_t E, int64_t iterations, double epsilon, void* workspace,
    CUstream_st* stream) {
  const auto layout =
      Layout<T>::backward(task_of(logits, G, tokens, E, iterations, epsilon, 0), workspace);
  const auto kernel =
      layout.launch.in_shared ? backward_kernel<T, true> : backward_kernel<T, false>;
  start(
      kernel, layout.launch, layout.task, stream,
      Backward<T>{grad, history, steps, grad_logits, layout.K});
}

template <typename T>
size_t sinkhorn_implicit_backward_workspace(int64_t G, int64_t tokens, int64_t E) {
  return SystemLayout<T>(G, tokens, E, nullptr).bytes;
}

template <typename T>
void sinkhorn_implicit_backward(
    const T* grad, const T* plan, T* grad_logits, int64_t G, int64_t tokens, int64_t E,
    double epsilon, void* workspace, CUstream_st* stream) {
  run_system(SystemLayout<T>(G, tokens, E, workspace), grad, plan, grad_logits, epsilon, stream);
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
