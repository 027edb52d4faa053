// softmax_topk_oracle -- softmax_topk by its definition, for the tests on CPU and CUDA.
#pragma once

#include <ostream>

#include "testing.h"
#include "topk.h"

namespace vmoe {

template <typename T>
struct Chosen {
  std::vector<T> values;
  std::vector<int32_t> indices;
};

// G matrices of logits [tokens, E], and the k largest gates of every token or expert.
struct Choice {
  int64_t G, tokens, E, k;
  bool of_tokens;  // whether experts choose tokens, instead of tokens choosing experts

  int64_t all() const { return G * tokens; }
  int64_t rows() const { return of_tokens ? G * E : all(); }

  // Every expert of every token, as indices of softmax_gather.
  std::vector<int32_t> every_expert() const {
    std::vector<int32_t> every(all() * E);
    for (size_t i = 0; i < every.size(); ++i) every[i] = static_cast<int32_t>(i % E);
    return every;
  }
};

inline std::ostream& operator<<(std::ostream& out, const Choice& choice) {
  return out << choice.G << " x " << choice.tokens << " x " << choice.E << ", k " << choice.k
             << (choice.of_tokens ? " of the tokens" : "");
}

// The gates of masked tokens, whose scale is 0, become -inf.
template <typename T>
void mark_absent(const std::vector<T>& scale, int64_t E, std::vector<T>& gates) {
  for (size_t i = 0; i < gates.size(); ++i) {
    if (scale[i / E] == 0) gates[i] = -kInf<T>;
  }
}

// topk of gates [G, tokens, E]. A pick of -inf becomes value 0 and index -1.
template <typename T>
Chosen<T> chosen_by_definition(const Choice& choice, const std::vector<T>& gates) {
  const int64_t size = choice.rows() * choice.k;
  Chosen<T> out{std::vector<T>(size), std::vector<int32_t>(size)};
  cpu::topk(
      gates.data(), out.values.data(), out.indices.data(),
      choice.of_tokens ? choice.tokens : choice.E, choice.of_tokens ? choice.E : 1, choice.k, 0,
      choice.rows());
  for (int64_t i = 0; i < size; ++i) {
    if (out.values[i] != -kInf<T>) continue;
    out.values[i] = 0;
    out.indices[i] = -1;
  }
  return out;
}

// Two groups of logits. Every step-th token is absent. If some are present, NaN and infinity also
// occur.
template <typename T>
std::vector<T> strange_logits(int64_t tokens, int64_t E, int64_t step) {
  auto logits = uniform<T>(2 * tokens * E, 7);
  for (int64_t t = 0; t < 2 * tokens; t += step) {
    std::fill(&logits[t * E], &logits[t * E] + E, -kInf<T>);
  }
  for (int64_t t = 0; t < 2 * tokens; t += 7) logits[t * E + t % E] = -kInf<T>;
  if (step != 1) {
    logits[3 * E + 2] = kNaN<T>;
    logits[5 * E + 1] = kInf<T>;
    logits[17 * E] = -kNaN<T>;
  }
  return logits;
}

}  // namespace vmoe
