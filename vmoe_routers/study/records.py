"""Records of runs on disk: paths, reading and writing, and the values that a record must hold."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmoe_routers import __version__
from vmoe_routers.files import write_whole
from vmoe_routers.models.vit import moe_block_indices
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.variants import MOE_BLOCKS, Variant
from vmoe_routers.training import Images

RECORD_VERSION = 4  # increase it when the same settings give a different record
_MAX_BYTES = 1 << 28


class RecordError(ValueError):
    """File that is not the expected record. The message names the file and the fault."""


def fingerprint(data: Images, transfer: Images | None) -> str:
    """Hashes the images and the versions, on which a result depends besides the settings."""
    release = re.split(r"\.dev|\+", __version__)[0]  # commits between two releases share their records
    digest = hashlib.sha256(f"{RECORD_VERSION} {release} {torch.__version__}".encode())
    for images in (data, transfer):
        digest.update(repr(images and images.name).encode())
        if images is not None:
            for tensor in (images.train_images, images.train_labels, images.test_images, images.test_labels):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def record_path(settings: Settings, inputs: str, name: str, *of: Any) -> Path:
    """Returns the path of a record. The name has a hash of everything on which the numbers of the record depend.

    Args:
        settings: The study's settings. The hash leaves out settings that do not change a single run, such as the list
            of routers, the number of seeds and the output folder.
        inputs: The `fingerprint` of the data.
        name: The start of the file's name.
        of: Further values for the hash, such as the variant.
    """
    # The fingerprint covers the images, so the place of the data does not matter.
    others = ("output", "routers", "top_k", "capacity_factors", "plan_combine", "seeds", "workers")
    others += ("data", "transfer_data")
    of_run = {key: value for key, value in asdict(settings).items() if key not in others}
    text = json.dumps([inputs, of_run, name, *of], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return settings.output / "runs" / f"{name}-{digest}.json"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record, completely or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_text(json.dumps(record, indent=1)))


def read_record(path: Path, wanted: Any) -> dict[str, Any] | None:
    """Reads a finished record. Returns None if there is no file.

    Args:
        path: The record's path.
        wanted: The values that the record must hold, from `run_record` or `timing_record`.

    Raises:
        RecordError: The file is not such a record.
        OSError: The file cannot be opened.
    """
    if not path.exists():
        return None
    if not path.is_file():  # a pipe would block
        raise RecordError(f"{path}: not a regular file")
    if path.stat().st_size > _MAX_BYTES:
        raise RecordError(f"{path}: no record, {path.stat().st_size} bytes, wanted at most {_MAX_BYTES}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: no record, {error}") from None
    problem = _problem(record, wanted, "")
    if problem is not None:
        raise RecordError(f"{path}: no record, {problem}")
    return record


class _Kind(NamedTuple):
    """Kind of the values in one place of a record.

    Attributes:
        words: Description for messages.
        accepts: Tells whether a value is of this kind.
    """

    words: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _exactly(wanted: Any) -> _Kind:
    return _Kind(repr(wanted), lambda value: type(value) is type(wanted) and value == wanted)


_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_NUMBER = _Kind("a number", _is_number)  # NaN and infinity included: a training may diverge
_SHARE = _Kind("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
_COUNT = _Kind("a count", lambda value: _is_number(value) and isinstance(value, int) and value >= 0)
_POSITIVE = _Kind("a positive number", lambda value: _is_number(value) and 0 < value < math.inf)
_TIME = _Kind("a time", lambda value: _is_number(value) and 0 <= value < math.inf)
_MACHINE = _Kind(
    "a description in words",
    lambda value: isinstance(value, dict) and all(isinstance(words, str) for words in value.values()),
)
_WHEN_AND_WHERE = {"machine": _MACHINE, "date": _TEXT}


def run_record(settings: Settings, variant: Variant, seed: int, transfer: str | None) -> dict[str, Any]:
    """Returns the kinds of the values in the record of a run. `vmoe_routers.study.summary` describes the values.

    A record must have at least the keys of a mapping, and exactly the elements of a tuple.

    Args:
        settings, variant, seed: What was run.
        transfer: The name of the second data set.
    """
    metrics = dict.fromkeys(("utilisation", "load_cv", "dropped", "entropy"), _NUMBER)
    blocks = () if variant.router is None else moe_block_indices(settings.depth, MOE_BLOCKS)
    load = (_NUMBER,) * settings.num_experts
    epoch = {"seconds": _TIME, "train_loss": _NUMBER, "accuracy": _SHARE, "loss": _NUMBER}
    return {
        "variant": {key: _exactly(value) for key, value in variant.describe().items()},
        "seed": _exactly(seed),
        "epochs": tuple({"epoch": _exactly(number), **epoch} for number in evaluated_epochs(settings.epochs)),
        "steps": _POSITIVE,
        "cost": dict.fromkeys(("slots", "mlp_flops", "flops", "parameters"), _POSITIVE),
        "layers": tuple(
            {"block": _exactly(block), "load": load, "dead_experts": _COUNT, **metrics} for block in blocks
        ),
        "transfer": _exactly(None) if transfer is None else {"data": _exactly(transfer), "accuracy": _SHARE},
        **_WHEN_AND_WHERE,
    }


def timing_record(rounds: int) -> dict[str, Any]:
    """Returns the kinds of the values in the record of the timing: `rounds` times for every variant."""
    times = _Kind(
        f"{rounds} positive numbers for every variant",
        lambda value: (
            isinstance(value, dict)
            and all(
                isinstance(row, list) and len(row) == rounds and all(map(_POSITIVE.accepts, row))
                for row in value.values()
            )
        ),
    )
    return {"step_ms": times, **_WHEN_AND_WHERE}


def evaluated_epochs(epochs: int) -> Sequence[int]:
    """Returns the epochs after which a run is evaluated: the last one, and every second one before it."""
    return range(2 - epochs % 2, epochs + 1, 2)


def _problem(value: Any, wanted: Any, where: str) -> str | None:
    """Describes the first value that is not of the wanted kind; returns None if all are."""
    name = where or "the whole"
    if isinstance(wanted, _Kind):
        return None if wanted.accepts(value) else f"{name} is {_short(value)}, wanted {wanted.words}"
    if isinstance(wanted, Mapping):
        if not isinstance(value, dict):
            return f"{name} is {_short(value)}, wanted a mapping"
        missing = next((key for key in wanted if key not in value), None)
        if missing is not None:
            return f"{missing} is missing in {name}"
        inner = ((value[key], wanted[key], f"{where}.{key}" if where else key) for key in wanted)
    else:
        if not isinstance(value, list) or len(value) != len(wanted):
            return f"{name} is {_short(value)}, wanted a list of {len(wanted)}"
        inner = ((value[i], wanted[i], f"{where}[{i}]") for i in range(len(wanted)))
    return next(filter(None, (_problem(*part) for part in inner)), None)


def _short(value: Any) -> str:
    if isinstance(value, (list, dict)) and value:
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
