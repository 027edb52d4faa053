#include "invert_slots.h"

#include "testing.h"

namespace vmoe {
namespace {

// By definition: token by token, its slots in order, then -1.
void expect_lists(const std::vector<int32_t>& token, int64_t G, int64_t S, int64_t tokens) {
  SCOPED_TRACE(::testing::Message() << "G " << G << " S " << S << " T " << tokens);
  Guarded<int32_t> offsets(G * (tokens + 1)), slots(G * S);
  cpu::invert_slots(token.data(), offsets.data(), slots.data(), S, tokens, 0, G);
  EXPECT_TRUE(offsets.fences_stand() && slots.fences_stand());
  std::vector<int32_t> starts, lists;
  for (int64_t g = 0; g < G; ++g) {
    std::vector<int32_t> list;
    starts.push_back(0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t s = 0; s < S; ++s) {
        if (token[g * S + s] == t) list.push_back(static_cast<int32_t>(s));
      }
      starts.push_back(static_cast<int32_t>(list.size()));
    }
    list.resize(S, -1);
    lists.insert(lists.end(), list.begin(), list.end());
  }
  EXPECT_EQ(offsets.values(), starts);
  EXPECT_EQ(slots.values(), lists);
}

TEST(InvertSlots, ListsTheSlotsOfEveryToken) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const int64_t tokens = 1 + static_cast<int64_t>(seed), S = 17;
    expect_lists(integers(3 * S, seed, -1, tokens - 1), 3, S, tokens);
  }
}

TEST(InvertSlots, OneTokenMayHoldEverySlotOrNone) {
  expect_lists(std::vector<int32_t>(12, 2), 1, 12, 4);
  expect_lists(std::vector<int32_t>(12, -1), 1, 12, 4);
  expect_lists({0}, 1, 1, 1);
}

TEST(InvertSlots, TokenOutOfRangeIsAnEmptySlot) {
  expect_lists({4, 0, -2, INT32_MAX, 3, INT32_MIN, 5, 3}, 1, 8, 4);
  expect_lists(std::vector<int32_t>(8, 4), 2, 4, 4);
}

TEST(InvertSlots, EmptyShapes) {
  expect_lists({}, 0, 3, 4);
  expect_lists({}, 2, 0, 4);
  expect_lists({0, -1, 3, 0, 0, 1}, 2, 3, 0);
  expect_lists({}, 2, 0, 0);
}

TEST(InvertSlots, PiecesMakeTheWhole) {
  const int64_t G = 5, S = 11, tokens = 6;
  const auto token = integers(G * S, 1, -1, tokens);
  expect_pieces<int32_t>(G, tokens + 1, [&](int64_t begin, int64_t end, int32_t* offsets) {
    std::vector<int32_t> slots(G * S);
    cpu::invert_slots(token.data(), offsets, slots.data(), S, tokens, begin, end);
  });
  expect_pieces<int32_t>(G, S, [&](int64_t begin, int64_t end, int32_t* slots) {
    std::vector<int32_t> offsets(G * (tokens + 1));
    cpu::invert_slots(token.data(), offsets.data(), slots, S, tokens, begin, end);
  });
}

}  // namespace
}  // namespace vmoe
