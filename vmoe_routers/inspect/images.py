"""inspect_images: pictures of the routing of images, and a page, for ``vmoe-routers inspect``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from vmoe_routers.files import make_output, write_whole
from vmoe_routers.inspect import plots
from vmoe_routers.inspect.page import Section, page
from vmoe_routers.inspect.record import record
from vmoe_routers.inspect.trace import Trace
from vmoe_routers.moe import MoEMlp
from vmoe_routers.options import OptionError
from vmoe_routers.routers import SoftRouting
from vmoe_routers.training.models import folder_of
from vmoe_routers.training.pictures import read_picture
from vmoe_routers.training.processes import processes
from vmoe_routers.training.subject import channels_of, input_size, known_augmentation, load
from vmoe_routers.training.transforms import Augmentation, Transform

PAGE = "index.html"
MOST_IMAGES = 64  # one forward and one page
_DPI = 150


def inspect_images(
    model: str,
    images: Sequence[str],
    output: Path = Path("inspection"),
    image_size: int | None = None,
    normalization: str | None = None,
    crop_pct: float | None = None,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
    device: str = "auto",
    *,
    console: Console | None = None,
) -> Path:
    """Draws how a model routes images: PNG files, and a page that contains them.

    The images run in one batch. Normalization and crop are as in the model's training, if they are known.

    Args:
        model: a folder of save_pretrained, the record of a study's run (runs/*-seed*.json, of a study with
            --save-models), the prefix P of a V-MoE checkpoint (P.index), or a model of timm.
        images: image files.
        output: the folder for the files.
        image_size: height and width of the model's input, in pixels. None: the model's own.
        normalization: "inception", "imagenet", "clip" or "none". None: as in the model's training, if it is known.
        crop_pct: central share of an image that the model sees. None: as in the model's training.
        pretrained: load timm's weights of the model, which are downloaded.
        model_args: arguments that replace the model's own, such as {capacity_factor: 2}.
        device: "auto", "cpu" or "cuda".
        console: console that shows the table of the layers.

    Returns:
        The page.

    Raises:
        ValueError: The model has no MoE layer, or an image cannot be read. The message is for the user.
    """
    console = console or Console(highlight=False)
    if not 0 < len(images) <= MOST_IMAGES:
        raise OptionError(f"images must be 1 to {MOST_IMAGES} files, got {len(images)}", "images")
    for path in images:
        if not os.path.exists(path):
            raise OptionError(f"{path}: no such file", "images")
        if os.path.isdir(path):
            raise OptionError(f"{path}: is a folder, wanted image files: inspect MODEL IMAGE ...", "images")
    pictures = [read_picture(path) for path in images]
    folder, run = folder_of(model)
    with processes(device) as world:
        found = load(folder, image_size, pretrained, model_args, world.device, "float32")
        if not any(isinstance(module, MoEMlp) for module in found.modules()):
            raise OptionError(
                f"model {model!r} has no MoE layer; wanted a model of vit_moe, one of vmoe_routers.models.NAMES, or an "
                "upcycled model in a folder (vmoe-routers train --upcycle makes one)",
                "model",
            )
        default = Augmentation(image_size=image_size or input_size(found, model), scale=None)
        augmentation, origin = known_augmentation(folder, found, pretrained, default, normalization, crop_pct)
        transform = Transform(augmentation, channels_of(found, model), training=False)
        seen = torch.stack([transform(picture) for picture in pictures])  # uint8
        make_output(output)
        trace = _recorded(found, transform.normalize(seen).to(world.device), model)
    console.print(trace.summary())
    sections = _draw(trace, seen, images, output)
    about = [
        f"Model: {model}",
        f"Router: {', '.join(dict.fromkeys(layer.title for layer in trace.layers))}, "
        f"{trace.layers[0].num_experts} experts",
        f"Input: {transform.channels} x {augmentation.image_size} x {augmentation.image_size}, "
        f"normalization {augmentation.normalization} ({origin})",
    ]
    if run is not None:
        label, accuracy = run["variant"]["label"], run["final"]["accuracy"]
        about.append(f"Run of a study: {label}, seed {run['seed']}, accuracy {accuracy:.1%}")
    elif not (pretrained or Path(model).is_dir() or Path(f"{model}.index").is_file()):
        about.append("The weights are random: the model is not trained, and its routing has no meaning.")
    text = page(about, trace, sections)
    path = output / PAGE
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    for line in about[3:]:
        console.print(line, soft_wrap=True)
    count = sum(len(section.files) for section in sections)
    console.print(f"written: {path} and {count} pictures; open the page in a browser", soft_wrap=True)
    return path


def _recorded(model: nn.Module, batch: Tensor, name: str) -> Trace:
    with torch.no_grad(), record(model) as trace:
        try:
            model(batch)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            if "allocate" in str(error):  # the command line reports this error
                raise
            raise OptionError(f"model {name!r} does not take images {list(batch.shape)}: {error}", "model") from error
    if not trace.layers:
        raise OptionError(f"model {name!r} did not run its MoE layers on the images", "model")
    return trace


def _draw(trace: Trace, seen: Tensor, images: Sequence[str], output: Path) -> list[Section]:
    """Writes the pictures of the images and of the layers."""
    layers = list(enumerate(trace.layers))
    sections = []
    for index, path in enumerate(images):
        stem = f"{index:02}_{_plain(Path(path).stem)}"
        figure = plots.tokens([], seen[index], index, None)
        files = {_save(output / f"{stem}.png", figure): "the image as the model sees it"}
        for _, layer in layers:
            name = f"{stem}_{_plain(layer.name)}"
            figure = plots.tokens([layer], seen[index], index, None, with_image=False)
            files[_save(output / f"{name}_tokens.png", figure)] = f"{layer.name}: the expert of every patch"
        for number, layer in layers:
            name = f"{stem}_{_plain(layer.name)}"
            if isinstance(layer.image(index)[0], SoftRouting):
                figure = trace.plot_slots(seen[index], index, number)
                files[_save(output / f"{name}_slots.png", figure)] = f"{layer.name}: the slots"
        sections.append(Section(Path(path).name, files))
    files = {}
    for number, layer in layers:
        figure = trace.plot_load([number])
        files[_save(output / f"{_plain(layer.name)}_load.png", figure)] = f"{layer.name}: load of the experts"
        if layer.is_transport:
            figure = trace.plot_plan(number)
            files[_save(output / f"{_plain(layer.name)}_plan.png", figure)] = f"{layer.name}: plan of the first group"
    sections.append(Section("All images", files))
    return sections


def _save(path: Path, figure: Figure) -> Path:
    write: Callable[[Path], object] = lambda partial: figure.savefig(partial, dpi=_DPI, format="png")  # noqa: E731
    write_whole(path, write)
    return path


def _plain(name: str) -> str:
    """Returns a name without characters that are special in file names. Long names of layers differ at their ends."""
    return re.sub(r"[^\w.-]+", "_", name)[-60:] or "layer"
