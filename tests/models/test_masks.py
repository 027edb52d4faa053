"""Padding masks in whole models: masked patches never affect the result."""

import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers.models import vit_moe


def model_of(router, **options):
    torch.manual_seed(0)
    options = options if router is None else {"num_experts": 4, **options}
    model = vit_moe(8, 2, 1, 10, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0, router=router, **options)
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("global_pool", ["avg", "token", "map"])
@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
def test_masked_patches_do_not_affect_the_result(router, global_pool):
    """The contents of masked patches change nothing, and every real patch still counts."""
    model = model_of(router, global_pool=global_pool)
    x = torch.randn(3, 1, 8, 8)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1, 8:] = False  # the lower half of the second image
    mask[2, ::2] = False
    other = x.clone()
    other[1, :, 4:] = 100.0
    torch.testing.assert_close(model(x, mask=mask), model(other, mask=mask))
    assert not torch.allclose(model(x, mask=mask)[1], model(x)[1])
    other = x.clone()
    other[1, :, :4] += 1
    assert not torch.allclose(model(x, mask=mask)[1], model(other, mask=mask)[1])


@pytest.mark.parametrize("global_pool", ["avg", "token", "map"])
@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
def test_a_padded_image_gives_the_output_of_the_unpadded_image(router, global_pool):
    """If there are slots for all tokens, an image padded to a larger size gives the output of the unpadded image."""
    room = {} if router in (None, "soft") else {"capacity_factor": 8.0}
    options = {"global_pool": global_pool, "pos_embed_std": 0.0, **room}
    x = torch.randn(3, 1, 8, 8)
    model = model_of(router, **options)
    wanted, features = model(x), model.forward_features(x)
    model.set_input_size(img_size=(12, 8))
    real = features.shape[1]
    mask = (torch.arange(24) < 16).expand(3, 24)
    for rest in (1.0, torch.inf, torch.nan):
        padded = torch.cat([x, torch.full((3, 1, 4, 8), rest)], 2)
        torch.testing.assert_close(model(padded, mask=mask), wanted, rtol=1e-4, atol=1e-5)
        found = model.forward_features(padded, mask=mask)[:, :real]
        torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("global_pool", ["avg", "token", "map"])
@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
def test_a_mask_of_true_is_no_mask(router, global_pool):
    model = model_of(router, global_pool=global_pool)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(x, mask=torch.ones(3, 16, dtype=torch.bool)), model(x))


@pytest.mark.parametrize("global_pool", ["avg", "token", "map"])
def test_features_and_head_give_the_output_of_the_model(global_pool):
    model = model_of("softmax_expert_choice", global_pool=global_pool)
    x, mask = torch.randn(3, 1, 8, 8), torch.rand(3, 16) > 0.3
    features = model.forward_features(x, mask=mask)
    wanted = model(x, mask=mask)
    assert torch.equal(model.forward_head(features, mask=mask), wanted)
    assert torch.equal(model.head(model.forward_head(features, pre_logits=True, mask=mask)), wanted)
    if global_pool != "token":
        assert not torch.allclose(model.forward_head(features), wanted, rtol=1e-2)
    final, blocks = model.forward_intermediates(x, mask=mask, output_fmt="NLC")
    assert torch.equal(final, features)
    (last,) = model.get_intermediate_layers(x, 1, norm=True, mask=mask)
    assert torch.equal(last, features[:, model.num_prefix_tokens :])
    assert len(blocks) == 4 and not torch.allclose(model.forward_intermediates(x)[0], features, rtol=1e-2)


@pytest.mark.parametrize("pool_type", ["max", "avgmax", "avg", "token", ""])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_pools_of_timm(pool_type, include_prefix):
    """Pooling with a mask gives the result of pooling without the masked patches."""
    model = model_of("soft", global_pool="token")
    model.pool_include_prefix = include_prefix
    features = torch.randn(2, 17, 16)
    mask = (torch.arange(16) < 9).expand(2, 16)
    got = model.pool(features, pool_type, mask=mask)
    torch.testing.assert_close(got, model.pool(features[:, :10] if pool_type else features, pool_type))
    assert model.pool(features, pool_type, mask=torch.zeros_like(mask)).isfinite().all()


@pytest.mark.parametrize("global_pool", ["avg", "map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_of_padding_is_finite(global_pool, dtype):
    model = model_of("soft", global_pool=global_pool)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0] = True
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(torch.randn(2, 1, 8, 8), mask=mask)
    assert logits.isfinite().all()


@pytest.mark.usefixtures("on_device")
def test_gradients_with_checkpointing_are_the_same():
    x, mask = torch.randn(2, 1, 8, 8), torch.rand(2, 16) > 0.3
    found = []
    for enable in (False, True):
        model = model_of("softmax_expert_choice")
        model.set_grad_checkpointing(enable)
        model(x, mask=mask).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("mask", "error", "words"), [
    (torch.ones(2, 16), TypeError, "mask must be bool"),
    (torch.ones(2, 15, dtype=torch.bool), ValueError, r"mask must be \[N, patches\] = \[2, 16\], got \[2, 15\]"),
    (torch.ones(16, dtype=torch.bool), ValueError, "mask must be"),
    ([[True] * 16] * 2, TypeError, "mask must be bool, .* got list"),
])  # fmt: skip
def test_refuses(mask, error, words):
    with pytest.raises(error, match=words):
        model_of("soft")(torch.randn(2, 1, 8, 8), mask=mask)


def test_head_refuses_a_mask_of_another_length():
    with pytest.raises(ValueError, match=r"mask must be \[N, patches\] = \[2, 16\], got \[2, 12\]"):
        model_of("soft").forward_head(torch.randn(2, 16, 16), mask=torch.ones(2, 12, dtype=torch.bool))


def test_refuses_timms_mask_beside():
    mask = torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(TypeError, match="mask cannot be combined with attn_mask"):
        model_of("soft")(torch.randn(2, 1, 8, 8), mask=mask, attn_mask=mask)


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_another_image_size(router):
    """Another image size changes the position embedding and the capacity only."""
    small = model_of(router, dynamic_img_size=True)
    large = model_of(router)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    large.set_input_size(img_size=(12, 8))
    after = large.state_dict()
    assert set(before) == set(after)
    changed = [n for n in before if before[n].shape != after[n].shape or not torch.equal(before[n], after[n])]
    assert changed == ["pos_embed"] and after["pos_embed"].shape == (1, 24, 16)
    x = torch.randn(2, 1, 12, 8)
    with vr.inspect.record(large) as trace:
        torch.testing.assert_close(small(x), large(x))
    (routing,) = trace.routings["blocks.3.mlp"]
    assert routing.num_tokens == 24
    if router != "soft":
        assert routing.capacity == large.blocks[3].mlp.router.slots(24)
