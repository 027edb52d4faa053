#include "invert_slots.h"

#include "testing.h"

namespace vmoe {
namespace {

// Expects the lists by definition: the slots of each token in ascending order, then -1.
void expect_lists(const std::vector<int32_t>& token, const Slots& shape) {
  const int64_t G = shape.G, tokens = shape.tokens, S = shape.of_group();
  SCOPED_TRACE(
      ::testing::Message() << "G " << G << " E " << shape.E << " C " << shape.C << " T " << tokens);
  Guarded<int32_t> offsets(G * (tokens + 1)), slots(G * S), filled(G * shape.E);
  cpu::invert_slots(token.data(), offsets.data(), slots.data(), filled.data(), shape, 0, G);
  EXPECT_TRUE(offsets.fences_stand() && slots.fences_stand() && filled.fences_stand());
  std::vector<int32_t> starts, lists, last(G * shape.E, 0);
  for (int64_t g = 0; g < G; ++g) {
    std::vector<int32_t> list;
    starts.push_back(0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t s = 0; s < S; ++s) {
        if (token[g * S + s] == t) list.push_back(static_cast<int32_t>(s));
      }
      starts.push_back(static_cast<int32_t>(list.size()));
    }
    for (const int32_t s : list) {
      int32_t& of_expert = last[g * shape.E + s / shape.C];
      of_expert = std::max(of_expert, static_cast<int32_t>(s % shape.C + 1));
    }
    list.resize(S, -1);
    lists.insert(lists.end(), list.begin(), list.end());
  }
  EXPECT_EQ(offsets.values(), starts);
  EXPECT_EQ(slots.values(), lists);
  EXPECT_EQ(filled.values(), last);
}

TEST(InvertSlots, ListsTheSlotsOfEveryToken) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const int64_t tokens = 1 + static_cast<int64_t>(seed);
    const Slots shape{3, tokens, 1 + static_cast<int64_t>(seed % 4), 5};
    expect_lists(integers(shape.all(), seed, -1, tokens - 1), shape);
    expect_lists(integers(shape.all(), seed, -2 * tokens, tokens - 1), shape);  // most are empty
  }
}

TEST(InvertSlots, OneTokenMayHoldEverySlotOrNone) {
  expect_lists(std::vector<int32_t>(12, 2), {1, 4, 3, 4});
  expect_lists(std::vector<int32_t>(12, -1), {1, 4, 3, 4});
  expect_lists({0}, {1, 1, 1, 1});
}

TEST(InvertSlots, TokenOutOfRangeIsAnEmptySlot) {
  expect_lists({4, 0, -2, INT32_MAX, 3, INT32_MIN, 5, 3}, {1, 4, 2, 4});
  expect_lists(std::vector<int32_t>(8, 4), {2, 4, 2, 2});
}

TEST(InvertSlots, EmptyShapes) {
  expect_lists({}, {0, 4, 1, 3});
  expect_lists({}, {2, 4, 0, 3});
  expect_lists({}, {2, 4, 3, 0});
  expect_lists({0, -1, 3, 0, 0, 1}, {2, 0, 1, 3});
  expect_lists({}, {2, 0, 3, 0});
}

TEST(InvertSlots, PiecesGiveTheSameBits) {
  const Slots shape{5, 6, 3, 4};
  const int64_t G = shape.G, S = shape.of_group();
  const auto token = integers(shape.all(), 1, -1, shape.tokens);
  std::vector<int32_t> offsets(G * (shape.tokens + 1)), slots(shape.all()), filled(G * shape.E);
  expect_pieces<int32_t>(G, shape.tokens + 1, [&](int64_t begin, int64_t end, int32_t* out) {
    cpu::invert_slots(token.data(), out, slots.data(), filled.data(), shape, begin, end);
  });
  expect_pieces<int32_t>(G, S, [&](int64_t begin, int64_t end, int32_t* out) {
    cpu::invert_slots(token.data(), offsets.data(), out, filled.data(), shape, begin, end);
  });
  expect_pieces<int32_t>(G, shape.E, [&](int64_t begin, int64_t end, int32_t* out) {
    cpu::invert_slots(token.data(), offsets.data(), slots.data(), out, shape, begin, end);
  });
}

}  // namespace
}  // namespace vmoe
