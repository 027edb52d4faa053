#include "dispatch.h"

#include "common/slots.h"
#include "testing.h"

namespace vmoe {
namespace {

void expect_rows(const Slots& shape, int64_t width, const std::vector<int32_t>& token) {
  const auto [G, tokens, E, C] = shape;
  SCOPED_TRACE(
      ::testing::Message() << "G " << G << " T " << tokens << " E " << E << " C " << C << " bytes "
                           << width);
  std::mt19937_64 random(1);
  std::vector<char> x(G * tokens * width);
  for (char& byte : x) byte = static_cast<char>(random());  // any bits, NaN payloads among them
  Guarded<char> out(E * G * C * width);
  cpu::dispatch(x.data(), token.data(), out.data(), shape, width, 0, shape.all());
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

TEST(Slots, RowsAreABijection) {
  const int64_t G = 3, E = 4, C = 5;
  const Slots shape{G, 7, E, C};
  std::vector<int> seen(G * E * C);
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t row = (e * G + g) * C + c;
        const SlotRow at = shape.at(row);
        EXPECT_EQ(at.group, g);
        EXPECT_EQ(at.slot, (g * E + e) * C + c);
        EXPECT_EQ(shape.row(g, e * C + c), row);
        ++seen[at.slot];
      }
    }
  }
  EXPECT_EQ(seen, std::vector<int>(G * E * C, 1));
}

TEST(Dispatch, LaysRowsOutByExpert) {
  for (const Slots& shape :
       {Slots{1, 1, 1, 1}, {3, 5, 4, 2}, {2, 7, 3, 5}, {1, 9, 2, 9}, {4, 3, 2, 3}}) {
    for (const int64_t width : {1, 2, 4, 8, 12}) {
      expect_rows(shape, width, integers(shape.all(), 2, -1, shape.tokens - 1));
    }
  }
}

TEST(Dispatch, TokenOutOfRangeGivesZeros) {
  const Slots shape{2, 4, 3, 2};
  expect_rows(shape, 8, {4, 0, -1, 3, INT32_MAX, INT32_MIN, 1, 5, 2, -2, 3, 8});
  expect_rows(shape, 8, std::vector<int32_t>(12, 4));
}

TEST(Dispatch, EmptyShapes) {
  for (const Slots& shape : {Slots{0, 4, 3, 2}, {2, 0, 3, 2}, {2, 4, 0, 2}, {2, 4, 3, 0}}) {
    expect_rows(shape, 8, std::vector<int32_t>(shape.all(), 0));
  }
  expect_rows({2, 4, 3, 2}, 0, std::vector<int32_t>(12, 0));
}

TEST(Dispatch, PiecesGiveTheSameBits) {
  const Slots shape{3, 5, 4, 2};
  const auto token = integers(shape.all(), 3, -1, shape.tokens);
  const auto x = uniform<double>(shape.all_tokens(), 4);  // rows of one double
  const auto* bytes = reinterpret_cast<const char*>(x.data());
  expect_pieces<double>(shape.all(), 1, [&](int64_t begin, int64_t end, double* out) {
    cpu::dispatch(
        bytes, token.data(), reinterpret_cast<char*>(out), shape, int64_t{sizeof(double)}, begin,
        end);
  });
}

// An output large enough for streaming stores.
TEST(Dispatch, LargeOutput) {
  const int64_t tokens = 5, C = 8200, width = 4096;
  const auto token = integers(C, 5, -1, tokens);
  const auto x = integers(tokens * width / 4, 6, INT32_MIN, INT32_MAX);
  const auto* from = reinterpret_cast<const char*>(x.data());
  std::vector<char> memory(C * width + 64, 1);
  auto* out = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  cpu::dispatch(from, token.data(), out, Slots{1, tokens, 1, C}, width, int64_t{0}, C);
  const std::vector<char> zeros(width);
  for (int64_t s = 0; s < C; ++s) {
    const bool filled = token[s] >= 0 && token[s] < tokens;
    ASSERT_EQ(memcmp(out + s * width, filled ? from + token[s] * width : zeros.data(), width), 0);
  }
}

}  // namespace
}  // namespace vmoe
