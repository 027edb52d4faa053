"""Augmentation: timm's transforms for single images, shifts and flips for whole batches, and mixing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from vmoe_routers.fields import check_fields
from vmoe_routers.options import OptionError
from vmoe_routers.training.samples import Data
from vmoe_routers.training.stream import generators_kept, seed_cpu

Pipeline = Callable[[Any], Any]

NORMALIZATIONS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
_LEAST_CROP = 0.1  # evaluation resizes an image to image_size / crop_pct
_MOST_ALPHA = 1e6  # with a larger alpha, the share of each image in a mixed pair is always close to 1/2
# Arguments of torch.nn.functional.interpolate that resize as Pillow does.
_FILTERS: dict[str, dict[str, Any]] = {
    "bilinear": {"mode": "bilinear", "antialias": True},
    "bicubic": {"mode": "bicubic", "antialias": True},
    "nearest": {"mode": "nearest-exact"},
    "random": {"mode": "bilinear", "antialias": True},
}
INTERPOLATIONS = tuple(_FILTERS)
PREPROCESSING = ("normalization", "crop_pct", "interpolation")
"""Fields of `Augmentation` that also prepare images for evaluation."""


@dataclass(frozen=True)
class Augmentation:
    """Options of the transform from images to the input of a model.

    Attributes:
        image_size: height and width of the input.
        scale: smallest and largest area of a random crop, as shares of the image. None: no random crop.
        ratio: smallest and largest ratio of a random crop's width to its height.
        hflip: probability of a horizontal flip.
        shift: largest random shift in both directions, in pixels, less than the image's size. Zeros fill the gap.
            Requires `scale` None.
        rand_augment: timm's string, such as "rand-m9-mstd0.5-inc1" (RandAugment), "augmix-m3" or "original".
        color_jitter: strength of random brightness, contrast and saturation. RandAugment replaces it.
        erasing: probability of erasing a random rectangle.
        erasing_mode: fill of the rectangle: "const" is the mean, "pixel" is noise.
        interpolation: filter of resizing: "bilinear", "bicubic", "nearest", or "random" (evaluation and
            `Transform.batch`: bilinear).
        crop_pct: the central share of an image that evaluation sees.
        normalization: mean and standard deviation: "inception" (pixels in [-1, 1]), "imagenet", "clip", or "none"
            (pixels in [0, 1]).
        repeats: copies of an image in its batch (repeated augmentation).
        mixup, cutmix: alpha of mixup and of cutmix, which mix pairs of images. 0 turns them off.
        mix_prob: the share of batches that are mixed.
        switch_prob: the share of mixed batches with cutmix, if both are on.

    Raises:
        OptionError: A value is out of range.
    """

    image_size: int = 224
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    shift: int = 0
    rand_augment: str | None = None
    color_jitter: float = 0.0
    erasing: float = 0.0
    erasing_mode: str = "pixel"
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    normalization: str = "inception"
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("image_size", "repeats"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        wanted = f"at least 0 and less than the image's size, {self.image_size}"
        _check("shift", self.shift, 0 <= self.shift < self.image_size, wanted)
        for name in ("hflip", "erasing", "mix_prob", "switch_prob"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("mixup", "cutmix"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= _MOST_ALPHA, f"in [0, {_MOST_ALPHA:g}]")
        _check("color_jitter", self.color_jitter, 0 <= self.color_jitter < float("inf"), "at least 0 and finite")
        _check("crop_pct", self.crop_pct, _LEAST_CROP <= self.crop_pct <= 1, f"in [{_LEAST_CROP:g}, 1]")
        _check(
            "ratio", self.ratio, 0 < self.ratio[0] <= self.ratio[1] < float("inf"), "an interval of positive numbers"
        )
        _check("erasing_mode", self.erasing_mode, self.erasing_mode in ("const", "pixel"), "const or pixel")
        _check("interpolation", self.interpolation, self.interpolation in INTERPOLATIONS, ", ".join(INTERPOLATIONS))
        names = ", ".join(NORMALIZATIONS)
        _check("normalization", self.normalization, self.normalization in NORMALIZATIONS, f"one of {names}")
        if self.rand_augment is not None:
            _check_rand_augment(self.rand_augment)
        if self.scale is not None:
            _check("scale", self.scale, 0 < self.scale[0] <= self.scale[1] <= 1, "an interval in (0, 1]")
            _check("shift", self.shift, self.shift == 0, "0 where scale is set: a random crop shifts already")

    @property
    def is_simple(self) -> bool:
        """Whether shifts and flips are the only augmentation. The loader does these for a whole batch at once."""
        return self.scale is None and not (self.rand_augment or self.color_jitter or self.erasing)

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed, by `Mixing`."""
        return self.mixup > 0 or self.cutmix > 0


