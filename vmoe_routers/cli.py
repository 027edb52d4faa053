"""The command line: ``vmoe-routers study``, ``vmoe-routers convert``."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vmoe_routers import __version__

if TYPE_CHECKING:
    from vmoe_routers.study import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status. What the user can mend comes in one line."""
    try:
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        if isinstance(command, dict):
            _convert(command)
        else:
            from vmoe_routers.study import run_study

            run_study(command)
    except ImportError as error:
        message = f"{error}; what the commands need comes with: pip install 'vmoe_routers[study]'"
    except ArgumentError as error:
        message = f"{error} (vmoe-routers study --help, or convert --help, lists what there is)"
    except (ValueError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    print("vmoe-routers:", " ".join(message.split()), file=sys.stderr)
    return 2


def _convert(options: dict[str, Any]) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from vmoe_routers.checkpoints.convert import convert

    columns = TextColumn("reading"), BarColumn(), DownloadColumn()
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("reading", total=None)
        model = convert(**options, progress=lambda done, total: progress.update(task, completed=done, total=total))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options['folder']}: {parameters:,} parameters")
    print(", ".join(f"{name} {value}" for name, value in model.moe_config.items()))


def _parse(arguments: Sequence[str]) -> Settings | dict[str, Any]:
    """The study's settings, or the options of `convert`."""
    # Here, so that a missing package is told in one line too.
    from jsonargparse import ArgumentParser

    from vmoe_routers.checkpoints.convert import convert
    from vmoe_routers.study import Settings

    parser = ArgumentParser(
        prog="vmoe-routers",
        version=__version__,
        description="Routers in vision mixtures of experts.",
        exit_on_error=False,
    )
    study = ArgumentParser(
        description="A dense ViT and the six routers head to head, on real images. Lists are written with commas, "
        "--top_k 1,2; dashes in names do as well, --top-k.",
        exit_on_error=False,
    )
    study.add_class_arguments(Settings, as_group=False)
    conversion = ArgumentParser(
        description="A V-MoE checkpoint, or a dense ViT in an npz file, to a folder for from_pretrained. "
        "The architecture is inferred from the parameters.",
        exit_on_error=False,
    )
    conversion.add_function_arguments(convert, as_group=False, as_positional=True, skip={"progress"})
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("study", study, help="the head-to-head, with table, figures and report")
    commands.add_subcommand("convert", conversion, help="the reference code's checkpoints to safetensors")
    lists = {f"--{field.name}" for field in fields(Settings) if str(field.type).startswith("list")}
    parsed = parser.parse_args(_spelled_out(arguments, lists if "study" in arguments[:1] else set()))
    return Settings(**vars(parsed.study)) if parsed.subcommand == "study" else vars(parsed.convert)


def _spelled_out(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """Arguments as jsonargparse wants them: ``--top-k 1,2`` becomes ``--top_k [1,2]``."""
    found, option = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = "--" + name[2:].replace("-", "_")
            found.append(option + equals + (_in_brackets(value) if equals and option in lists else value))
        else:
            found.append(_in_brackets(argument) if option in lists else argument)
    return found


def _in_brackets(value: str) -> str:
    return value if value.startswith("[") else f"[{value}]"


if __name__ == "__main__":
    sys.exit(main())
