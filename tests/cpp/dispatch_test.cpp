#include "dispatch.h"

#include "common/slot_row.h"
#include "testing.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E, C, row_bytes;
};

void expect_rows(const Shape& shape, const std::vector<int32_t>& token) {
  const auto [G, tokens, E, C, width] = shape;
  SCOPED_TRACE(
      ::testing::Message() << "G " << G << " T " << tokens << " E " << E << " C " << C << " bytes "
                           << width);
  std::mt19937_64 random(1);
  std::vector<char> x(G * tokens * width);
  for (char& byte : x) byte = static_cast<char>(random());  // any bits, NaN payloads among them
  Guarded<char> out(E * G * C * width);
  cpu::dispatch(x.data(), token.data(), out.data(), G, tokens, E, C, width, 0, E * G * C);
  EXPECT_TRUE(out.fences_stand());
  std::vector<char> wanted;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t t = token[(g * E + e) * C + c];
        for (int64_t i = 0; i < width; ++i) {
          wanted.push_back(t >= 0 && t < tokens ? x[(g * tokens + t) * width + i] : 0);
        }
      }
    }
  }
  EXPECT_EQ(out.values(), wanted);
}

TEST(SlotRow, IsABijection) {
  const int64_t G = 3, E = 4, C = 5;
  std::vector<int> seen(G * E * C);
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t row = (e * G + g) * C + c;
        const SlotRow at = slot_of_row(row, G, E, C);
        EXPECT_EQ(at.group, g);
        EXPECT_EQ(at.slot, (g * E + e) * C + c);
        EXPECT_EQ(row_of_slot(g, e * C + c, G, C), row);
        ++seen[at.slot];
      }
    }
  }
  EXPECT_EQ(seen, std::vector<int>(G * E * C, 1));
}

TEST(Dispatch, LaysRowsOutByExpert) {
  for (const Shape& shape :
       {Shape{1, 1, 1, 1, 4},
        {3, 5, 4, 2, 8},
        {2, 7, 3, 5, 12},
        {1, 9, 2, 9, 1},
        {4, 3, 2, 3, 2}}) {
    expect_rows(shape, integers(shape.G * shape.E * shape.C, 2, -1, shape.T - 1));
  }
}

TEST(Dispatch, TokenOutOfRangeGivesZeros) {
  const Shape shape{2, 4, 3, 2, 8};
  expect_rows(shape, {4, 0, -1, 3, INT32_MAX, INT32_MIN, 1, 5, 2, -2, 3, 8});
  expect_rows(shape, std::vector<int32_t>(12, 4));
}

TEST(Dispatch, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 4, 3, 2, 8}, {2, 0, 3, 2, 8}, {2, 4, 0, 2, 8}, {2, 4, 3, 0, 8}, {2, 4, 3, 2, 0}}) {
    expect_rows(shape, std::vector<int32_t>(shape.G * shape.E * shape.C, 0));
  }
}

TEST(Dispatch, PiecesMakeTheWhole) {
  const int64_t G = 3, tokens = 5, E = 4, C = 2;
  const auto token = integers(G * E * C, 3, -1, tokens);
  const auto x = uniform<double>(G * tokens, 4);  // rows of one double
  const auto* bytes = reinterpret_cast<const char*>(x.data());
  expect_pieces<double>(E * G * C, 1, [&](int64_t begin, int64_t end, double* out) {
    cpu::dispatch(
        bytes, token.data(), reinterpret_cast<char*>(out), G, tokens, E, C, sizeof(double), begin,
        end);
  });
}

// An output that is stored past the caches.
TEST(Dispatch, LargeOutput) {
  const int64_t tokens = 5, C = 8200, width = 4096;
  const auto token = integers(C, 5, -1, tokens);
  const auto x = integers(tokens * width / 4, 6, INT32_MIN, INT32_MAX);
  const auto* from = reinterpret_cast<const char*>(x.data());
  std::vector<char> memory(C * width + 64, 1);
  auto* out = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  cpu::dispatch(from, token.data(), out, 1, tokens, 1, C, width, 0, C);
  const std::vector<char> zeros(width);
  for (int64_t s = 0; s < C; ++s) {
    const bool filled = token[s] >= 0 && token[s] < tokens;
    ASSERT_EQ(memcmp(out + s * width, filled ? from + token[s] * width : zeros.data(), width), 0);
  }
}

}  // namespace
}  // namespace vmoe
