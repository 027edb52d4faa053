"""Compares the package with the reference code's numbers in tests/golden, for the tests and for docs/parity.md.

`compare("tc_ties_G1_K2_bpr1")` returns the largest deviation and the tolerance of every quantity; `check` fails if a
deviation exceeds its tolerance. `python tests/parity.py` writes all of them to docs/parity.md.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import vmoe_routers as vr
from vmoe_routers.checkpoints import load_flax
from vmoe_routers.routers import SoftRouter

GOLDEN = Path(__file__).parent / "golden"
TABLE = Path(__file__).parents[1] / "docs" / "parity.md"
COMMAND = "python tests/parity.py"
# The few-shot probe, the schedules and the readers of checkpoints have tests of their own.
OTHER = ("fewshot", "schedules", "ckpt", "vit_zoom")
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz") if not path.stem.startswith(OTHER))

EXACT = 0.0
GATE = 1e-6  # absolute
OUTPUT = 1e-5  # absolute
SOFT = 2e-6  # absolute; relative to the largest value if tokens are a thousand times larger than usual
SOFT_ROUNDED = 1e-6  # absolute, with the reference's two roundings to bfloat16
# In a whole model, a value may be next to a boundary of that rounding. On another machine, whose products add in
# another order, the value may round differently: 1e-7 more on the images changes the features by 5e-5.
SOFT_ROUNDED_MODEL = 1e-4
SOFT_BFLOAT16 = 5e-3  # absolute, without these roundings
SINKHORN_PLAN = 2e-5  # relative, of every entry
TRANSPORT_PLAN = 1e-4  # absolute
GRADIENT = 1e-5  # relative to the norm
LOSS = 1e-5  # relative
LOSS_OF_TERMS = 1e-6

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
    """The largest deviation of one of our quantities from the reference."""

    router: str
    file: str
    quantity: str
    largest: float
    tolerance: float


Quantities = Iterator[tuple[str, float, float]]  # name, largest deviation, tolerance


class Golden(dict[str, Tensor]):
    """The arrays of a file as tensors, and its settings."""

    def __init__(self, file: str):
        with np.load(GOLDEN / f"{file}.npz") as arrays:
            self.config: dict[str, Any] = json.loads(str(arrays["config"])) if "config" in arrays else {}
            super().__init__({k: torch.as_tensor(arrays[k]) for k in arrays.files if k != "config"})

    def params(self, prefix: str = "param/") -> dict[str, Tensor]:
        return {path.removeprefix(prefix): array for path, array in self.items() if path.startswith(prefix)}


@cache
def compare(file: str) -> tuple[Deviation, ...]:
    """Compares every quantity of a golden file that the package also computes."""
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
            options["gradient"] = "implicit"  # as in the reference
        found = _layer(golden, router, options)
    elif kind == "vit":
        router, options = router_options(golden.config["encoder"]["moe"]["router"])
        found = _vit(golden, router, options)
    else:
        config = {key: value for key, value in golden.config.items() if key != "router"}
        router, options = router_options({"name": golden.config["router"], **config})
        found = _sparse_router(golden, router, options)
    return tuple(Deviation(router, file, *quantity) for quantity in found)


def check(file: str, device: str = "cpu") -> None:
    """Fail and list every quantity of `file` whose deviation exceeds its tolerance or is NaN.

    `compare` caches its results for the CPU. For another device the comparison is computed again.
    """
    found = compare(file) if device == "cpu" else compare.__wrapped__(file)
    assert found, f"{file}: nothing was compared"
    beyond = [f"{d.quantity}: {d.largest:.3g} > {d.tolerance:.3g}" for d in found if not d.largest <= d.tolerance]
    assert not beyond, f"{file}: {'; '.join(beyond)}"


def router_options(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Translate the reference's settings of a router to our name and options."""
    name = config.get("name", "NoisyTopExpertsPerItemRouter")
    config = {**config.get("dispatcher", {}), **config}
    options = {ours: config[theirs] for theirs, ours in OPTIONS.items() if config.get(theirs) is not None}
    if not config.get("use_softmax_combine_weights", True):
        options["combine"] = "plan"
    return ROUTERS[name.rpartition(".")[2]], options


