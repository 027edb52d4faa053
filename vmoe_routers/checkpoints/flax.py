"""load_flax: copies parameters of the reference (flax) models into modules of this package.

The map from paths to parameters (H width, h heads, d = H / h, M hidden width, E experts, P slots per expert):

    embedding/{kernel, bias}                         (p, p, c, H), (H)               patch_embed.proj
    cls                                              (1, 1, H)                       cls_token
    Encoder/posembed_input/pos_embedding             (1, tokens, H)                  pos_embed, class token first
    Encoder/encoderblock_i/LayerNorm_{0, 1}          scale, bias (H)                 blocks[i].norm1, norm2
        SelfAttention/{query, key, value}            (H, h, d), (h, d)               attn.qkv, as blocks of rows
        SelfAttention/{query_ln, key_ln}/scale       (d)                             attn.q_norm, k_norm
        SelfAttention/out                            (h, d, H), (H)                  attn.proj
        Mlp/Dense_{0, 1}                             (H, M), (M); (M, H), (H)        mlp.fc1, fc2
        Moe/Mlp/Dense_{0, 1}                         (E, H, M), (E, M); (E, M, H), (E, H)   mlp.experts w1, b1; w2, b2
        Moe/Router/dense/kernel                      (H, E)                          mlp.router.weight
        Moe/Router/{mu, scale}                       (H, E, P), ()                   mlp.router.phi, scale
    Encoder/encoder_norm                             scale, bias (H)                 norm
    MapHead/{probe, MultiHeadDotProductAttention, LayerNorm, Mlp}                    attn_pool
    pre_logits/{kernel, bias}                        (H, H), (H)                     fc_norm.dense
    head/{kernel, bias}                              (H, classes), (classes)         head

Dense kernels are (in, out) in the reference and [out, in] in this package. Expert kernels have the same layout in both.
Npz files of dense ViTs use other names (Transformer for Encoder, MlpBlock_3 for Mlp), which are accepted too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vmoe_routers.moe import MoEMlp


class _Entry(NamedTuple):
    """Array of the reference, and the parameter or the rows of a parameter that it fills."""

    path: str
    shape: tuple[int, ...]
    parameter: Tensor
    rows: slice = slice(None)
    layout: Callable[[Tensor], Tensor] | None = None
    resize: Callable[[Tensor], Tensor | None] | None = None  # converts an array of another shape, or gives None


@torch.no_grad()
def load_flax(module: nn.Module, params: Mapping[str, Any], *, skip_head: bool = False) -> nn.Module:
    """Copies the reference's parameters into `module`, in place.

    Position embeddings of another square grid are resized as in the reference: bilinear with aligned corners. The
    embedding of a class token is copied. All other arrays must match exactly.

    Args:
        module: A model of `vit_moe` (or a timm VisionTransformer of the same form), a `MoEMlp`, or a router.
        params: Arrays of numpy, jax or torch by path, floating point: {"Encoder/encoderblock_0/...": ...} for a model,
            as `read_vmoe` and `read_npz` give it, {"Router/dense/kernel": ..., "Mlp/Dense_0/kernel": ...} for a MoE
            layer, {"dense/kernel": ...} or {"mu": ..., "scale": ...} for a router. Nested mappings count as paths, and
            every path may begin with "params/". Values are converted to the dtype and device of the parameter.
        skip_head: Keeps head and pre_logits of the model and ignores them in `params`, for a task with other classes.

    Returns:
        `module`.

    Raises:
        ValueError: Arrays are missing, unused, given twice, of another shape or not floating point. The message lists
            them all, and the module is unchanged.
        TypeError: `module` or `params` is of another kind.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"load_flax: params is a {type(params).__name__}, wanted a mapping of paths to arrays")
    found = list(_flatten(params))
    if all(path.startswith("params/") for path, _ in found):
        found = [(path.removeprefix("params/"), array) for path, array in found]
    found = [(reference_path(path), array) for path, array in found]
    entries = list(_entries(module))
    filled = {id(entry.parameter) for entry in entries}
    if skip_head:
        found = [(path, array) for path, array in found if not path.startswith(_HEAD)]
        entries = [entry for entry in entries if not entry.path.startswith(_HEAD)]
    arrays = dict(found)
    problems = [f"{path}: given {n} times" for path, n in Counter(path for path, _ in found).items() if n > 1]
    problems += [
        f"{type(module).__name__}.{name}, shape {tuple(parameter.shape)}: has no counterpart in the reference's models"
        for name, parameter in module.named_parameters()
        if id(parameter) not in filled
    ]
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.path not in arrays:
            problems.append(f"{entry.path}: missing, wanted shape {entry.shape}")
            continue
        array = arrays.pop(entry.path)
        tensor = _tensor(array)
        if tensor is None:
            kind = f"{type(array).__name__} of dtype {getattr(array, 'dtype', None)}"
            kind += " without memory" if getattr(array, "is_meta", False) else ""
            problems.append(f"{entry.path}: {kind}, wanted a floating-point array of shape {entry.shape}")
        elif tuple(tensor.shape) == entry.shape:
            tensors[entry.path] = tensor
        elif entry.resize is not None and (resized := entry.resize(tensor)) is not None:
            tensors[entry.path] = resized
        else:
            problems.append(f"{entry.path}: shape {tuple(tensor.shape)}, wanted {entry.shape}")
    for path, array in arrays.items():
        shape = tuple(getattr(array, "shape", ()))
        problems.append(f"{path}: not used, came with shape {shape}, {type(module).__name__} has no such parameter")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"load_flax: {len(problems)} of the parameters do not match, nothing was loaded:{lines}")
    for entry in entries:
        tensor = tensors[entry.path]
        target = entry.parameter[entry.rows] if entry.parameter.ndim else entry.parameter
        target.copy_(tensor.reshape(target.shape) if entry.layout is None else entry.layout(tensor))
    return module


