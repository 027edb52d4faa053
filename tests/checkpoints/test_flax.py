"""load_flax: every parameter is found by its path, and either all of them are loaded or none."""

import ast
import copy

import numpy as np
import parity
import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.checkpoints import load_flax
from vmoe_routers.models import vit_moe

D, F, E = 8, 12, 4


def layer(router="softmax_token_choice", **options):
    return vr.MoEMlp(D, F, num_experts=E, router=router, **options)


def arrays(**more):
    """The parameters of `layer()` by their paths, as numpy arrays."""
    draw = np.random.default_rng(0)
    shapes = {
        "Router/dense/kernel": (D, E),
        "Mlp/Dense_0/kernel": (E, D, F),
        "Mlp/Dense_0/bias": (E, F),
        "Mlp/Dense_1/kernel": (E, F, D),
        "Mlp/Dense_1/bias": (E, D),
    }
    return {path: draw.standard_normal(shape, dtype=np.float32) for path, shape in shapes.items()} | more


def check_loaded(module, params):
    torch.testing.assert_close(module.router.weight, torch.as_tensor(params["Router/dense/kernel"]).t())
    torch.testing.assert_close(module.experts.w1, torch.as_tensor(params["Mlp/Dense_0/kernel"]))
    torch.testing.assert_close(module.experts.b1, torch.as_tensor(params["Mlp/Dense_0/bias"]))
    torch.testing.assert_close(module.experts.w2, torch.as_tensor(params["Mlp/Dense_1/kernel"]))
    torch.testing.assert_close(module.experts.b2, torch.as_tensor(params["Mlp/Dense_1/bias"]))


def check_refused(module, params, *messages):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_flax(module, params)
    for message in messages:
        assert message in str(error.value)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layer():
    module = layer()
    parameters = dict(module.named_parameters())
    assert load_flax(module, arrays()) is module
    check_loaded(module, arrays())
    for name, parameter in module.named_parameters():  # loaded in place, and still requires a gradient
        assert parameter is parameters[name] and parameter.requires_grad and parameter.is_leaf


def test_soft_layer():
    mu = np.random.default_rng(1).standard_normal((D, E, 3), dtype=np.float32)
    params = arrays(**{"Router/mu": mu, "Router/scale": np.float32(2.5)})
    del params["Router/dense/kernel"]
    module = load_flax(layer("soft", slots_per_expert=3), params)
    torch.testing.assert_close(module.router.phi, torch.as_tensor(mu))
    assert module.router.scale == 2.5


@pytest.mark.parametrize("name", vr.ROUTERS)
def test_router_alone(name):
    router = vr.create_router(name, D, E)
    if name == "soft":
        load_flax(router, {"mu": np.ones((D, E, 1), np.float32), "scale": np.ones((), np.float32)})
        assert (router.phi == 1).all()
    else:
        kernel = np.random.default_rng(1).standard_normal((D, E))
        load_flax(router, {"dense/kernel": kernel})
        torch.testing.assert_close(router.weight, torch.as_tensor(kernel).t().float())


def test_nested_maps_and_the_params_prefix():
    flat = arrays()
    nested = {
        "Router": {"dense": {"kernel": flat["Router/dense/kernel"]}},
        "Mlp": {f"Dense_{i}": {k: flat[f"Mlp/Dense_{i}/{k}"] for k in ("kernel", "bias")} for i in (0, 1)},
    }
    for params in (nested, {"params": nested}, {f"params/{path}": array for path, array in flat.items()}):
        check_loaded(load_flax(layer(), params), flat)


@pytest.mark.parametrize("change", [
    lambda array: torch.as_tensor(array),
    lambda array: torch.as_tensor(array).requires_grad_(),
    lambda array: torch.as_tensor(array).double(),
    lambda array: array.astype(np.float64),
    lambda array: array.astype(">f4"),
    lambda array: np.asfortranarray(array),
    lambda array: array[..., ::-1].copy()[..., ::-1],
    lambda array: np.frombuffer(array.tobytes(), np.float32).reshape(array.shape),  # not writable
])  # fmt: skip
def test_kinds_of_arrays(change):
    params = {path: change(array) for path, array in arrays().items()}
    check_loaded(load_flax(layer(), params), arrays())


def test_bfloat16_as_two_bytes():
    rounded = {path: torch.as_tensor(array).bfloat16() for path, array in arrays().items()}
    raw = {path: tensor.view(torch.int16).numpy().view("V2") for path, tensor in rounded.items()}
    check_loaded(load_flax(layer(), raw), {path: tensor.float() for path, tensor in rounded.items()})


