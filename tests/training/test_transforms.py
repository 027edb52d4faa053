"""Augmentation: timm's pipeline for pictures, whole batches of tensors, mixing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made import picture
from PIL import Image
from timm.data.transforms_factory import create_transform

from vmoe_routers.options import OptionError
from vmoe_routers.training import Augmentation, Data, Mixing, Tensors, Transform, default_augmentation, open_data
from vmoe_routers.training.seeding import seed_of
from vmoe_routers.training.stream import seed_cpu
from vmoe_routers.training.transforms import NORMALIZATIONS

PHOTO = Augmentation(image_size=16)


def grey(number):
    return torch.tensor(np.array(picture(number).convert("L"))).unsqueeze(0)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_evaluation_equals_timm(name):
    mean, std = NORMALIZATIONS[name]
    image = picture(1, (50, 40))
    wanted = create_transform(16, crop_pct=0.875, interpolation="bicubic", mean=mean, std=std)(image)
    transform = Transform(replace(PHOTO, normalization=name), training=False)
    assert torch.equal(transform.normalize(transform(image)[None])[0], wanted)


def test_training_equals_timm():
    image, mean, std = picture(1, (50, 40)), *NORMALIZATIONS["imagenet"]
    options = {"scale": (0.2, 1.0), "ratio": (0.5, 2.0), "hflip": 0.3, "interpolation": "random", "color_jitter": 0.3}
    transform = Transform(Augmentation(image_size=16, normalization="imagenet", **options), training=True)
    timm = create_transform(16, is_training=True, mean=mean, std=std, **options)
    for draw in range(5):
        seed_cpu(draw)
        wanted = timm(image)
        seed_cpu(draw)
        torch.testing.assert_close(transform.normalize(transform(image)[None])[0], wanted, rtol=0, atol=0)


def test_erasing_equals_timm_after_rounding_to_uint8():
    image, mean, std = picture(1, (16, 16)), *NORMALIZATIONS["imagenet"]
    for mode in ("const", "pixel"):
        options = Augmentation(image_size=16, scale=(1, 1), ratio=(1, 1), hflip=0, erasing=1, erasing_mode=mode)
        transform = Transform(replace(options, normalization="imagenet"), training=True)
        timm = create_transform(
            16, is_training=True, scale=(1, 1), ratio=(1, 1), hflip=0, color_jitter=None, interpolation="bicubic",
            mean=mean, std=std, re_prob=1, re_mode=mode,
        )  # fmt: skip
        seed_cpu(1)
        wanted = timm(image)
        seed_cpu(1)
        found = transform.normalize(transform(image)[None])[0]
        low, high = ((value - transform.mean) / transform.std for value in (0, 1))
        torch.testing.assert_close(found, wanted.clamp(low, high), rtol=0, atol=0.51 / 255 / 0.22)
        assert not torch.equal(found, transform.normalize(torch.tensor(np.array(image)).permute(2, 0, 1)[None])[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "image", [picture(1), picture(1).convert("L"), grey(1), grey(1) / 255], ids=lambda x: x.__class__
)
def test_every_kind_of_image_and_augmentation(channels, image):
    for augmentation in (
        replace(PHOTO, rand_augment="rand-m9-n3-mstd0.5-inc1", erasing=1.0),
        replace(PHOTO, rand_augment="augmix-m3-w2"),
        replace(PHOTO, rand_augment="original", color_jitter=0.4),
        replace(PHOTO, color_jitter=0.4, interpolation="random"),
        Augmentation(image_size=16, scale=None, shift=2),
    ):
        transform = Transform(augmentation, channels, training=True)
        for draw in range(40):  # RandAugment draws from 15 operations
            seed_cpu(draw)
            found = transform(image)
            assert found.shape == (channels, 16, 16) and found.dtype == torch.uint8
        assert Transform(augmentation, channels, training=False)(image).shape == (channels, 16, 16)


def test_by_batch():
    assert Transform(Augmentation(scale=None, shift=2), training=True).by_batch
    for options in ({"rand_augment": "rand-m9"}, {"color_jitter": 0.1}, {"erasing": 0.1}, {"scale": (0.5, 1.0)}):
        transform = Transform(Augmentation(**{"scale": None, **options}), training=True)
        assert not transform.by_batch
        assert Transform(transform.augmentation, training=False).by_batch


def test_batch_of_one_size_is_only_normalized():
    images = torch.stack([grey(i)[:, :8, :8] for i in range(3)])
    for augmentation in (Augmentation(image_size=8, scale=None), Augmentation(image_size=8)):
        transform = Transform(replace(augmentation, crop_pct=1.0), 1, training=False)
        torch.testing.assert_close(transform.batch(images), images / 255 * 2 - 1)
        torch.testing.assert_close(transform.batch(images / 255), images / 255 * 2 - 1)
    assert Transform(transform.augmentation, 3, training=False).batch(images).shape == (3, 3, 8, 8)


def test_batch_resizes_and_crops_the_center():
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[..., 4:12, 4:12] = 255
    augmentation = Augmentation(image_size=8, crop_pct=0.5, normalization="none")
    assert (Transform(augmentation, 1, training=False).batch(images) == 1).all()
    whole = Transform(replace(augmentation, crop_pct=1.0), 1, training=False).batch(images)
    assert whole.shape == (1, 1, 8, 8) and whole[0, 0, 0, 0] < 0.01 and whole[0, 0, 4, 4] > 0.99


def test_normalization_of_grey_is_the_mean_of_colours():
    transform = Transform(Augmentation(image_size=8, normalization="imagenet"), 1, training=False)
    found = transform.normalize(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8))
    torch.testing.assert_close(found, torch.full_like(found, (1 - 0.449) / 0.226))


def test_default_augmentation():
    digits = default_augmentation(open_data("digits"))
    assert (digits.image_size, digits.shift, digits.hflip, digits.scale, digits.crop_pct) == (8, 1, 0, None, 1)
    small = Tensors(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
    found = default_augmentation(Data("cifar", small, small, ("a", "b"), 3, 32))
    assert (found.image_size, found.shift, found.hflip) == (32, 4, 0.5)
    photographs = Data("flowers", small, small, ("a", "b"), 3, None)
    assert default_augmentation(photographs) == Augmentation()
    assert default_augmentation(photographs, 1).shift == 0
    assert default_augmentation(photographs, 64) == Augmentation(image_size=64)


@pytest.mark.parametrize(("options", "words"), [
    ({"image_size": 0}, "image_size must be at least 1, got 0"),
    ({"shift": -1}, "shift must be at least 0 and less than the image's size, 224, got -1"),
    ({"shift": 1}, "shift must be 0 where scale is set"),
    ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ({"image_size": 8.0}, "image_size must be int, got 8.0"),
    ({"hflip": "x"}, "hflip must be float, got 'x'"),
    ({"scale": (0.5,)}, r"scale must be tuple\[float, float\] \| None, got \(0.5,\)"),
    ({"ratio": 3}, r"ratio must be tuple\[float, float\], got 3"),
    ({"rand_augment": 9}, r"rand_augment must be str \| None, got 9"),
    ({"normalization": []}, r"normalization must be str, got \[\]"),
    ({"scale": (0.5, 0.2)}, r"scale must be an interval in \(0, 1\], got \(0.5, 0.2\)"),
    ({"scale": (0.0, 1.0)}, "scale must be an interval"),
    ({"ratio": (2.0, 1.0)}, "ratio must be an interval of positive numbers"),
    ({"hflip": 1.5}, r"hflip must be in \[0, 1\], got 1.5"),
    ({"erasing": float("nan")}, r"erasing must be in \[0, 1\], got nan"),
    ({"mixup": -0.1}, r"mixup must be in \[0, 1e\+06\]"),
    ({"cutmix": float("inf")}, r"cutmix must be in \[0, 1e\+06\]"),
    ({"color_jitter": float("inf")}, "color_jitter must be at least 0 and finite, got inf"),
    ({"crop_pct": 0.05}, r"crop_pct must be in \[0.1, 1\], got 0.05"),
    ({"erasing_mode": "noise"}, "erasing_mode must be const or pixel, got 'noise'"),
    ({"interpolation": "cubic"}, "interpolation must be bilinear, bicubic, nearest, random, got 'cubic'"),
    ({"normalization": "mine"}, "normalization must be one of none, inception, imagenet, clip, got 'mine'"),
])  # fmt: skip
def test_options_out_of_range(options, words):
    with pytest.raises(OptionError, match=f"^{words}") as error:
        Augmentation(**options)
    assert error.value.options == tuple(options)


@pytest.mark.parametrize("part", ["x9", "foo", "m", "n0", "p2", "mstd", "inc2", "tfoo", "", "m9-m8"])
def test_unknown_part_of_rand_augment(part):
    last = part.rpartition("-")[2]
    with pytest.raises(
        OptionError, match=f"rand_augment 'rand-{part}': part '{last}' is unknown, out of range or given"
    ):
        Augmentation(rand_augment=f"rand-{part}")


def test_rand_augment():
    with pytest.raises(OptionError, match=r"rand_augment must begin with rand, augmix, original, .*, got 'strong'"):
        Augmentation(rand_augment="strong")
    parts = {"rand-m9-n3-p0.5-mstd0.5-mmax12-inc1-tweights", "rand-t3a", "rand", "augmix-m3-w2-d1-a1.5-b1-mstd101"}
    for text in parts | {"original-mstd0.5", "originalr", "v0", "v0r", "3a"}:
        assert Transform(Augmentation(image_size=8, rand_augment=text), training=True)(picture(1)).shape == (3, 8, 8)


def test_a_shift_leaves_a_part_of_the_image():
    with pytest.raises(OptionError, match="shift must be at least 0 and less than the image's size, 8, got 8"):
        Augmentation(image_size=8, scale=None, shift=8)
    assert Augmentation(image_size=8, scale=None, shift=7).shift == 7


def test_channels():
    with pytest.raises(OptionError, match="channels must be 1 or 3, got 4"):
        Transform(PHOTO, 4, training=False)


def batch(count=6):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(count)


def mixed(step, rank=0, count=6, **options):
    return Mixing(replace(PHOTO, **options), 6, seed=3, rank=rank)(*batch(count), step)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing(options):
    images, targets = mixed(0, **options)
    assert images.shape == (6, 3, 8, 8) and targets.shape == (6, 6)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    share = targets[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(targets[0, 5], 1 - share)
    originals, _ = batch()
    if options == {"mixup": 0.8}:
        torch.testing.assert_close(images, share * originals + (1 - share) * originals.flip(0))
    elif options == {"cutmix": 1.0}:
        kept = (images == originals).all(1)
        assert torch.equal(kept | (images == originals.flip(0)).all(1), torch.ones(6, 8, 8, dtype=torch.bool))
        torch.testing.assert_close(kept.float().mean((1, 2)), share.expand(6))


def test_mixing_is_a_function_of_seed_step_and_rank():
    torch.manual_seed(1)
    images, targets = mixed(4, mixup=0.8, cutmix=1.0)
    torch.manual_seed(2)
    np.random.seed(2)
    before = np.random.get_state()[1].copy()
    again, targets_again = mixed(4, mixup=0.8, cutmix=1.0)
    assert torch.equal(images, again) and torch.equal(targets, targets_again)
    assert np.array_equal(before, np.random.get_state()[1])
    assert not torch.equal(targets, mixed(5, mixup=0.8, cutmix=1.0)[1])
    assert not torch.equal(targets, mixed(4, rank=1, mixup=0.8, cutmix=1.0)[1])


def test_mixing_refuses():
    with pytest.raises(OptionError, match="batch_size must be even on every rank for mixup and cutmix, got 5"):
        mixed(0, count=5, mixup=0.8)
    with pytest.raises(OptionError, match="mixup must be above 0 where cutmix is 0, got 0"):
        mixed(0)


def test_seeds_are_fixed_for_ever():
    """Fixed seeds make results of different versions, machines and processes comparable."""
    assert seed_of(0, "image", 1, 2, 3) == 2362762654729159274
    assert seed_of(1, 23) != seed_of(12, 3)


def test_picture_modes():
    image = Image.new("LA", (4, 4))
    assert Transform(PHOTO, training=False)(image).shape == (3, 16, 16)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_batches_are_resized_as_single_images(interpolation):
    image = np.random.default_rng(0).integers(80, 176, (24, 24, 3), dtype=np.uint8)
    augmentation = Augmentation(image_size=16, crop_pct=1.0, interpolation=interpolation, normalization="none")
    transform = Transform(augmentation, 3, training=False)
    single = transform(Image.fromarray(image)) / 255
    batch = transform.batch(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(batch, single, rtol=0, atol=1.6 / 255)  # Pillow rounds to uint8 after each direction
