"""Own routers of a study: factories `(dim, num_experts) -> nn.Module`, named ``package.module:factory``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, TypeGuard, cast

from torch import nn

from vmoe_routers.options import OptionError
from vmoe_routers.routers import RouterFactory


def is_own(router: str | None) -> TypeGuard[str]:
    """Tells whether `router` has the form ``package.module:factory``."""
    return router is not None and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", router) is not None


def load_factory(router: str, option: str = "routers") -> RouterFactory:
    """Imports the factory named ``package.module:factory``.

    Args:
        router: The name.
        option: Name of the option, for error messages.

    Raises:
        OptionError: The module cannot be imported, or has no such function or class.
    """
    module_name, _, name = router.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's code may raise any error
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"{option}: {router!r} cannot be imported: {reason}", option) from error
    factory = getattr(module, name, None)
    if not callable(factory) or isinstance(factory, nn.Module):
        got = type(factory).__name__ if hasattr(module, name) else f"no {name} in the module"
        wanted = "a function or class, called with dim and num_experts, that makes a router"
        raise OptionError(f"{option}: {router!r} must be {wanted}, got {got}", option)
    return cast(RouterFactory, factory)


def source_digest(router: str) -> str:
    """Hashes the file that defines the factory; without such a file, an empty text."""
    file = _source_file(load_factory(router)) or _source_file(sys.modules[router.partition(":")[0]])
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()


def _source_file(thing: Any) -> str | None:
    try:
        return inspect.getsourcefile(thing)
    except TypeError:  # not defined in a file
        return None