def _check(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise OptionError(f"{name} must be {wanted}, got {value!r}", name)


_NUMBER = r"\d+(\.\d*)?"
_SOME = r"[1-9]\d?"
# Parts of `rand_augment` after the first part, which names the policy: the letters that begin a part, and a regular
# expression for the value that follows them (timm.data.auto_augment).
_POLICIES = {
    "rand": {"m": r"\d+", "n": _SOME, "p": r"0(\.\d*)?|1(\.0*)?", "mstd": _NUMBER, "mmax": _SOME, "inc": "[01]"}
    | {"t": "weights|3aw?"},
    "augmix": {"m": r"\d+", "w": _SOME, "d": r"\d\d?", "a": r"[1-9]\d*(\.\d*)?", "b": "[01]", "mstd": _NUMBER},
    **{policy: {"mstd": _NUMBER} for policy in ("original", "originalr", "v0", "v0r", "3a")},
}


def _check_rand_augment(text: str) -> None:
    """Refuses parts that timm ignores, and values that fail when an image is transformed."""
    policy, *parts = text.split("-")
    if policy not in _POLICIES:
        raise OptionError(f"rand_augment must begin with {', '.join(_POLICIES)}, got {text!r}", "rand_augment")
    keys = list(_POLICIES[policy])
    for part in parts:
        key = next((key for key in keys if re.fullmatch(f"{key}({_POLICIES[policy][key]})", part)), None)
        if key is None:
            raise OptionError(
                f"rand_augment {text!r}: part {part!r} is unknown, out of range or given twice; wanted values of "
                f"{', '.join(_POLICIES[policy])}, such as rand-m9-mstd0.5-inc1",
                "rand_augment",
            )
        keys.remove(key)


SMALL = 64  # larger images are augmented by random crops


def default_augmentation(data: Data, image_size: int | None = None) -> Augmentation:
    """Chooses light augmentation for a data set: shifts for small images, random crops for photographs.

    Args:
        data: the data set.
        image_size: height and width of the input. Default: the images' own, or 224 if they differ.
    """
    size = image_size or data.size or 224
    if data.size is None or data.size > SMALL:
        return Augmentation(image_size=size)
    flip = 0.5 if data.channels == 3 else 0.0  # a mirrored digit may be another character
    return Augmentation(
        image_size=size,
        scale=None,
        hflip=flip,
        shift=min(max(1, size // 8), size - 1),
        interpolation="bilinear",
        crop_pct=1.0,
    )


class Transform:
    """Transforms images to the input of a model: single images in the loader's workers, or whole batches.

    Args:
        augmentation: the options.
        channels: channels of the input: 1 for grey, 3 for colour.
        training: whether to augment at random. Evaluation resizes and crops the center.

    Raises:
        OptionError: `channels` is neither 1 nor 3.
    """

    def __init__(self, augmentation: Augmentation, channels: int = 3, *, training: bool):
        _check("channels", channels, channels in (1, 3), "1 or 3")
        self.augmentation: Augmentation = augmentation
        self.channels: int = channels
        self.training: bool = training
        self.by_batch: bool = augmentation.is_simple or not training
        mean, std = (torch.tensor(value) for value in NORMALIZATIONS[augmentation.normalization])
        if channels == 1:
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        self.mean: Tensor = mean.view(-1, 1, 1)
        self.std: Tensor = std.view(-1, 1, 1)
        self._pipeline = None if self.by_batch else self._make_pipeline()

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Transforms one image. Random draws come from the generators of random, numpy and torch.

        Args:
            image: a picture, or a tensor [channels, height, width], uint8 or float32 in [0, 1].

        Returns:
            uint8 [channels, image_size, image_size], for `normalize`.
        """
        if self._pipeline is None:
            self._pipeline = self._make_pipeline()
        return self._pipeline(_as_picture(image, self.channels))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws shifts (rows, columns) and flips of `count` images for `batch`: [count, 3] int64."""
        shift = self.augmentation.shift
        shifts = torch.randint(2 * shift + 1, (count, 2), generator=generator)
        flips = torch.rand(count, 1, generator=generator) < self.augmentation.hflip
        return torch.cat([shifts, flips.long()], dim=1)

    def batch(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Transforms a batch of images in memory. Requires `by_batch`.

        Args:
            images: [N, channels, height, width], uint8 or float32 in [0, 1]. Images of another size are resized without
                regard to their aspect ratio.
            draws: rows of `draw`, for training.

        Returns:
            float32 [N, channels, image_size, image_size], normalized.
        """
        size, options = self.augmentation.image_size, self.augmentation
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        whole = size if self.training else int(size / options.crop_pct)
        if images.shape[-2:] != (whole, whole):
            images = F.interpolate(images, (whole, whole), **_FILTERS[options.interpolation]).clamp_(0, 1)
        if whole != size:
            first = round((whole - size) / 2)
            images = images[..., first : first + size, first : first + size]
        if images.shape[1] != self.channels:
            images = images.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if self.training and draws is not None:
            draws = draws.to(images.device)
            images = shifted(images, draws[:, :2], options.shift)
            if options.hflip:
                images = torch.where(draws[:, 2].bool().view(-1, 1, 1, 1), images.flip(-1), images)
        return self.normalize(images)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalizes uint8, or float32 in [0, 1], to float32 [N, channels, height, width], the model's input."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        is_new = images.dtype == torch.uint8
        images = images.float().div_(255) if is_new else images
        if self.augmentation.normalization == "none":
            return images
        return (images.sub_(mean) if is_new else images - mean).div_(std)

    def _make_pipeline(self) -> Pipeline:
        from timm.data.transforms_factory import create_transform
        from torchvision import transforms

        options = self.augmentation
        size, interpolation = options.image_size, options.interpolation
        single = "bilinear" if interpolation == "random" else interpolation
        if not self.training:
            return cast(
                Pipeline, create_transform(size, interpolation=single, crop_pct=options.crop_pct, normalize=False)
            )
        primary, secondary, final = cast(
            tuple[Pipeline, Pipeline, Pipeline],
            create_transform(
                size,
                is_training=True,
                scale=options.scale,
                ratio=options.ratio,
                hflip=options.hflip,
                color_jitter=cast(float, options.color_jitter or None),
                auto_augment=options.rand_augment,
                interpolation=interpolation,
                mean=tuple(self.mean.flatten().tolist()),
                normalize=False,
                separate=True,
            ),
        )
        _mend_posterize(secondary)
        if options.scale is None:
            steps = [transforms.Resize(size, transforms.InterpolationMode(single)), transforms.CenterCrop(size)]
            if options.shift:
                steps.append(transforms.RandomCrop(size, padding=options.shift))
            primary = transforms.Compose([*steps, transforms.RandomHorizontalFlip(options.hflip)])
        erasing = [_Erasing(options.erasing, options.erasing_mode, self.mean, self.std)] if options.erasing else []
        return transforms.Compose([primary, secondary, final, *erasing])


def shifted(images: Tensor, offsets: Tensor, most: int) -> Tensor:
    """Shifts every image of [N, channels, height, width] by ``offsets - most`` [N, 2]. Zeros fill the gap."""
    if most == 0:
        return images
    count, _, height, width = images.shape
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    padded = F.pad(images, [most] * 4)
    which = torch.arange(count, device=images.device)
    # The slice between index tensors puts the indexed axes first: [N, height, width, channels].
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _as_picture(image: Image.Image | Tensor, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if isinstance(image, Tensor):
        pixels = image if image.dtype == torch.uint8 else (image * 255).round().byte()
        array = pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    return image if image.mode == mode else image.convert(mode)


def _mend_posterize(pipeline: Any) -> None:
    """Keeps at least 1 bit per pixel: timm's strongest posterizing asks for 0 bits, which Pillow 13 refuses."""
    from timm.data import auto_augment

    for step in pipeline.transforms:
        for op in [*getattr(step, "ops", []), *(op for policy in getattr(step, "policy", []) for op in policy)]:
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    return ImageOps.posterize(image, max(1, bits))


class _Erasing:
    """timm's random erasing for uint8 pixels.

    After normalization, the fill has timm's distribution, clamped to the range of pixels.
    """

    def __init__(self, probability: float, mode: str, mean: Tensor, std: Tensor):
        from timm.data.random_erasing import RandomErasing

        self.erase = RandomErasing(probability, mode=mode, device="cpu")
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> Tensor:
        self.erase(_Canvas(image, self.mean, self.std))
        return image


class _Canvas:
    """Image of uint8 pixels that timm fills with normalized values."""

    dtype = torch.float32

    def __init__(self, image: Tensor, mean: Tensor, std: Tensor):
        self.image, self.mean, self.std = image, mean, std

    def size(self) -> torch.Size:
        return self.image.size()

    def __setitem__(self, where: Any, fill: Tensor) -> None:
        self.image[where] = ((fill * self.std + self.mean) * 255).round_().clamp_(0, 255).byte()


class Mixing:
    """Mixup and cutmix of timm for a batch. The draws are a function of (seed, step, rank).

    Args:
        augmentation: the options `mixup`, `cutmix`, `mix_prob`, `switch_prob`.
        num_classes: number of classes.
        seed: the seed.
        rank: the number of this process.
        label_smoothing: share of the target that is spread over all classes.

    Raises:
        OptionError: Neither `mixup` nor `cutmix` is on.
    """

    def __init__(
        self, augmentation: Augmentation, num_classes: int, *, seed: int, rank: int = 0, label_smoothing: float = 0.0
    ):
        from timm.data.mixup import Mixup

        _check("mixup", augmentation.mixup, augmentation.mixup + augmentation.cutmix > 0, "above 0 where cutmix is 0")
        self.seed: int = seed
        self.rank: int = rank
        self._mixup = Mixup(
            augmentation.mixup,
            augmentation.cutmix,
            prob=augmentation.mix_prob,
            switch_prob=augmentation.switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixes image i with image N - 1 - i, in place.

        Args:
            images: [N, channels, height, width] with an even N.
            labels: [N] int64.
            step: number of the step.

        Returns:
            The images, and soft targets [N, num_classes] float32.

        Raises:
            OptionError: N is odd.
        """
        count = len(images)
        _check("batch_size", count, count % 2 == 0, "even on every rank for mixup and cutmix")
        with generators_kept():
            seed_cpu(self.seed, "mix", step, self.rank)
            return self._mixup(images, labels)
