// assign_slots_oracle -- assign_slots by its definition, for the tests on CPU and CUDA.
#pragma once

#include <numeric>
#include <ostream>

#include "common/slots.h"
#include "testing.h"

namespace vmoe {

struct Requests : Slots {
  int64_t K;

  int64_t count() const { return all_tokens() * K; }
};

inline std::ostream& operator<<(std::ostream& out, const Requests& shape) {
  return out << "G " << shape.G << " T " << shape.tokens << " K " << shape.K << " E " << shape.E
             << " C " << shape.C;
}

struct Assigned {
  std::vector<int32_t> slot, source;
};

// Whether token a is served before token b.
template <typename T>
bool served_before(const T* priority, int64_t a, int64_t b) {
  if (!priority) return a < b;
  const T left = priority[a], right = priority[b];
  if (std::isnan(left) != std::isnan(right)) return std::isnan(left);
  if (left > right || left < right) return left > right;
  return a < b;
}

// A request's position is the number of requests for its expert that are served before it.
template <typename T>
Assigned assigned_by_definition(
    const Requests& shape, const std::vector<int32_t>& expert, const std::vector<T>* priority) {
  const int64_t G = shape.G, tokens = shape.tokens, K = shape.K, E = shape.E, C = shape.C;
  Assigned out{std::vector<int32_t>(shape.count(), -1), std::vector<int32_t>(shape.all(), -1)};
  std::vector<int32_t> order(tokens);
  for (int64_t g = 0; g < G; ++g) {
    const T* rank = priority ? priority->data() + g * tokens : nullptr;
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return served_before(rank, a, b);
    });
    std::vector<int64_t> before(E, 0);
    for (int64_t k = 0; k < K; ++k) {
      for (const int64_t t : order) {
        const int64_t request = t * K + k;
        const int32_t e = expert[g * tokens * K + request];
        if (e < 0 || e >= E) continue;
        const int64_t place = before[e]++;
        if (place >= C) continue;
        out.slot[g * tokens * K + request] = static_cast<int32_t>(e * C + place);
        out.source[(g * E + e) * C + place] = static_cast<int32_t>(request);
      }
    }
  }
  return out;
}

}  // namespace vmoe