def test_parameters_keep_their_dtype():
    module = load_flax(layer(dtype=torch.bfloat16), arrays())
    assert module.experts.w1.dtype == torch.bfloat16
    assert torch.equal(module.experts.w1, torch.as_tensor(arrays()["Mlp/Dense_0/kernel"]).bfloat16())


def test_the_arrays_are_copied():
    params = arrays()
    module = load_flax(layer(), params)
    params["Mlp/Dense_0/kernel"][:] = 0
    check_loaded(module, arrays())


def test_refuses_missing_left_over_and_misshapen_together():
    params = arrays(**{"Router/dense/bias": np.zeros(E, np.float32), "Mlp/Dense_0/bias": np.zeros((F, E), np.float32)})
    del params["Mlp/Dense_1/kernel"]
    check_refused(
        layer(),
        params,
        "3 of the parameters",
        "Mlp/Dense_1/kernel: missing, wanted shape (4, 12, 8)",
        "Mlp/Dense_0/bias: shape (12, 4), wanted (4, 12)",
        "Router/dense/bias: not used, came with shape (4,)",
    )


@pytest.mark.parametrize("wrong", [
    np.zeros((E, F), np.int32),
    np.zeros((E, F), np.complex64),
    np.zeros((E, F), np.longdouble),
    torch.zeros(E, F, dtype=torch.int8),
    torch.zeros(E, F, device="meta"),
    [[0.0] * F] * E,
    None,
    "zeros",
])  # fmt: skip
def test_refuses_what_is_no_floating_array(wrong):
    check_refused(layer(), arrays(**{"Mlp/Dense_0/bias": wrong}), "Mlp/Dense_0/bias", "wanted a floating-point array")


def test_refuses_a_path_given_twice():
    params = arrays(Mlp={"Dense_0": {"bias": np.zeros((E, F), np.float32)}})
    check_refused(layer(), params, "Mlp/Dense_0/bias: given 2 times")


def test_refuses_a_prefix_on_some_paths_only():
    params = arrays()
    params["params/Mlp/Dense_0/bias"] = params.pop("Mlp/Dense_0/bias")
    check_refused(layer(), params, "Mlp/Dense_0/bias: missing", "params/Mlp/Dense_0/bias: not used")


def test_refuses_the_parameters_of_another_router():
    check_refused(
        layer("soft"), arrays(), "Router/mu: missing", "Router/scale: missing", "Router/dense/kernel: not used"
    )


def test_refuses_no_parameters():
    check_refused(layer(), {}, "5 of the parameters")


def test_refuses_a_parameter_that_the_reference_lacks():
    module = layer()
    module.register_parameter("gain", torch.nn.Parameter(torch.ones(1)))
    check_refused(module, arrays(), "MoEMlp.gain, shape (1,): has no counterpart")


@pytest.mark.parametrize("params", [None, [("Router/dense/kernel", np.zeros((D, E)))], np.zeros(3)])
def test_refuses_params_that_are_no_mapping(params):
    with pytest.raises(TypeError, match="load_flax: params is a"):
        load_flax(layer(), params)


@pytest.mark.parametrize("module", [torch.nn.Linear(2, 2), torch.nn.Sequential(), object()])
def test_refuses_a_module_of_another_kind(module):
    with pytest.raises(TypeError, match="load_flax: module is a"):
        load_flax(module, {})


def test_refuses_a_router_without_parameters_of_the_reference():
    router = torch.nn.Identity()
    router.dim, router.num_experts = D, E
    with pytest.raises(TypeError, match="load_flax: router is a Identity, wanted one with a weight"):
        load_flax(vr.MoEMlp(D, F, num_experts=E, router=router), arrays())


def model(**options):
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 32, "depth": 4, "num_heads": 4}
    token_choice = {"router": "softmax_token_choice", "num_experts": 4, "moe_blocks": "every_2", "global_pool": "token"}
    return vit_moe(**{**sizes, "mlp_ratio": 2.0, **token_choice, **options})


