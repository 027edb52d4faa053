"""soft_logits: the logits of Soft MoE."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, refuse_second_derivative
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, product_dtype

check = Check("soft_logits")


def soft_logits(x: Tensor, phi: Tensor) -> Tensor:
    """Products of tokens of length 1 and the slots' parameters (arXiv 2308.00951, section 2.3).

    ``logits[g, t, s] = <x[g, t], phi[:, s]> / sqrt(|x[g, t]|^2 + 1e-6)``. For backward
    nothing is kept but x and phi. On CUDA the products are torch's: of float32 tokens in TF32 where
    `torch.set_float32_matmul_precision` allows it; of tokens in 16 bits in 16 bits, with sums in float32
    and phi in two parts, which together are off by 2^-16 of it at most (TF32: 2^-11). In backward the gradient
    of the logits is rounded to the tokens' dtype; in float16 entries of phi end at 65504.

    Args:
        x: [G, T, D] floating point.
        phi: [D, S] floating point, taken as it is: normalised and scaled by the caller.

    Returns:
        [G, T, S], in float32; in float64 where x or phi is.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device.
    """
    x = check.floating("x", x, "G T D")
    phi = check.floating("phi", phi, "D S")
    check.shape("phi", phi, (x.shape[2], phi.shape[1]), "D, S")
    check.device("phi", phi, "x", x)
    return soft_logits_unchecked(x, phi)


def soft_logits_unchecked(x: Tensor, phi: Tensor) -> Tensor:
    """`soft_logits` of arguments known to be right."""
    dtype = compute_dtype(torch.promote_types(x.dtype, phi.dtype))
    return call(torch.ops.vmoe_routers.soft_logits.default, cast(x, product_dtype(x, dtype)), cast(phi, dtype))


@torch.library.register_fake("vmoe_routers::soft_logits")
def _(x: Tensor, phi: Tensor) -> Tensor:
    return phi.new_empty(x.shape[0], x.shape[1], phi.shape[1])


@torch.library.register_fake("vmoe_routers::soft_logits_backward")
def _(grad: Tensor, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), phi.new_empty(phi.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return torch.ops.vmoe_routers.soft_logits_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("vmoe_routers::soft_logits", _backward, setup_context=_setup_context)
refuse_second_derivative("soft_logits_backward")
