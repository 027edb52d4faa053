// A step of the solver first projects the columns, with one warp or block per column. Then it
// updates alpha, with one thread per token.
//
// Groups that fit in a block's shared memory take one launch, with one block per group for all
// steps. Larger groups are in device memory. Adam then takes two launches per step: one block per
// column projects, and one block per kPieceThreads tokens updates. L-BFGS still takes one block per
// group, because a step of L-BFGS needs many sums over all tokens, one after another.
//
// Projections are stored in compact form (simplex.h). Their entries are computed when needed. In
// shared memory, a bit mask per token names the experts that picked the token. These experts are
// few.
//
// The cut of a column moves little in a step of Adam. So the search for the cut begins at the cut
// of the step before (Guess).
#include <algorithm>

#include "../ksparse_transport.h"
#include "matrix.h"
#include "simplex.h"
#include "transpose.h"

namespace vmoe::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kMemory = 10;  // number of (step, change) pairs that L-BFGS keeps

// Up to this many tokens per lane, a warp keeps its column in registers.
constexpr int kHeld = 8;

using Column = Projection<double>;

struct Seen {
  int32_t present, bad;  // number of present tokens; `bad` is not 0 if any entry is NaN or +inf
};

struct Adam {
  double rate, mean_share, square_share;  // learning rate; bias corrections 1 - 0.9^i, 1 - 0.999^i
};

// The semi-dual problem of one group (ksparse_transport.h) and its current point.
template <typename T>
struct SemiDual {
  int64_t tokens, E, k, stride;
  const T* columns;          // [E, stride]  the similarity, transposed
  const int8_t* is_present;  // [T]  1 for present tokens, 0 for masked tokens; null: all present
  double* alpha;             // [T]  the current point
  Column* projected;         // [E]  the projected columns at alpha
  uint32_t* pickers;         // [ceil(E / 32), T]  bit e: expert e picked the token; null: not kept
  double b, scale;           // n / E, gamma n / E
  double reach;              // about how far a cut moves per step; 0 if unknown

  __device__ double value(int64_t t, int64_t e) const {
    return alpha[t] + static_cast<double>(columns[e * stride + t]);
  }
  __device__ double share(int64_t t, int64_t e) const {
    return projected[e].share(value(t, e), t, scale);
  }

  // Where to search first for the cut of column e.
  __device__ Guess<double> guess(int64_t e) const {
    return {reach > 0 ? projected[e].cut : kUndefined, reach};
  }

  template <typename Team>
  __device__ void project(const Team& team, int64_t e) const {
    const auto value_at = [&](int64_t t) { return value(t, e); };
    const Entries<Team, decltype(value_at)> row{team, tokens, value_at};
    const Column column = cuda::project(team, row, tokens, k, scale, guess(e));
    if (team.rank() == 0) projected[e] = column;
    if (pickers) mark(row, column, e);
  }
  // Sets the bit of expert e in the masks of its picks.
  template <typename Row>
  __device__ void mark(const Row& row, const Column& column, int64_t e) const {
    row.picks_of(column)(
        [&](int64_t t, double) { atomicOr(&pickers[e / kWarp * tokens + t], 1u << (e % kWarp)); });
  }
  // Projects a column of up to kHeld tokens per lane of a warp.
  __device__ void project_held(int64_t e) const {
    const WarpTeam warp{};
    const auto value_at = [&](int t) { return value(t, e); };
    const HeldEntries<double, kHeld, WarpTeam, decltype(value_at)> row(
        warp, static_cast<int>(tokens), value_at);
    const Column column = cuda::project(warp, row, tokens, k, scale, guess(e));
    if (warp.rank() == 0) projected[e] = column;
    mark(row, column, e);
  }
  // Projects all columns, with one warp per column.
  __device__ void project() const {
    const bool held = pickers && tokens <= kHeld * kWarp;
    for (int64_t e = threadIdx.x / kWarp; e < E; e += blockDim.x / kWarp) {
      held ? project_held(e) : project(WarpTeam{}, e);
    }
    __syncthreads();
  }