def test_model_is_loaded_whole_or_not_at_all():
    params = parity.Golden("vit_tiny_token_tc").params()
    last = "Encoder/encoderblock_3/Moe/Mlp/Dense_1/bias"
    check_refused(model(), {**params, last: params[last][:, 1:]}, last, "wanted (4, 32)")
    loaded = load_flax(model(), params)
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all(), name
    value = loaded.blocks[0].attn.qkv.weight[64:]
    kernel = params["Encoder/encoderblock_0/SelfAttention/value/kernel"]
    assert torch.equal(value, kernel.reshape(32, 32).t())
    assert torch.equal(loaded.patch_embed.proj.weight, params["embedding/kernel"].permute(3, 2, 0, 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"moe_blocks": "last_2"}, "encoderblock_1/Mlp/Dense_0/kernel: missing"),
    ({"router": None}, "encoderblock_1/Moe/Router/dense/kernel: not used"),
    ({"global_pool": "avg"}, "cls: not used"),
    ({"global_pool": "map"}, "MapHead/probe: missing"),
    ({"qk_norm": True}, "SelfAttention/query_ln/scale: missing"),
    ({"pos_embed": "sincos"}, "pos_embedding: not used"),
    ({"num_classes": 5}, "head/kernel: shape (32, 10), wanted (32, 5)"),
    ({"num_classes": 0}, "head/kernel: not used"),
    ({"depth": 6}, "encoderblock_5/Moe/Router/dense/kernel: missing"),
    ({"num_heads": 2}, "query/kernel: shape (32, 4, 8), wanted (32, 2, 16)"),
])  # fmt: skip
def test_refuses_a_model_of_another_form(options, message):
    check_refused(model(**options), parity.Golden("vit_tiny_token_tc").params(), message)


def test_attention_pooling_fills_every_parameter():
    """Checks the shape of every path in the name map, and the head's layout by values. No golden file covers these."""
    module = model(global_pool="map", qk_norm=True)
    params = {path: array for path, array in parity.Golden("vit_tiny_token_tc").params().items() if path != "cls"}
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    for i in range(4):
        for ln in ("query_ln", "key_ln"):
            params[f"Encoder/encoderblock_{i}/SelfAttention/{ln}/scale"] = normal(8)
    params["Encoder/posembed_input/pos_embedding"] = normal(1, 16, 32)
    attention = "MapHead/MultiHeadDotProductAttention"
    params |= {
        "MapHead/probe": normal(1, 1, 32),
        "MapHead/LayerNorm/scale": normal(32),
        "MapHead/LayerNorm/bias": normal(32),
    }
    for name in ("query", "key", "value"):
        params |= {f"{attention}/{name}/kernel": normal(32, 4, 8), f"{attention}/{name}/bias": normal(4, 8)}
    params |= {f"{attention}/out/kernel": normal(4, 8, 32), f"{attention}/out/bias": normal(32)}
    params |= {f"{attention}/query_ln/scale": normal(8), f"{attention}/key_ln/scale": normal(8)}
    params |= {"MapHead/Mlp/Dense_0/kernel": normal(32, 64), "MapHead/Mlp/Dense_0/bias": normal(64)}
    params |= {"MapHead/Mlp/Dense_1/kernel": normal(64, 32), "MapHead/Mlp/Dense_1/bias": normal(32)}
    pool = load_flax(module, params).attn_pool
    x = normal(2, 16, 32)
    torch.testing.assert_close(pool(x), _map_head(x, params), rtol=1e-4, atol=1e-4)


def _map_head(x, params):
    """Writes attention pooling with the names and axes of the reference."""
    attention = "MapHead/MultiHeadDotProductAttention"

    def project(y, name):
        return (
            torch.einsum("btd,dhk->bthk", y, params[f"{attention}/{name}/kernel"]) + params[f"{attention}/{name}/bias"]
        )

    def norm(y, path, bias=0.0):
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * params[path] + bias

    query = norm(project(params["MapHead/probe"].expand(len(x), -1, -1), "query"), f"{attention}/query_ln/scale")
    key = norm(project(x, "key"), f"{attention}/key_ln/scale")
    weights = (torch.einsum("bqhk,bthk->bhqt", query, key) * 8**-0.5).softmax(-1)
    mixed = torch.einsum("bhqt,bthk->bqhk", weights, project(x, "value"))
    y = torch.einsum("bqhk,hkd->bqd", mixed, params[f"{attention}/out/kernel"]) + params[f"{attention}/out/bias"]
    hidden = norm(y, "MapHead/LayerNorm/scale", params["MapHead/LayerNorm/bias"])
    hidden = hidden @ params["MapHead/Mlp/Dense_0/kernel"] + params["MapHead/Mlp/Dense_0/bias"]
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    return (y + hidden @ params["MapHead/Mlp/Dense_1/kernel"] + params["MapHead/Mlp/Dense_1/bias"])[:, 0]