# Deviations


def differing(ours: Tensor, golden: Tensor) -> float:
    """Count the entries that differ."""
    return float((_detach(ours, golden) != golden).sum())


def absolute(ours: Tensor, golden: Tensor) -> float:
    return float((_detach(ours, golden) - golden).abs().max())


def relative(ours: Tensor, golden: Tensor) -> float:
    """Return the largest relative deviation of an entry. Entries that are 0 in the reference must be 0."""
    deviation = (_detach(ours, golden) - golden).abs()
    return float(torch.where(deviation == 0, 0, deviation / golden.abs()).max())


def of_norm(ours: Tensor, golden: Tensor) -> float:
    return float((_detach(ours, golden) - golden).norm() / golden.norm())


def of_largest(ours: Tensor, golden: Tensor) -> float:
    return absolute(ours, golden) / float(golden.abs().max())


def _detach(ours: Tensor, golden: Tensor) -> Tensor:
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, wanted {tuple(golden.shape)}"
    return ours.detach()


# Files


def _capacity(golden: Golden) -> Quantities:
    columns = ("num_tokens", "num_experts", "capacity_factor", "mode_round", "multiple_of", "capacity")
    wrong = 0
    for tokens, experts, factor, mode, multiple, wanted in zip(*(golden[c].tolist() for c in columns), strict=True):
        ours = vr.capacity(tokens, experts, factor, rounding="round" if mode else "ceil", multiple_of=multiple)
        # The reference refuses a rounded capacity of 0 (-1). This package raises 0 to 1, and then to the multiple.
        wrong += ours != (wanted if wanted >= 0 else max(multiple, 1))
    yield f"capacity ({len(golden['capacity']):,} rows)", float(wrong), EXACT


def _projection(golden: Golden) -> Quantities:
    for name, projected in golden.items():
        if name != "v":
            k = int(name.removeprefix("proj_k")) if name.startswith("proj_k") else golden["v"].shape[-1]
            ours = vr.ksparse_projection(golden["v"], k)
            yield "projection", absolute(ours, projected), GATE
            yield "projection, support", differing(ours != 0, projected != 0), EXACT


def _token_choice(golden: Golden) -> Quantities:
    config = golden.config
    top_k, capacity = config["num_selected_experts"], config["capacity"]
    routing = vr.token_choice(golden["gates"], top_k, capacity, batch_priority=config["batch_priority"])
    assert routing.expert is not None and routing.slot is not None
    yield from _buffers(golden, routing)
    yield from _outputs(golden, routing)
    if config["capacity_factor"] is not None:
        requests = config["tokens"] * top_k
        rules = {"rounding": config["ceil_or_round"], "multiple_of": config["multiple_of"]}
        ours = vr.capacity(requests, config["experts"], config["capacity_factor"], **rules)
        yield "capacity", abs(ours - capacity), EXACT
    expert, position = golden["indices"].unbind(-1)
    yield "experts of the choices", differing(routing.expert, expert), EXACT
    slot = torch.where(position < capacity, expert * capacity + position, -1)
    yield "slots of the choices", differing(routing.slot, slot), EXACT
    gates = routing.weights.gather(-1, routing.expert.long())
    yield "gates of the choices", absolute(gates, golden["indices_combine_weights"]), GATE


def _expert_choice(golden: Golden) -> Quantities:
    routing = vr.expert_choice(golden["gates"], golden.config["capacity"])
    yield from _buffers(golden, routing)
    yield from _outputs(golden, routing)
    yield from _metrics(golden, routing)


def _expert_choice_of_a_plan(golden: Golden) -> Quantities:
    capacity = golden["dispatch_weights"].shape[-1]
    for weights, wanted in ((None, "combine_weights_plan"), (golden["softmax_gates"], "combine_weights_softmax")):
        routing = vr.expert_choice(golden["plan"], capacity, weights=weights)
        yield "dispatch", differing(routing.dispatch_tensor() != 0, golden["dispatch_weights"]), EXACT
        yield "combine weights", absolute(routing.combine_tensor(), golden[wanted]), GATE
        yield from _metrics(golden, routing)