  // Calls body(value, share) for every expert that may have picked token t, in ascending order.
  // Then clears the pickers of the token.
  template <typename Body>
  __device__ void each_share(int64_t t, Body&& body) const {
    if (!pickers) {
      for (int64_t e = 0; e < E; ++e) body(value(t, e), share(t, e));
      return;
    }
    for (int64_t word = 0; word * kWarp < E; ++word) {
      uint32_t& mask = pickers[word * tokens + t];
      for (uint32_t left = mask; left != 0; left &= left - 1) {
        const int64_t e = word * kWarp + __ffs(static_cast<int>(left)) - 1;
        const double x = value(t, e);
        body(x, projected[e].share_of_pick(x, scale));
      }
      mask = 0;
    }
  }

  // The gradient of the negated objective with respect to alpha[t]. If `part` is not null, writes
  // the terms of token t in the negated objective to `part`.
  __device__ double differentiate(int64_t t, double* part = nullptr) const {
    const double present = is_present ? is_present[t] : 1;
    double gradient = -present, sum = -present * alpha[t];
    each_share(t, [&](double x, double p) {
      gradient += b * p;
      if (part && p > 0) sum += b * (x * p - scale / 2 * p * p);
    });
    if (part) *part = sum;
    return gradient;
  }

  // Adam's update of alpha[t].
  __device__ void take_step(
      const Adam& adam, int64_t t, double gradient, double* mean, double* square) const {
    const double m = 0.9 * mean[t] + 0.1 * gradient;
    const double s = 0.999 * square[t] + 0.001 * gradient * gradient;
    alpha[t] -= m * (adam.rate / adam.mean_share) / (sqrt(s * (1 / adam.square_share)) + 1e-8);
    mean[t] = m;
    square[t] = s;
  }
};

// The arguments of a call, for all its kernels.
template <typename T>
struct Task {
  const T* similarity;  // [G, T, E]
  T* plan;              // [G, T, E]
  int64_t tokens, E, k, iterations;
  double learning_rate, tolerance, gamma;
  double reach;     // as in SemiDual
  double* vectors;  // [G, vectors_of_group, T]  the vectors of the solver
  int64_t vectors_of_group;

  // For groups in device memory only:
  int64_t pieces;       // pieces of kPieceThreads tokens per group
  T* columns;           // [G, E, T]
  int8_t* is_present;   // [G, T]
  double* alpha;        // [G, T]
  Column* projected;    // [G, E]
  Seen* seen_of_piece;  // [G, pieces]
  Seen* seen;           // [G]
  double* norms;        // [G, pieces]  |gradient|^2 over the tokens of a piece
  int32_t* stopped;     // [G]

  __device__ double* vector(int64_t g, int64_t i) const {
    return vectors + (g * vectors_of_group + i) * tokens;
  }
  __device__ SemiDual<T> dual(const Seen& seen) const {
    const double b = static_cast<double>(seen.present) / static_cast<double>(E);
    return {tokens, E, k, 0, nullptr, nullptr, nullptr, nullptr, nullptr, b, gamma * b, reach};
  }
  __device__ SemiDual<T> dual_of(int64_t g, const Seen& seen) const {
    SemiDual<T> of_group = dual(seen);
    of_group.stride = tokens;
    of_group.columns = columns + g * E * tokens;
    of_group.is_present = is_present + g * tokens;
    of_group.alpha = alpha + g * tokens;
    of_group.projected = projected + g * E;
    return of_group;
  }
  // Whether the group has a present token, and no NaN or +inf.
  __device__ bool solvable(const Seen& seen) const { return seen.present > 0 && !seen.bad; }

  // Writes the plan of the tokens [begin, begin + count). place_of(t) is the position of token t in
  // the columns, or -1 if it is masked. The plan of a group that is not solvable is 0, or NaN if an
  // entry is NaN or +inf.
  template <typename PlaceOf>
  __device__ void write(
      const SemiDual<T>& dual, const Seen& seen, int64_t g, int64_t begin, int64_t count,
      PlaceOf&& place_of) const {
    const T empty = seen.bad ? static_cast<T>(kUndefined) : 0;
    const bool solved = solvable(seen) && k > 0;
    T* to = plan + (g * tokens + begin) * E;
    each_entry(count, E, [&](int64_t t, int64_t e) {
      const int64_t place = place_of(begin + t);
      to[t * E + e] = solved && place >= 0 ? static_cast<T>(dual.b * dual.share(place, e)) : empty;
    });
  }
};

