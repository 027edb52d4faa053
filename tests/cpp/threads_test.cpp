// Tests of kernels on several threads. Results must equal the results of one thread. A build with
// ThreadSanitizer (-DVMOE_SANITIZE=thread) also reports data races.
#include <thread>

#include "assign_slots.h"
#include "combine.h"
#include "cpu/product.h"
#include "ksparse_transport.h"
#include "sinkhorn.h"
#include "softmax_topk.h"
#include "testing.h"
#include "topk.h"

namespace vmoe {
namespace {

// Calls body(begin, end) on threads, for ranges that partition [0, count).
template <typename Body>
void on_threads(int64_t count, Body&& body) {
  std::vector<std::thread> threads;
  constexpr int64_t kThreads = 3;
  for (int64_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { body(i * count / kThreads, (i + 1) * count / kThreads); });
  }
  for (std::thread& thread : threads) thread.join();
}

const Parallel kThreads{[](int64_t count, Parallel::Body piece, const void* context) {
  on_threads(count, [=](int64_t begin, int64_t end) { piece(begin, end, context); });
}};

constexpr int64_t G = 2, T = 700, E = 13;

TEST(Threads, SinkhornDividesAGroup) {
  for (const double spread : {2.0, 300.0}) {
    const auto logits = uniform<float>(G * T * E, 1, -spread, spread);
    const auto grad = uniform<float>(G * T * E, 2);
    const auto run = [&](const Parallel& parallel) {
      std::vector<float> plan(G * T * E), unrolled(plan), implicit(plan);
      std::vector<double> history(G * 5 * E), error(G);
      std::vector<int32_t> steps(G);
      cpu::sinkhorn(
          logits.data(), plan.data(), history.data(), error.data(), steps.data(), T, E, int64_t{5},
          1.0, 0.0, int64_t{0}, G, parallel);
      cpu::sinkhorn_backward(
          grad.data(), logits.data(), history.data(), steps.data(), unrolled.data(), T, E,
          int64_t{5}, 1.0, int64_t{0}, G, parallel);
      cpu::sinkhorn_implicit_backward(
          grad.data(), plan.data(), implicit.data(), T, E, 1.0, int64_t{0}, G, parallel);
      return std::tuple(plan, history, error, steps, unrolled, implicit);
    };
    EXPECT_TRUE(run(Parallel{}) == run(kThreads));
  }
}

TEST(Threads, TransportDividesAGroup) {
  const auto similarity = uniform<float>(G * T * E, 1);
  for (const Solver solver : {Solver::kAdam, Solver::kLbfgs}) {
    const TransportOptions options{60, 4, solver, 0.01, 0, 1.0};
    const auto run = [&](const Parallel& parallel) {
      std::vector<float> plan(G * T * E);
      cpu::ksparse_transport(
          similarity.data(), plan.data(), T, E, options, int64_t{0}, G, parallel);
      return plan;
    };
    EXPECT_EQ(run(Parallel{}), run(kThreads));
  }
}

// Rows, or groups, of one tensor on several threads.
TEST(Threads, DivideRows) {
  const auto logits = uniform<float>(G * T * E, 1);
  const auto priority = uniform<float>(G * T, 2);
  const Slots shape{G, T, E, 60};
  const int64_t D = 17, k = 2;
  const auto y = uniform<float>(shape.all() * D, 3), gate = uniform<float>(shape.all(), 4);
  const auto slots = integers(shape.all(), 5, -1, shape.of_group());
  const auto offsets = integers(G * (T + 1), 6, 0, shape.of_group());
  const auto run = [&](auto&& each) {
    std::vector<float> values(G * T * k), high(G * T), scale(G * T), out(G * T * D),
        best(G * T * k);
    std::vector<int32_t> expert(G * T * k), slot(G * T * k), source(shape.all()), picks(G * T * k);
    each(G * T, [&](int64_t begin, int64_t end) {
      cpu::softmax_topk(
          logits.data(), values.data(), expert.data(), high.data(), scale.data(), E, k, begin, end);
      cpu::topk(logits.data(), best.data(), picks.data(), E, int64_t{1}, k, begin, end);
      cpu::combine(
          y.data(), gate.data(), offsets.data(), slots.data(), out.data(), shape, D, begin, end);
    });
    each(G, [&](int64_t begin, int64_t end) {
      cpu::assign_slots(
          expert.data(), priority.data(), slot.data(), source.data(), shape, k, begin, end);
    });
    return std::tuple(values, expert, high, scale, out, best, picks, slot, source);
  };
  const auto one = [](int64_t count, auto&& body) { body(int64_t{0}, count); };
  const auto many = [](int64_t count, auto&& body) { on_threads(count, body); };
  EXPECT_TRUE(run(one) == run(many));
}

// Every thread has its own packed operands.
TEST(Threads, ProductsRunAtTheSameTime) {
  const int64_t n = 70;
  const auto a = uniform<float>(9 * n * n, 1), b = uniform<float>(9 * n * n, 2);
  const auto run = [&](auto&& each) {
    std::vector<float> out(9 * n * n);
    each(9, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * n * n;
        multiply<float>(
            matrix(out.data() + at, n, n), matrix(a.data() + at, n, n),
            transposed(b.data() + at, n, n));
      }
    });
    return out;
  };
  const auto one = [](int64_t count, auto&& body) { body(int64_t{0}, count); };
  const auto many = [](int64_t count, auto&& body) { on_threads(count, body); };
  EXPECT_EQ(run(one), run(many));
}

}  // namespace
}  // namespace vmoe
