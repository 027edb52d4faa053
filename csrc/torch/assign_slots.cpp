#include "../assign_slots.h"

#include "tensor.h"

namespace vmoe {
namespace {

constexpr int64_t kMostExperts = 1 << 20;
// A group may have this many slots even if it has fewer requests.
constexpr int64_t kMostEmptySlots = 1 << 20;

std::tuple<Tensor, Tensor> assign_slots(
    const Tensor& expert_, std::optional<Tensor> priority_, int64_t E, int64_t C) {
  check_dim("assign_slots", "expert", expert_, 3);
  check_dtype("assign_slots", "expert", expert_, ScalarType::Int);
  const int64_t G = expert_.size(0), tokens = expert_.size(1), K = expert_.size(2);
  STD_TORCH_CHECK(
      tokens <= INT32_MAX && K <= INT32_MAX && tokens * K <= INT32_MAX, "assign_slots: ", tokens,
      " tokens with ", K, " requests each do not fit int32");
  STD_TORCH_CHECK(
      E >= 0 && E <= kMostExperts, "assign_slots: num_experts = ", E, ", wanted 0 to ",
      kMostExperts);
  // Slots beyond the number of requests stay empty. This bound keeps time and memory proportional
  // to the number of requests.
  const int64_t most = std::max(tokens * K, kMostEmptySlots / std::max<int64_t>(E, 1));
  STD_TORCH_CHECK(
      C >= 0 && C <= most, "assign_slots: capacity = ", C, ", wanted 0 to ", most, " for ",
      tokens * K, " requests");
  STD_TORCH_CHECK(E * C <= INT32_MAX, "assign_slots: ", E * C, " slots per group do not fit int32");
  const Slots shape{G, tokens, E, C};
  if (priority_) check_shape("assign_slots", "priority", *priority_, {G, tokens});
  const Tensor expert = packed(expert_);
  const Tensor priority = priority_ ? packed(*priority_) : empty({0}, expert, ScalarType::Float);
  Tensor slot = empty({G, tokens, K}, expert);
  Tensor source = empty({G, E, C}, expert);
  by_dtype("assign_slots", priority, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("assign_slots", expert, {priority}, [&](auto stream) {
      STD_TORCH_CHECK(
          E <= cuda::assign_slots_most_experts(), "assign_slots: num_experts = ", E,
          ", wanted at most ", cuda::assign_slots_most_experts(), " on this device");
      const bool prioritised = priority_.has_value();
      const Tensor scratch =
          workspace(expert, cuda::assign_slots_workspace<T>(prioritised, shape, K));
      cuda::assign_slots(
          read<int32_t>(expert), prioritised ? read<T>(priority) : nullptr, write<int32_t>(slot),
          write<int32_t>(source), shape, K, write<void>(scratch), stream);
    });
#else
    parallel(G, tokens * K + E * C, [&](int64_t begin, int64_t end) {
      cpu::assign_slots(
          read<int32_t>(expert), priority_ ? read<T>(priority) : nullptr, write<int32_t>(slot),
          write<int32_t>(source), shape, K, begin, end);
    });
#endif
  });
  return {slot, source};
}

}  // namespace

VMOE_REGISTER(m) { m.impl("assign_slots", TORCH_BOX(&assign_slots)); }

}  // namespace vmoe
