"""Records of runs on disk: paths, reading and writing, and the values that a record must hold."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from vmoe_routers.files import write_whole
from vmoe_routers.models.vit import moe_block_indices
from vmoe_routers.study.images import StudyData
from vmoe_routers.study.own import is_own, source_digest
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.variants import Variant
from vmoe_routers.training import Images
from vmoe_routers.training.samples import Pictures

RECORD_VERSION = 5  # increase it when the same settings give a different record
_MAX_BYTES = 1 << 28


class RecordError(ValueError):
    """File that is not the expected record. The message names the file and the fault."""


def fingerprint(data: StudyData, transfer: StudyData | None) -> str:
    """Hashes the version of the records and the images. A result depends on them and on the settings.

    For images that are not in memory, it hashes the names of their files.

    The versions of packages are not part of the hash, because a study may go on after an update. Every record names
    them in its description of the machine.
    """
    digest = hashlib.sha256(f"{RECORD_VERSION}".encode())
    for images in (data, transfer):
        digest.update(repr(images and images.name).encode())
        if isinstance(images, Images):
            tensors = (images.train_images, images.train_labels, images.test_images, images.test_labels)
        elif images is not None:
            tensors = (images.train_labels, images.test_labels)
            for samples in (images.train, images.test):
                if isinstance(samples, Pictures):
                    for index in range(len(samples)):
                        digest.update(Path(samples.paths[index]).name.encode())
        else:
            continue
        for tensor in tensors:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# Settings on which no single run depends. The fingerprint covers the images, so the place of the data does not matter.
_OF_STUDY = ("output", "routers", "top_k", "capacity_factors", "plan_combine", "batch_priority", "ablations", "seeds")
_OF_STUDY += ("first_seed", "ablation_seeds", "workers", "data_workers", "stream", "save_models", "learning_rates")
_OF_STUDY += ("data", "transfer_data")


def of_run(settings: Settings, variant: Variant) -> dict[str, Any]:
    """Returns the settings on which a run of the variant depends."""
    chosen = asdict(variant.settings(settings))
    if not chosen["training"]:
        del chosen["training"]
    return {key: value for key, value in chosen.items() if key not in _OF_STUDY} | {"options": variant.changes()}


def run_path(settings: Settings, inputs: str, variant: Variant, seed: int) -> Path:
    """Returns the path of a run's record. Its name has a hash of everything on which the record's numbers depend.

    Args:
        settings: The study's settings.
        inputs: The `fingerprint` of the data.
        variant, seed: The run.
    """
    own = [source_digest(variant.router)] if is_own(variant.router) else []
    # The settings and options are part of the hash. The ablation's name and arm are not.
    of = [inputs, of_run(settings, variant), asdict(replace(variant, ablation=None, arm=None)), seed, *own]
    return _path(settings, f"{variant.name}-seed{seed}", of)


def timing_path(settings: Settings, inputs: str, variants: Sequence[Variant]) -> Path:
    """Returns the path of the timing's record."""
    own = sorted(source_digest(variant.router) for variant in variants if is_own(variant.router))
    # The path does not depend on the variants: a study of fewer routers finds the times of a larger study.
    return _path(settings, "steps", [inputs, of_run(settings, Variant()) | {"learning_rate": None}, own])


def _path(settings: Settings, name: str, of: Any) -> Path:
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
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


def read_run(
    path: Path, settings: Settings, variant: Variant, seed: int, transfer: str | None
) -> dict[str, Any] | None:
    """Reads the record of a run, as `read_record` does."""
    record = read_record(path, run_record(settings, variant, seed, transfer))
    wanted = len(evaluated_epochs(variant.settings(settings).epochs))
    if record is not None and record["diverged"] is None and len(record["epochs"]) < wanted:
        raise RecordError(f"{path}: no record, epochs is a list of {len(record['epochs'])}, wanted a list of {wanted}")
    return record


class _Kind(NamedTuple):
    """Kind of the values in one place of a record.

    Attributes:
        words: Description for messages.
        accepts: Tells whether a value is of this kind.
    """

    words: str
    accepts: Callable[[Any], bool]


class _Beginning(tuple):
    """Kinds of a list that may end early."""


