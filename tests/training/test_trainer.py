"""Trainer: the step, parameter groups, freezing, accumulation, skipped steps, and the state."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.optim._optim_factory import list_optimizers
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

import vmoe_routers as vr
from vmoe_routers.models import upcycle, vit_moe
from vmoe_routers.options import OptionError
from vmoe_routers.training import Optimisation, Trainer, TrainingError
from vmoe_routers.training.optimisation import criterion, freeze, make_optimizer, parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(router="softmax_token_choice", **options):
    torch.manual_seed(0)
    if router is not None:
        options = {"num_experts": 4, "group_size": 1 if router == "soft" else 2} | options
    model = vit_moe(4, 2, 1, 3, embed_dim=8, depth=2, num_heads=2, router=router, **options)
    nn.init.normal_(model.head.weight, std=0.5)  # a head of zeros would pass no gradient on
    return model.train()


def batch(count=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 4, 4, generator=g), torch.randint(3, (count,), generator=g)


def trained(model, optimisation, steps=3, **options):
    trainer = Trainer(model, optimisation, steps, **options)
    for step in range(steps):
        trainer(*batch(seed=step))
    return trainer


def values(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_step_is_what_torch_does_by_hand():
    o = Optimisation(learning_rate=0.1, schedule="constant", warmup=0.0, clip=0.5, weight_decay=0.25)
    model, images, labels = tiny(importance_loss_weight=1.0), *batch()
    ours, report = copy.deepcopy(model), None
    trainer = Trainer(ours, o, 1, seed=3)
    torch.manual_seed(5)  # the step must override this seed
    report = trainer(images, labels)

    from vmoe_routers.training.seeding import seed_of

    torch.manual_seed(seed_of(3, "step", 0, 0))
    loss = F.cross_entropy(model(images), labels)
    auxiliary = vr.aux_loss(model)
    (loss + auxiliary).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    kernels = [
        p for name, p in model.named_parameters() if name.endswith(("weight", "w1", "w2")) and "norm" not in name
    ]
    others = [p for p in model.parameters() if not any(p is kernel for kernel in kernels)]
    torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.25}, {"params": others, "weight_decay": 0.0}], lr=0.1
    ).step()
    assert float(report.loss) == pytest.approx(loss.item()) and float(report.aux_loss) == pytest.approx(
        auxiliary.item()
    )
    assert auxiliary.item() > 0 and float(report.grad_norm) == pytest.approx(float(norm)) and norm > 0.5
    assert torch.allclose(values(ours), values(model), atol=1e-6)
    assert trainer.step == 1 and trainer.skipped == 0


def test_noise_depends_on_seed_step_and_rank_alone():
    torch.manual_seed(1)
    first = values(trained(tiny(), Optimisation(), seed=2).plain)
    torch.manual_seed(7)
    assert torch.equal(first, values(trained(tiny(), Optimisation(), seed=2).plain))
    assert not torch.equal(first, values(trained(tiny(), Optimisation(), seed=3).plain))
    assert not torch.equal(first, values(trained(tiny(), Optimisation(), seed=2, rank=1).plain))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_accumulation_changes_nothing(loss):
    model = tiny(noise_std=0.0, top_k=4).double()  # every token gets all experts, so groups do not affect the capacity
    o = {"loss": loss, "learning_rate": 0.01, "warmup": 0.0, "optimizer": "sgd"}
    parts = []
    for accumulate in (1, 2, 4):
        trainer = Trainer(copy.deepcopy(model), Optimisation(**o, accumulate=accumulate), 2)
        for seed in range(2):
            images, labels = batch(seed=seed)
            report = trainer(images.double(), labels)
        parts.append((values(trainer.plain), report.loss, report.aux_loss, report.grad_norm))
    for other in parts[1:]:
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(parts[0], other))
    with pytest.raises(ValueError, match="8 images are not a multiple of accumulate = 3"):
        trained(tiny(), Optimisation(accumulate=3), 1)


def test_criterion():
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    shares = F.one_hot(labels, 3).double()
    for loss in ("softmax", "sigmoid"):
        for smoothing in (0.0, 0.2):
            assert torch.allclose(
                criterion(logits, labels, loss, smoothing), criterion(logits, shares, loss, smoothing)
            )
    assert torch.allclose(criterion(logits, labels, "softmax", 0.0), F.cross_entropy(logits, labels))
    by_class = -(shares * F.logsigmoid(logits) + (1 - shares) * F.logsigmoid(-logits))
    assert torch.allclose(criterion(logits, labels, "sigmoid", 0.0), by_class.sum(1).mean())
    assert criterion(logits.bfloat16(), labels, "sigmoid", 0.0).dtype == torch.float32


@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
def test_only_kernels_and_the_scale_are_decayed(router):
    model = tiny(router)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    o = Optimisation(weight_decay=0.25, head_weight_decay=3.0)
    groups = parameter_groups(model, o)
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, decay in found.items():
        kernel = name.endswith(("weight", ".w1", ".w2", ".scale")) and "norm" not in name
        assert decay == (3.0 if name == "head.weight" else 0.25 if kernel else 0.0), name
    assert found["patch_embed.proj.weight"] == 0.25 and found["pos_embed"] == 0


def test_gated_and_normalised_experts_are_decayed_by_their_kernels_alone():
    experts = vr.Experts(2, 4, 6, 4, norm_layer=nn.LayerNorm, glu=True)  # norms and biases are [E, F]
    decayed = [g for g in parameter_groups(nn.Sequential(experts), Optimisation()) if g["weight_decay"]]
    assert {id(p) for g in decayed for p in g["params"]} == {id(experts.w1), id(experts.w2)}


def test_layer_decay_of_an_upcycled_model():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=3)
    upcycle(model, router="softmax_token_choice", num_experts=2)
    trainer = Trainer(model, Optimisation(layer_decay=0.5, learning_rate=1.0, warmup=0.0, schedule="constant"), 1)
    trainer(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    assert rates["head.weight"] == 1 and rates["patch_embed.proj.weight"] == min(rates.values())
    assert rates["blocks.3.mlp.experts.w1"] == 2 * rates["blocks.2.mlp.router.logits.weight"]
    assert rates["blocks.1.mlp.fc1.weight"] == 2 * rates["blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize("trained", ["router", "experts", "head"])
def test_freezing(trained):
    model = tiny()
    freeze(model, trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    globals()["trained"](model, Optimisation(learning_rate=0.1, trained=trained))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if f"{trained}." in name}
    with pytest.raises(OptionError, match="trained 'router': MoEVisionTransformer"):
        freeze(tiny(None), "router")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lion", "nadamw"])
def test_steps_that_are_not_finite_change_nothing(optimizer):
    trainer = Trainer(tiny(), Optimisation(optimizer=optimizer, max_skipped=2, ema=0.5), 10)
    images, labels = batch()
    trainer(images, labels)
    before, average = values(trainer.plain), copy.deepcopy(trainer.ema.values)
    state = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    bad = images.clone()
    bad[3, 0, 1, 1] = float("nan")
    trainer(bad, labels)
    assert torch.equal(values(trainer.plain), before) and trainer.skipped == 1
    for key, old in state.items():
        for name, value in old.items():
            assert torch.equal(
                torch.as_tensor(trainer.optimizer.state_dict()["state"][key][name]), torch.as_tensor(value)
            )
    trainer.check(bad)  # max_skipped = 2: a single bad step raises nothing
    trainer(images, labels)
    assert not torch.equal(values(trainer.plain), before)
    trainer(bad, labels), trainer(bad, labels)
    assert trainer.skipped == 3
    with pytest.raises(TrainingError, match=r"last 2 steps; the images have values that are not finite"):
        trainer.check(bad)
    assert average.keys() == trainer.ema.values.keys()


def test_an_infinite_loss_with_a_finite_gradient_changes_nothing():
    model = tiny()
    trainer = Trainer(model, Optimisation(warmup=0.0, weight_decay=0.0), 10)
    weight = torch.tensor([float("inf"), 0.0, 0.0])
    model.register_forward_hook(lambda module, args, output: output - weight)
    before = values(model)
    report = trainer(batch()[0], torch.zeros(8, dtype=torch.int64))
    assert torch.isinf(report.loss) and trainer.skipped == 1 and torch.equal(values(model), before)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_finite_gradient_whose_norm_overflows_changes_nothing(optimizer, precision):
    """Clipping makes such a gradient 0, and a step with it would still decay the parameters."""
    model = tiny()
    o = Optimisation(
        optimizer=optimizer, precision=precision, warmup=0.0, weight_decay=0.5, learning_rate=0.1, clip=1.0
    )
    trainer = Trainer(model, o, 10)
    # With torch 2.11, gradients of float16 overflow at GradScaler's first scale.
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "float16")
    handle = model.head.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    before = values(model)
    report = trainer(*batch())
    assert torch.isinf(report.grad_norm) and trainer.skipped == 1 and torch.equal(values(model), before)
    handle.remove()
    trainer(*batch())
    assert trainer.skipped == 1 and not torch.equal(values(model), before)


def test_the_first_layer_that_is_not_finite_is_named():
    model = tiny()
    trainer = Trainer(model, Optimisation(max_skipped=1), 10)
    handle = model.blocks[1].mlp.experts.register_forward_hook(lambda module, args, output: output * float("inf"))
    trainer(*batch())
    with pytest.raises(TrainingError, match=r"first module whose output is not finite is blocks\.1\.mlp\.experts"):
        trainer.check(batch()[0])
    handle.remove()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = float("nan")
    trainer(*batch())
    with pytest.raises(TrainingError, match=r"first parameter that is not finite is blocks\.0\.attn\.qkv\.weight"):
        trainer.check(batch()[0])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast(precision):
    model, seen = tiny(), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer = Trainer(model, Optimisation(precision=precision), 3)
    # With torch 2.11, gradients of float16 overflow at GradScaler's first scale.
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "float16")
    before = values(model)
    reports = [trainer(*batch(seed=step)) for step in range(3)]
    assert seen == [getattr(torch, precision)] * 3
    assert all(report.loss.dtype == torch.float32 and torch.isfinite(report.loss) for report in reports)
    assert not torch.equal(before, values(model)) and trainer.scaler.is_enabled() == (precision == "float16")
    assert 0 < float(reports[0].grad_norm) < 1e3  # unscaled


@pytest.mark.parametrize(
    "options",
    [{}, {"ema": 0.9}, {"optimizer": "sgd"}, {"optimizer": "lamb"}, {"precision": "float16"}, {"trained": "experts"}],
    ids=str,
)
def test_the_state_continues_bit_for_bit(options, tmp_path):
    from vmoe_routers.training import checkpoint

    o = Optimisation(**options)

    def make():
        model = tiny()
        freeze(model, o.trained)
        return Trainer(model, o, 6)

    through = make()
    for step in range(6):
        if step == 3:
            checkpoint.save(tmp_path, through, {"best": None})
        through(*batch(seed=step))
    resumed = make()
    with torch.no_grad():
        for parameter in resumed.plain.parameters():
            parameter.add_(1)  # the checkpoint overwrites it
    assert checkpoint.restore(tmp_path, resumed, pytest.fail) == {
        "format_version": 1,
        "step": 3,
        "sizes": checkpoint.read_info(tmp_path / "00000003")["sizes"],
        "best": None,
    }
    assert resumed.step == 3
    for step in range(3, 6):
        resumed(*batch(seed=step))
    assert torch.equal(values(through.plain), values(resumed.plain))
    if o.ema:
        assert all(torch.equal(value, resumed.ema.values[name]) for name, value in through.ema.values.items())


def test_average():
    trainer = Trainer(tiny(), Optimisation(ema=0.75, learning_rate=0.1, warmup=0.0), 2)
    first = values(trainer.plain)
    trainer(*batch())
    second = values(trainer.plain)
    with trainer.averaged():
        assert torch.allclose(values(trainer.plain), 0.75 * first + 0.25 * second, atol=1e-6)
    assert torch.equal(values(trainer.plain), second)
    assert isinstance(Trainer(tiny(), Optimisation(), 1).averaged(), nullcontext)


def test_arguments_of_the_optimizer():
    optimizer = make_optimizer(tiny(), Optimisation(optimizer_args={"betas": (0.5, 0.6)}))
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    with pytest.raises(OptionError, match=r"optimizer 'adamw' with .*'beta'"):
        make_optimizer(tiny(), Optimisation(optimizer_args={"beta": 1}))
    with pytest.raises(OptionError, match="'adahessian' needs second derivatives"):
        Optimisation(optimizer="adahessian")


# Kron compiles its step and advises to install a package.
OF_TIMM = [name for name in list_optimizers() if not name.startswith(("adahessian", "kron"))]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by checkpoints of one process
@pytest.mark.skipif(torch.cuda.is_available(), reason="optimizers of CUDA")
def test_every_optimizer_of_timm_continues_bit_for_bit(tmp_path):
    """An optimizer that needs CUDA is refused with a message that names what is missing."""

    def make(name):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 3))
        return Trainer(model, Optimisation(optimizer=name, warmup=0.0, schedule="constant"), 4)

    trainers, states, refused = {}, {}, []
    for name in OF_TIMM:
        try:
            trainers[name] = make(name)
        except OptionError as error:
            refused.append(name)
            assert re.fullmatch(rf"optimizer '{name}': .*(APEX|CUDA|bitsandbytes).*", str(error))
            continue
        for seed in range(2):
            trainers[name](*batch(seed=seed))
        states[name] = copy.deepcopy(trainers[name].state_dict())
        for seed in range(2, 4):
            trainers[name](*batch(seed=seed))
    assert all(name.startswith(("bnb", "fused")) for name in refused) and "adamw" in states
    write_state(states, checkpoint_id=tmp_path, no_dist=True)
    resumed = {name: make(name) for name in states}
    for trainer in resumed.values():
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.add_(1)  # the checkpoint overwrites it
    read = {name: trainer.state_dict() for name, trainer in resumed.items()}
    read_state(read, checkpoint_id=tmp_path, no_dist=True)
    for name, trainer in resumed.items():
        trainer.load_state_dict(read[name])
        for seed in range(2, 4):
            trainer(*batch(seed=seed))
        assert torch.equal(values(trainer.plain), values(trainers[name].plain)), name
        assert not torch.equal(values(trainer.plain), values(make(name).plain)), name


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
def test_random_choices_of_an_optimizer_are_a_function_of_seed_and_step(monkeypatch):
    def choices(step, rank):
        trainer = Trainer(tiny(), Optimisation(optimizer="kron"), 4, rank=rank)
        trainer.step, found = step, []
        monkeypatch.setattr(trainer.optimizer, "step", lambda: found.append(trainer.optimizer.rng.random()))
        trainer(*batch())
        return found

    assert choices(2, 0) == choices(2, 1) != choices(3, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="optimizers of CUDA")
def test_an_optimizer_that_needs_cuda_is_refused():
    with pytest.raises(OptionError, match=r"optimizer 'fusedadam': .*(APEX|CUDA)"):
        make_optimizer(tiny(), Optimisation(optimizer="fusedadam"))
