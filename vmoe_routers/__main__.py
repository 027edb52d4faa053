"""Runs the command ``vmoe-routers`` as ``python -m vmoe_routers``."""

import sys

from vmoe_routers.cli import main

if __name__ == "__main__":
    sys.exit(main())