def _sparse_router(golden: Golden, name: str, options: dict[str, Any]) -> Quantities:
    x, kernel = golden["x"], golden["kernel"]
    router = vr.create_router(name, x.shape[-1], kernel.shape[-1], **options)
    load_flax(router, {"dense/kernel": kernel})
    routing = _route(router, x, golden)
    logits = golden["logits"]
    if "noise" in golden:
        logits = logits + options["noise_std"] / logits.shape[-1] * golden["noise"]
    gates = golden["gates_combine"] if "gates_combine" in golden else golden["gates_dispatch"]
    if options.get("combine") != "plan":  # a plan is compared below
        yield "gates", absolute(routing.weights, gates), GATE
    if name.startswith("sinkhorn"):
        plan = vr.sinkhorn(logits, iterations=options.get("iterations", 20))
        yield "plan (relative)", relative(plan, golden["gates_dispatch"]), SINKHORN_PLAN
    if name.startswith("sparsity"):
        k = golden["dispatch_weights"].shape[-1]
        plan = vr.ksparse_transport(logits.softmax(-1), k, iterations=options["iterations"])
        yield "plan", absolute(plan, golden["gates_dispatch"]), TRANSPORT_PLAN
        # entries of the plan may tie, so compare sets of tokens, not their order in the buffers
        taken, wanted = routing.dispatch_tensor().amax(-1) != 0, golden["dispatch_weights"].any(-1)
        yield "tokens of every expert", differing(taken, wanted), EXACT
        tolerance = TRANSPORT_PLAN if options.get("combine") == "plan" else GATE
        ours = routing.combine_tensor().sum(-1)
        yield "combine weights", absolute(ours, golden["combine_weights"].sum(-1)), tolerance
    else:
        yield from _buffers(golden, routing)
    yield from _outputs(golden, routing)
    if "metric_min_selected_gate" in golden:
        yield from _metrics(golden, routing)
    yield from _losses(golden, routing)


def _soft(golden: Golden) -> Quantities:
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
    by_expert, y = inputs.flatten(1, 2), routing.combine(_experts(golden, inputs))
    if golden["x"].abs().max() < 100:
        yield "expert inputs", absolute(by_expert, golden["expert_inputs"]), SOFT
        yield "y", absolute(y, golden["y"]), SOFT
    else:
        yield "expert inputs (of the largest)", of_largest(by_expert, golden["expert_inputs"]), SOFT
        yield "y (of the largest)", of_largest(y, golden["y"]), SOFT


def _layer(golden: Golden, name: str, options: dict[str, Any]) -> Quantities:
    experts = golden.config["num_experts"]
    x = golden["x"].clone().requires_grad_()
    if name == "soft" and "capacity_factor" in options:
        options["num_tokens"] = x.shape[0] * x.shape[1]
    hidden = golden.config["mlp_dim"]
    layer = vr.MoEMlp(x.shape[-1], hidden, num_experts=experts, router=name, group_size=len(x), **options)
    load_flax(layer, golden.params())
    train_without_noise(layer)
    tolerance = OUTPUT
    if name == "soft":
        yield "layer y, without the roundings", absolute(layer(x), golden["y"]), SOFT_BFLOAT16
        tolerance = SOFT_ROUNDED
    with vr.inspect.record(layer) as trace:
        y = rounded_soft(layer, x) if name == "soft" else layer(x)
    (routing,) = trace.routings[""]
    auxiliary = vr.aux_loss(layer)
    terms = y * golden["cotangent"]
    loss = terms.sum() + 100 * auxiliary
    yield "layer y", absolute(y, golden["y"]), tolerance
    # Relative to the sum of absolute terms, because terms cancel: the stored loss and y disagree by 2e-6 of the loss.
    yield "layer loss (of its terms)", absolute(loss, golden["loss"]) / float(terms.detach().abs().sum()), LOSS_OF_TERMS
    yield from _losses(golden, routing)
    loss.backward()
    assert x.grad is not None
    yield "gradients (of norm)", of_norm(x.grad, golden["grad_x"]), GRADIENT
    for path, gradient in flax_gradients(layer, golden.params()).items():
        yield "gradients (of norm)", of_norm(gradient, golden[f"grad/{path}"]), GRADIENT


