"""Dense transformers of timm, torchvision and Hugging Face: their blocks, and the parts of their MLPs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Layout(NamedTuple):
    """Names of the children of an MLP."""

    first: tuple[str, ...]  # one linear layer; or gate and value
    act: str | None  # None: SiLU, called as a function
    second: str
    drops: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        return {*self.first, *([self.act] if self.act else ()), self.second, *self.drops, *self.norm}


_LAYOUTS = (
    _Layout(("fc1",), "act", "fc2", ("drop1", "drop2"), ("norm",)),  # timm: Mlp; GluMlp with gate and value in fc1
    _Layout(("fc1_g", "fc1_x"), "act", "fc2", ("drop1", "drop2"), ("norm",)),  # timm: SwiGLU
    _Layout(("0",), "1", "3", ("2", "4")),  # torchvision: MLPBlock
    _Layout(("fc1",), "activation_fn", "fc2"),  # transformers: ViT, DeiT, DINOv2, SigLIP, CLIP
    _Layout(("up_proj",), "act_fn", "down_proj"),  # transformers: DINOv3
    _Layout(("gate_proj", "up_proj"), "act_fn", "down_proj"),  # transformers: DINOv2 and DINOv3 with SwiGLU
    _Layout(("fc1",), "activation", "fc2"),  # transformers 5.10: DINOv2
    _Layout(("weights_in",), None, "weights_out"),  # transformers 5.10: DINOv2 with SwiGLU, gate and value in one
)


@dataclass(frozen=True)
class DenseMlp:
    """Parts of an MLP.

    The MLP is ``second(norm(act(x w + b)))``. In a gated MLP, ``act(x w_gate + b_gate) * (x w_value + b_value)`` takes
    the place of ``act(x w + b)``.

    Attributes:
        weights, biases: w [F, D] and b ([F] or None), one each. A gated MLP has two weights and two biases, of gate
            and value.
        act: The activation.
        second: The second linear layer.
        drop: The rate of dropout after the activation and after the second layer.
        norm: A LayerNorm before the second layer, or None.
    """

    weights: list[Tensor]
    biases: list[Any]
    act: nn.Module
    second: nn.Linear
    drop: float
    norm: nn.LayerNorm | None

    def activation(self) -> nn.Module:
        """Copies the activation. A module that computes GELU becomes nn.GELU, for which kernels exist."""
        if type(self.act) is not nn.GELU and not any(True for _ in self.act.parameters()):
            x = torch.linspace(-6, 6, 61, device="cpu")
            for approximate in ("none", "tanh"):
                if torch.equal(self.act(x), F.gelu(x, approximate=approximate)):
                    return nn.GELU(approximate)
        return copy.deepcopy(self.act)

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the MLP without dropout."""
        hidden = self.act(F.linear(x, self.weights[0], self.biases[0]))
        if len(self.weights) == 2:
            hidden = hidden * F.linear(x, self.weights[1], self.biases[1])
        return self.second(hidden if self.norm is None else self.norm(hidden))


def find_blocks(model: nn.Module) -> tuple[str, nn.Sequential | nn.ModuleList]:
    """Finds the transformer blocks of a model, a list of modules that all have an `mlp`, and the name of the list.

    Raises:
        TypeError, ValueError: The model has no such list, or several.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
        and len(module)
        and all(isinstance(getattr(block, "mlp", None), nn.Module) for block in module)
    }
    if "blocks" in lists:
        return "blocks", lists["blocks"]
    if not lists:
        raise TypeError(
            f"upcycle: model must have transformer blocks, a list of modules with an mlp, got {type(model).__name__}"
        )
    if len(lists) > 1:
        names = ", ".join(sorted(lists))
        raise ValueError(f"upcycle: model has blocks at {names}; give the module around one of them, such as its tower")
    return next(iter(lists.items()))


def parts_of(mlp: Any, where: str) -> DenseMlp:
    """Finds the parts of an MLP, and checks that the parts compute the same function as the MLP.

    Raises:
        TypeError, ValueError: The MLP has other children, or computes something else.
    """
    children = dict(mlp.named_children())
    layout = next((layout for layout in _LAYOUTS if layout.names == children.keys()), None)
    linear = [] if layout is None else [children[name] for name in (*layout.first, layout.second)]
    if layout is None or not all(isinstance(module, nn.Linear) for module in linear):
        raise TypeError(
            f"upcycle: {where}.mlp must be an MLP of linear layers of timm, torchvision or transformers, "
            f"got {type(mlp).__name__}"
        )
    norms = [children[name] for name in layout.norm if not isinstance(children[name], nn.Identity)]
    if any(not isinstance(norm, nn.LayerNorm) for norm in norms):
        raise ValueError(f"upcycle: {where}.mlp has a {type(norms[0]).__name__} inside, wanted a LayerNorm or no norm")
    rates = [children[name].p for name in layout.drops] or [0.0]
    if len(set(rates)) > 1:
        raise ValueError(f"upcycle: {where}.mlp has two dropout rates, {rates[0]} and {rates[1]}, wanted one")
    *first, second = linear
    weights, biases = [module.weight for module in first], [module.bias for module in first]
    if len(first) == 1 and weights[0].shape[0] == 2 * second.in_features:  # GluMlp
        order = -1 if getattr(mlp, "gate_last", False) else 1
        weights = list(weights[0].chunk(2))[::order]
        biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))[::order]
    if len({bias is None for bias in biases}) > 1:
        names = " and ".join(layout.first)
        raise ValueError(f"upcycle: {where}.mlp has a bias in one of {names}, wanted in both or none")
    act = nn.SiLU() if layout.act is None else children[layout.act]
    parts = DenseMlp(weights, biases, act, second, rates[0], norms[0] if norms else None)
    if not second.weight.is_meta and not _same(mlp, parts):
        raise TypeError(f"upcycle: {where}.mlp ({type(mlp).__name__}) computes something else than its layers in order")
    return parts


def _same(mlp: nn.Module, parts: DenseMlp) -> bool:
    """Compares MLP and parts on three tokens, without dropout."""
    weight = parts.weights[0]
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device).reshape(1, 3, -1).to(weight.dtype)
    modes = [(module, module.training) for module in mlp.modules()]
    mlp.eval()
    try:
        ours, theirs = parts(x).double(), mlp(x).double()
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    tolerance = 100 * torch.finfo(weight.dtype).eps
    return ours.shape == theirs.shape and bool((ours - theirs).norm() <= tolerance * theirs.norm())
