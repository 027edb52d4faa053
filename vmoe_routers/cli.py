"""The command line: ``vmoe-routers study``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from vmoe_routers import __version__


def _parser() -> ArgumentParser:
    from vmoe_routers.study import Settings

    description = "Routers in vision mixtures of experts."
    parser = ArgumentParser(prog="vmoe-routers", version=__version__, description=description)
    commands = parser.add_subcommands(required=True)
    study = ArgumentParser(description="A dense ViT and the six routers head to head, on real images.")
    study.add_class_arguments(Settings, as_group=False)
    commands.add_subcommand("study", study, help="the head-to-head, with table, figures and report")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status. What the user can mend comes in one line."""
    from vmoe_routers.study import Settings, run_study

    parsed = _parser().parse_args(arguments)
    try:
        run_study(Settings(**vars(parsed.study)))
    except ValueError as error:
        print(f"vmoe-routers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