// Ends with the projections at the last alpha, like solve_lbfgs.
template <typename T>
__device__ void solve_adam(
    const Task<T>& task, const SemiDual<T>& dual, const BlockTeam& team, int64_t g) {
  double *mean = task.vector(g, 0), *square = task.vector(g, 1);
  for (int64_t t = team.rank(); t < dual.tokens; t += team.size()) mean[t] = square[t] = 0;
  double decay1 = 1, decay2 = 1;
  bool stops = false;
  for (int64_t i = 0;; ++i) {
    dual.project();
    if (i == task.iterations || stops) return;
    decay1 *= 0.9;
    decay2 *= 0.999;
    const Adam adam{task.learning_rate, 1 - decay1, 1 - decay2};
    const double norm = join_all(team, dual.tokens, 0.0, Sum{}, [&](int64_t t) {
      const double gradient = dual.differentiate(t);
      dual.take_step(adam, t, gradient, mean, square);
      return gradient * gradient;
    });
    stops = sqrt(norm) <= task.tolerance;
  }
}

template <typename T>
__device__ void solve_lbfgs(
    const Task<T>& task, const SemiDual<T>& dual, const BlockTeam& team, int64_t g) {
  // One more slot than pairs: a new pair is computed in a slot before it is accepted.
  constexpr int kHalvings = 40, kSlots = kMemory + 1;
  double *alpha = task.vector(g, 0), *gradient = task.vector(g, 1);
  double *direction = task.vector(g, 2), *next_gradient = task.vector(g, 3);
  const auto step_of = [&](int slot) { return task.vector(g, 4 + 2 * slot); };
  const auto change_of = [&](int slot) { return task.vector(g, 5 + 2 * slot); };
  // A thread has the same tokens in every loop, so only sums need barriers.
  const auto each = [&](auto&& body) {
    for (int64_t t = team.rank(); t < dual.tokens; t += team.size()) body(t);
  };
  const auto dot = [&](const double* x, const double* y) {
    return join_all(team, dual.tokens, 0.0, Sum{}, [&](int64_t t) { return x[t] * y[t]; });
  };
  // Writes the gradient at dual.alpha to `to` and returns the negated objective.
  const auto differentiate = [&](double* to) {
    __syncthreads();
    dual.project();
    return join_all(team, dual.tokens, 0.0, Sum{}, [&](int64_t t) {
      double part;
      to[t] = dual.differentiate(t, &part);
      return part;
    });
  };
  double curvature[kSlots], weight[kSlots];
  int oldest = 0, kept = 0;
  const auto slot_of = [&](int i) { return (oldest + i) % kSlots; };

  each([&](int64_t t) { alpha[t] = dual.alpha[t]; });
  double value = differentiate(gradient);
  for (int64_t i = 0; i < task.iterations; ++i) {
    const double length = sqrt(dot(gradient, gradient));
    if (!(length > task.tolerance)) break;
    each([&](int64_t t) { direction[t] = gradient[t]; });
    for (int j = kept - 1; j >= 0; --j) {
      const int slot = slot_of(j);
      weight[slot] = dot(step_of(slot), direction) / curvature[slot];
      each([&](int64_t t) { direction[t] -= weight[slot] * change_of(slot)[t]; });
    }
    if (kept > 0) {
      const int newest = slot_of(kept - 1);
      const double scale = curvature[newest] / dot(change_of(newest), change_of(newest));
      each([&](int64_t t) { direction[t] *= scale; });
    }
    for (int j = 0; j < kept; ++j) {
      const int slot = slot_of(j);
      const double by = weight[slot] - dot(change_of(slot), direction) / curvature[slot];
      each([&](int64_t t) { direction[t] += by * step_of(slot)[t]; });
    }
    const double slope = -dot(direction, gradient);
    // Without a pair the curvature is unknown, so the first step has length 1.
    double rate = kept == 0 ? 1 / length : 1;
    int halvings = 0;
    for (; halvings < kHalvings; ++halvings, rate /= 2) {
      each([&](int64_t t) { dual.alpha[t] = alpha[t] - rate * direction[t]; });
      const double next_value = differentiate(next_gradient);
      if (next_value <= value + 1e-4 * rate * slope) {
        value = next_value;
        break;
      }
    }
    if (halvings == kHalvings) {
      // At a kink the pairs may give a direction in which no step improves the objective. So
      // steepest descent is tried once. If it fails too, the solver stops.
      if (kept == 0) break;
      kept = 0;
      continue;
    }
    const int slot = slot_of(kept);
    double *step = step_of(slot), *change = change_of(slot);
    each([&](int64_t t) {
      step[t] = dual.alpha[t] - alpha[t];
      change[t] = next_gradient[t] - gradient[t];
      alpha[t] = dual.alpha[t];
      gradient[t] = next_gradient[t];
    });
    curvature[slot] = dot(step, change);
    if (curvature[slot] > 1e-12 * dot(change, change)) ++kept;
    if (kept > kMemory) {
      oldest = slot_of(1);
      --kept;
    }
  }
  each([&](int64_t t) { dual.alpha[t] = alpha[t]; });
  __syncthreads();
  dual.project();
}

