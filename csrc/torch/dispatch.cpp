#include "../dispatch.h"

#include "tensor.h"

namespace vmoe {
namespace {

// offsets and slots are for the gradient, which is a combine with every gate 1.
Tensor dispatch(
    const Tensor& x_, const Tensor& token_, const Tensor& offsets, const Tensor& slots) {
  check_dim("dispatch", "x", x_, 3);
  check_dim("dispatch", "token", token_, 3);
  check_dtype("dispatch", "token", token_, ScalarType::Int);
  const int64_t G = x_.size(0), tokens = x_.size(1), D = x_.size(2);
  const int64_t E = token_.size(1), C = token_.size(2);
  check_shape("dispatch", "token", token_, {G, E, C});
  check_shape("dispatch", "offsets", offsets, {G, tokens + 1});
  check_shape("dispatch", "slots", slots, {G, E * C});
  check_dtype("dispatch", "offsets", offsets, ScalarType::Int);
  check_dtype("dispatch", "slots", slots, ScalarType::Int);
  const Tensor x = packed(x_), token = packed(token_);
  Tensor out = empty({E, G, C, D}, x);
  const int64_t row_bytes = D * static_cast<int64_t>(x.element_size());
#ifdef VMOE_DEVICE_CUDA
  on_device("dispatch", x, {token}, [&](auto stream) {
    cuda::dispatch(
        read<char>(x), read<int32_t>(token), write<char>(out), G, tokens, E, C, row_bytes, stream);
  });
#else
  parallel(E * G * C, D, [&](int64_t begin, int64_t end) {
    cpu::dispatch(
        read<char>(x), read<int32_t>(token), write<char>(out), G, tokens, E, C, row_bytes, begin,
        end);
  });
#endif
  return out;
}

}  // namespace

VMOE_REGISTER(m) { m.impl("dispatch", TORCH_BOX(&dispatch)); }

}  // namespace vmoe
