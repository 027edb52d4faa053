"""Auxiliary losses of the routers. Each is computed per group and averaged over groups to a scalar.

Every function takes the router's logits [G, T, E] and a mask [G, T] (True = real token) or None. Gradients flow through
every term except the shares f_e of `balance_loss`, which are counts. 16-bit logits give a loss in float32, because sums
over the tokens overflow float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, fill_masked
from vmoe_routers.ops.topk import topk_unchecked


def importance_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the squared coefficient of variation over experts of ``sum_t softmax(logits)[t, e]``.

    The logits are without noise (Shazeer et al., arXiv 1701.06538, equation 7).
    """
    logits = _checked("importance_loss", "logits", logits, mask)
    return _mean_over_groups(_squared_cv(_sum_over_tokens(logits.softmax(-1), mask)))


def load_loss(
    logits: Tensor,
    noisy_logits: Tensor,
    noise_std: float,
    top_k: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the squared coefficient of variation over experts of their expected load.

    ``load_e = mean_t P(logits[t, e] + noise >= thr_t)``, with thr_t the `top_k`-th largest noisy logit of the token
    (arXiv 2106.05974, appendix A).

    Args:
        logits: [G, T, E] without noise.
        noisy_logits: [G, T, E] with noise. The gradient also flows through the threshold.
        noise_std: Standard deviation of the noise on a logit. If it is 0, the loss is 0.
        top_k: Experts per token.
        mask: [G, T] or None.
    """
    check = Check("load_loss")
    logits = _checked("load_loss", "logits", logits, mask)
    noisy_logits = _checked("load_loss", "noisy_logits", noisy_logits, None)
    check.shape("noisy_logits", noisy_logits, logits.shape, "G, T, E")
    check.device("noisy_logits", noisy_logits, "logits", logits)
    noise_std = check.number("noise_std", noise_std, zero=True)
    top_k = check.integer("top_k", top_k, 1, logits.shape[2])
    if noise_std == 0:
        return logits.new_zeros(())
    threshold = topk_unchecked(noisy_logits, top_k, 2)[0][..., -1:]
    chosen = torch.special.ndtr((logits - threshold) / noise_std)
    return _mean_over_groups(_squared_cv(_sum_over_tokens(chosen, mask)))


def balance_loss(noisy_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes ``E * sum_e f_e P_e`` (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, equation 4).

    f_e is the share of tokens whose first choice is e, before tokens are dropped, without a gradient. P_e is the mean
    over the tokens of the softmax of the noisy logits.
    """
    noisy_logits = _checked("balance_loss", "noisy_logits", noisy_logits, mask)
    gates = noisy_logits.softmax(-1)
    first = topk_unchecked(gates.detach(), 1, 2)[1].long()
    chosen = torch.zeros_like(gates).scatter(-1, first, 1)
    tokens = _tokens(gates, mask)
    share = _sum_over_tokens(chosen, mask) / tokens
    mean = _sum_over_tokens(gates, mask) / tokens
    return _mean_over_groups(gates.shape[-1] * (share * mean).sum(-1))


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes ``mean_t logsumexp_e(logits)^2`` (ST-MoE, arXiv 2202.08906, equation 5)."""
    logits = _checked("z_loss", "logits", logits, mask)
    squares = logits.logsumexp(-1, keepdim=True).square()
    return _mean_over_groups((_sum_over_tokens(squares, mask) / _tokens(logits, mask)).sum(-1))


def _checked(where: str, name: str, logits: Tensor, mask: Tensor | None) -> Tensor:
    """Checks the arguments, and gives the logits in the dtype of the computation."""
    check = Check(where)
    check.floating(name, logits, "G T E")
    if mask is not None:
        check.mask(mask, name, logits)
    return cast(logits, compute_dtype(logits.dtype))


def _sum_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    return fill_masked(values, mask, 0.0).sum(1)


def _tokens(like: Tensor, mask: Tensor | None) -> Tensor | int:
    """Counts the real tokens of every group, at least 1. Gives [G, 1], or a number without a mask."""
    if mask is None:
        return max(like.shape[1], 1)
    return mask.sum(1, keepdim=True).clamp(min=1)


def _squared_cv(values: Tensor) -> Tensor:
    """Computes var / mean^2 over the last axis. A square root would have a NaN gradient where all values are equal."""
    mean = values.mean(-1, keepdim=True)
    variance = (values - mean).square().mean(-1)
    return variance / mean.squeeze(-1).square().clamp(min=torch.finfo(values.dtype).tiny)


def _mean_over_groups(values: Tensor) -> Tensor:
    return values.sum() / max(values.shape[0], 1)
