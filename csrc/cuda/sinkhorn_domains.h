// sinkhorn_domains -- the updates of sinkhorn.h and their gradients, by one block. ScalingDomain
// computes the updates on exp(M), LogDomain on logarithms. Both domains have the same interface.
//
// A block has all tokens of a group, or one piece of the tokens. A function that sums over tokens
// writes the partial sums of this block's piece. If a group has several pieces, the pieces' partial
// sums are added up (gather, gather_sums) before the next update.
#pragma once

#include "matrix.h"

namespace vmoe::cuda {

// Facts about a group that are known before its first iteration.
struct Facts {
  double high;      // the largest logit
  double marginal;  // n / E, the sum that every column should have
  int32_t scaling;  // whether to iterate on exp(M), else on logarithms
};

// The tokens of a block, and memory for its vectors.
struct Piece {
  int64_t count, E;  // tokens, experts
  int lanes;         // per row
  double inverse_epsilon;
  double* of_row;     // [kRowVectors, count] or, for a gradient, [kRowVectorsOfGradient, count]
  double* of_column;  // [kColumnVectors, E]
  double* storage;    // [threads], for each_column
};
constexpr int kRowVectors = 2, kRowVectorsOfGradient = 3;
constexpr int64_t kColumnVectors = 4;

// The partial column sums of all pieces of a group. LogDomain has a peak and a sum per column,
// ScalingDomain a sum alone.
struct Parts {
  double* sums;  // [pieces, 2, E]
  int64_t pieces;
  int64_t E;
  __device__ double* sum(int64_t piece) const { return sums + piece * 2 * E; }
  __device__ double* peak(int64_t piece) const { return sums + (piece * 2 + 1) * E; }
};

// out[e] = the sum over the pieces.
__device__ inline void gather_sums(const Piece& piece, const Parts& parts, double* out) {
  each_column(piece.E, piece.storage, out, Sum{}, [&](int64_t e, int first, int step) {
    double sum = 0;
    for (int64_t i = first; i < parts.pieces; i += step) sum += parts.sum(i)[e];
    return sum;
  });
}

// The largest of `size` values. Every warp computes the result for itself.
__device__ inline double largest_of(const double* values, int64_t size) {
  return join_all(WarpTeam{}, size, -kInfinity, Largest{}, [=](int64_t i) { return values[i]; });
}

// The updates on K[t, e] = exp(M[t, e] - max_e M[t, e]), in T. Each entry takes one exp before the
// first iteration, and only products after that. The potentials are
//   exp(f_t) = u_t exp(-max_e M[t, e] - log_scale)   and   exp(h_e) = v_e exp(log_scale),
// with max v = 1. A masked token has K = 0 and u = 0.
template <typename T>
class ScalingDomain {
 public:
  __device__ ScalingDomain(const Piece& piece, const Facts& facts, T* K, int64_t stride)
      : piece_(piece), facts_(facts), K_(K), stride_(stride) {}

  // Computes K from the logits, which may be in the memory of K, and u for f = 0.
  __device__ void start(const T* logits, int64_t stride) {
    log_scale_ = first_log_scale();
    fill(logits, stride, u());
  }

  // sums[e] = sum_t K[t, e] u[t] over this piece.
  __device__ void sum_columns(double* sums, double*) const { weigh_columns(u(), sums); }

  __device__ void gather(const Parts& parts) { gather_sums(piece_, parts, total()); }
  __device__ void close() {}

  // One block of a group gets an h to write to. All other blocks get null. The last threads of the
  // block write h, because most of these threads have no row in step_rows. Only the threads that
  // write h keep log_scale_ up to date.
  __device__ void step_columns(double* h) {
    const double least =
        join_all(WarpTeam{}, piece_.E, kInfinity, Least{}, [&](int64_t e) { return total()[e]; });
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) {
      v()[e] = static_cast<T>(least / total()[e]);
    }
    __syncthreads();
    const int64_t from_last = blockDim.x - 1 - threadIdx.x;
    if (!h || from_last >= piece_.E) return;
    const double log_marginal = log(facts_.marginal);
    for (int64_t e = from_last; e < piece_.E; e += blockDim.x) {
      h[e] = log_scale_ + log_marginal - log(total()[e]);
    }
    log_scale_ += log_marginal - log(least);
  }