template <typename T>
size_t shared_of_group(int64_t tokens, int64_t E) {
  return static_cast<size_t>(tokens) * (sizeof(double) + sizeof(int64_t)) +
         static_cast<size_t>(E) * sizeof(Column) +
         static_cast<size_t>(E * (tokens | 1)) * sizeof(T) +
         static_cast<size_t>(ceil_div(E, kWarp) * tokens) * sizeof(uint32_t);
}

// A group in the block's shared memory. Masked tokens are removed from the columns. So the result
// equals, to the bit, the result of the group without these tokens. This matters at a kink of the
// objective, where other rounding errors could lead to another result.
template <typename T>
class StagedGroup {
 public:
  __device__ StagedGroup(const Task<T>& task, const BlockTeam& team, int64_t g)
      : tokens_(task.tokens), stride_(task.tokens | 1) {
    const int64_t E = task.E;
    alpha_ = dynamic_shared<double>();
    place_ = reinterpret_cast<int64_t*>(alpha_ + tokens_);
    projected_ = reinterpret_cast<Column*>(place_ + tokens_);
    columns_ = reinterpret_cast<T*>(projected_ + E);
    pickers_ = reinterpret_cast<uint32_t*>(columns_ + E * stride_);
    for (int64_t i = team.rank(); i < ceil_div(E, kWarp) * tokens_; i += team.size()) {
      pickers_[i] = 0;
    }
    for (int64_t e = team.rank(); e < E; e += team.size()) projected_[e].cut = kUndefined;
    int32_t bad = 0, present = 0;
    each_entry(tokens_, E, [&](int64_t t, int64_t e) {
      const T x = task.similarity[(g * tokens_ + t) * E + e];
      columns_[e * stride_ + t] = x;
      bad |= !(x < static_cast<T>(kInfinity));
    });
    __syncthreads();
    for (int64_t t = team.rank(); t < tokens_; t += team.size()) {
      bool is_present = false;
      for (int64_t e = 0; e < E; ++e) {
        is_present = is_present || columns_[e * stride_ + t] > static_cast<T>(-kInfinity);
      }
      place_[t] = is_present ? t : -1;
      present += is_present;
      alpha_[t] = 0;
    }
    seen_ = {team.join(present, Sum{}), team.join(bad, Sum{})};
    if (seen_.present < tokens_) leave_out_absent(E);
  }

