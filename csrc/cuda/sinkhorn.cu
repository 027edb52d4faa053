// A call is one launch. A group that fits a block's shared memory is worked on by one block: the
// matrix, the potentials and the sums stay there from the first iteration to the last. A larger
// group is cut into pieces, one block each. These blocks are a crew: they are co-resident (a
// cooperative launch, at most one block per multiprocessor), and each has its piece in shared
// memory too. In an iteration they write their parts of the column sums to device memory and meet
// at a barrier; then each joins all parts in the same order, and so to the same bits. The columns'
// potentials and the stop at a tolerance therefore agree without further communication. Pieces too
// large for shared memory stay in device memory, with the rows' potentials. If there are more
// groups than crews, a crew takes several, one after another. docs/cuda.md estimates what an
// iteration costs.
#include <algorithm>

#include "../sinkhorn.h"
#include "block_barrier.h"
#include "sinkhorn_domains.h"
#include "sinkhorn_system.h"

namespace vmoe::cuda {
namespace {

constexpr int kMostThreads = 1024;

struct Range {
  double high, low;         // of the logits that are not -inf; NaN stays in high
  int64_t present, broken;  // rows that are not all -inf, and those of them with some -inf
};

// `count` of them joined, by every warp for itself.
__device__ inline Range join_all(const Range* each, int64_t count) {
  const WarpTeam team{};
  const auto joined = [&](auto Range::* what, auto first, auto join) {
    return join_all(team, count, first, join, [&](int64_t i) { return each[i].*what; });
  };
  return {
      joined(&Range::high, -kInfinity, Largest{}), joined(&Range::low, kInfinity, Least{}),
      joined(&Range::present, int64_t{0}, Sum{}), joined(&Range::broken, int64_t{0}, Sum{})};
}

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
    range.broken += lane == 0 && reachable > 0 && reachable < width;
  });
  const WarpTeam team{};
  range = {
      team.join(range.high, Largest{}), team.join(range.low, Least{}),
      team.join(range.present, Sum{}), team.join(range.broken, Sum{})};
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = range;
  __syncthreads();
  return join_all(of_warp, blockDim.x / kWarp);
}

template <typename T>
struct Task {
  const T* logits;  // [G, T, E]
  int64_t groups, tokens, E, iterations;
  double inverse_epsilon;
  // The distance of logits, over epsilon, up to which exp(M) and every product with a potential fit
  // T; csrc/cpu/sinkhorn/group.h says why.
  double spread;

  int64_t crews;             // how many groups are worked on at once
  int64_t pieces, of_piece;  // of a group: how many, a block each, and tokens of each but the last
  int lanes;                 // of a row
  int64_t stride;            // from row to row of the matrices that are worked on

  // For crews of several blocks.
  Range* ranges;      // [2, crews, pieces]
  double* parts;      // [2, crews, pieces, 2, E]
  unsigned* arrived;  // [crews], see BlockBarrier

  // Where the matrices are in device memory.
  double* of_row;     // [crews, vectors, T] in pieces
  double* of_column;  // [crews, pieces, kColumnVectors, E], or null: in shared memory

  __device__ Facts facts(const Range& range) const {
    return {
        range.high, static_cast<double>(range.present) / static_cast<double>(E),
        range.broken == 0 && range.high > -kInfinity &&
            (range.high - range.low) * inverse_epsilon <= spread};
  }
};

// The blocks that do a group together, each a piece of it, range from one of them. What a block
// leaves for the others in one turn they read behind that turn's barrier, and its place is written
// over two turns later: behind the next barrier, which all come to when they have read it.
template <typename T>
class Crew {
 public:
  explicit __device__ Crew(const Task<T>& task)
      : task_(task),
        index_(blockIdx.x / static_cast<unsigned>(task.pieces)),
        piece_(blockIdx.x % static_cast<unsigned>(task.pieces)),
        barrier_(alone() ? nullptr : task.arrived + index_, task.pieces) {}

  __device__ int64_t index() const { return index_; }
  // What one block alone has to write is the first one's.
  __device__ bool leads() const { return piece_ == 0; }
  // The block's tokens of the group.
  __device__ int64_t begin() const { return piece_ * task_.of_piece; }
  __device__ int64_t count() const {
    const int64_t left = task_.tokens - begin();
    return left < task_.of_piece ? left : task_.of_piece;
  }