  __device__ void step_rows() const {
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      T sum = 0;
      for (int64_t e = lane; e < width; e += piece_.lanes) sum += K(t, e) * v()[e];
      sum = join_lanes(sum, piece_.lanes, Sum{});
      if (lane == 0 && width > 0) u()[t] = inverse(sum);
    });
    __syncthreads();
  }

  // max_e |column sum / (n/E) - 1|. Every warp computes the result for itself.
  __device__ double error() const {
    return join_all(WarpTeam{}, piece_.E, 0.0, Largest{}, [&](int64_t e) {
      return fabs(total()[e] * v()[e] / facts_.marginal - 1);
    });
  }

  __device__ void write_plan(T* plan) const {
    each_entry(piece_.count, piece_.E, [&](int64_t t, int64_t e) {
      plan[t * piece_.E + e] = u()[t] * K(t, e) * v()[e];
    });
  }

  // The gradient, from the last step to the first. Step i, with the potentials h_i and f_i, has the
  // gradients dh_i and df_i. Step i subtracts from the gradient of M[t, e]
  //   K[t, e] (a_i[t] v_i[e] + u_{i-1}[t] c_i[e]),   a_i = df_i u_i,  c_i = dh_i v_i / (n/E)
  // `rest` [count, rest_stride] is the gradient that remains, divided by K.

  __device__ void start_gradient(const T* logits, int64_t stride) const {
    fill(logits, stride, first_u());
  }

  // Starts at h of the last iteration, with grad in `rest`. Writes -sum_t K u (grad - df) over this
  // piece to `sums`.
  __device__ void begin_gradient(
      const double* h, T* rest, int64_t rest_stride, double* sums) const {
    set(v(), h, largest_of(h, piece_.E));
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      T row = 0, dot = 0;
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        const T kv = K(t, e) * v()[e];
        row += kv;
        dot += kv * rest[t * rest_stride + e];
      }
      const T of_row = inverse(join_lanes(row, piece_.lanes, Sum{}));
      const T df = of_row * join_lanes(dot, piece_.lanes, Sum{});
      for (int64_t e = lane; e < width; e += piece_.lanes) rest[t * rest_stride + e] *= of_row;
      if (lane == 0 && width > 0) a()[t] = df * of_row;
    });
    __syncthreads();
    each_column(piece_.E, piece_.storage, sums, Sum{}, [&](int64_t e, int first, int step) {
      const T of_column = v()[e];
      return in_chains(first, step, [&](int64_t t) {
        T& left = rest[t * rest_stride + e];
        const T part = K(t, e) * (a()[t] - left);
        left *= of_column;
        return part;
      });
    });
  }

  // The backward of the iteration that computed h. `before` is h of the previous iteration, or null
  // for the first iteration. total() holds the added-up `sums` of the previous call: dh = -v total.
  __device__ void take_step(
      const double* h, const double* before, T* rest, int64_t rest_stride, double* sums) const {
    const double scale = largest_of(h, piece_.E);
    const double scale_before = before ? largest_of(before, piece_.E) : first_log_scale();
    const double factor = exp(scale - scale_before) / facts_.marginal;
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) {
      const double of_column = exp(h[e] - scale);
      v()[e] = static_cast<T>(of_column);
      c()[e] = static_cast<T>(-total()[e] * of_column * of_column * factor);
      if (before) v_before()[e] = static_cast<T>(exp(before[e] - scale_before));
    }
    __syncthreads();
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      const T of_row = width > 0 ? a()[t] : 0;
      T of_row_before = width > 0 ? first_u()[t] : 0, da = 0;
      if (before) {
        T row = 0, dot = 0;
        for (int64_t e = lane; e < width; e += piece_.lanes) {
          row += K(t, e) * v_before()[e];
          dot += K(t, e) * c()[e];
        }
        of_row_before = inverse(join_lanes(row, piece_.lanes, Sum{}));
        da = -of_row_before * join_lanes(dot, piece_.lanes, Sum{}) * of_row_before;
      }
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        rest[t * rest_stride + e] -= of_row * v()[e] + of_row_before * c()[e];
      }
      __syncwarp();  // all lanes of the row have read a[t]
      if (lane == 0 && width > 0) a()[t] = da;
    });
    __syncthreads();
    if (before) weigh_columns(a(), sums);
  }

  __device__ void write_gradient(const T* rest, int64_t rest_stride, T* grad) const {
    const T inverse_epsilon = static_cast<T>(piece_.inverse_epsilon);
    each_entry(piece_.count, piece_.E, [&](int64_t t, int64_t e) {
      grad[t * piece_.E + e] = rest[t * rest_stride + e] * K(t, e) * inverse_epsilon;
    });
  }

  __device__ double* total() const { return piece_.of_column; }
  __device__ double* peak() const { return nullptr; }

 private:
  __device__ T& K(int64_t t, int64_t e) const { return K_[t * stride_ + e]; }
  __device__ T* u() const { return reinterpret_cast<T*>(piece_.of_row); }
  __device__ T* a() const { return u(); }
  __device__ T* first_u() const { return reinterpret_cast<T*>(piece_.of_row + piece_.count); }
  __device__ T* vector(int i) const {
    return reinterpret_cast<T*>(piece_.of_column + i * piece_.E);
  }
  __device__ T* v() const { return vector(1); }
  __device__ T* v_before() const { return vector(2); }
  __device__ T* c() const { return vector(3); }

  __device__ double first_log_scale() const { return -facts_.high * piece_.inverse_epsilon; }
  static __device__ T inverse(T x) { return x > 0 ? 1 / x : 0; }

  // exp((x - from) / epsilon). Rounding an exponent of 40 to float32 would cause a relative error
  // of 2e-6 in the result. So the result is multiplied by 1 + the rest that the rounding removed.
  __device__ T power(double x, double from) const {
    const double exponent = (x - from) * piece_.inverse_epsilon;
    if constexpr (sizeof(T) == sizeof(double)) {
      return exp(exponent);
    } else {
      const float rounded = static_cast<float>(exponent);
      const float value = expf(rounded);
      return value + value * static_cast<float>(exponent - rounded);
    }
  }

  // Computes K, and of_row[t] = exp(max_e M[t, e] - max M).
  __device__ void fill(const T* logits, int64_t stride, T* of_row) const {
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      T top = static_cast<T>(-kInfinity);
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        top = Largest{}(top, logits[t * stride + e]);
      }
      top = join_lanes(top, piece_.lanes, Largest{});
      const bool present = top > static_cast<T>(-kInfinity);
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        K(t, e) = present ? power(logits[t * stride + e], top) : 0;
      }
      if (lane == 0 && width > 0) of_row[t] = present ? power(top, facts_.high) : 0;
    });
    __syncthreads();
  }

  __device__ void set(T* values, const double* h, double scale) const {
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) {
      values[e] = static_cast<T>(exp(h[e] - scale));
    }
    __syncthreads();
  }

  // Sums value(t), value(t + step), .... Each sum of kChain values is computed in T. These sums are
  // added up in float64.
  template <typename Value>
  __device__ double in_chains(int64_t t, int step, Value&& value) const {
    constexpr int kChain = 32;
    double sum = 0;
    while (t < piece_.count) {
      T part = 0;
      for (int i = 0; i < kChain && t < piece_.count; ++i, t += step) part += value(t);
      sum += part;
    }
    return sum;
  }

  // sums[e] = sum_t K[t, e] of_row[t] over this piece.
  __device__ void weigh_columns(const T* of_row, double* sums) const {
    each_column(piece_.E, piece_.storage, sums, Sum{}, [&](int64_t e, int first, int step) {
      return in_chains(first, step, [&](int64_t t) { return K(t, e) * of_row[t]; });
    });
  }

  Piece piece_;
  Facts facts_;
  T* K_;  // [count, stride]
  int64_t stride_;
  double log_scale_ = 0;
};