def test_pre_logits_and_the_names_of_dense_vits():
    """The names in files of dense ViTs, and pre_logits, load like the names of the reference."""
    source = model(router=None, pre_logits=True)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    params = flax_params(source)
    renamed = {}
    for path, array in params.items():
        path = path.replace("Encoder/", "Transformer/").replace("SelfAttention/", "MultiHeadDotProductAttention_1/")
        path = path.replace("LayerNorm_1/", "LayerNorm_2/").replace("/Mlp/", "/MlpBlock_3/")
        renamed["opt/target/" + path] = array
    for given in (params, renamed):
        loaded = load_flax(model(router=None, pre_logits=True), given)
        for name, tensor in source.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    check_refused(model(router=None), params, "pre_logits/kernel: not used")


def flax_params(dense):
    """The inverse of the name map, for a dense model with a class token."""
    state, heads = dense.state_dict(), 4

    def linear(path, name, rows=slice(None)):
        return {f"{path}/kernel": state[f"{name}.weight"][rows].t(), f"{path}/bias": state[f"{name}.bias"][rows]}

    def norm(path, name):
        return {f"{path}/scale": state[f"{name}.weight"], f"{path}/bias": state[f"{name}.bias"]}

    found = {"cls": state["cls_token"], "Encoder/posembed_input/pos_embedding": state["pos_embed"]}
    found |= {"embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0)}
    found |= {"embedding/bias": state["patch_embed.proj.bias"]}
    for i in range(4):
        path, name, width = f"Encoder/encoderblock_{i}", f"blocks.{i}", state["cls_token"].shape[2]
        found |= norm(f"{path}/LayerNorm_0", f"{name}.norm1") | norm(f"{path}/LayerNorm_1", f"{name}.norm2")
        found |= linear(f"{path}/Mlp/Dense_0", f"{name}.mlp.fc1") | linear(f"{path}/Mlp/Dense_1", f"{name}.mlp.fc2")
        for j, projection in enumerate(("query", "key", "value")):
            here = f"{path}/SelfAttention/{projection}"
            found |= linear(here, f"{name}.attn.qkv", slice(j * width, (j + 1) * width))
            found[f"{here}/kernel"] = found[f"{here}/kernel"].unflatten(1, (heads, -1))
            found[f"{here}/bias"] = found[f"{here}/bias"].unflatten(0, (heads, -1))
        found |= linear(f"{path}/SelfAttention/out", f"{name}.attn.proj")
        found[f"{path}/SelfAttention/out/kernel"] = found[f"{path}/SelfAttention/out/kernel"].unflatten(0, (heads, -1))
    return found | norm("Encoder/encoder_norm", "norm") | linear("pre_logits", "fc_norm.dense") | linear("head", "head")


@pytest.mark.parametrize(("old", "new", "token"), [(50, 145, 1), (197, 577, 1), (197, 65, 1), (49, 144, 0)])
def test_position_embeddings_of_another_grid(old, new, token):
    golden = parity.Golden("vit_zoom")
    table, side = golden[f"src_{old}"], int((new - token) ** 0.5)
    module = vit_moe(
        side, 1, embed_dim=8, depth=1, num_heads=1, router=None, global_pool="token" if token else "avg", num_classes=0
    )
    path = "Encoder/posembed_input/pos_embedding"
    params = {missing: torch.zeros(shape) for missing, shape in _missing(module)}
    load_flax(module, params | {path: table})
    torch.testing.assert_close(module.pos_embed.data, golden[f"out_{old}_to_{new}"], rtol=0, atol=parity.OUTPUT)
    for wrong in (table[..., :4], table[:, :-1], table[0], table[:, :token]):
        check_refused(module, params | {path: wrong}, f"{path}: shape {tuple(wrong.shape)}, wanted (1, {new}, 8)")


def _missing(module):
    """Returns paths and shapes of the arrays that a module requires, in the form of the error message."""
    with pytest.raises(ValueError) as error:
        load_flax(module, {})
    lines = str(error.value).splitlines()[1:]
    return [(line.split(":")[0].strip(), ast.literal_eval(line.split("wanted shape ")[1])) for line in lines]


def test_skip_head():
    params = parity.Golden("vit_tiny_token_tc").params()
    for classes in (5, 0, 10):
        module = model(num_classes=classes)
        before = copy.deepcopy(module.head.state_dict())
        load_flax(module, {**params, "pre_logits/kernel": torch.zeros(32, 32)}, skip_head=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.head.state_dict().items())
        assert torch.equal(module.cls_token, params["cls"])
