#include "../grouped_mlp.h"

#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "../filled_rows.h"
#include "product.h"

namespace vmoe {
namespace {

// Rows of a product. Forward: few, so that the hidden rows stay in cache from one product to
// the next. Backward: many, since every block adds to the whole gradient of the weights;
// there the hidden columns are cut instead.
constexpr int64_t kRows = 128, kRowsBackward = 1024, kColumnsBackward = 384;

struct Sizes {
  int64_t E, N, D, F, out, G;
};

Sizes check(
    const char* op, const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
    const Tensor& w2, const std::optional<Tensor>& filled, const std::string& act) {
  check_dim(op, "x", x, 3);
  check_dim(op, "w1", w1, 3);
  check_dim(op, "w2", w2, 3);
  const int64_t E = x.size(0), N = x.size(1), D = x.size(2), F = w1.size(2), out = w2.size(2);
  check_shape(op, "w1", w1, {E, D, F});
  check_shape(op, "w2", w2, {E, F, out});
  check_dtype(op, "w1", w1, x.scalar_type());
  check_dtype(op, "w2", w2, x.scalar_type());
  if (b1) {
    check_shape(op, "b1", *b1, {E, F});
    check_dtype(op, "b1", *b1, x.scalar_type());
  }
  int64_t G = 1;
  if (filled) {
    check_dim(op, "filled", *filled, 2);
    G = filled->size(1);
    check_shape(op, "filled", *filled, {E, G});
    check_dtype(op, "filled", *filled, ScalarType::Int);
    STD_TORCH_CHECK(
        G > 0 ? N % G == 0 : N == 0, op, ": ", N, " rows are not ", G, " segments of one size");
  }
  STD_TORCH_CHECK(act == "gelu" || act == "gelu_tanh", op, ": act = ", act);
  return {E, N, D, F, out, G};
}

FilledRows rows_of(const Sizes& sizes, const std::optional<Tensor>& filled) {
  const int64_t C = sizes.G > 0 ? sizes.N / sizes.G : 0;
  return {filled ? read<int32_t>(*filled) : nullptr, sizes.E, sizes.G, C};
}

// body(task, scratch) for every task, in parallel; whoever is free takes the next one, since
// experts are not equally busy. What a task computes does not depend on who does.
template <typename T, typename Body>
void each_task(int64_t tasks, int64_t scratch_elements, const Tensor& like, Body&& body) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t scratch_size = (scratch_elements + line - 1) / line * line;
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const Tensor scratch = empty({workers, scratch_size}, like);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    T* mine = write<T>(scratch) + worker * scratch_size;
    for (int64_t task = next++; task < tasks; task = next++) body(task, mine);
  });
}

struct Block {
  int64_t expert, begin, end;  // filled rows [begin, end) of the expert
};

// About `size` rows each: a short rest goes with the last block.
std::vector<Block> blocks_of(const FilledRows& rows, int64_t E, int64_t size) {
  std::vector<Block> blocks;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t count = rows.count(e);
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = count - begin < size + size / 2 ? count : begin + size;
      blocks.push_back({e, begin, end});
    }
  }
  return blocks;
}

int64_t most_rows(const std::vector<Block>& blocks) {
  int64_t most = 0;
  for (const Block& block : blocks) most = std::max(most, block.end - block.begin);
  return most;
}

// An expert's rows of a block: where they lie if no gap is between them, else copied to `to`.
template <typename T>
const T* gather(
    const FilledRows& rows, const Block& block, const T* expert, int64_t columns, T* to) {
  const int64_t joined = rows.joined(block.expert, block.begin, block.end);
  if (joined >= 0) return expert + joined * columns;
  rows.each_run(block.expert, block.begin, block.end, [&](int64_t row, int64_t at, int64_t count) {
    memcpy(to + (at - block.begin) * columns, expert + row * columns, count * columns * sizeof(T));
  });
  return to;
}

// The way back: the rows of a block, plus a bias (or null), to their places.
template <typename T>
void scatter(
    const FilledRows& rows, const Block& block, const T* from, const T* bias, int64_t columns,
    T* expert) {
  rows.each_run(block.expert, block.begin, block.end, [&](int64_t row, int64_t at, int64_t count) {
    const T* x = from + (at - block.begin) * columns;
    T* out = expert + row * columns;
    if (bias || x != out) cpu::add_bias(x, bias, out, count, columns);
  });
}

// Where the products of a block may be written at once; else `scratch`, to be scattered.
template <typename T>
T* place(const FilledRows& rows, const Block& block, T* expert, int64_t columns, T* scratch) {
  const int64_t joined = rows.joined(block.expert, block.begin, block.end);
  return joined >= 0 ? expert + joined * columns : scratch;
}

