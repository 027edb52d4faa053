"""whole_state_dict: the unsharded values of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gathers a copy of a model's values on the CPU, with the names that they have in one process.

    All ranks must call this function. ``save_pretrained(model, folder, state_dict=whole_state_dict(model))`` on rank 0
    writes the same file under every layout.

    Returns:
        The values by name on rank 0, and an empty dict on every other rank.
    """
    with _without_advice():
        state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name, value in state.items():
        # torch returns a tensor of the model itself if it is unsharded and on the CPU.
        state[name] = value.clone() if isinstance(value, Tensor) else value
    return state


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silences torch's advice to gather in one collective.

    torch cannot do this for experts that are sharded over two axes of a mesh.
    """
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