class _Every(NamedTuple):
    """Kind of all elements of a list of any length."""

    of: Any


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
_OPTIONAL = _Kind("null or a text", lambda value: value is None or isinstance(value, str))
_OPTIONAL_NUMBER = _Kind("null or a number", lambda value: value is None or _is_number(value))
_OPTIONAL_BOOL = _Kind("null, true or false", lambda value: value is None or isinstance(value, bool))
_MACHINE = _Kind(
    "a description in words",
    lambda value: isinstance(value, dict) and all(isinstance(words, str) for words in value.values()),
)
_WHEN_AND_WHERE = {"machine": _MACHINE, "date": _TEXT}
_EPOCH = {"seconds": _TIME, "train_loss": _NUMBER, "accuracy": _SHARE, "loss": _NUMBER}
_METRICS = dict.fromkeys(("utilisation", "load_cv", "dropped", "entropy"), _NUMBER) | {"dead_experts": _COUNT}
_RESULTS = {
    "final": {"accuracy": _SHARE, "loss": _NUMBER},
    "diverged": _OPTIONAL,
    "steps": _POSITIVE,
    "cost": dict.fromkeys(("slots", "mlp_flops", "flops", "parameters"), _POSITIVE),
}


def run_record(settings: Settings, variant: Variant, seed: int, transfer: str | None) -> dict[str, Any]:
    """Returns the kinds of the values in the record of a run. `vmoe_routers.study.summary` describes the values.

    A record must have at least the keys of a mapping, and exactly the elements of a tuple.

    Args:
        settings, variant, seed: The run.
        transfer: The name of the second data set.
    """
    wanted = of_run(settings, variant)
    settings = variant.settings(settings)
    blocks = () if variant.router is None else moe_block_indices(settings.depth, settings.moe_blocks)
    load = (_NUMBER,) * settings.num_experts
    return {
        "variant": {key: _exactly(value) for key, value in variant.describe().items()},
        "seed": _exactly(seed),
        "settings": {key: _exactly(value) for key, value in wanted.items()},
        "epochs": _Beginning({"epoch": _exactly(number), **_EPOCH} for number in evaluated_epochs(settings.epochs)),
        **_RESULTS,
        "layers": tuple({"block": _exactly(block), "load": load, **_METRICS} for block in blocks),
        "transfer": _exactly(None) if transfer is None else {"data": _exactly(transfer), "accuracy": _SHARE},
        **_WHEN_AND_WHERE,
    }


def some_run() -> dict[str, Any]:
    """Returns the kinds of the values that the record of any run has."""
    variant = {"name": _TEXT, "label": _TEXT, **dict.fromkeys(("router", "combine", "ablation", "arm"), _OPTIONAL)}
    variant |= {"top_k": _OPTIONAL_NUMBER, "capacity_factor": _OPTIONAL_NUMBER, "batch_priority": _OPTIONAL_BOOL}
    settings = {"learning_rate": _POSITIVE, "device": _TEXT, "options": {}}
    return {
        "variant": variant,
        "seed": _COUNT,
        "settings": settings,
        "epochs": _Every({"epoch": _COUNT, **_EPOCH}),
        **_RESULTS,
        "layers": _Every({"block": _COUNT, "load": _Every(_NUMBER), **_METRICS}),
        "transfer": _Kind(
            "null, or the name of the data and a share",
            lambda value: value is None or _problem(value, {"data": _TEXT, "accuracy": _SHARE}, "") is None,
        ),
        **_WHEN_AND_WHERE,
    }


def run_by_name() -> dict[str, Any]:
    """Returns the kinds of the values that name a run and its result, which records of every version have."""
    return {"variant": {"label": _TEXT}, "seed": _COUNT, "final": {"accuracy": _SHARE}}


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
    """Describes the first value that is not of the wanted kind. Returns None if all are."""
    name = where or "the whole"
    if isinstance(wanted, _Kind):
        return None if wanted.accepts(value) else f"{name} is {_short(value)}, wanted {wanted.words}"
    if isinstance(wanted, _Every):
        if not isinstance(value, list):
            return f"{name} is {_short(value)}, wanted a list"
        inner = ((item, wanted.of, f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(wanted, Mapping):
        if not isinstance(value, dict):
            return f"{name} is {_short(value)}, wanted a mapping"
        missing = next((key for key in wanted if key not in value), None)
        if missing is not None:
            return f"{missing} is missing in {name}"
        inner = ((value[key], wanted[key], f"{where}.{key}" if where else key) for key in wanted)
    else:
        may_end = isinstance(wanted, _Beginning)
        if not isinstance(value, list) or len(value) > len(wanted) or (len(value) < len(wanted) and not may_end):
            return f"{name} is {_short(value)}, wanted a list of {len(wanted)}"
        inner = ((value[i], wanted[i], f"{where}[{i}]") for i in range(len(value)))
    return next(filter(None, (_problem(*part) for part in inner)), None)


def _short(value: Any) -> str:
    if isinstance(value, (list, dict)) and value:
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
