// As in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication": a tile of C stays in
// registers while k runs; A's rows in panels of a tile's height and B's columns in strips of a
// tile's width are copied so that the loop reads both front to back. A block of A stays in the
// second-level cache; a strip of B is copied once for every such block.
#include "product.h"

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <utility>

#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// A tile: at most kTall rows of kWide vectors. Of 32 registers 28 hold it, of 16 twelve.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTall = 14;
#else
constexpr int kTall = 6;
#endif
constexpr int kWide = 2;

constexpr int64_t kDepth = 512;           // of k at a time
constexpr int64_t kBlockBytes = 3 << 17;  // of A, most of a second-level cache of half a MiB

// Rows of A at a time, whole panels.
template <typename T>
int64_t rows_together(int64_t depth) {
  return kBlockBytes / sizeof(T) / depth / kTall * kTall;
}

// What a thread copies to; kept, since a small product takes less time than getting memory.
template <typename T>
struct Packed {
  alignas(64) T a[kBlockBytes / sizeof(T)];
  alignas(64) T b[kDepth * kWide * kWidth<T>];

  static Packed& of_thread() {
    thread_local const std::unique_ptr<Packed> mine{new Packed};
    return *mine;
  }
};

// `lines` lines of `entries` entries, at `from` an entry beside the next, to entries one below the
// other: entry i of line j goes to to[i * stride + j]. Up to `room` >= lines entries of each line of
// `to` are written, zeros where there is no line.
template <typename T>
void turn(
    const T* from, int64_t line_stride, int64_t lines, int64_t entries, T* to, int64_t stride,
    int64_t room) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t i = 0; i < entries; i += W) {
    const int64_t count = std::min(W, entries - i);
    for (int64_t j = 0; j < room; j += W) {
      Vec<T> r[W];
      for (int64_t l = 0; l < W; ++l) {
        r[l] = j + l < lines ? get(from + (j + l) * line_stride + i, count, T{0}) : Vec<T>{};
      }
      transpose<T>(r);
      for (int64_t l = 0; l < count; ++l) put(to + (i + l) * stride + j, r[l], room - j);
    }
  }
}

// `lines` lines of `entries` entries to lines of `room` >= entries, zeros behind.
template <typename T>
void copy(const T* from, int64_t line_stride, int64_t lines, int64_t entries, T* to, int64_t room) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t l = 0; l < lines; ++l, from += line_stride, to += room) {
    for (int64_t j = 0; j < room; j += W) {
      const int64_t count = entries - j;
      put(to + j, count > 0 ? get(from + j, count, T{0}) : Vec<T>{}, room - j);
    }
  }
}

// Rows [row, row + rows) of A and its columns [first, first + depth) to [depth, rows].
template <typename T>
void pack_panel(Matrix<const T> a, int64_t row, int rows, int64_t first, int64_t depth, T* to) {
  const T* from = a.data + row * a.down + first * a.along;
  if (a.along == 1) {
    turn(from, a.down, rows, depth, to, rows, rows);
  } else {
    copy(from, a.along, depth, rows, to, rows);
  }
}

// Columns [column, column + columns) of B and its rows [first, first + depth) to [depth, width].
template <typename T>
void pack_strip(
    Matrix<const T> b, int64_t column, int64_t columns, int64_t first, int64_t depth, T* to,
    int64_t width) {
  const T* from = b.data + first * b.down + column * b.along;
  if (b.along == 1) {
    copy(from, b.down, depth, columns, to, width);
  } else {
    turn(from, b.along, columns, depth, to, width, width);
  }
}

// A tile of kRows rows, of whose columns the first `columns` are there.
template <typename T, int kRows, int kVectors>
void tile(
    const T* a,  // [depth, kRows]
    const T* b,  // [depth, kVectors * width]
    T* out, int64_t stride, int64_t columns, int64_t depth, bool add) {
  constexpr int64_t W = kWidth<T>;
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += kVectors * W) {
    Vec<T> beside[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) beside[j] = load(b + j * W);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(splat(a[i]), beside[j], sum[i][j]);
    }
  }
  const bool whole = columns == kVectors * W;
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      T* to = out + i * stride + j * W;
      if (whole) {
        store(to, add ? load(to) + sum[i][j] : sum[i][j]);
      } else if (const int64_t count = columns - j * W; count > 0) {
        put(to, add ? get(to, count, T{0}) + sum[i][j] : sum[i][j], count);
      }
    }
  }
}

// tile<T, i + 1, kVectors> at i.
template <typename T, int kVectors>
constexpr auto kTiles = []<int... I>(std::integer_sequence<int, I...>) {
  return std::array{&tile<T, I + 1, kVectors>...};
}(std::make_integer_sequence<int, kTall>{});

}  // namespace

template <typename T>
void product(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, bool add) {
  constexpr int64_t W = kWidth<T>;
  const int64_t M = out.rows, N = out.columns, K = a.columns;
  if (K == 0 && !add) {
    for (int64_t i = 0; i < M; ++i) std::fill_n(out.data + i * out.down, N, T{0});
    return;
  }
  Packed<T>& packed = Packed<T>::of_thread();
  for (int64_t first = 0; first < K; first += kDepth) {
    const int64_t depth = std::min(kDepth, K - first);
    const int64_t together = rows_together<T>(depth);
    for (int64_t row = 0; row < M; row += together) {
      // Panels as even as may be: a low one costs nearly as much as a tall one.
      const int64_t rows = std::min(together, M - row), panels = (rows + kTall - 1) / kTall;
      const auto begin = [&](int64_t panel) { return rows * panel / panels; };
      for (int64_t panel = 0; panel < panels; ++panel) {
        pack_panel<T>(
            a, row + begin(panel), static_cast<int>(begin(panel + 1) - begin(panel)), first, depth,
            packed.a + begin(panel) * depth);
      }
      for (int64_t column = 0; column < N; column += kWide * W) {
        const int64_t columns = std::min(kWide * W, N - column);
        const bool narrow = columns <= W;
        pack_strip<T>(b, column, columns, first, depth, packed.b, narrow ? W : kWide * W);
        const auto& tiles = narrow ? kTiles<T, 1> : kTiles<T, kWide>;
        for (int64_t panel = 0; panel < panels; ++panel) {
          tiles[begin(panel + 1) - begin(panel) - 1](
              packed.a + begin(panel) * depth, packed.b,
              out.data + (row + begin(panel)) * out.down + column, out.down, columns, depth,
              add || first > 0);
        }
      }
    }
  }
}

template void product(Matrix<const float>, Matrix<const float>, Matrix<float>, bool);
template void product(Matrix<const double>, Matrix<const double>, Matrix<double>, bool);

}  // namespace vmoe::cpu::VMOE_ISA
