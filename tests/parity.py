"""The package against the reference code's numbers in tests/golden: the comparison that the parity tests and
the parity table share. `compare("tc_ties_G1_K2_bpr1")` gives every quantity's largest deviation and its tolerance."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import vmoe_routers as vr
from vmoe_routers.checkpoints import load_flax
from vmoe_routers.ops.assign_slots import assign_slots

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

EXACT = 0.0
GATE = 1e-6  # absolute
OUTPUT = 1e-5  # absolute
SOFT = 2e-6  # absolute, where values are of order one; relative to the largest beyond
SOFT_BFLOAT16 = 5e-3  # against data that the reference rounded to bfloat16
SINKHORN_PLAN = 2e-5  # relative, of every entry
TRANSPORT_PLAN = 1e-4  # absolute
GRADIENT = 1e-5  # of the norm
LOSS = 1e-5  # relative

ROUTERS = {
    "NoisyTopExpertsPerItemRouter": "softmax_token_choice",
    "KLProjectionNoisyTopExpertsPerItemRouter": "sinkhorn_token_choice",
    "NoisyTopItemsPerExpertRouter": "softmax_expert_choice",
    "KLProjectionNoisyTopItemsPerExpertRouter": "sinkhorn_expert_choice",
    "KSparseProjectionTransportTopItemsPerExpertRouter": "sparsity_constrained_expert_choice",
    "SoftRouter": "soft",
}
OPTIONS = {
    "num_selected_experts": "top_k",
    "maxiter": "iterations",
    "noise_std": "noise_std",
    "num_slots": "slots_per_expert",
    "capacity_factor": "capacity_factor",
    "importance_loss_weight": "importance_loss_weight",
    "load_loss_weight": "load_loss_weight",
    "gshard_loss_weight": "balance_loss_weight",
    "capacity_ceil_or_round": "capacity_rounding",
    "capacity_multiple_of": "capacity_multiple_of",
    "batch_priority": "batch_priority",
}
LOSSES = {"importance": "metric_importance_loss", "load": "metric_load_loss", "balance": "metric_gshard_loss"}


class Deviation(NamedTuple):
    """How far a quantity of ours is from the reference's, at most."""

    router: str
    file: str
    quantity: str
    largest: float
    tolerance: float


class Golden(dict):
    """The arrays of a file as tensors, and its settings."""

    def __init__(self, file: str):
        with np.load(GOLDEN / f"{file}.npz") as arrays:
            self.config = json.loads(str(arrays["config"])) if "config" in arrays else {}
            super().__init__({k: torch.as_tensor(arrays[k]) for k in arrays.files if k != "config"})

    def params(self, prefix: str = "param/") -> dict[str, Tensor]:
        return {path.removeprefix(prefix): array for path, array in self.items() if path.startswith(prefix)}


def compare(file: str) -> list[Deviation]:
    """Every quantity of a golden file that the package also computes."""
    golden = Golden(file)
    kind, _, rest = file.partition("_")
    if file == "capacity":
        router, found = "(all)", _capacity(golden)
    elif file == "simplex_projection":
        router, found = "sparsity_constrained_expert_choice", _projection(golden)
    elif kind == "tc":
        router, found = "softmax_token_choice", _token_choice(golden)
    elif file == "ec_zero_fill_replaced_cw":
        router, found = "sparsity_constrained_expert_choice", _expert_choice_of_a_plan(golden)
    elif kind == "ec":
        router, found = "softmax_expert_choice", _expert_choice(golden)
    elif kind == "soft":
        router, found = "soft", _soft(golden)
    elif kind == "mlpmoe":
        router, options = router_options(golden.config["router"])
        if "plancw" in rest:
            options["gradient"] = "implicit"  # as the reference differentiates its plan
        found = _layer(golden, router, options)
    elif kind == "vit":
        router, options = router_options(golden.config["encoder"]["moe"]["router"])
        found = _vit(golden, router, options)
    else:
        config = {key: value for key, value in golden.config.items() if key != "router"}
        router, options = router_options({"name": golden.config["router"], **config})
        found = _sparse_router(golden, router, options)
    return [Deviation(router, file, *quantity) for quantity in found]


def check(file: str) -> None:
    """Fail with every quantity of `file` that is further off than its tolerance (NaN is)."""
    found = compare(file)
    assert found, f"{file}: nothing was compared"
    beyond = [f"{d.quantity}: {d.largest:.3g} > {d.tolerance:.3g}" for d in found if not d.largest <= d.tolerance]
    assert not beyond, f"{file}: {'; '.join(beyond)}"


