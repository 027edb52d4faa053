"""The command line: ``vmoe-routers study``, ``vmoe-routers convert``."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vmoe_routers import __version__
from vmoe_routers._ctrl_c import end_at_once, raising
from vmoe_routers.options import OptionError

if TYPE_CHECKING:
    from vmoe_routers.study import Settings


_POSITIONAL = ("source", "folder")  # arguments of convert
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
_MOST_SHOWN = 2000  # longest message, in characters


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status. An error that the user can correct is printed in one line."""
    if arguments is None:
        end_at_once()
        arguments = sys.argv[1:]
    try:
        command = _parse(arguments)
        if isinstance(command, dict):
            _convert(command)
        else:
            from vmoe_routers.study import run_study
            from vmoe_routers.study.own import is_own

            if any(map(is_own, command.routers)) and os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())  # which Python leaves out for an installed command
            with raising():
                run_study(command)
    except ImportError as error:
        message = f"{error}; pip install 'vmoe_routers[study]' installs the packages that the commands need"
    except ArgumentError as error:
        message = f"{_plain(str(error), arguments)} (the options: vmoe-routers study --help or convert --help)"
    except OptionError as error:
        message = str(error)
        for name in error.options:
            message = re.sub(rf"\b{name}\b", _as_typed(name, arguments), message, count=1)
    except (ValueError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):  # torch's error of an allocation
            raise
        message = f"not enough memory {str(error)[:200]}"
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    message = "".join(character if character.isprintable() else " " for character in message)
    message = " ".join(message.split())
    print("vmoe-routers:", f"{message[:_MOST_SHOWN]} ..." if len(message) > _MOST_SHOWN else message, file=sys.stderr)
    return 2


def _as_typed(name: str, arguments: Sequence[str]) -> str:
    """An option as the user typed it, or else as the help shows it. Names of positional arguments do not change."""
    if name in _POSITIONAL:
        return name
    flags = (argument.partition("=")[0] for argument in arguments if len(argument) > 2 and argument.startswith("--"))
    found = (flag for flag in flags if name.startswith(flag[2:].replace("-", "_")))
    return next(found, "--" + name.replace("_", "-"))


def _plain(message: str, arguments: Sequence[str]) -> str:
    """The parser's message. A message about a value's type is rewritten, with the option as the user typed it."""
    key, kind = re.match(r'Parser key "(\w+)"', message), re.search(r"<class '(\w+)'>", message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    if not (key and kind and value):
        return message
    return f"{_as_typed(key[1], arguments)} must be {_KINDS.get(kind[1], kind[1])}, got {value[1]}"


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
    # Imported here, so that `main` reports a missing package in one line.
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
        description="A dense ViT and the six routers head to head, on real images. Lists are written with commas: "
        "--top_k 1,2. Names may have dashes: --top-k.",
        exit_on_error=False,
    )
    study.add_class_arguments(Settings, as_group=False)
    conversion = ArgumentParser(
        description="Converts a V-MoE checkpoint, or a dense ViT in an npz file, to a folder for from_pretrained. "
        "The architecture is inferred from the parameters.",
        exit_on_error=False,
    )
    conversion.add_function_arguments(convert, as_group=False, as_positional=True, skip={"progress"})
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("study", study, help="compare the routers; writes table, figures and report")
    commands.add_subcommand("convert", conversion, help="convert checkpoints of the reference code to safetensors")
    lists: set[str] = set()
    if "study" in arguments[:1]:  # the option --top_k of convert is one number
        lists = {f"--{field.name}" for field in fields(Settings) if str(field.type).startswith("list")}
    parsed = parser.parse_args(_spelled_out(arguments, lists))
    return Settings(**vars(parsed.study)) if parsed.subcommand == "study" else vars(parsed.convert)


def _spelled_out(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """Arguments in the form that jsonargparse takes: ``--top-k 1,2`` becomes ``--top_k [1,2]``.

    Raises:
        OptionError: an option with an empty value, such as an unset variable of the shell.
        ValueError: an argument that is not text.
    """
    found, option = [], ""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):  # Python's form of invalid bytes
            raise ValueError(f"argument {argument!r} is not valid UTF-8")
        name, equals, value = argument.partition("=")
        is_option = argument.startswith("--")
        if is_option:
            option = "--" + name[2:].replace("-", "_")
        if option and (argument == "" or (is_option and equals and value == "")):
            raise OptionError(f"{option[2:]} must not be empty", option[2:])
        if is_option:
            found.append(option + equals + (_in_brackets(value) if equals and option in lists else value))
        else:
            found.append(_in_brackets(argument) if option in lists else argument)
            option = ""
    return found


def _in_brackets(value: str) -> str:
    return value if value.startswith("[") else f"[{value}]"


if __name__ == "__main__":
    sys.exit(main())
