// sinkhorn_domains -- the updates of sinkhorn.h by a block, on exp(M) or on logarithms, and their
// gradients.
//
// A block has all tokens of a group or a piece of them. Whatever is summed over the tokens is left
// behind as this piece's part; where there are several, gather() joins them before the next update.
#pragma once

#include "matrix.h"

namespace vmoe::cuda {

// What is known of a group before it is iterated on.
struct Facts {
  double high;      // of the logits
  double marginal;  // n / E
  int32_t scaling;  // whether exp(M) will do
};

struct Piece {
  int64_t count, E;  // tokens, experts
  int lanes;         // of a row
  double inverse_epsilon;
  double* of_row;     // [kRowVectors, count] or, for a gradient, [kRowVectorsOfGradient, count]
  double* of_column;  // [kColumnVectors, E]
  double* storage;    // [threads]
};
constexpr int kRowVectors = 2, kRowVectorsOfGradient = 3;
constexpr int64_t kColumnVectors = 4;

// The parts of a group's column sums, [pieces, 2, E]; the second is the logarithms' alone.
struct Parts {
  double* sums;
  int64_t pieces;
  int64_t E;
  __device__ double* sum(int64_t piece) const { return sums + piece * 2 * E; }
  __device__ double* peak(int64_t piece) const { return sums + (piece * 2 + 1) * E; }
};

// out[e] = the sum of the parts.
__device__ inline void gather_sums(const Piece& piece, const Parts& parts, double* out) {
  each_column(piece.E, piece.storage, out, Sum{}, [&](int64_t e, int first, int step) {
    double sum = 0;
    for (int64_t i = first; i < parts.pieces; i += step) sum += parts.sum(i)[e];
    return sum;
  });
}

// Every warp finds it for itself.
__device__ inline double largest_of(const double* values, int64_t size) {
  return join_all(WarpTeam{}, size, -kInfinity, Largest{}, [=](int64_t i) { return values[i]; });
}

// On K[t, e] = exp(M[t, e] - max_e M[t, e]), in T: an exp an entry once, products after that. The
// potentials are exp(f_t) = u_t exp(-max_e M[t, e] - log_scale) and exp(h_e) = v_e exp(log_scale),
// with max v = 1. An absent token has K = 0 and u = 0.
template <typename T>
class ScalingDomain {
 public:
  __device__ ScalingDomain(const Piece& piece, const Facts& facts, T* K, int64_t stride)
      : piece_(piece), facts_(facts), K_(K), stride_(stride) {}

  // K from the logits, which may lie where K will, and u at f = 0.
  __device__ void start(const T* logits, int64_t stride) {
    log_scale_ = first_log_scale();
    fill(logits, stride, u());
  }

  // The parts of sum_t K[t, e] u[t].
  __device__ void sum_columns(double* sums, double*) const { weigh_columns(u(), sums); }

  __device__ void gather(const Parts& parts) { gather_sums(piece_, parts, total()); }
  __device__ void close() {}

  // h may be null: one block writes it. By the last threads, which have no
  // row mostly.
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

  // max_e |column sum / (n/E) - 1|, by every warp for itself.
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

  // The gradient. In the plan after step i and in the columns' softmax before it only the
  // potentials change from step to step, so what a step takes from entry (t, e) is
  //   K[t, e] (a_i[t] v_i[e] + u_{i-1}[t] c_i[e]),   a_i = df_i u_i,  c_i = dh_i v_i / (n/E)
  // `rest` [count, rest_stride] is what is left, over K.

  __device__ void start_gradient(const T* logits, int64_t stride) const {
    fill(logits, stride, first_u());
  }

  // From the last iteration's h, with grad in `rest`; the parts of -sum_t K u (grad - df).
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

  // Back over the iteration that gave h. `before` is h of the one before, null in the first. With
  // the sums that the step after left gathered: dh = -v sum.
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
      __syncwarp();  // a[t] was read by all of the row's lanes
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

  // exp((x - from) / epsilon). In float32 the exponent would be off by 2e-6 at 40: what it
  // lacks is multiplied in.
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

  __device__ void fill(const T* logits, int64_t stride, T* of_row) const {
    each_row(piece_.count, piece_.E, piece_.lanes, [&](int64_t t, int lane, int64_t width) {
      T top = static_cast<T>(-kInfinity);
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        top = Largest{}(top, logits[t * stride + e]);
      }
      top = join_lanes(top, piece_.lanes, Largest{});
      const bool there = top > static_cast<T>(-kInfinity);
      for (int64_t e = lane; e < width; e += piece_.lanes) {
        K(t, e) = there ? power(logits[t * stride + e], top) : 0;
      }
      if (lane == 0 && width > 0) of_row[t] = there ? power(top, facts_.high) : 0;
    });
    __syncthreads();
  }

  __device__ void set(T* values, const double* h, double scale) const {
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) {
      values[e] = static_cast<T>(exp(h[e] - scale));
    }
    __syncthreads();
  }

  // A sum over some tokens, in T a few at a time and in float64 from there.
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

// The same on the potentials' logarithms, in float64: right for any logits, an exp for every entry
// and update.
//
// f_t is kept as two numbers, -top_t - log_sum_t, the largest M[t, e] + h_e and the logarithm of
// the sum relative to it: where top is so large that their sum would lose log_sum, the rows of the
// plan still sum to 1. The columns are moved by what the plan's own sums lack.
template <typename T>
class LogDomain {
 public:
  __device__ LogDomain(const Piece& piece, const Facts& facts, const T* logits, int64_t stride)
      : piece_(piece), facts_(facts), logits_(logits), stride_(stride) {}

  __device__ void start(const T*, int64_t) {
    for (int64_t t = threadIdx.x; t < piece_.count; t += blockDim.x) set_row(t, {0, 0});
    for (int64_t e = threadIdx.x; e < piece_.E; e += blockDim.x) h()[e] = 0;
    __syncthreads();
  }

  // The parts of logsumexp_t(log_weight(t, e)): the largest, and the sum relative to it.
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

  // -inf for a column that no token can reach.
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

  // f = -logsumexp_e(M + h); -inf for an absent token, whose plan is then 0.
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

  // h is null where no iteration was done. The parts of -sum_t (grad - df) * plan.
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
        // The row update, and then the column update, on what it was given.
        const double taken = d_potential * exp(log_weight(t, e, potential, h()));
        const double d =
            -total()[e] * exp(log_weight(t, e, potential_before, h())) * inverse_marginal;
        rest[t * rest_stride + e] = static_cast<T>(rest[t * rest_stride + e] - taken - d);
        sum -= d;
      }
      sum = join_lanes(sum, piece_.lanes, Sum{});
      __syncwarp();  // the row's potential and df[t] were read by all of its lanes
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

  // All lanes of the row get it.
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
