#include "grouped_mlp.h"

#ifdef VMOE_DEVICE_CUDA
#include "cuda/grouped_mlp.h"
#else
#include "cpu/grouped_mlp.h"
#endif

namespace vmoe {
namespace {

ExpertMlps checked(
    const char* op, const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
    const Tensor& w2, const std::optional<Tensor>& filled, const std::string& act) {
  check_dim(op, "x", x, 3);
  check_dim(op, "w1", w1, 3);
  check_dim(op, "w2", w2, 3);
  const int64_t E = x.size(0), N = x.size(1), D = x.size(2), F = w1.size(2), out = w2.size(2);
  check_shape(op, "w1", w1, {E, D, F});
  check_shape(op, "w2", w2, {E, F, out});
  check_dtype(op, "w1", w1, x.scalar_type());
  check_dtype(op, "w2", w2, x.scalar_type());
  if (b1) {
    check_shape(op, "b1", *b1, {E, F});
    check_dtype(op, "b1", *b1, x.scalar_type());
  }
  int64_t G = 1;
  if (filled) {
    check_dim(op, "filled", *filled, 2);
    G = filled->size(1);
    check_shape(op, "filled", *filled, {E, G});
    check_dtype(op, "filled", *filled, ScalarType::Int);
    STD_TORCH_CHECK(
        G > 0 ? N % G == 0 : N == 0, op, ": ", N, " rows per expert do not divide into ", G,
        " equal segments");
  }
  STD_TORCH_CHECK(
      act == "gelu" || act == "gelu_tanh", op, ": act = '", act, "', wanted 'gelu' or 'gelu_tanh'");
  return {
      E,
      N,
      D,
      F,
      out,
      G,
      packed(x),
      packed(w1),
      packed(w2),
      packed(b1),
      packed(filled),
      act == "gelu_tanh"};
}

std::tuple<Tensor, Tensor> grouped_mlp(
    const Tensor& x, const Tensor& w1, std::optional<Tensor> b1, const Tensor& w2,
    std::optional<Tensor> b2, std::optional<Tensor> filled, const std::string& act, bool save) {
  const ExpertMlps mlp = checked("grouped_mlp", x, w1, b1, w2, filled, act);
  if (b2) {
    check_shape("grouped_mlp", "b2", *b2, {mlp.E, mlp.out});
    check_dtype("grouped_mlp", "b2", *b2, x.scalar_type());
  }
  Tensor y = empty({mlp.E, mlp.N, mlp.out}, x), hidden = empty({mlp.E, save ? mlp.N : 0, mlp.F}, x);
  run_forward(mlp, packed(b2), y, hidden);
  return {y, hidden};
}

// If `hidden` has no rows, the hidden rows are computed again. Gradients that are not asked for
// (of_x, of_weights) are returned as empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grouped_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& w1, std::optional<Tensor> b1,
    const Tensor& w2, std::optional<Tensor> filled, const Tensor& hidden, const std::string& act,
    bool of_x, bool of_weights) {
  const char* op = "grouped_mlp_backward";
  const ExpertMlps mlp = checked(op, x, w1, b1, w2, filled, act);
  check_shape(op, "grad", grad, {mlp.E, mlp.N, mlp.out});
  check_dtype(op, "grad", grad, x.scalar_type());
  check_dim(op, "hidden", hidden, 3);
  check_shape(op, "hidden", hidden, {mlp.E, hidden.size(1) > 0 ? mlp.N : 0, mlp.F});
  check_dtype(op, "hidden", hidden, x.scalar_type());
  const auto made = [&](bool wanted, std::initializer_list<int64_t> shape) {
    return wanted ? empty(shape, x) : empty({0}, x);
  };
  const ExpertMlpGradients to{
      made(of_x, {mlp.E, mlp.N, mlp.D}),
      made(of_weights, {mlp.E, mlp.D, mlp.F}),
      made(of_weights, {mlp.E, mlp.F}),
      made(of_weights, {mlp.E, mlp.F, mlp.out}),
      made(of_weights, {mlp.E, mlp.out}),
      of_x,
      of_weights};
  run_backward(mlp, packed(grad), packed(hidden), to);
  return {to.x, to.w1, to.b1, to.w2, to.b2};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("grouped_mlp", TORCH_BOX(&grouped_mlp));
  m.impl("grouped_mlp_backward", TORCH_BOX(&grouped_mlp_backward));
}

}  // namespace vmoe