  __device__ const Seen& seen() const { return seen_; }
  __device__ int64_t place_of(int64_t t) const { return place_[t]; }
  __device__ SemiDual<T> dual(const Task<T>& task) const {
    SemiDual<T> dual = task.dual(seen_);
    dual.tokens = seen_.present;
    dual.k = dual.k < dual.tokens ? dual.k : dual.tokens;
    dual.stride = stride_;
    dual.columns = columns_;
    dual.alpha = alpha_;
    dual.projected = projected_;
    dual.pickers = pickers_;
    return dual;
  }

 private:
  // Computes place_, and moves the present tokens of every column to its front.
  __device__ void leave_out_absent(int64_t E) {
    const int64_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (warp == 0) {
      int64_t before = 0;
      for (int64_t begin = 0; begin < tokens_; begin += kWarp) {
        const int64_t t = begin + lane;
        const bool is_present = t < tokens_ && place_[t] >= 0;
        const unsigned present = __ballot_sync(kAllLanes, is_present);
        if (is_present) place_[t] = before + __popc(present & ((1u << lane) - 1));
        before += __popc(present);
      }
    }
    __syncthreads();
    for (int64_t e = warp; e < E; e += blockDim.x / kWarp) {
      T* column = columns_ + e * stride_;
      for (int64_t begin = 0; begin < tokens_; begin += kWarp) {
        const int64_t t = begin + lane, place = t < tokens_ ? place_[t] : -1;
        const T x = place >= 0 ? column[t] : 0;
        __syncwarp();  // writes go to entries that all lanes have read
        if (place >= 0) column[place] = x;
        __syncwarp();
      }
    }
    __syncthreads();
  }

  int64_t tokens_, stride_;
  double* alpha_;      // [T]
  int64_t* place_;     // [T]  position of a token in the columns, or -1 if it is masked
  Column* projected_;  // [E]
  T* columns_;         // [E, T | 1]; an odd stride avoids bank conflicts
  uint32_t* pickers_;  // [ceil(E / 32), T]
  Seen seen_;
};

template <typename T, Solver kSolver>
__device__ void solve(
    const Task<T>& task, const SemiDual<T>& dual, const Seen& seen, const BlockTeam& team,
    int64_t g) {
  if (!task.solvable(seen) || task.k <= 0) return;
  if constexpr (kSolver == Solver::kAdam) {
    solve_adam(task, dual, team, g);
  } else {
    solve_lbfgs(task, dual, team, g);
  }
}

template <typename T, Solver kSolver>
__global__ void __launch_bounds__(kMostThreads, kSolver == Solver::kAdam ? 2 : 1)
    group_kernel(Task<T> task) {
  __shared__ BlockTeam::Storage storage;
  const BlockTeam team(storage);
  const int64_t g = blockIdx.x;
  const StagedGroup<T> group(task, team, g);
  const SemiDual<T> dual = group.dual(task);
  solve<T, kSolver>(task, dual, group.seen(), team, g);
  task.write(dual, group.seen(), g, 0, task.tokens, [&](int64_t t) { return group.place_of(t); });
}

// ---- Groups in device memory ----

constexpr int kPieceThreads = 128;  // tokens per piece, one thread per token

// Finds the present tokens and bad entries of a piece, and sets alpha and all vectors to 0.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads) read_kernel(Task<T> task) {
  __shared__ BlockTeam::Storage storage;
  const BlockTeam team(storage);
  const int64_t g = blockIdx.x / task.pieces;
  const int64_t t = blockIdx.x % task.pieces * kPieceThreads + threadIdx.x;
  int32_t bad = 0, present = 0;
  if (t < task.tokens) {
    for (int64_t e = 0; e < task.E; ++e) {
      const T x = task.columns[(g * task.E + e) * task.tokens + t];
      bad |= !(x < static_cast<T>(kInfinity));
      present |= x > static_cast<T>(-kInfinity);
    }
    const int64_t at = g * task.tokens + t;
    task.is_present[at] = static_cast<int8_t>(present);
    task.alpha[at] = 0;
    for (int64_t i = 0; i < task.vectors_of_group; ++i) task.vector(g, i)[t] = 0;
  }
  const Seen seen{team.join(present, Sum{}), team.join(bad, Sum{})};
  if (threadIdx.x == 0) task.seen_of_piece[blockIdx.x] = seen;
}

