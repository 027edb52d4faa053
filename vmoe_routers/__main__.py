"""``python -m vmoe_routers`` is ``vmoe-routers``."""

import sys

from vmoe_routers.cli import main

if __name__ == "__main__":
    sys.exit(main())