def router_options(config: dict) -> tuple[str, dict]:
    """Our name and options for the reference's settings of a router."""
    config = {**config, **config.get("dispatcher", {})}
    name = config.get("name", "NoisyTopExpertsPerItemRouter")
    name = config["router_name"] if name == "einsum" else name
    options = {ours: config[theirs] for theirs, ours in OPTIONS.items() if config.get(theirs) is not None}
    if not config.get("use_softmax_combine_weights", True):
        options["combine"] = "plan"
    return ROUTERS[name.rpartition(".")[2]], options


# Deviations


def differing(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, wanted {tuple(golden.shape)}"
    return float((ours != golden).sum())


def absolute(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, wanted {tuple(golden.shape)}"
    return float((ours.detach() - golden).abs().max())


def relative(ours: Tensor, golden: Tensor) -> float:
    """The largest of the entries' relative deviations; entries that are 0 in the reference must be 0."""
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, wanted {tuple(golden.shape)}"
    deviation = (ours.detach() - golden).abs()
    return float(torch.where(deviation == 0, 0, deviation / golden.abs()).max())


def of_norm(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, wanted {tuple(golden.shape)}"
    return float((ours.detach() - golden).norm() / golden.norm())


def of_largest(ours: Tensor, golden: Tensor) -> float:
    return absolute(ours, golden) / max(1.0, float(golden.abs().max()))


# Files


def _capacity(golden):
    columns = ("num_tokens", "num_experts", "capacity_factor", "mode_round", "multiple_of", "capacity")
    wrong = 0
    for tokens, experts, factor, mode, multiple, wanted in zip(*(golden[c].tolist() for c in columns), strict=True):
        ours = vr.capacity(tokens, experts, factor, rounding="round" if mode else "ceil", multiple_of=multiple)
        # a rounding result of 0 is an error there (-1) and one slot here, before the multiple
        wrong += ours != (wanted if wanted >= 0 else max(multiple, 1))
    yield f"capacity ({len(golden['capacity']):,} rows)", float(wrong), EXACT


def _projection(golden):
    for name, projected in golden.items():
        if name != "v":
            k = int(name.removeprefix("proj_k")) if name.startswith("proj_k") else golden["v"].shape[-1]
            ours = vr.ksparse_projection(golden["v"], k)
            yield "projection", absolute(ours, projected), GATE
            yield "projection, support", differing(ours != 0, projected != 0), EXACT


def _token_choice(golden):
    config = golden.config
    top_k, capacity, experts = config["num_selected_experts"], config["capacity"], golden["gates"].shape[-1]
    routing = vr.token_choice(golden["gates"], top_k, capacity, batch_priority=config["batch_priority"])
    yield from _buffers(golden, routing)
    yield from _outputs(golden, routing)
    if config["capacity_factor"] is not None:
        requests = config["tokens"] * top_k
        rules = {"rounding": config["ceil_or_round"], "multiple_of": config["multiple_of"]}
        ours = vr.capacity(requests, config["experts"], config["capacity_factor"], **rules)
        yield "capacity", abs(ours - capacity), EXACT
    expert, position = golden["indices"].unbind(-1)
    priority = golden["gates"].amax(-1) if config["batch_priority"] else None
    slot, _ = assign_slots(expert.contiguous(), experts, capacity, priority)
    wanted = torch.where(position < capacity, expert * capacity + position, -1)
    yield "slots of the choices", differing(slot, wanted.to(slot.dtype)), EXACT


def _expert_choice(golden):
    routing = vr.expert_choice(golden["gates"], golden.config["capacity"])
    yield from _buffers(golden, routing)
    yield from _outputs(golden, routing)
    yield from _metrics(golden, routing)


def _expert_choice_of_a_plan(golden):
    capacity = golden["dispatch_weights"].shape[-1]
    for weights, wanted in ((None, "combine_weights_plan"), (golden["softmax_gates"], "combine_weights_softmax")):
        routing = vr.expert_choice(golden["plan"], capacity, weights=weights)
        yield "dispatch", differing(routing.dispatch_tensor() != 0, golden["dispatch_weights"]), EXACT
        yield "combine weights", absolute(routing.combine_tensor(), golden[wanted]), GATE
        yield from _metrics(golden, routing)


def _sparse_router(golden, name, options):
    x, kernel = golden["x"], golden["kernel"]
    router = vr.create_router(name, x.shape[-1], kernel.shape[-1], **options)
    load_flax(router, {"dense/kernel": kernel})
    routing = _route(router, x, golden)
    logits = golden["logits"]
    if "noise" in golden:
        logits = logits + options["noise_std"] / logits.shape[-1] * golden["noise"]
    gates = logits.softmax(-1)
    combine = golden["gates_combine"] if "gates_combine" in golden else golden["gates_dispatch"]
    if options.get("combine") != "plan":
        # Sinkhorn token choice weighs by the softmax without noise
        clean = golden["logits"].softmax(-1) if name == "sinkhorn_token_choice" else gates
        yield "softmax", absolute(clean, combine), GATE
    if name.startswith("sinkhorn"):
        plan = vr.sinkhorn(logits, iterations=options.get("iterations", 20))
        yield "plan (relative)", relative(plan, golden["gates_dispatch"]), SINKHORN_PLAN
    if name.startswith("sparsity"):
        k = golden["dispatch_weights"].shape[-1]
        plan = vr.ksparse_transport(gates, k, iterations=options["iterations"])
        yield "plan", absolute(plan, golden["gates_dispatch"]), TRANSPORT_PLAN
        # values of the plan can tie to the last bit: the sets of tokens are compared, not their order in the buffers
        taken, wanted = routing.dispatch_tensor().amax(-1) != 0, golden["dispatch_weights"].any(-1)
        yield "tokens of every expert", differing(taken, wanted), EXACT
        tolerance = TRANSPORT_PLAN if options.get("combine") == "plan" else GATE
        yield "combine weights", absolute(routing.combine_tensor().sum(-1), golden["combine_weights"].sum(-1)), tolerance
    else:
        yield from _buffers(golden, routing)
    yield from _outputs(golden, routing)
    if "metric_min_selected_gate" in golden:
        yield from _metrics(golden, routing)
    yield from _losses(golden, routing)


def _soft(golden):
    config, mu = golden.config, golden["mu"]
    size = {"slots_per_expert": config["num_slots_arg"]}
    if config["capacity_factor"] is not None:
        size = {"capacity_factor": config["capacity_factor"], "num_tokens": config["tokens"]}
    router = vr.create_router("soft", *mu.shape[:2], noise_std=config["noise_std"], **size)
    load_flax(router, {"mu": mu, "scale": golden["scale"]})
    routing = _route(router, golden["x"], golden)
    yield "dispatch", absolute(routing.dispatch_tensor(), golden["dispatch_weights"]), SOFT
    yield "combine weights", absolute(routing.combine_tensor(), golden["combine_weights"]), SOFT
    inputs = routing.dispatch(golden["x"])
    yield "expert inputs", of_largest(inputs.transpose(0, 1).flatten(1, 2), golden["expert_inputs"]), SOFT
    yield "y", of_largest(routing.combine(_experts(golden, inputs)), golden["y"]), SOFT


def _layer(golden, name, options):
    experts = golden.config["num_experts"]
    x = golden["x"].clone().requires_grad_()
    if name == "soft" and "capacity_factor" in options:
        options["num_tokens"] = x.shape[0] * x.shape[1]
    hidden = golden.config["mlp_dim"]
    layer = vr.MoEMlp(x.shape[-1], hidden, num_experts=experts, router=name, group_size=len(x), **options).eval()
    load_flax(layer, golden.params())
    tolerance = OUTPUT
    if name == "soft":
        yield "layer y, without the roundings", absolute(layer(x), golden["y"]), SOFT_BFLOAT16
        layer, tolerance = RoundedSoft(layer), GATE
    y = layer(x)
    auxiliary = vr.aux_loss(layer)
    loss = (y * golden["cotangent"]).sum() + 100 * auxiliary
    yield "layer y", absolute(y, golden["y"]), tolerance
    yield "layer loss (relative)", relative(loss, golden["loss"]), LOSS
    yield "auxiliary loss", absolute(auxiliary, golden["metric_auxiliary_loss"].float().mean()), GATE
    loss.backward()
    yield "gradients (of norm)", of_norm(x.grad, golden["grad_x"]), GRADIENT
    for path, gradient in flax_gradients(layer, golden.params()).items():
        yield "gradients (of norm)", of_norm(gradient, golden[f"grad/{path}"]), GRADIENT


def flax_gradients(layer: nn.Module, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a MoE layer by the reference's paths and in its shapes."""
    layer = layer.layer if isinstance(layer, RoundedSoft) else layer
    experts, router = layer.experts, layer.router
    gradients = {
        "Mlp/Dense_0/kernel": experts.w1.grad,
        "Mlp/Dense_0/bias": experts.b1.grad,
        "Mlp/Dense_1/kernel": experts.w2.grad,
        "Mlp/Dense_1/bias": experts.b2.grad,
    }
    if "Router/mu" in like:
        gradients |= {"Router/mu": router.phi.grad, "Router/scale": router.scale.grad}
    else:
        gradients |= {"Router/dense/kernel": router.weight.grad.t()}
    assert gradients.keys() == like.keys()
    return gradients


def _vit(golden, name, options):
    from vmoe_routers.models import vit_moe

    config, encoder = golden.config, golden.config["encoder"]
    moe = encoder["moe"]
    patch, image = config["patch_size"][0], config["image_size"]
    tokens = (image // patch) ** 2 + (config["classifier"] == "token")
    model = vit_moe(
        img_size=image,
        patch_size=patch,
        num_classes=config["num_classes"],
        embed_dim=config["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / config["hidden_size"],
        router=name,
        num_experts=moe["num_experts"],
        moe_blocks=moe["layers"],
        group_size=moe["group_size"] // tokens,
        global_pool={"gap": "avg"}.get(config["classifier"], config["classifier"]),
        qk_norm=encoder.get("attention_qk_norm", False),
        **options,
    ).eval()
    load_flax(model, golden.params())
    images = golden["images"].permute(0, 3, 1, 2)
    with torch.no_grad():
        if name == "soft":
            yield "model logits, without the roundings", absolute(model(images), golden["logits"]), SOFT_BFLOAT16
            for i in moe["layers"]:
                model.blocks[i].mlp = RoundedSoft(model.blocks[i].mlp)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        yield "model features", absolute(features, golden["features"]), OUTPUT
        yield "model logits", absolute(model.head(features), golden["logits"]), OUTPUT
        yield "auxiliary loss", absolute(vr.aux_loss(model), golden["auxiliary_loss"].mean()), GATE


class RoundedSoft(nn.Module):
    """A Soft MoE layer with the two roundings to bfloat16 of the reference's: tokens and experts' outputs."""

    def __init__(self, layer: vr.MoEMlp):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.layer.group_size * x.shape[1], x.shape[2])
        routing = self.layer.router(tokens)
        y = self.layer.experts(routing.dispatch(tokens.bfloat16().float()))
        return routing.combine(y.bfloat16().float()).reshape(x.shape)


# Parts that files share


def _route(router: nn.Module, x: Tensor, golden: Golden):
    """Route x in eval mode; in training mode where the file holds a noise draw, with that draw."""
    if "noise" not in golden:
        return router.eval()(x)
    with patch.object(router, "draw_noise", lambda logits: golden["noise"].reshape(logits.shape)):
        return router.train()(x)


def _buffers(golden, routing):
    yield "dispatch", differing(routing.dispatch_tensor() != 0, golden["dispatch_weights"]), EXACT
    yield "combine weights", absolute(routing.combine_tensor(), golden["combine_weights"]), GATE


def _outputs(golden, routing):
    inputs = routing.dispatch(golden["x"])
    if "expert_inputs" in golden:
        yield "expert inputs", absolute(inputs.transpose(0, 1).flatten(1, 2), golden["expert_inputs"]), GATE
    yield "y", absolute(routing.combine(_experts(golden, inputs)), golden["y"]), OUTPUT


def _experts(golden, inputs: Tensor) -> Tensor:
    return torch.einsum("gecd,edf->gecf", inputs, golden["expert_A"]) + golden["expert_b"][:, None]


def _metrics(golden, routing):
    processed = golden["metric_ratio_processed_items_by_at_least_1_experts"].mean()
    yield "dropped share", absolute(torch.as_tensor(routing.metrics["dropped"]).mean(), 1 - processed), GATE


def _losses(golden, routing):
    for ours, theirs in LOSSES.items():
        if theirs in golden and ours in routing.losses:
            wanted = golden[theirs].float().mean()
            yield f"{ours} loss (relative)", relative(routing.losses[ours], wanted), LOSS
    yield "auxiliary loss", absolute(routing.aux_loss, golden["metric_auxiliary_loss"].float().mean()), GATE