// Joins the `seen` of all pieces of a group, and marks its projections as not computed.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads) join_kernel(Task<T> task) {
  __shared__ BlockTeam::Storage storage;
  const BlockTeam team(storage);
  const Seen* pieces = task.seen_of_piece + blockIdx.x * task.pieces;
  const auto sum = [&](int32_t Seen::* of) {
    return join_all(team, task.pieces, int32_t{0}, Sum{}, [&](int64_t i) { return pieces[i].*of; });
  };
  const Seen seen{sum(&Seen::present), sum(&Seen::bad)};
  if (threadIdx.x == 0) task.seen[blockIdx.x] = seen;
  for (int64_t e = team.rank(); e < task.E; e += team.size()) {
    task.projected[blockIdx.x * task.E + e].cut = kUndefined;  // no guess for the first step
  }
}

// The first launch of a step of Adam: projects the columns at alpha. After the last step it is
// launched once more, for the plan. A group stops after the update whose gradient met the
// tolerance.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, 2) columns_kernel(Task<T> task, int64_t step) {
  __shared__ BlockTeam::Storage storage;
  const BlockTeam team(storage);
  const int64_t g = blockIdx.x / task.E, e = blockIdx.x % task.E;
  const Seen seen = task.seen[g];
  if (!task.solvable(seen)) return;
  if (step < task.iterations) {
    const double norm =
        step == 0 ? kInfinity : join_all(team, task.pieces, 0.0, Sum{}, [&](int64_t i) {
          return task.norms[g * task.pieces + i];
        });
    // A stopped group is not updated, so its norms meet the tolerance in every later step too.
    const bool stops = sqrt(norm) <= task.tolerance;
    if (e == 0 && threadIdx.x == 0) task.stopped[g] = stops;
    if (stops) return;
  }
  task.dual_of(g, seen).project(team, e);
}

// The second launch of a step of Adam: updates alpha, and writes the squared norm of the gradient.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads) tokens_kernel(Task<T> task, Adam adam) {
  __shared__ BlockTeam::Storage storage;
  const BlockTeam team(storage);
  const int64_t g = blockIdx.x / task.pieces;
  const int64_t t = blockIdx.x % task.pieces * kPieceThreads + threadIdx.x;
  const Seen seen = task.seen[g];
  if (!task.solvable(seen) || task.stopped[g]) return;
  const SemiDual<T> dual = task.dual_of(g, seen);
  double gradient = 0;
  if (t < task.tokens) {
    gradient = dual.differentiate(t);
    dual.take_step(adam, t, gradient, task.vector(g, 0), task.vector(g, 1));
  }
  const double norm = team.join(gradient * gradient, Sum{});
  if (threadIdx.x == 0) task.norms[blockIdx.x] = norm;
}

// All steps of L-BFGS, by one block per group.
template <typename T>
__global__ void __launch_bounds__(kMostThreads) lbfgs_kernel(Task<T> task) {
  __shared__ BlockTeam::Storage storage;
  const int64_t g = blockIdx.x;
  const Seen seen = task.seen[g];
  solve<T, Solver::kLbfgs>(task, task.dual_of(g, seen), seen, BlockTeam(storage), g);
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads) plan_kernel(Task<T> task) {
  const int64_t g = blockIdx.x / task.pieces;
  const int64_t begin = blockIdx.x % task.pieces * kPieceThreads, left = task.tokens - begin;
  const Seen seen = task.seen[g];
  task.write(
      task.dual_of(g, seen), seen, g, begin, left < kPieceThreads ? left : kPieceThreads,
      [](int64_t t) { return t; });
}