_HEAD = ("head/", "pre_logits/")

_RENAMED = [
    (re.compile(r"^opt/target/"), ""),
    (re.compile(r"^pos_embedding$"), "Encoder/posembed_input/pos_embedding"),
    (re.compile(r"^Transformer/"), "Encoder/"),
    (re.compile(r"^(Encoder/encoderblock_\d+/)MultiHeadDotProductAttention_\d/"), r"\1SelfAttention/"),
    (re.compile(r"^(Encoder/encoderblock_\d+/)MlpBlock_\d/"), r"\1Mlp/"),
    (re.compile(r"^(Encoder/encoderblock_\d+/)LayerNorm_2/"), r"\1LayerNorm_1/"),
    (re.compile(r"^MAPHead_0/"), "MapHead/"),
    (re.compile(r"^(MapHead/)(MultiHeadDotProductAttention|LayerNorm)_0/"), r"\1\2/"),
    (re.compile(r"^MapHead/MlpBlock_0/"), "MapHead/Mlp/"),
]
"""Paths in files of dense ViTs (google-research/vision_transformer, big_vision), and the paths that replace them."""


def reference_path(path: str) -> str:
    """Translates a path of a dense ViT's file to the path in the map above."""
    for pattern, name in _RENAMED:
        path = pattern.sub(name, path)
    return path


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _tensor(array: Any) -> Tensor | None:
    """Converts `array` to a floating-point tensor; None if it is not floating point, or is on the meta device.

    bfloat16 arrays of numpy are accepted in the dtype of ml_dtypes and, as read from npz, in the dtype V2.
    """
    if not isinstance(array, Tensor):
        dtype = getattr(array, "dtype", None)
        two_bytes = getattr(dtype, "name", None) == "bfloat16" or getattr(dtype, "str", None) == "|V2"
        if not two_bytes and (getattr(dtype, "kind", None) != "f" or getattr(dtype, "itemsize", 16) > 8):
            return None
        import numpy as np  # an array of this kind needs numpy, so numpy is installed

        array = np.asarray(array)
        # torch requires native byte order and strides >= 0, and warns about read-only memory.
        native = array.dtype if two_bytes else array.dtype.newbyteorder("=")
        array = np.require(array, native, ["C_CONTIGUOUS", "WRITEABLE"])
        array = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if two_bytes else torch.from_numpy(array)
    return array if array.is_floating_point() and not array.is_meta else None


def _entries(module: nn.Module) -> Iterator[_Entry]:
    if isinstance(module, MoEMlp):
        return _moe("", module)
    if isinstance(getattr(module, "blocks", None), nn.Sequential) and hasattr(module, "patch_embed"):
        return _vit(module)
    if hasattr(module, "num_experts") and (hasattr(module, "phi") or hasattr(module, "weight")):
        return _router("", module)
    raise TypeError(
        f"load_flax: module is a {type(module).__name__}, wanted a vision transformer of vit_moe, a MoEMlp or a router"
    )


