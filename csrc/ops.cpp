// ops -- the schemas of all ops, and the Python module _C with the facts of its build.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "common/isa.h"

namespace {

using vmoe::cpu::Isa;

constexpr std::pair<const char*, Isa> kLevels[] = {
    {"base", Isa::kBase}, {"v2", Isa::kV2}, {"v3", Isa::kV3}, {"v4", Isa::kV4}};

std::string isa() {
  for (const auto& [name, level] : kLevels) {
    if (level == vmoe::cpu::isa()) return name;
  }
  return "";
}

void use_isa(const std::string& wanted) {
  for (const auto& [name, level] : kLevels) {
    if (wanted == name && vmoe::cpu::use_isa(level)) return;
  }
  throw std::invalid_argument("use_isa: this CPU and build cannot run '" + wanted + "'");
}

}  // namespace

// clang-format off: one schema per line
STABLE_TORCH_LIBRARY(vmoe_routers, m) {
  m.def("topk(Tensor x, SymInt k, int dim) -> (Tensor values, Tensor indices)");
  m.def("softmax_gather(Tensor logits, Tensor indices, int dim) -> (Tensor values, Tensor norms)");
  m.def("softmax_gather_backward(Tensor grad, Tensor values, Tensor logits, Tensor indices, Tensor norms, int dim) -> Tensor");
  m.def("softmax_topk(Tensor logits, SymInt k, int dim) -> (Tensor values, Tensor indices, Tensor norms)");
  m.def("assign_slots(Tensor expert, Tensor? priority, int num_experts, SymInt capacity) -> (Tensor slot, Tensor source)");
  m.def("invert_slots(Tensor token, SymInt num_tokens) -> (Tensor offsets, Tensor slots, Tensor filled)");
  m.def("dispatch(Tensor x, Tensor token, Tensor offsets, Tensor slots) -> Tensor");
  m.def("combine(Tensor y, Tensor? gate, Tensor token, Tensor offsets, Tensor slots) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor y, Tensor gate, Tensor token) -> (Tensor grad_y, Tensor grad_gate)");
  m.def("sinkhorn(Tensor logits, float epsilon, int iterations, float tolerance, bool implicit) -> (Tensor plan, Tensor history, Tensor error, Tensor steps)");
  m.def("sinkhorn_backward(Tensor grad, Tensor logits, Tensor history, Tensor steps, float epsilon) -> Tensor");
  m.def("sinkhorn_implicit_backward(Tensor grad, Tensor plan, float epsilon) -> Tensor");
  m.def("ksparse_projection(Tensor x, SymInt k) -> Tensor");
  m.def("ksparse_projection_backward(Tensor grad, Tensor out) -> Tensor");
  m.def("ksparse_transport(Tensor similarity, SymInt k, int iterations, str solver, float learning_rate, float tolerance, float gamma) -> Tensor");
  m.def("soft_logits(Tensor x, Tensor phi) -> Tensor");
  m.def("soft_logits_backward(Tensor grad, Tensor x, Tensor phi) -> (Tensor grad_x, Tensor grad_phi)");
  m.def("soft_mix(Tensor logits, Tensor values, int dim, int num_experts) -> Tensor");
  m.def("soft_mix_backward(Tensor grad, Tensor logits, Tensor values, int dim, int num_experts) -> (Tensor grad_logits, Tensor grad_values)");
  m.def("grouped_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? filled, str act, bool save) -> (Tensor y, Tensor hidden)");
  m.def("grouped_mlp_backward(Tensor grad, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? filled, Tensor hidden, str act, bool of_x, bool of_weights) -> (Tensor grad_x, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)");
}
// clang-format on

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the CPU kernels of vmoe_routers with torch's dispatcher.";
  m.def("isa", &isa, "The ISA level whose CPU kernels are in use: base, v2, v3 or v4.");
  m.def("use_isa", &use_isa, "For tests and benchmarks: uses the kernels of another ISA level.");
  m.attr("torch_target") = "2.11";
  m.attr("cuda_built") = VMOE_CUDA_BUILT;
  m.attr("cuda_architectures") = VMOE_CUDA_ARCHITECTURES;
}
