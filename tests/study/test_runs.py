"""One run of the study: the models of a seed, their cost and their records."""

import json
from dataclasses import replace

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.study import Settings, Variant, timing, variants
from vmoe_routers.study.runs import run
from vmoe_routers.study.variants import build
from vmoe_routers.training import Images

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Settings(width=16, depth=2, heads=2, mlp_ratio=2.0, num_experts=4, group_size=4, batch_size=16, epochs=2)
DENSE, SOFT = Variant(), Variant("soft", 1.0)
EXPERT_CHOICE = Variant("softmax_expert_choice", 1.0)


def made_up(train=16, test=10, seed=0):
    """Images of the size of the digits, filled with noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(train + test, 1, 8, 8, generator=generator)
    labels = torch.arange(train + test) % 10
    return Images("made up", images[:train], labels[:train], images[train:], labels[train:], 10)


def trunk(model):
    layers = [f"blocks.{i}.mlp" for i, block in enumerate(model.blocks) if isinstance(block.mlp, vr.MoEMlp)]
    return {name: p for name, p in model.named_parameters() if not name.startswith(tuple(layers))}


def test_variants():
    found = variants(TINY)
    assert found[0] == DENSE and len(found) == len(set(found)) == 1 + 2 + 4 + 4
    assert {v.router for v in found[1:]} == set(vr.ROUTERS)
    assert len({v.name for v in found}) == len({v.label for v in found}) == 11
    assert len(variants(replace(TINY, plan_combine=False))) == 9
    assert len(variants(replace(TINY, capacity_factors=[0.5, 1.0, 2.0], top_k=[1]))) == 1 + 3 * 7
    twice = replace(TINY, routers=["soft", "soft"], capacity_factors=[1, 1.0])
    assert variants(twice) == [DENSE, SOFT]


def test_one_seed_is_one_trunk():
    data = made_up()
    models = {variant: build(variant, TINY, data, seed=5) for variant in variants(TINY)}
    shared = trunk(models[SOFT])
    assert len(shared) > 15 and not any("router" in name for name in shared)
    for variant, model in models.items():
        found = trunk(model)
        extra = set(found) - set(shared)  # the dense model has MLPs in place of experts
        assert all(variant == DENSE and name.startswith("blocks.1.mlp.") for name in extra)
        for name, parameter in shared.items():
            assert torch.equal(parameter, found[name]), (variant.name, name)
    again, other = build(SOFT, TINY, data, seed=5), build(SOFT, TINY, data, seed=6)
    for name, parameter in models[SOFT].named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.router.phi"):
        assert not torch.equal(models[SOFT].get_parameter(name), other.get_parameter(name)), name


def test_settings_reach_the_model():
    settings = replace(TINY, scale_init=3.0, mlp_ratio=1.5)
    layer = build(Variant("sinkhorn_token_choice", 0.5, 2, "plan"), settings, made_up(), 0).blocks[1].mlp
    assert (layer.group_size, layer.router.top_k, layer.router.capacity_factor) == (4, 2, 0.5)
    assert layer.router.affinity.combine == "plan" and layer.experts.w1.shape == (4, 16, 24)
    soft = build(SOFT, settings, made_up(), 0).blocks[1].mlp
    assert soft.group_size == 1 and float(soft.router.scale.detach()) == 3 and soft.router.phi.shape == (16, 4, 4)


@pytest.mark.parametrize("variant", [DENSE, EXPERT_CHOICE], ids=lambda v: v.name)
def test_record(variant):
    epochs = []
    record = run(replace(TINY, epochs=3), variant, 2, made_up(), None, lambda: epochs.append(1))
    assert json.loads(json.dumps(record)) == record
    assert record["variant"] == variant.describe() and record["seed"] == 2 and record["transfer"] is None
    assert len(epochs) == 3 and [epoch["epoch"] for epoch in record["epochs"]] == [1, 3]
    for epoch in record["epochs"]:
        assert set(epoch) == {"epoch", "seconds", "train_loss", "accuracy", "loss"} and 0 <= epoch["accuracy"] <= 1
    assert record["epochs"][-1]["seconds"] > 0 and record["steps"] == 3
    assert record["machine"]["torch"] == torch.__version__ and record["date"]
    assert [layer["block"] for layer in record["layers"]] == ([] if variant == DENSE else [1])
    if record["layers"]:
        assert sum(record["layers"][0]["load"]) == pytest.approx(16)  # as many slots as tokens of an image


def test_a_run_can_be_repeated():
    first, same, other = (run(TINY, EXPERT_CHOICE, seed, made_up(), None)["epochs"][-1] for seed in (0, 0, 1))
    assert first["loss"] == same["loss"] != other["loss"] and first["train_loss"] == same["train_loss"]


def test_transfer():
    other = made_up(train=120, test=40, seed=1)
    # The pixels show the label.
    for images, labels in ((other.train_images, other.train_labels), (other.test_images, other.test_labels)):
        images.zero_()[torch.arange(len(labels)), 0, labels // 2, labels % 2 * 4] = 1
    record = run(TINY, SOFT, 0, made_up(), replace(other, name="others"))
    assert record["transfer"]["data"] == "others" and record["transfer"]["accuracy"] > 0.9


def test_steps_are_timed_in_turns(monkeypatch):
    turns = []
    monkeypatch.setattr(
        timing, "Trainer", lambda model, *_: lambda images, labels: turns.append((id(model), len(images)))
    )
    rounds = []
    found = [DENSE, SOFT, EXPERT_CHOICE]
    record = timing.time_steps(TINY, found, made_up(train=40), lambda: rounds.append(len(turns)))
    assert rounds == list(range(3, 3 * (timing.ROUNDS + timing.WARM_UP) + 1, 3))
    assert {count for _, count in turns} == {TINY.batch_size}
    orders = [tuple(model for model, _ in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(len(set(order)) == 3 for order in orders) and len(set(orders)) > 3
    assert set(record["step_ms"]) == {variant.name for variant in found}
    assert all(len(times) == timing.ROUNDS and min(times) > 0 for times in record["step_ms"].values())


def test_timed_steps_train():
    record = timing.time_steps(TINY, [DENSE, SOFT], made_up())
    assert json.loads(json.dumps(record)) == record and record["machine"] and record["date"]