def _vit(model: Any) -> Iterator[_Entry]:
    kernel = model.patch_embed.proj.weight
    height, width = kernel.shape[2:]
    yield _Entry(
        "embedding/kernel",
        (height, width, kernel.shape[1], kernel.shape[0]),
        kernel,
        layout=lambda array: array.permute(3, 2, 0, 1),
    )
    yield _same("embedding/bias", model.patch_embed.proj.bias)
    if model.cls_token is not None:
        yield _same("cls", model.cls_token)
    if isinstance(model.pos_embed, nn.Parameter):  # a fixed table is no parameter, and the reference does not store it
        resize = partial(_resize_positions, grid=model.patch_embed.grid_size, like=model.pos_embed)
        yield _same("Encoder/posembed_input/pos_embedding", model.pos_embed)._replace(resize=resize)
    for i, block in enumerate(model.blocks):
        path = f"Encoder/encoderblock_{i}/"
        yield from _norm(f"{path}LayerNorm_0/", block.norm1)
        yield from _attention(f"{path}SelfAttention/", block.attn, [(block.attn.qkv, ("query", "key", "value"))])
        yield from _norm(f"{path}LayerNorm_1/", block.norm2)
        if isinstance(block.mlp, MoEMlp):
            yield from _moe(f"{path}Moe/", block.mlp)
        else:
            yield from _mlp(f"{path}Mlp/", block.mlp)
    yield from _norm("Encoder/encoder_norm/", model.norm)
    if model.attn_pool is not None:
        pool = model.attn_pool
        yield _same("MapHead/probe", pool.latent)
        projections = [(pool.q, ("query",)), (pool.kv, ("key", "value"))]
        yield from _attention("MapHead/MultiHeadDotProductAttention/", pool, projections)
        yield from _norm("MapHead/LayerNorm/", pool.norm)
        yield from _mlp("MapHead/Mlp/", pool.mlp)
    if hasattr(model.fc_norm, "dense"):
        yield from _dense("pre_logits/", model.fc_norm.dense)
    if isinstance(model.head, nn.Linear):
        yield from _dense("head/", model.head)


def _resize_positions(table: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor | None:
    """Resizes a table [1, n, D] of a square grid, bilinear with aligned corners; None for any other table."""
    prefix = like.shape[1] - grid[0] * grid[1]  # the class token
    if table.ndim != 3 or (table.shape[0], table.shape[2]) != (1, like.shape[2]) or table.shape[1] <= prefix:
        return None
    side = isqrt(table.shape[1] - prefix)
    if side * side != table.shape[1] - prefix:
        return None
    old = table[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2).double()
    new = interpolate(old, size=grid, mode="bilinear", align_corners=True).to(table.dtype)
    return torch.cat([table[:, :prefix], new.flatten(2).transpose(1, 2)], dim=1)


def _moe(path: str, layer: MoEMlp) -> Iterator[_Entry]:
    yield from _router(f"{path}Router/", layer.router)
    experts: Any = layer.experts
    for name, kernel, bias in (("Dense_0", experts.w1, experts.b1), ("Dense_1", experts.w2, experts.b2)):
        yield _same(f"{path}Mlp/{name}/kernel", kernel)
        if bias is not None:
            yield _same(f"{path}Mlp/{name}/bias", bias)


def _router(path: str, router: Any) -> Iterator[_Entry]:
    if hasattr(router, "phi"):
        yield _same(f"{path}mu", router.phi)
        yield _Entry(f"{path}scale", (), router.scale)
    elif not hasattr(router, "weight"):
        raise TypeError(
            f"load_flax: router is a {type(router).__name__}, wanted one with a weight [E, D] or phi [D, E, C]"
        )
    else:
        experts, width = router.weight.shape
        yield _Entry(f"{path}dense/kernel", (width, experts), router.weight, layout=Tensor.t)


def _attention(path: str, attention: Any, projections: list[tuple[nn.Linear, tuple[str, ...]]]) -> Iterator[_Entry]:
    heads, head_width = attention.num_heads, attention.head_dim
    for linear, names in projections:
        for i, name in enumerate(names):
            rows = slice(i * heads * head_width, (i + 1) * heads * head_width)
            yield from _dense(f"{path}{name}/", linear, out_shape=(heads, head_width), rows=rows)
    yield from _norm(f"{path}query_ln/", attention.q_norm)
    yield from _norm(f"{path}key_ln/", attention.k_norm)
    yield from _dense(f"{path}out/", attention.proj, in_shape=(heads, head_width))


def _mlp(path: str, mlp: Any) -> Iterator[_Entry]:
    yield from _dense(f"{path}Dense_0/", mlp.fc1)
    yield from _dense(f"{path}Dense_1/", mlp.fc2)


def _dense(
    path: str,
    linear: nn.Linear,
    in_shape: tuple[int, ...] = (),
    out_shape: tuple[int, ...] = (),
    rows: slice = slice(None),
) -> Iterator[_Entry]:
    """Maps a kernel (in, out) and a bias (out). The reference may split an axis into heads. `rows` selects a part."""
    in_shape, out_shape = in_shape or (linear.in_features,), out_shape or (linear.out_features,)

    def layout(array: Tensor) -> Tensor:
        return array.reshape(linear.in_features, -1).t()

    yield _Entry(f"{path}kernel", (*in_shape, *out_shape), linear.weight, rows, layout)
    if linear.bias is not None:
        yield _Entry(f"{path}bias", out_shape, linear.bias, rows)


def _norm(path: str, norm: nn.Module) -> Iterator[_Entry]:
    if isinstance(norm, nn.LayerNorm):
        yield _same(f"{path}scale", norm.weight)
        if norm.bias is not None:
            yield _same(f"{path}bias", norm.bias)


def _same(path: str, parameter: Tensor) -> _Entry:
    return _Entry(path, tuple(parameter.shape), parameter)
