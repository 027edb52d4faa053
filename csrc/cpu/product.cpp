// The blocking of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication". A
// tile of C stays in registers during the loop over k. The rows of A are packed in panels with the
// height of a tile. The columns of B are packed in strips with the width of a tile. So the loop
// reads panels and strips sequentially. A block of A stays in the second-level cache. Each strip of
// B is packed once per block of A.
#include "product.h"

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <utility>

#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// A tile has at most kTall rows of kWide vectors. Its sums take 28 of 32 registers, or 12 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTall = 14;
#else
constexpr int kTall = 6;
#endif
constexpr int kWide = 2;

constexpr int64_t kDepth = 512;           // values of k per pass
constexpr int64_t kBlockBytes = 3 << 17;  // a block of A: three quarters of a 512 KiB L2 cache

// Rows of a block of A, in whole panels.
template <typename T>
int64_t rows_together(int64_t depth) {
  return kBlockBytes / sizeof(T) / depth / kTall * kTall;
}

// The packed operands of a thread. The memory is kept between calls, because allocation takes
// longer than a small product.
template <typename T>
struct Packed {
  alignas(64) T a[kBlockBytes / sizeof(T)];
  alignas(64) T b[kDepth * kWide * kWidth<T>];

  static Packed& of_thread() {
    thread_local const std::unique_ptr<Packed> mine{new Packed};
    return *mine;
  }
};

// Transposes `lines` lines of `entries` contiguous entries: entry i of line j goes to
// to[i * stride + j]. Each line of `to` is padded with zeros to `room` >= lines entries.
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

// Copies `lines` lines of `entries` entries to lines of `room` >= entries, padded with zeros.
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

// Packs rows [row, row + rows) and columns [first, first + depth) of A to [depth, rows].
template <typename T>
void pack_panel(Matrix<const T> a, int64_t row, int rows, int64_t first, int64_t depth, T* to) {
  const T* from = a.data + row * a.down + first * a.along;
  if (a.along == 1) {
    turn(from, a.down, rows, depth, to, rows, rows);
  } else {
    copy(from, a.along, depth, rows, to, rows);
  }
}

// Packs columns [column, column + columns) and rows [first, first + depth) of B to [depth, width].
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

// Computes a tile of kRows rows and stores its first `columns` columns.
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

// kTiles[i] is tile<T, i + 1, kVectors>.
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
      // Panels of nearly equal height, because a low panel costs nearly as much as a tall panel.
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
