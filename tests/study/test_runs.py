"""One run of the study: the models of a seed, their cost and their records."""

import json
from dataclasses import replace

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.models.cost import cost
from vmoe_routers.study import Settings, Variant, timing, variants
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.recipes import RECIPES, fashion
from vmoe_routers.study.runs import run
from vmoe_routers.study.variants import ablated, build, make
from vmoe_routers.training import Images, Trainer, evaluate_model

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Settings(width=16, depth=2, heads=2, mlp_ratio=2.0, num_experts=4, group_size=4, batch_size=16, epochs=2)
DENSE, SOFT = Variant(), Variant("soft", 1.0)
EXPERT_CHOICE = Variant("softmax_expert_choice", 1.0)


def made_up(train=16, test=10, seed=0):
    """Makes images of the size of the digits, filled with noise."""
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


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_images_are_mixed(option):
    settings = replace(TINY, training={option: 1.0})
    plain, mixed, again = (run(of, DENSE, 0, made_up(), None)["epochs"][-1] for of in (TINY, settings, settings))
    assert mixed["train_loss"] == again["train_loss"] != plain["train_loss"]


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
    # As in the recipes for ImageNet, the warm-up is longer than the timed steps.
    settings = replace(TINY, training={"warmup": 10_000.0})
    record = timing.time_steps(settings, [DENSE, SOFT], made_up())
    assert json.loads(json.dumps(record)) == record and record["machine"] and record["date"]


def test_held_out_images_are_not_trained_on_and_test_images_are_measured_last():
    data = made_up(train=24)
    settings = replace(TINY, holdout=8)
    record = run(settings, EXPERT_CHOICE, 0, data, None)
    whole = replace(data, train_images=data.train_images[:16], train_labels=data.train_labels[:16])
    without = run(TINY, EXPERT_CHOICE, 0, whole, None)
    assert record["final"] == without["final"]  # the same training, the same test images
    assert without["final"] == {key: without["epochs"][-1][key] for key in ("accuracy", "loss")}
    assert record["epochs"][-1]["loss"] != record["final"]["loss"]
    assert record["epochs"][-1]["train_loss"] == without["epochs"][-1]["train_loss"]


def test_choosing_does_not_use_the_test_images():
    data = made_up(train=24)
    settings = replace(TINY, holdout=8, choosing=True)
    record = run(settings, DENSE, 0, data, None)
    other = replace(data, test_images=torch.full_like(data.test_images, float("nan")))
    assert run(settings, DENSE, 0, other, None)["final"] == record["final"]
    assert record["final"] == {key: record["epochs"][-1][key] for key in ("accuracy", "loss")}


def test_a_run_that_diverges_is_recorded_as_such(monkeypatch):
    data = made_up(train=64)
    good = Trainer.__call__

    def bad_from_the_seventh(self, images, labels):
        images = images if self.step < 6 else images * float("inf")
        return good(self, images, labels)

    monkeypatch.setattr(Trainer, "__call__", bad_from_the_seventh)
    record = run(replace(TINY, epochs=12), DENSE, 0, data, None)
    assert "not finite in the last 10 steps" in record["diverged"] and [e["epoch"] for e in record["epochs"]] == [2]
    assert 0 <= record["final"]["accuracy"] <= 1 and record["layers"] == []


def test_ablations_change_one_thing():
    settings = replace(TINY, ablations=["soft_scale", "noise", "aux_loss", "learning_rate"], routers=["soft"])
    found = ablated(settings)
    assert {(v.router, v.ablation, v.arm) for v in found} == {
        (None, "learning_rate", "0.33"), (None, "learning_rate", "3"), ("soft", "learning_rate", "0.33"),
        ("soft", "learning_rate", "3"), ("soft", "soft_scale", "1"), ("soft", "soft_scale", "4"),
    }  # fmt: skip
    assert len({v.name for v in found}) == len({v.label for v in found}) == len(found)
    for variant in found:
        assert set(variant.name) <= set("abcdefghijklmnopqrstuvwxyz_0123456789.-")
        changed = variant.settings(settings)
        different = [key for key, value in vars(settings).items() if getattr(changed, key) != value]
        assert different == (["scale_init"] if variant.ablation == "soft_scale" else ["learning_rate"])
    assert ablated(replace(settings, scale_init=4.0, ablations=["soft_scale"]))[-1].arm == "16"
    twice = replace(settings, ablations=settings.ablations * 2, routers=["soft", "soft"])
    assert ablated(twice) == found


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_can_be_built(name):
    settings = replace(fashion(), width=8, heads=2, mlp_ratio=1.0, patch_size=14, ablations=[name], transfer_data=None)
    data = Images("made up", *(torch.rand(4, 1, 28, 28), torch.arange(4)) * 2, 10)
    found = ablated(settings)
    assert found
    for variant in found:
        with torch.device("meta"):
            make(variant, variant.settings(settings), data)


def test_ablations_of_slots_have_equal_slots():
    data = Images("made up", *(torch.rand(4, 1, 28, 28), torch.arange(4)) * 2, 10)
    settings = replace(fashion(), width=8, heads=2, mlp_ratio=1.0)
    for variant in ablated(replace(settings, ablations=["group_size", "experts", "experts_soft"])):
        model = build(variant, variant.settings(settings), data, 0)
        slots = 64 if variant.ablation != "experts" else 49 if variant.arm == "8" else 48
        assert cost(model)["slots"] == slots, variant.name


def test_equal_capacity_factors_are_equal_slots():
    """Token Choice with K choices has the slots of Expert Choice with a K times larger capacity factor."""
    data = Images("made up", *(torch.rand(4, 1, 28, 28), torch.arange(4)) * 2, 10)
    settings = replace(fashion(), width=8, heads=2, mlp_ratio=1.0, routers=[r for r in vr.ROUTERS if r != "soft"])
    wanted = {0.5: 24, 1.0: 48, 2.0: 96, 4.0: 196}
    for variant in variants(settings)[1:]:
        slots = cost(build(variant, variant.settings(settings), data, 0))["slots"]
        assert slots == wanted[variant.capacity_factor * (variant.top_k or 1)], variant.name


def test_identical_experts_start_as_copies():
    settings = replace(TINY, identical_experts=True)
    for variant in (SOFT, EXPERT_CHOICE):
        for parameter in build(variant, settings, made_up(), 0).blocks[1].mlp.experts.parameters():
            assert all(torch.equal(expert, parameter[0]) for expert in parameter)


def test_a_router_has_its_own_learning_rate():
    settings = replace(TINY, learning_rates={"soft": 0.5, "dense": 0.25})
    assert [v.settings(settings).learning_rate for v in (DENSE, SOFT, EXPERT_CHOICE)] == [0.25, 0.5, 2e-3]
    assert SOFT.settings(settings).optimisation().learning_rate == 0.5


def test_a_trained_model_is_kept(tmp_path):
    data = made_up()
    run(TINY, SOFT, 0, data, None, folder=tmp_path / "model")
    model = vr.checkpoints.from_pretrained(tmp_path / "model")
    assert evaluate_model(model, [(data.test_images, data.test_labels)], 10).top1 == pytest.approx(
        run(TINY, SOFT, 0, data, None)["final"]["accuracy"]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_settings(name):
    settings = RECIPES[name]()
    assert len(variants(settings)) > 1 and set(settings.ablations) <= set(ABLATIONS)
    assert RECIPES[name].__doc__
