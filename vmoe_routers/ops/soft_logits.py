"""soft_logits: the logits of Soft MoE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_routers.ops._autograd import call, refuse_second_derivative, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, product_dtype

check: Check = Check("soft_logits")


def soft_logits(x: Tensor, phi: Tensor) -> Tensor:
    """Multiplies normalised tokens by the parameters of the slots (arXiv 2308.00951, section 2.3).

    Computes ``logits[g, t, s] = <x[g, t], phi[:, s]> / sqrt(|x[g, t]|^2 + 1e-6)``. Backward keeps only x and phi.

    On CUDA torch computes the products. Float32 tokens are multiplied in TF32 if `torch.set_float32_matmul_precision`
    allows TF32, which rounds `phi` with a relative error of at most 2^-11. 16-bit tokens are multiplied in 16 bits and
    accumulated in float32. For 16-bit tokens, `phi` is split into a high and a low part, whose sum has a relative error
    of at most 2^-16, and backward rounds `phi` and the gradient of the logits to the tokens' dtype. In float16, entries
    of phi beyond 65504 overflow.

    Args:
        x: [G, T, D] floating point.
        phi: [D, S] floating point, already normalised and scaled by the caller.

    Returns:
        [G, T, S] in float32, or in float64 if x or phi is float64.
    """
    x = check.floating("x", x, "G T D")
    phi = check.floating("phi", phi, "D S")
    check.shape("phi", phi, (x.shape[2], phi.shape[1]), "D, S")
    check.device("phi", phi, "x", x)
    return soft_logits_unchecked(x, phi)


def soft_logits_unchecked(x: Tensor, phi: Tensor) -> Tensor:
    """Runs `soft_logits` without checks."""
    dtype = compute_dtype(torch.promote_types(x.dtype, phi.dtype))
    return call(torch.ops.vmoe_routers.soft_logits.default, cast(x, product_dtype(x, dtype)), cast(phi, dtype))


@torch.library.register_fake("vmoe_routers::soft_logits")
def _(x: Tensor, phi: Tensor) -> Tensor:
    return phi.new_empty(x.shape[0], x.shape[1], phi.shape[1])


@torch.library.register_fake("vmoe_routers::soft_logits_backward")
def _(grad: Tensor, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), phi.new_empty(phi.shape)


@register_flop_formula(torch.ops.vmoe_routers.soft_logits)
def _(x: torch.Size, phi: torch.Size, out_shape: object = None) -> int:
    return 2 * x.numel() * phi[1]


@register_flop_formula(torch.ops.vmoe_routers.soft_logits_backward)
def _(grad: torch.Size, x: torch.Size, phi: torch.Size, out_shape: object = None) -> int:
    return 4 * x.numel() * phi[1]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return call(torch.ops.vmoe_routers.soft_logits_backward.default, grad, *ctx.saved_tensors)


register_gradient("soft_logits", _backward, _setup_context)
refuse_second_derivative("soft_logits_backward")