// The updates on logarithms, in float64. These updates are correct for any logits. They take one
// exp per entry and update.
//
// f_t = -top_t - log_sum_t is stored as two numbers. top_t is the largest M[t, e] + h_e. log_sum_t
// is the logarithm of sum_e exp(M[t, e] + h_e - top_t). So the rows of the plan sum to 1 even if
// top_t is so large that rounding top_t + log_sum_t would lose log_sum_t. A column update adds
// log(n/E) minus the logarithm of the plan's column sum to h_e.
template <typename T>
class LogDomain {
 public:
  __device__ LogDomain(const Piece& piece, const Facts& facts, const T* logits, int64_t stride)
      : piece_(piece), facts_(facts), logits_(logits), stride_(stride) {}

  // Sets f = 0 and h = 0.
  __device__ void start(const T*, int64_t) {
    for (int64_t t = threadIdx.x; t < piece_.count; t += blockDim.x) set_row(t, {0, 0});
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) h()[e] = 0;
    __syncthreads();
  }

  // logsumexp_t(log_weight(t, e)) over this piece, as two numbers: the largest log_weight in
  // `peaks`, and the sum of exp(log_weight - peak) in `sums`.
  __device__ void sum_columns(double* sums, double* peaks) const {
    const auto power = [&](int64_t t, int64_t e) { return log_weight(t, e, row(t), h()); };
    each_column(piece_.E, piece_.storage, peaks, Largest{}, [&](int64_t e, int first, int step) {
      double high = -kInfinity;
      for (int64_t t = first; t < piece_.count; t += step) high = Largest{}(high, power(t, e));
      return high;
    });
    each_column(piece_.E, piece_.storage, sums, Sum{}, [&](int64_t e, int first, int step) {
      double sum = 0;
      if (peaks[e] == -kInfinity) return sum;
      for (int64_t t = first; t < piece_.count; t += step) sum += exp(power(t, e) - peaks[e]);
      return sum;
    });
  }

  __device__ void gather(const Parts& parts) {
    each_column(piece_.E, piece_.storage, peak(), Largest{}, [&](int64_t e, int first, int step) {
      double high = -kInfinity;
      for (int64_t i = first; i < parts.pieces; i += step) {
        high = Largest{}(high, parts.peak(i)[e]);
      }
      return high;
    });
    each_column(piece_.E, piece_.storage, total(), Sum{}, [&](int64_t e, int first, int step) {
      double sum = 0;
      if (peak()[e] == -kInfinity) return sum;
      for (int64_t i = first; i < parts.pieces; i += step) {
        sum += parts.sum(i)[e] * exp(parts.peak(i)[e] - peak()[e]);
      }
      return sum;
    });
  }

  // total()[e] = the logarithm of the column sum, or -inf for a column that no token can reach.
  __device__ void close() {
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) {
      total()[e] = peak()[e] == -kInfinity ? -kInfinity : peak()[e] + log(total()[e]);
    }
    __syncthreads();
  }

  __device__ void step_columns(double* out) {
    const double log_marginal = log(facts_.marginal);
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) {
      h()[e] = total()[e] == -kInfinity ? -kInfinity : h()[e] + (log_marginal - total()[e]);
      if (out) out[e] = h()[e];
    }
    __syncthreads();
  }

  // f = -logsumexp_e(M + h), or -inf for a masked token, so that its plan is 0.
  __device__ void step_rows() const {
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      const RowPotential potential = row_potential(t, lane, width, h());
      if (lane == 0 && width > 0) set_row(t, potential);
    });
    __syncthreads();
  }

  __device__ double error() const {
    if (facts_.marginal == 0) return 0;  // no token is present
    const double log_marginal = log(facts_.marginal);
    return join_all(WarpTeam{}, piece_.E, 0.0, Largest{}, [&](int64_t e) {
      const double ratio = total()[e] == -kInfinity ? 0 : exp(total()[e] - log_marginal);
      return fabs(ratio - 1);
    });
  }

  __device__ void write_plan(T* plan) const {
    each_entry(piece_.count, piece_.E, [&](int64_t t, int64_t e) {
      plan[t * piece_.E + e] = static_cast<T>(exp(log_weight(t, e, row(t), h())));
    });
  }

  __device__ void start_gradient(const T*, int64_t) const {}

  // Starts at the column potentials `from`, which is null if no iteration was done, with grad in
  // `rest`. Writes -sum_t (grad - df) * plan over this piece to `sums`. Sets `rest` to grad * plan,
  // from which each later take_step subtracts its terms. At the end `rest` is the gradient of M.
  __device__ void begin_gradient(
      const double* from, T* rest, int64_t rest_stride, double* sums) const {
    set(h(), from);
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      const RowPotential potential = from ? row_potential(t, lane, width, h()) : RowPotential{0, 0};
      double sum = 0;
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        T& left = rest[t * rest_stride + e];
        const double d = left * exp(log_weight(t, e, potential, h()));
        left = static_cast<T>(d);
        sum += d;
      }
      sum = join_lanes(sum, piece_.lanes, Sum{});
      if (lane == 0 && width > 0) {
        set_row(t, potential);
        df()[t] = sum;
      }
    });
    __syncthreads();
    each_column(piece_.E, piece_.storage, sums, Sum{}, [&](int64_t e, int first, int step) {
      double sum = 0;
      for (int64_t t = first; t < piece_.count; t += step) {
        sum += df()[t] * exp(log_weight(t, e, row(t), h())) - rest[t * rest_stride + e];
      }
      return sum;
    });
  }

  // The backward of the iteration that computed the potentials `from`. `before` is as in
  // ScalingDomain.
  __device__ void take_step(
      const double* from, const double* before, T* rest, int64_t rest_stride, double* sums) const {
    set(h(), from);
    set(h_before(), before);
    const double inverse_marginal = facts_.marginal == 0 ? 0 : 1 / facts_.marginal;
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      const RowPotential potential_before =
          before ? row_potential(t, lane, width, h_before()) : RowPotential{0, 0};
      const RowPotential potential = width > 0 ? row(t) : RowPotential{0, 0};
      const double d_potential = width > 0 ? df()[t] : 0;
      double sum = 0;
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        // `taken` is the gradient through the row update. d is the gradient through the column
        // update before that row update.
        const double taken = d_potential * exp(log_weight(t, e, potential, h()));
        const double d =
            -total()[e] * exp(log_weight(t, e, potential_before, h())) * inverse_marginal;
        rest[t * rest_stride + e] = static_cast<T>(rest[t * rest_stride + e] - taken - d);
        sum -= d;
      }
      sum = join_lanes(sum, piece_.lanes, Sum{});
      __syncwarp();  // all lanes of the row have read its potential and df[t]
      if (lane == 0 && width > 0) {
        set_row(t, potential_before);
        df()[t] = sum;
      }
    });
    __syncthreads();
    if (!before) return;
    each_column(piece_.E, piece_.storage, sums, Sum{}, [&](int64_t e, int first, int step) {
      double sum = 0;
      for (int64_t t = first; t < piece_.count; t += step) {
        sum += df()[t] * exp(log_weight(t, e, row(t), h_before()));
      }
      return sum;
    });
  }

  __device__ void write_gradient(const T* rest, int64_t rest_stride, T* grad) const {
    each_entry(piece_.count, piece_.E, [&](int64_t t, int64_t e) {
      grad[t * piece_.E + e] = static_cast<T>(rest[t * rest_stride + e] * piece_.inverse_epsilon);
    });
  }

  __device__ double* total() const { return piece_.of_column; }
  __device__ double* peak() const { return piece_.of_column + 2 * piece_.E; }

 private:
  struct RowPotential {
    double top, log_sum;
  };

  __device__ double M(int64_t t, int64_t e) const {
    return logits_[t * stride_ + e] * piece_.inverse_epsilon;
  }
  __device__ double log_weight(
      int64_t t, int64_t e, const RowPotential& row, const double* of_column) const {
    return M(t, e) + of_column[e] - row.top - row.log_sum;
  }

  __device__ RowPotential row(int64_t t) const {
    return {piece_.of_row[t], piece_.of_row[piece_.count + t]};
  }
  __device__ void set_row(int64_t t, const RowPotential& potential) const {
    piece_.of_row[t] = potential.top;
    piece_.of_row[piece_.count + t] = potential.log_sum;
  }
  __device__ double* df() const { return piece_.of_row + 2 * piece_.count; }
  __device__ double* h() const { return piece_.of_column + piece_.E; }
  __device__ double* h_before() const { return piece_.of_column + 3 * piece_.E; }

  __device__ void set(double* values, const double* from) const {
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) values[e] = from ? from[e] : 0;
    __syncthreads();
  }

  // The potential f_t for the column potentials `of_column`. All lanes of the row get f_t.
  __device__ RowPotential
  row_potential(int64_t t, int lane, int64_t width, const double* of_column) const {
    double top = -kInfinity, sum = 0;
    for (int64_t e = lane; e < width; e += piece_.lanes) {
      top = Largest{}(top, M(t, e) + of_column[e]);
    }
    top = join_lanes(top, piece_.lanes, Largest{});
    for (int64_t e = lane; e < width && top != -kInfinity; e += piece_.lanes) {
      sum += exp(M(t, e) + of_column[e] - top);
    }
    sum = join_lanes(sum, piece_.lanes, Sum{});
    if (top == -kInfinity) return {0, kInfinity};  // no entry has weight
    return {top, log(sum)};
  }

  Piece piece_;
  Facts facts_;
  const T* logits_;  // [count, stride]
  int64_t stride_;
};

}  // namespace vmoe::cuda
