// filled_rows -- the filled rows of every expert, numbered without the gaps between them.
//
// An expert has G segments of C rows. The first filled[e, g] rows of a segment are filled.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vmoe {

class FilledRows {
 public:
  // filled [E, G], clamped to [0, C]; null: all rows are filled.
  FilledRows(const int32_t* filled, int64_t E, int64_t G, int64_t C)
      : G_(filled ? G : 1), C_(filled ? C : G * C), start_(E * (G_ + 1)) {
    for (int64_t e = 0; e < E; ++e) {
      int64_t* start = &start_[e * (G_ + 1)];
      for (int64_t g = 0; g < G_; ++g) {
        const int64_t count = filled ? std::clamp<int64_t>(filled[e * G_ + g], 0, C_) : C_;
        start[g + 1] = start[g] + count;
      }
    }
  }

  int64_t count(int64_t expert) const { return start_[(expert + 1) * (G_ + 1) - 1]; }

  // Returns the first of the filled rows [begin, end) if these rows are contiguous, else -1. The
  // range must not be empty.
  int64_t joined(int64_t expert, int64_t begin, int64_t end) const {
    const int64_t first = row(expert, begin);
    return row(expert, end - 1) - first == end - 1 - begin ? first : -1;
  }

  // Divides the filled rows [begin, end) into runs of contiguous rows. Calls body(row, at, count)
  // for each run: its filled rows [at, at + count) are stored from row `row` on.
  template <typename Body>
  void each_run(int64_t expert, int64_t begin, int64_t end, Body&& body) const {
    const int64_t* start = &start_[expert * (G_ + 1)];
    for (int64_t g = segment(expert, begin); begin < end; ++g) {
      const int64_t stop = std::min(end, start[g + 1]);
      if (begin < stop) body(g * C_ + begin - start[g], begin, stop - begin);
      begin = stop;
    }
  }

  // Calls body(row, count) for each gap: rows [row, row + count) are not filled.
  template <typename Body>
  void each_gap(int64_t expert, Body&& body) const {
    const int64_t* start = &start_[expert * (G_ + 1)];
    for (int64_t g = 0; g < G_; ++g) {
      const int64_t count = start[g + 1] - start[g];
      if (count < C_) body(g * C_ + count, C_ - count);
    }
  }

 private:
  int64_t segment(int64_t expert, int64_t i) const {
    const auto start = start_.begin() + expert * (G_ + 1);
    return std::upper_bound(start, start + G_ + 1, i) - start - 1;
  }

  int64_t row(int64_t expert, int64_t i) const {
    const int64_t g = segment(expert, i);
    return g * C_ + i - start_[expert * (G_ + 1) + g];
  }

  int64_t G_, C_;
  std::vector<int64_t> start_;  // [E, G + 1]
};

}  // namespace vmoe
