"""Checkpoints of a training, in the format of torch.distributed.checkpoint, replaced as a whole.

A checkpoint holds the parameters, the optimizer's state, the average of the parameters and the step. Order,
augmentation, noise and dropout are functions of the seed and the step, so no state of a generator is needed. The files
do not depend on the number of ranks. They hold pickled metadata: read only checkpoints that you wrote.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from vmoe_routers.training.trainer import Trainer

FORMAT_VERSION = 1
_INFO = "training.json"  # written last, beside the files that torch writes


class TrainingCheckpointError(ValueError):
    """Unusable checkpoint. The message names the folder."""


def save(folder: Path, trainer: Trainer, info: dict[str, Any]) -> Path:
    """Writes the checkpoint ``folder / <step>``, completely or not at all. Every rank must call this function.

    Args:
        folder: The folder of all checkpoints.
        trainer: The training.
        info: Further values for `restore`, which JSON can represent.

    Raises:
        OSError: The files cannot be written, on any rank.
    """
    final = folder / f"{trainer.step:08d}"
    partial = folder / f"{final.name}.partial"
    first = _rank() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
        _barrier()
        with _quiet():
            write_state(trainer.state_dict(), checkpoint_id=partial, no_dist=not dist.is_initialized())
        if first:
            sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
            described = {"format_version": FORMAT_VERSION, "step": trainer.step, "sizes": sizes, **info}
            (partial / _INFO).write_text(json.dumps(described, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    except (CheckpointException, OSError) as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
        raise OSError(f"{final}: cannot be written: {_cause(error)}") from error
    _barrier()
    return final


def saved(folder: Path) -> list[Path]:
    """Lists the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name) and path.is_dir())


def read_info(checkpoint: Path) -> dict[str, Any]:
    """Reads the description of a checkpoint and checks that its files are complete.

    Raises:
        TrainingCheckpointError: The folder is not a checkpoint or has a newer format, or a file is missing or
            truncated.
    """
    try:
        info = json.loads((checkpoint / _INFO).read_text())
        version, sizes = info["format_version"], dict(info["sizes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingCheckpointError(f"{checkpoint}: not a checkpoint of a training ({error})") from None
    if version != FORMAT_VERSION:
        raise TrainingCheckpointError(f"{checkpoint}: format {version}, this version reads {FORMAT_VERSION}")
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "missing" if found is None else f"truncated: {found} of {size} bytes"
            raise TrainingCheckpointError(f"{path}: {what}")
    return info


def restore(folder: Path, trainer: Trainer, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Loads the newest checkpoint that can be read. Every rank must call this function.

    Args:
        folder: The folder of all checkpoints.
        trainer: The training, which gets the state.
        say: Called with one line for every checkpoint that cannot be read.

    Returns:
        The `info` of `save`, or None if there is no checkpoint.

    Raises:
        TrainingCheckpointError: There are checkpoints, but none can be read.
    """
    problems = []
    for checkpoint in reversed(saved(folder)):
        try:
            info = read_info(checkpoint)
            load(checkpoint, trainer)
        except TrainingCheckpointError as error:
            problems.append(str(error))
            say(f"{error}; trying the previous checkpoint")
            continue
        return info
    if problems:
        raise TrainingCheckpointError(f"{folder}: no checkpoint can be read; delete the folder to begin again")
    return None


def load(checkpoint: Path, trainer: Trainer) -> None:
    """Loads a checkpoint into a training with the same model and optimizer, on any number of ranks.

    Raises:
        TrainingCheckpointError: The files are damaged, or belong to another model or optimizer.
    """
    state = trainer.state_dict()
    with _quiet():
        try:
            read_state(state, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
            reason = _cause(error)
            raise TrainingCheckpointError(f"{checkpoint}: damaged, or of another model: {reason}") from error
    trainer.load_state_dict(state)


def tidy(folder: Path, keep: Iterable[str], best: int | None) -> None:
    """Deletes the checkpoints that are not kept, and partial checkpoints.

    Args:
        folder: The folder of all checkpoints.
        keep: The newest two are always kept, so that one is left if the newest is damaged. "last" keeps no more. "best"
            also keeps the checkpoint of step `best`. "every" keeps all.
        best: The step with the best accuracy so far.
    """
    if _rank() != 0 or not folder.is_dir():
        return
    found = saved(folder)
    kept = set(found) if "every" in keep else set(found[-2:])
    if "best" in keep and best is not None:
        kept.add(folder / f"{best:08d}")
    for path in [*found, *folder.glob("*.partial")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _cause(error: Any) -> str:
    """Extracts the reason in one line. Exceptions of torch hold one reason per rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))
        error = error[0] if isinstance(error, tuple) else error
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch: its warning about a single process, and its log lines about unreadable checkpoints."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