def flax_gradients(layer: vr.MoEMlp, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a MoE layer by the reference's paths and in its shapes."""
    experts: Any = layer.experts
    router: Any = layer.router
    gradients = {
        "Mlp/Dense_0/kernel": experts.w1.grad,
        "Mlp/Dense_0/bias": experts.b1.grad,
        "Mlp/Dense_1/kernel": experts.w2.grad,
        "Mlp/Dense_1/bias": experts.b2.grad,
    }
    if isinstance(router, SoftRouter):
        gradients |= {"Router/mu": router.phi.grad, "Router/scale": router.scale.grad.squeeze(0)}
    else:
        gradients |= {"Router/dense/kernel": router.weight.grad.t()}
    assert gradients.keys() == like.keys()
    return gradients


def _vit(golden: Golden, name: str, options: dict[str, Any]) -> Quantities:
    from vmoe_routers.models import vit_moe

    config, encoder = golden.config, golden.config["encoder"]
    moe = encoder["moe"]
    patch, image = config["patch_size"][0], config["image_size"]
    tokens = (image // patch) ** 2 + (config["classifier"] == "token")
    model: Any = vit_moe(
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
        global_pool={"gap": "avg", "token": "token"}[config["classifier"]],
        qk_norm=encoder.get("attention_qk_norm", False),
        **options,
    )
    load_flax(model, golden.params())
    train_without_noise(model)
    images = golden["images"].permute(0, 3, 1, 2)
    tolerance = OUTPUT
    if name == "soft":
        yield "model logits, without the roundings", absolute(model(images), golden["logits"]), SOFT_BFLOAT16
        tolerance = SOFT_ROUNDED_MODEL
        for i in moe["layers"]:
            model.blocks[i].mlp.forward = partial(rounded_soft, model.blocks[i].mlp)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    yield "model features", absolute(features, golden["features"]), tolerance
    yield "model logits", absolute(model.head(features), golden["logits"]), tolerance
    yield "auxiliary loss", absolute(vr.aux_loss(model), golden["auxiliary_loss"].mean()), GATE


def train_without_noise(model: nn.Module) -> None:
    """Set training mode, in which `aux_loss` counts a forward, but keep the numbers of eval mode."""
    for module in model.modules():
        if isinstance(module, vr.MoEMlp):
            module.router.noise_std = 0.0
    model.train()


def rounded_soft(layer: vr.MoEMlp, x: Tensor) -> Tensor:
    """Compute a Soft MoE layer's forward with the reference's two roundings to bfloat16: tokens and expert outputs."""
    tokens = x.reshape(-1, layer.group_size * x.shape[1], x.shape[2])
    routing = layer.router(tokens)
    y = layer.experts(routing.dispatch(tokens.bfloat16().float()))
    return routing.combine(y.bfloat16().float()).reshape(x.shape)


# Parts that files share


def _route(router: nn.Module, x: Tensor, golden: Golden) -> Any:
    """Route x in eval mode. If the file holds a noise draw, route in training mode with this draw."""
    if "noise" not in golden:
        return router.eval()(x)
    with patch.object(router, "draw_noise", lambda logits: golden["noise"].reshape(logits.shape)):
        return router.train()(x)


def _buffers(golden: Golden, routing: Any) -> Quantities:
    yield "dispatch", differing(routing.dispatch_tensor() != 0, golden["dispatch_weights"]), EXACT
    yield "combine weights", absolute(routing.combine_tensor(), golden["combine_weights"]), GATE


def _outputs(golden: Golden, routing: Any) -> Quantities:
    inputs = routing.dispatch(golden["x"])
    if "expert_inputs" in golden:
        yield "expert inputs", absolute(inputs.flatten(1, 2), golden["expert_inputs"]), GATE
    yield "y", absolute(routing.combine(_experts(golden, inputs)), golden["y"]), OUTPUT


def _experts(golden: Golden, inputs: Tensor) -> Tensor:
    return torch.einsum("egcd,edf->egcf", inputs, golden["expert_A"]) + golden["expert_b"][:, None, None]


def _metrics(golden: Golden, routing: Any) -> Quantities:
    processed = golden["metric_ratio_processed_items_by_at_least_1_experts"].mean()
    yield "dropped share", absolute(torch.as_tensor(routing.metrics["dropped"]).mean(), 1 - processed), GATE


def _losses(golden: Golden, routing: Any) -> Quantities:
    for ours, theirs in LOSSES.items():
        # one number per group; a loss that was not requested from the reference is a scalar 0 or absent
        if theirs in golden and golden[theirs].ndim:
            yield f"{ours} loss (relative)", relative(routing.losses[ours], golden[theirs].mean()), LOSS
    yield "auxiliary loss", absolute(routing.aux_loss, golden["metric_auxiliary_loss"].float().mean()), GATE


# The table

DOCUMENT = """\
# Parity with the reference code

The table has the largest deviations of this package from the JAX reference code of the routers' authors, on the same
inputs ([tests/golden](../tests/golden/README.md)), on a CPU in float32. The tests make the same comparison, and fail if
a deviation exceeds its tolerance ([tests/parity.py](../tests/parity.py)).

Made by `{command}`, {date}: {versions}; {cpu}.

{table}

- Deviations are absolute unless the quantity says otherwise. "differ" counts entries that are not equal.
- The noise on the logits is read from the golden file. Files without noise are compared in eval mode.
- Entries of a sparsity-constrained plan can tie to the last bit, so the set of tokens of every expert is compared. For
  all other routers every slot is compared.
- If a Sinkhorn plan goes into the combine tensor, the gradients of the reference come from the implicit function
  theorem. The option `gradient="implicit"` computes the same gradients.
- The reference rounds twice to bfloat16 inside a Soft MoE layer. This package does not, and the lines "without the
  roundings" compare it as users get it. The other lines on the same golden files compare this package after adding the
  same two roundings.
"""


def table() -> list[str]:
    """Make the lines of the Markdown table: for every router and quantity, the largest deviation of all files."""
    groups: dict[tuple[str, str, float], list[Deviation]] = {}
    for file in FILES:
        for found in compare(file):
            groups.setdefault((found.router, found.quantity, found.tolerance), []).append(found)
    order = ("(all)", *vr.ROUTERS)
    lines = ["| router | golden files | quantity | largest deviation | tolerance |", "|---|---|---|---|---|"]
    for (router, quantity, tolerance), found in sorted(groups.items(), key=lambda group: order.index(group[0][0])):
        largest, exact = max(deviation.largest for deviation in found), tolerance == EXACT
        numbers = f"{largest:.0f} differ | exact" if exact else f"{largest:.1e} | {tolerance:.0e}"
        lines.append(f"| {router} | {_names({deviation.file for deviation in found})} | {quantity} | {numbers} |")
    return lines


def _names(files: set[str]) -> str:
    """Write `tc_*` (8) for eight files whose names begin with tc_, and the full name for a single file."""
    kinds = Counter(file.partition("_")[0] for file in files)
    alone = {file.partition("_")[0]: file for file in files}
    return ", ".join(f"`{kind}_*` ({n})" if n > 1 else f"`{alone[kind]}`" for kind, n in sorted(kinds.items()))


def document() -> str:
    """docs/parity.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("vmoe_routers", "torch", "timm", "numpy"))
    return DOCUMENT.format(
        table="\n".join(table()),
        command=COMMAND,
        date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
        versions=f"{versions}, Python {platform.python_version()}",
        cpu=_cpu(),
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    for file in FILES:
        check(file)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(document())
    print(f"written: {TABLE.relative_to(TABLE.parents[1])}")