  // The range of the whole group.
  __device__ Range join(const Range& range) {
    if (alone()) return range;
    Range* each = task_.ranges + place();
    if (threadIdx.x == 0) each[piece_] = range;
    barrier_.wait();
    ++turn_;
    return join_all(each, task_.pieces);
  }

  // Where this block's part of the column sums and of their peaks goes: who is alone has all of it.
  __device__ double* sum(double* total) const { return alone() ? total : parts().sum(piece_); }
  __device__ double* peak(double* total) const { return alone() ? total : parts().peak(piece_); }

  // gather(parts) joins what all have left there, and ends with a barrier of the block.
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
  unsigned index_, piece_, turn_ = 0;  // narrow, for registers are few
  BlockBarrier barrier_;
};

// Cuts the block's shared memory, `matrices` in it only where they are kept there.
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
      __syncthreads();  // before the potentials change
    }
    domain.step_columns(crew.leads() ? history + step * E : nullptr);
    domain.step_rows();
  }
  const double error = domain.error();
  if (crew.leads()) {
    const int64_t behind = (task.iterations - step) * E;
    for (int64_t i = threadIdx.x; i < behind; i += blockDim.x) history[step * E + i] = 0;
    if (threadIdx.x == 0) {
      out.error[g] = error;
      out.steps[g] = static_cast<int32_t>(step);
    }
  }
  domain.write_plan(out.plan + (g * task.tokens + crew.begin()) * E);
}

// In device memory K lies in the plan until that is written.
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
    __syncthreads();  // before the next group
  }
}

template <typename T>
struct Backward {
  const T* grad;          // [G, T, E]
  const double* history;  // [G, I, E]
  const int32_t* steps;   // [G]
  T* grad_logits;         // [G, T, E]
  T* K;                   // [crews, T, E] where the matrices are in device memory
};

// `rest`, in `domain` too, begins as grad.
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

// In device memory what is left of grad lies in the gradient.
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
    // A caller's steps may be anything.
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
    __syncthreads();  // before the next group
  }
}

// ---- Choosing ----

int threads_of_group(int64_t tokens, int64_t E) {
  const int64_t size = tokens * E;
  return size <= 2048 ? 128 : size <= 16384 ? 512 : kMostThreads;
}

struct Launch {
  int threads;
  size_t shared;
  bool in_shared;  // where the matrices are
};

// Fills in how the groups are worked on, and takes what that needs from the workspace.
template <typename T>
Launch prepare(Task<T>& task, int row_vectors, int matrices, Workspace& workspace) {
  const int64_t tokens = task.tokens, E = task.E, G = std::max<int64_t>(task.groups, 1);
  const auto limit = static_cast<size_t>(std::max<int64_t>(shared_limit(), 0));
  const int64_t blocks = multiprocessors();
  Launch launch{};
  const auto share_out = [&](int64_t crews, int64_t pieces, int threads) {
    task.crews = crews;
    task.of_piece = ceil_div(tokens, pieces);
    task.pieces = tokens > 0 ? ceil_div(tokens, task.of_piece) : 1;
    task.lanes = lanes_of_rows(task.of_piece, E, threads);
    task.stride = stride_of_rows(E, task.lanes);
    launch.threads = threads;
    launch.shared =
        shared_of_piece<T>(task.of_piece, E, task.stride, threads, row_vectors, matrices);
    launch.in_shared = launch.shared <= limit;
  };
  // No more groups at once than it takes for as few rounds, so that crews are as large as can be.
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
  const bool together = task.pieces > 1;
  if (task.groups == 0) return;
  if (together) cudaMemsetAsync(task.arrived, 0, task.crews * sizeof(unsigned), stream);
  launch_blocks(
      together, kernel, task.crews * task.pieces, with.threads, with.shared, stream, task, args...);
}

template <typename T>
Task<T> task_of(
    const T* logits, int64_t G, int64_t tokens, int64_t E, int64_t iterations, double epsilon,
    double tolerance) {
  // Rounding of float32 sums alone is an error of about 1e-7: an aim near it needs float64.
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

// How the groups are worked on, and the workspace for it: <op>_workspace asks for what <op> uses.
template <typename T>
struct Layout {
  Layout(Task<T> task_, int row_vectors, int matrices, void* memory) : task(task_) {
    Workspace workspace(memory);
    launch = prepare(task, row_vectors, matrices, workspace);
    // The matrices are the output's, where it is as many.
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
  T* K = nullptr;  // [crews, T, E], for a gradient in device memory
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