template <typename T>
void clear_gaps(const FilledRows& rows, const Sizes& sizes, int64_t columns, const Tensor& out) {
  parallel(sizes.E, sizes.N * columns, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      T* expert = write<T>(out) + e * sizes.N * columns;
      rows.each_gap(e, [&](int64_t row, int64_t count) {
        memset(expert + row * columns, 0, count * columns * sizeof(T));
      });
    }
  });
}

template <typename T>
const T* at(const std::optional<Tensor>& bias, int64_t i) {
  return bias ? read<T>(*bias) + i : nullptr;
}

std::tuple<Tensor, Tensor> grouped_mlp(
    const Tensor& x_, const Tensor& w1_, std::optional<Tensor> b1_, const Tensor& w2_,
    std::optional<Tensor> b2_, std::optional<Tensor> filled_, const std::string& act, bool save) {
  const Sizes sizes = check("grouped_mlp", x_, w1_, b1_, w2_, filled_, act);
  const int64_t E = sizes.E, N = sizes.N, D = sizes.D, F = sizes.F, out = sizes.out;
  if (b2_) {
    check_shape("grouped_mlp", "b2", *b2_, {E, out});
    check_dtype("grouped_mlp", "b2", *b2_, x_.scalar_type());
  }
  const Tensor x = packed(x_), w1 = packed(w1_), w2 = packed(w2_);
  const std::optional<Tensor> b1 = packed(b1_), b2 = packed(b2_), filled = packed(filled_);
  Tensor y = empty({E, N, out}, x), hidden = empty({E, save ? N : 0, F}, x);
  const FilledRows rows = rows_of(sizes, filled);
  const std::vector<Block> blocks = blocks_of(rows, E, kRows);
  const int64_t most = most_rows(blocks);
  by_dtype("grouped_mlp", x, [&](auto zero) {
    using T = decltype(zero);
    clear_gaps<T>(rows, sizes, out, y);
    each_task<T>(blocks.size(), most * (D + F + out), x, [&](int64_t task, T* scratch) {
      const Block& block = blocks[task];
      const int64_t e = block.expert, count = block.end - block.begin;
      T* act_of = scratch + most * D;
      T* y_of = write<T>(y) + e * N * out;
      const T* xs = gather(rows, block, read<T>(x) + e * N * D, D, scratch);
      T* product_of = save ? write<T>(hidden) + (e * N + block.begin) * F : act_of;
      T* ys = place(rows, block, y_of, out, act_of + most * F);
      multiply<T>(
          matrix(product_of, count, F), matrix(xs, count, D),
          matrix(read<T>(w1) + e * D * F, D, F));
      cpu::bias_gelu(product_of, at<T>(b1, e * F), act_of, count, F, F, act == "gelu_tanh");
      multiply<T>(
          matrix(ys, count, out), matrix(act_of, count, F),
          matrix(read<T>(w2) + e * F * out, F, out));
      scatter(rows, block, ys, at<T>(b2, e * out), out, y_of);
    });
  });
  return {y, hidden};
}