// The task and the workspace of a call, without the tensors, which ksparse_transport adds.
// ksparse_transport_workspace and ksparse_transport both use this struct, so that they agree on the
// size of the workspace.
template <typename T>
struct Layout {
  Layout(int64_t G, int64_t tokens, int64_t E, const TransportOptions& options, void* memory) {
    if (G == 0 || tokens == 0 || E == 0) return;
    shared = shared_of_group<T>(tokens, E);
    staged = static_cast<int64_t>(shared) <= shared_limit();
    task.tokens = tokens;
    task.E = E;
    task.k = std::min(options.k, tokens);
    task.iterations = options.iterations;
    task.learning_rate = options.learning_rate;
    // Adam moves an entry of alpha by about the learning rate.
    task.reach = options.solver == Solver::kAdam ? options.learning_rate : 0;
    task.tolerance = options.tolerance;
    task.gamma = options.gamma;
    task.vectors_of_group = options.solver == Solver::kAdam ? 2 : 4 + 2 * (kMemory + 1);
    Workspace workspace(memory);
    task.vectors = workspace.take<double>(G * task.vectors_of_group * tokens);
    if (!staged) {
      task.pieces = ceil_div(tokens, kPieceThreads);
      task.columns = workspace.take<T>(G * E * tokens);
      task.is_present = workspace.take<int8_t>(G * tokens);
      task.alpha = workspace.take<double>(G * tokens);
      task.projected = workspace.take<Column>(G * E);
      task.seen_of_piece = workspace.take<Seen>(G * task.pieces);
      task.seen = workspace.take<Seen>(G);
      task.norms = workspace.take<double>(G * task.pieces);
      task.stopped = workspace.take<int32_t>(G);
    }
    bytes = workspace.size();
  }

  Task<T> task{};
  size_t shared = 0;    // bytes of shared memory of a group
  bool staged = false;  // whether a group fits in a block's shared memory
  size_t bytes = 0;     // bytes of workspace; 0 if a size is 0
};

// Launches the kernels for groups in device memory.
template <typename T>
void run(const Task<T>& task, int64_t G, const TransportOptions& options, cudaStream_t stream) {
  const int64_t tokens = task.tokens, E = task.E;
  transpose(task.similarity, task.columns, G, tokens, E, stream);
  launch(read_kernel<T>, G * task.pieces, kPieceThreads, 0, stream, task);
  launch(join_kernel<T>, G, kPieceThreads, 0, stream, task);
  if (options.solver == Solver::kLbfgs) {
    launch(lbfgs_kernel<T>, G, kMostThreads, 0, stream, task);
  } else if (task.k > 0) {
    double decay1 = 1, decay2 = 1;
    for (int64_t i = 0; i <= options.iterations; ++i) {
      launch(columns_kernel<T>, G * E, tokens <= 2048 ? 128 : kMostThreads, 0, stream, task, i);
      if (i == options.iterations) break;
      decay1 *= 0.9;
      decay2 *= 0.999;
      launch(
          tokens_kernel<T>, G * task.pieces, kPieceThreads, 0, stream, task,
          Adam{options.learning_rate, 1 - decay1, 1 - decay2});
    }
  }
  launch(plan_kernel<T>, G * task.pieces, kPieceThreads, 0, stream, task);
}

}  // namespace

template <typename T>
size_t ksparse_transport_workspace(
    int64_t G, int64_t tokens, int64_t E, const TransportOptions& options) {
  return Layout<T>(G, tokens, E, options, nullptr).bytes;
}

template <typename T>
void ksparse_transport(
    const T* similarity, T* plan, int64_t G, int64_t tokens, int64_t E,
    const TransportOptions& options, void* workspace, CUstream_st* stream) {
  const Layout<T> layout(G, tokens, E, options, workspace);
  if (layout.bytes == 0) return;
  Task<T> task = layout.task;
  task.similarity = similarity;
  task.plan = plan;
  if (layout.staged) {
    launch(
        options.solver == Solver::kAdam ? group_kernel<T, Solver::kAdam>
                                        : group_kernel<T, Solver::kLbfgs>,
        G, tokens * E <= 1024 ? 128 : kMostThreads, layout.shared, stream, task);
  } else {
    run(task, G, options, stream);
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template size_t ksparse_transport_workspace<T>(                                                  \
      int64_t, int64_t, int64_t, const TransportOptions&);                                         \
  template void ksparse_transport(                                                                 \
      const T*, T*, int64_t, int64_t, int64_t, const TransportOptions&, void*, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
