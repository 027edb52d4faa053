// filled_rows -- the rows of every expert that are there, numbered without the gaps between.
//
// An expert's rows are G segments of C, of which the first filled[e, g] are there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vmoe {

class FilledRows {
 public:
  // filled [E, G], cut to [0, C]; null: all are there.
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

  // Where the filled rows [begin, end), of which there is one, begin if no gap is between
  // them; else -1.
  int64_t joined(int64_t expert, int64_t begin, int64_t end) const {
    const int64_t first = row(expert, begin);
    return row(expert, end - 1) - first == end - 1 - begin ? first : -1;
  }

  // body(row, at, count): the filled rows [at, at + count) of [begin, end) lie at `row` and on.
  template <typename Body>
  void each_run(int64_t expert, int64_t begin, int64_t end, Body&& body) const {
    const int64_t* start = &start_[expert * (G_ + 1)];
    for (int64_t g = segment(expert, begin); begin < end; ++g) {
      const int64_t stop = std::min(end, start[g + 1]);
      if (begin < stop) body(g * C_ + begin - start[g], begin, stop - begin);
      begin = stop;
    }
  }

  // body(row, count): rows that are not there.
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