// Without `hidden` (no rows) it is computed once more. What is not asked for comes out empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grouped_mlp_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& w1_, std::optional<Tensor> b1_,
    const Tensor& w2_, std::optional<Tensor> filled_, const Tensor& hidden_, const std::string& act,
    bool of_x, bool of_weights) {
  const char* op = "grouped_mlp_backward";
  const Sizes sizes = check(op, x_, w1_, b1_, w2_, filled_, act);
  const int64_t E = sizes.E, N = sizes.N, D = sizes.D, F = sizes.F, out = sizes.out;
  check_shape(op, "grad", grad_, {E, N, out});
  check_dtype(op, "grad", grad_, x_.scalar_type());
  check_dim(op, "hidden", hidden_, 3);
  const bool saved = hidden_.size(1) > 0;
  check_shape(op, "hidden", hidden_, {E, saved ? N : 0, F});
  check_dtype(op, "hidden", hidden_, x_.scalar_type());
  const Tensor grad = packed(grad_), x = packed(x_), w1 = packed(w1_), w2 = packed(w2_);
  const Tensor hidden = packed(hidden_);
  const std::optional<Tensor> b1 = packed(b1_), filled = packed(filled_);
  const auto made = [&](bool wanted, std::initializer_list<int64_t> shape) {
    return wanted ? empty(shape, x) : empty({0}, x);
  };
  Tensor grad_x = made(of_x, {E, N, D});
  Tensor grad_w1 = made(of_weights, {E, D, F}), grad_b1 = made(of_weights, {E, F});
  Tensor grad_w2 = made(of_weights, {E, F, out}), grad_b2 = made(of_weights, {E, out});

  const FilledRows rows = rows_of(sizes, filled);
  const std::vector<Block> blocks = blocks_of(rows, E, kRowsBackward);
  std::vector<size_t> first_block(E + 1, 0);
  for (const Block& block : blocks) first_block[block.expert + 1] += 1;
  std::partial_sum(first_block.begin(), first_block.end(), first_block.begin());

  // A task is an expert; where experts are few, a part of its hidden columns, and every part
  // makes a sum of its own for grad_x.
  const int64_t width = std::min(F, kColumnsBackward);
  const int64_t chunks = F > 0 ? (F + width - 1) / width : 1;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(2 * threads / std::max<int64_t>(E, 1), 1, chunks);
  const Tensor partial = parts > 1 ? made(of_x, {parts, E, N, D}) : empty({0}, x);
  if (of_weights) {
    torch::stable::zero_(grad_b1);
    torch::stable::zero_(grad_b2);
  }
  by_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    if (of_x) clear_gaps<T>(rows, sizes, D, grad_x);
    const int64_t most = most_rows(blocks);
    const int64_t scratch_size = most * (2 * D + out + 2 * width);
    each_task<T>(E * parts, scratch_size, x, [&](int64_t task, T* scratch) {
      const int64_t e = task / parts, part = task % parts;
      T* scratch_grad = scratch + most * D;
      T* scratch_sum = scratch_grad + most * out;
      T* act_of = scratch_sum + most * D;
      T* grad_act = act_of + most * width;
      const T* w1_of = read<T>(w1) + e * D * F;
      const T* w2_of = read<T>(w2) + e * F * out;
      if (of_weights && part == 0 && rows.count(e) == 0) {
        std::fill_n(write<T>(grad_w1) + e * D * F, D * F, T{0});
        std::fill_n(write<T>(grad_w2) + e * F * out, F * out, T{0});
      }
      for (size_t i = first_block[e]; i < first_block[e + 1]; ++i) {
        const Block& block = blocks[i];
        const int64_t count = block.end - block.begin;
        const T* xs = gather(rows, block, read<T>(x) + e * N * D, D, scratch);
        const T* grads = gather(rows, block, read<T>(grad) + e * N * out, out, scratch_grad);
        T* sum = nullptr;
        if (of_x) {
          sum = parts > 1 ? write<T>(partial) + ((part * E + e) * N + block.begin) * D
                          : place(rows, block, write<T>(grad_x) + e * N * D, D, scratch_sum);
        }
        for (int64_t chunk = part; chunk < chunks; chunk += parts) {
          const int64_t f = chunk * width, columns = std::min(width, F - f);
          const T* hidden_of = act_of;
          int64_t hidden_stride = columns;
          if (saved) {
            hidden_of = read<T>(hidden) + (e * N + block.begin) * F + f;
            hidden_stride = F;
          } else {
            multiply<T>(
                matrix(act_of, count, columns), matrix(xs, count, D),
                matrix(w1_of + f, D, columns, F));
          }
          multiply<T>(
              matrix(grad_act, count, columns), matrix(grads, count, out),
              transposed(w2_of + f * out, columns, out));
          cpu::bias_gelu_backward(
              hidden_of, at<T>(b1, e * F + f), act_of, grad_act,
              of_weights ? write<T>(grad_b1) + e * F + f : nullptr, count, columns, hidden_stride,
              act == "gelu_tanh");
          if (of_weights) {
            const bool first = i == first_block[e];
            multiply_add<T>(
                matrix(write<T>(grad_w2) + (e * F + f) * out, columns, out),
                transposed(act_of, count, columns), matrix(grads, count, out), first);
            multiply_add<T>(
                matrix(write<T>(grad_w1) + e * D * F + f, D, columns, F), transposed(xs, count, D),
                matrix(grad_act, count, columns), first);
          }
          if (of_x) {
            multiply_add<T>(
                matrix(sum, count, D), matrix(grad_act, count, columns),
                transposed(w1_of + f, D, columns, F), chunk == part);
          }
        }
        if (of_weights && part == 0) {
          cpu::add_rows(grads, write<T>(grad_b2) + e * out, count, out);
        }
        if (of_x && parts == 1) {
          scatter<T>(rows, block, sum, nullptr, D, write<T>(grad_x) + e * N * D);
        }
      }
    });
    if (!of_x || parts == 1) return;
    each_task<T>(blocks.size(), 0, x, [&](int64_t task, T*) {
      const Block& block = blocks[task];
      const int64_t size = (block.end - block.begin) * D;
      T* sum = write<T>(partial) + (block.expert * N + block.begin) * D;
      for (int64_t part = 1; part < parts; ++part) {
        cpu::add_rows(sum + part * E * N * D, sum, 1, size);
      }
      scatter<T>(rows, block, sum, nullptr, D, write<T>(grad_x) + block.expert * N * D);
    });
  });
  return {grad_x, grad_w1, grad_b1, grad_w2, grad_b2};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("grouped_mlp", TORCH_BOX(&grouped_mlp));
  m.impl("grouped_mlp_backward", TORCH_BOX(&grouped_mlp_backward));
}

}  // namespace vmoe
