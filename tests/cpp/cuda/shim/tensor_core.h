// tensor_core -- emulates the instructions of csrc/cuda/tensor_core.h on the host.
//
// On a GPU an asynchronous copy may happen at any time between its start and the wait for it.
// --schedule chooses the time: `forward` copies in the wait, `backward` at the start, `shuffled` in
// one of them at random. If a result depends on the time, a wait is missing, or memory is
// overwritten too early.
#pragma once

#include <cstdint>
#include <cstring>

namespace shim {

void copy_async(char* to, const void* from, bool valid);
void commit_copies();
// Performs the copies of all groups of this thread except the last `pending` groups.
void await_copies(int pending);

// An instruction of a whole warp. When all lanes have arrived, run() is called once, with the
// operands of all lanes.
struct WarpInstruction {
  void (*run)(WarpInstruction* const (&lanes)[32]);
};
void execute(WarpInstruction* mine);

// Fails unless `at` is aligned to 16 bytes.
void check_alignment(const void* at);

struct Load : WarpInstruction {
  const char* row;
  uint32_t* to;
};

template <bool kTransposed>
void load(uint32_t (&to)[4], const char* row) {
  check_alignment(row);
  Load mine{
      {[](WarpInstruction* const(&lanes)[32]) {
        const auto of = [&](int lane) { return static_cast<Load*>(lanes[lane]); };
        const auto entry = [&](int matrix, int row, int column) {
          uint16_t value;
          memcpy(&value, of(8 * matrix + row)->row + 2 * column, sizeof(value));
          return uint32_t{value};
        };
        for (int lane = 0; lane < 32; ++lane) {
          const int row = lane / 4, pair = lane % 4 * 2;
          for (int i = 0; i < 4; ++i) {
            of(lane)->to[i] = kTransposed ? entry(i, pair, row) | entry(i, pair + 1, row) << 16
                                          : entry(i, row, pair) | entry(i, row, pair + 1) << 16;
          }
        }
      }},
      row,
      to};
  execute(&mine);
}
inline void load_matrices(uint32_t (&to)[4], const char* row) { load<false>(to, row); }
inline void load_transposed(uint32_t (&to)[4], const char* row) { load<true>(to, row); }

struct Product : WarpInstruction {
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
  float (*widen)(uint16_t);
};

inline void multiply_add(
    float (&sums)[4], const uint32_t (&a)[4], uint32_t b_upper, uint32_t b_lower,
    float (*widen)(uint16_t)) {
  Product mine{
      {[](WarpInstruction* const(&lanes)[32]) {
        const auto of = [&](int lane) { return static_cast<Product*>(lanes[lane]); };
        const auto half = [&](uint32_t pair, int i) {
          return of(0)->widen(static_cast<uint16_t>(i % 2 ? pair >> 16 : pair));
        };
        float a[16][16], b[16][8];
        for (int i = 0; i < 16; ++i) {
          for (int k = 0; k < 16; ++k) {
            const uint32_t* from = of(i % 8 * 4 + k % 8 / 2)->a;
            a[i][k] = half(from[i / 8 + k / 8 * 2], k);
          }
        }
        for (int k = 0; k < 16; ++k) {
          for (int j = 0; j < 8; ++j) b[k][j] = half(of(j * 4 + k % 8 / 2)->b[k / 8], k);
        }
        for (int i = 0; i < 16; ++i) {
          for (int j = 0; j < 8; ++j) {
            float& sum = of(i % 8 * 4 + j / 2)->sums[i / 8 * 2 + j % 2];
            for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k][j];
          }
        }
      }},
      sums,
      a,
      {b_upper, b_lower},
      widen};
  execute(&mine);
}

}  // namespace shim
