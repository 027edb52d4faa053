"""requirements.py EXTRA[,EXTRA] -- prints the packages that extras of pyproject.toml need, one per line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def requirements(extras: list[str]) -> list[str]:
    """Returns the dependencies of the package and of `extras`. The dependencies of an extra replace its name."""
    found = [*PROJECT["dependencies"]]
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            nested = re.fullmatch(r"vmoe_routers\[(.+)\]", line)
            found += requirements(nested[1].split(",")) if nested else [line]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print(*requirements(sys.argv[1].split(",")), sep="\n")
