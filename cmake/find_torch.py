"""Prints the folder of the torch against which the modules are built. An older or missing torch is an error."""

import importlib.util
import re
import sys
from pathlib import Path

OLDEST = (2, 11)


def main() -> str:
    """Returns the folder of torch, without importing it: that takes seconds."""
    wanted = f"vmoe_routers needs torch >= {OLDEST[0]}.{OLDEST[1]} to build"
    advice = "pip install 'torch>=2.11', or build with isolation (pip install without --no-build-isolation)"
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{wanted}, and {sys.executable} finds no torch: {advice}")
    folder = Path(spec.submodule_search_locations[0])
    file = folder / "version.py"
    found = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", file.read_text() if file.is_file() else "")
    if found is None or (int(found[2]), int(found[3])) < OLDEST:
        sys.exit(f"{wanted}, and found {found[1] if found else 'an unknown version'} in {folder}: {advice}")
    return str(folder)


if __name__ == "__main__":
    print(main())
