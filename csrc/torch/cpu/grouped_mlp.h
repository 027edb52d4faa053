// grouped_mlp on a CPU -- computes the filled rows in blocks. A block is so small that its hidden
// rows stay in cache between the two products.
#pragma once

#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "../../cpu/filled_rows.h"
#include "../grouped_mlp.h"
#include "product.h"

namespace vmoe {
namespace {

// Rows per block. Blocks of the forward have few rows, so that the hidden rows stay in cache from
// one product to the next. Blocks of the backward have many rows, because every block adds to the
// whole gradient of the weights. There the hidden rows are computed in ranges of columns instead,
// to stay in cache.
constexpr int64_t kRows = 128, kRowsBackward = 1024, kColumnsBackward = 384;

FilledRows rows_of(const ExpertMlps& mlp) {
  const int64_t C = mlp.G > 0 ? mlp.N / mlp.G : 0;
  return {read_or_null<int32_t>(mlp.filled), mlp.E, mlp.G, C};
}

// Calls body(task, scratch) for every task, in parallel. A thread that has finished a task takes
// the next task, because experts have different numbers of rows. The result does not depend on
// which thread runs a task.
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

// Divides the filled rows of every expert into blocks of `size` rows. The last block of an expert
// has up to 1.5 * size rows.
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

// The rows of a block, from the matrix `expert` [N, columns] of its expert. Returns a pointer into
// `expert` if the rows are contiguous, else copies them to `to`.
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

// The inverse of gather: writes the rows of a block, plus a bias if not null, to the matrix
// `expert` [N, columns]. `from` may be in that matrix.
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

// Memory for the rows of a block. The memory is in the matrix `expert` if the rows are contiguous
// in that matrix. Otherwise the memory is `scratch`, and scatter() copies the rows to the matrix.
template <typename T>
T* place(const FilledRows& rows, const Block& block, T* expert, int64_t columns, T* scratch) {
  const int64_t joined = rows.joined(block.expert, block.begin, block.end);
  return joined >= 0 ? expert + joined * columns : scratch;
}

// Sets the rows of `out` that are not filled to 0.
template <typename T>
void clear_gaps(const FilledRows& rows, const ExpertMlps& mlp, int64_t columns, const Tensor& out) {
  parallel(mlp.E, mlp.N * columns, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      T* expert = write<T>(out) + e * mlp.N * columns;
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

// If `hidden` has no rows, the hidden rows are not kept.
void run_forward(
    const ExpertMlps& mlp, const std::optional<Tensor>& b2, const Tensor& y, const Tensor& hidden) {
  const int64_t E = mlp.E, N = mlp.N, D = mlp.D, F = mlp.F, out = mlp.out;
  const Tensor &x = mlp.x, &w1 = mlp.w1, &w2 = mlp.w2;
  const bool save = hidden.size(1) > 0;
  const FilledRows rows = rows_of(mlp);
  const std::vector<Block> blocks = blocks_of(rows, E, kRows);
  const int64_t most = most_rows(blocks);
  by_dtype("grouped_mlp", x, [&](auto zero) {
    using T = decltype(zero);
    clear_gaps<T>(rows, mlp, out, y);
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
      cpu::bias_gelu(product_of, at<T>(mlp.b1, e * F), act_of, count, F, F, mlp.tanh);
      multiply<T>(
          matrix(ys, count, out), matrix(act_of, count, F),
          matrix(read<T>(w2) + e * F * out, F, out));
      scatter(rows, block, ys, at<T>(b2, e * out), out, y_of);
    });
  });
}

// If `hidden` has no rows, the hidden rows are computed again.
void run_backward(
    const ExpertMlps& mlp, const Tensor& grad, const Tensor& hidden, const ExpertMlpGradients& to) {
  const int64_t E = mlp.E, N = mlp.N, D = mlp.D, F = mlp.F, out = mlp.out;
  const Tensor &x = mlp.x, &w1 = mlp.w1, &w2 = mlp.w2;
  const bool saved = hidden.size(1) > 0;
  const FilledRows rows = rows_of(mlp);
  const std::vector<Block> blocks = blocks_of(rows, E, kRowsBackward);
  std::vector<size_t> first_block(E + 1, 0);
  for (const Block& block : blocks) first_block[block.expert + 1] += 1;
  std::partial_sum(first_block.begin(), first_block.end(), first_block.begin());

  // A task is an expert or, if there are few experts for the threads, a part of the hidden columns
  // of an expert. With several parts, each part has a partial sum of the gradient of x.
  const int64_t width = std::min(F, kColumnsBackward);
  const int64_t chunks = F > 0 ? (F + width - 1) / width : 1;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(2 * threads / std::max<int64_t>(E, 1), 1, chunks);
  const Tensor partial = empty({parts > 1 && to.of_x ? parts : 0, E, N, D}, x);
  by_dtype("grouped_mlp_backward", x, [&](auto zero) {
    using T = decltype(zero);
    if (to.of_weights) {
      std::fill_n(write<T>(to.b1), E * F, T{0});
      std::fill_n(write<T>(to.b2), E * out, T{0});
    }
    if (to.of_x) clear_gaps<T>(rows, mlp, D, to.x);
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
      if (to.of_weights && part == 0 && rows.count(e) == 0) {
        std::fill_n(write<T>(to.w1) + e * D * F, D * F, T{0});
        std::fill_n(write<T>(to.w2) + e * F * out, F * out, T{0});
      }
      for (size_t i = first_block[e]; i < first_block[e + 1]; ++i) {
        const Block& block = blocks[i];
        const int64_t count = block.end - block.begin;
        const T* xs = gather(rows, block, read<T>(x) + e * N * D, D, scratch);
        const T* grads = gather(rows, block, read<T>(grad) + e * N * out, out, scratch_grad);
        T* sum = nullptr;
        if (to.of_x) {
          sum = parts > 1 ? write<T>(partial) + ((part * E + e) * N + block.begin) * D
                          : place(rows, block, write<T>(to.x) + e * N * D, D, scratch_sum);
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
              hidden_of, at<T>(mlp.b1, e * F + f), act_of, grad_act,
              to.of_weights ? write<T>(to.b1) + e * F + f : nullptr, count, columns, hidden_stride,
              mlp.tanh);
          if (to.of_weights) {
            const bool first = i == first_block[e];
            multiply_add<T>(
                matrix(write<T>(to.w2) + (e * F + f) * out, columns, out),
                transposed(act_of, count, columns), matrix(grads, count, out), first);
            multiply_add<T>(
                matrix(write<T>(to.w1) + e * D * F + f, D, columns, F), transposed(xs, count, D),
                matrix(grad_act, count, columns), first);
          }
          if (to.of_x) {
            multiply_add<T>(
                matrix(sum, count, D), matrix(grad_act, count, columns),
                transposed(w1_of + f, D, columns, F), chunk == part);
          }
        }
        if (to.of_weights && part == 0) {
          cpu::add_rows(grads, write<T>(to.b2) + e * out, count, out);
        }
        if (to.of_x && parts == 1) {
          scatter<T>(rows, block, sum, nullptr, D, write<T>(to.x) + e * N * D);
        }
      }
    });
    if (!to.of_x || parts == 1) return;
    each_task<T>(blocks.size(), 0, x, [&](int64_t task, T*) {
      const Block& block = blocks[task];
      const int64_t size = (block.end - block.begin) * D;
      T* sum = write<T>(partial) + (block.expert * N + block.begin) * D;
      for (int64_t part = 1; part < parts; ++part) {
        cpu::add_rows(sum + part * E * N * D, sum, 1, size);
      }
      scatter<T>(rows, block, sum, nullptr, D, write<T>(to.x) + block.expert * N * D);
    });
  });
}

}  // namespace
}  // namespace vmoe
