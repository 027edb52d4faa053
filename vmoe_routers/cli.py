"""Command line. A new command is one entry of `COMMANDS`."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib import import_module
from inspect import Parameter, get_annotations, signature
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from vmoe_routers import __version__
from vmoe_routers._ctrl_c import end_at_once, raising
from vmoe_routers.options import OptionError, did_you_mean

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
_KINDS |= {"dict": "values by name", "list": "values with commas between them"}
_METAVARS = {"images": "IMAGE"}  # names of positional arguments in the help
_MOST_SHOWN = 2000  # longest message, in characters
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set in the processes of torchrun
_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # of gloo and NCCL
_PATIENCE = 3.0  # seconds


def _search_here(routers: Sequence[str | None]) -> None:
    """Adds the current folder to Python's path, to import the user's own routers.

    The path of an installed command does not have the current folder.
    """
    from vmoe_routers.study.own import is_own

    if any(map(is_own, routers)) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _study(settings: Any, options: dict[str, Any]) -> None:
    from vmoe_routers.study import compare_studies, report_study, run_study

    options.pop("recipe")
    folders, finished = options.pop("compare"), options.pop("report")
    if finished is not None:
        report_study(Path(finished))
        return
    if folders is not None:
        first, second = map(Path, folders)
        compare_studies(first, second)
        return
    chosen = settings(**options)
    _search_here(chosen.routers)
    with raising():
        run_study(chosen)


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Reads options before the parser does, because `--recipe` and `--config` set the defaults of other options."""
    given = dict(pairwise(arguments))
    return given | {name: value for name, _, value in (a.partition("=") for a in arguments) if value}


def _recipe(name: Any, recipes: Mapping[str, Callable[[], Any]]) -> Any:
    """Makes the settings of a recipe.

    Raises:
        OptionError: There is no such recipe.
    """
    if name not in recipes:
        meant = did_you_mean(name, recipes)
        raise OptionError(f"recipe {name!r} does not exist; there are {', '.join(recipes)}{meant}", "recipe")
    return recipes[name]()


def _add_study_recipes(parser: Any, arguments: Sequence[str]) -> None:
    """Adds the option of `study` that sets the defaults of all other options."""
    from vmoe_routers.study.recipes import RECIPES

    texts = "; ".join(f"{name}: {(recipe.__doc__ or '').rstrip('.')}" for name, recipe in RECIPES.items())
    parser.add_argument("--recipe", type=str, help=f"named settings, which other options override. {texts}")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="set the kept records of two studies side by side, and run nothing",
    )
    parser.add_argument(
        "--report",
        metavar="FOLDER",
        help="write the report of the finished runs in the folder of a study, and run nothing",
    )
    parser.set_defaults(asdict(_recipe(_given(arguments).get("--recipe", "digits"), RECIPES)))


def _convert(convert: Any, options: dict[str, Any]) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = TextColumn("reading"), BarColumn(), DownloadColumn()
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("reading", total=None)
        model = convert(**options, progress=lambda done, total: progress.update(task, completed=done, total=total))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options['folder']}: {parameters:,} parameters")
    print(", ".join(f"{name} {value}" for name, value in model.moe_config.items()))


def _train(settings: Any, options: dict[str, Any]) -> None:
    from vmoe_routers.training import train

    dry_run = options.pop("dry_run")
    for name in ("recipe", "config"):
        options.pop(name)
    chosen = settings(**options)
    _search_here([chosen.router, chosen.upcycle])
    train(chosen, dry_run=dry_run)


def _add_recipes(parser: Any, arguments: Sequence[str]) -> None:
    """Adds the options of `train` that set the defaults of all other options."""
    from vmoe_routers.routers import ROUTERS, router_options
    from vmoe_routers.training.recipes import RECIPES, recipe_for
    from vmoe_routers.training.settings import TrainSettings, read_settings

    names = ", ".join(RECIPES)
    parser.add_argument("--recipe", type=str, help=f"named settings, which other options override: {names}")
    parser.add_argument("--config", type=str, help="a YAML file of options, which flags override")
    parser.add_argument("--dry_run", type=bool, default=False, help="describe the training and draw its first batch")
    given = _given(arguments)
    try:
        config = read_settings(Path(given["--config"])) if "--config" in given else {}
    except OSError as error:
        raise OptionError(f"config {given['--config']!r}: {error.strerror}", "config") from error
    data = given.get("--data") or config.get("data", "digits")
    defaults = _recipe(given.get("--recipe", config.pop("recipe", recipe_for(data))), RECIPES).to_dict()
    model = given.get("--model", config.get("model", defaults["model"]))
    if defaults["model"] == "vit_moe" != model:  # the recipe's architecture and router belong to its model
        defaults |= {"model_args": {}, "router": None, "num_experts": None, "group_size": None}
    defaults |= config
    router = given.get("--router", defaults["router"])
    if router != defaults["router"] and "model_args" not in config:  # drop options of the recipe's router
        foreign = router_options(defaults["router"]) - router_options(router if router in ROUTERS else None)
        kept = {name: value for name, value in defaults["model_args"].items() if name not in foreign}
        defaults["model_args"] = kept
    unknown = sorted(defaults.keys() - {field.name for field in fields(TrainSettings)})
    if unknown:
        nearest = did_you_mean(unknown[0], [field.name for field in fields(TrainSettings)])
        raise OptionError(f"config {given['--config']}: no option {unknown[0]!r}{nearest}", "config")
    parser.set_defaults(defaults)


def _add_images(parser: Any, arguments: Sequence[str]) -> None:
    """Adds the images of `inspect`, any number of positional arguments."""
    parser.add_argument("images", nargs="+", type=str, metavar=_METAVARS["images"], help="image files")


class Command(NamedTuple):
    """Command of ``vmoe-routers``.

    Attributes:
        target: "module:name" of a function or dataclass. Its arguments are the command's options, and its docstring
            describes them. The module is imported only for this command.
        help: the line in ``vmoe-routers --help``.
        description: the first paragraph of the command's help.
        example: a command line, for the command's help.
        run: runs the command, from the target and the options by name.
        positional: whether arguments without a default are given by position instead of as options.
        hidden: arguments of the target that are no options.
        prepare: adds further options to the command's parser and sets defaults, from all arguments.
        added: names of the options that `prepare` adds.
        extra: the extra of pyproject.toml with the packages that the command imports.
    """

    target: str
    help: str
    description: str
    example: str
    run: Callable[[Any, dict[str, Any]], object] = lambda target, options: target(**options)
    positional: bool = False
    hidden: tuple[str, ...] = ()
    prepare: Callable[[Any, Sequence[str]], None] | None = None
    added: tuple[str, ...] = ()
    extra: str = "training"

    def load(self) -> Any:
        """Imports the target."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


COMMANDS = {
    "study": Command(
        "vmoe_routers.study:Settings",
        help="compare the routers; writes table, figures and report",
        description="A dense ViT and the six routers head to head, on real images. Lists are written with commas: "
        "--top-k 1,2.",
        example="vmoe-routers study --data digits --routers soft,softmax_expert_choice --output study",
        run=_study,
        extra="study",
        prepare=_add_study_recipes,
        added=("recipe", "compare", "report"),
    ),
    "train": Command(
        "vmoe_routers.training.settings:TrainSettings",
        help="train a model on your images; without options, a small Soft MoE on digits",
        description="Trains a vision mixture of experts, or continues a training: the same command continues from the "
        "newest checkpoint in --output. On many devices: torchrun --nproc-per-node 8 -m vmoe_routers train.",
        example="vmoe-routers train --data photos --recipe photos --output runs/photos",
        run=_train,
        prepare=_add_recipes,
        added=("recipe", "config", "dry_run"),
    ),
    "eval": Command(
        "vmoe_routers.training.evaluate:evaluate",
        help="evaluate a model: accuracy, calibration, classes, routing; or its throughput",
        description="Evaluates a model on the test images of a data set: top-1, top-5, loss, calibration error, a "
        "table of the classes, and how its routers use the experts. --benchmark times it instead.",
        example="vmoe-routers eval --model runs/photos/model --data photos --output evaluation",
        hidden=("console",),
    ),
    "fewshot": Command(
        "vmoe_routers.training.probes:few_shot",
        help="fit a probe to the features of a model, on a few images per class or on all",
        description="Fits a linear classifier to the features before the head of a model, which does not change: ridge "
        "regression on a few images per class, or logistic regression on all (--probe linear).",
        example="vmoe-routers fewshot --model runs/photos/model --data flowers --shots 1,5,10 --seeds 0,1,2",
        hidden=("console",),
    ),
    "inspect": Command(
        "vmoe_routers.inspect.images:inspect_images",
        help="draw how a model routes images; writes pictures and a page",
        description="Draws which expert takes which patch of an image, the load of the experts, and the slots or the "
        "transport plan: PNG files, and a page that contains them.",
        example="vmoe-routers inspect runs/photos/model cat.jpg dog.jpg --output inspection",
        positional=True,
        hidden=("images", "console"),
        prepare=_add_images,
    ),
    "convert": Command(
        "vmoe_routers.checkpoints.convert:convert",
        help="convert checkpoints of the reference code to safetensors",
        description="Converts a V-MoE checkpoint, or a dense ViT in an npz file, to a folder for from_pretrained. "
        "The architecture is inferred from the parameters.",
        example="vmoe-routers convert vmoe_s32_last2_ilsvrc2012_randaug_light1 vmoe-s32",
        run=_convert,
        positional=True,
        hidden=("progress",),
        extra="checkpoints",
    ),
    "info": Command(
        "vmoe_routers.info:info",
        help="print versions, machine and kernels, for a report of an error",
        description="Prints the machine, the versions, and the kernels in use. Needs no package but torch.",
        example="vmoe-routers info",
    ),
}


def overview() -> str:
    """Describes the commands in one screen."""
    lines = [
        f"vmoe-routers {__version__}: routers for vision mixtures of experts.",
        "",
        "vmoe-routers COMMAND --help describes a command, with an example:",
        "",
    ]
    for name, command in COMMANDS.items():
        lines += fill(command.help, 78, initial_indent=f"  {name:9}", subsequent_indent=" " * 11).splitlines()
    return "\n".join([
        *lines,
        "",
        "For a start, train on handwritten digits, and evaluate the model:",
        "",
        "  vmoe-routers train",
        "  vmoe-routers eval --model runs/train/model",
        "",
        "Completion for bash (or zsh, tcsh): vmoe-routers --print-completion shtab-bash",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status. An error that the user can correct is printed in one line."""
    if arguments is None:
        end_at_once()
        arguments = sys.argv[1:]
    # These work without the parser's package.
    if not arguments or (not _command_name(arguments) and {"-h", "--help"} & set(arguments)):
        print(overview())
        return 0
    if list(arguments) == ["--version"]:
        print(f"vmoe-routers {__version__}")
        return 0
    if list(arguments) == ["info"]:
        COMMANDS["info"].load()()
        return 0
    is_own = False  # whether the error may be an error of this process alone, among the processes of torchrun
    try:
        name, target, options = _parse(arguments)
        COMMANDS[name].run(target, options)
    except ModuleNotFoundError as error:
        command = COMMANDS.get(_command_name(arguments))
        extra = command.extra if command is not None else "training"
        message = f"{error}; pip install 'vmoe_routers[{extra}]' installs the packages that this command needs"
    except ImportError as error:  # raised by an installed package, or with a message that says what to install
        message = str(error)
    except ArgumentError as error:
        name = _command_name(arguments)
        of_command = f"vmoe-routers {name} --help" if name in COMMANDS else "vmoe-routers --help"
        message = f"{_plain(str(error), arguments)} (the options: {of_command})"
    except OptionError as error:
        message = str(error)
        for name in error.options:
            message = re.sub(rf"\b{name}\b", _as_typed(name, arguments), message, count=1)
    except (ValueError, FloatingPointError) as error:
        message = str(error)
    except OSError as error:
        message, is_own = str(error), True
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message, is_own = str(error), True
        # RuntimeError is torch's error for a failed allocation.
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in message):
            message = f"not enough memory {message[:200]}"
        elif not _is_lost(message):
            if _ERROR_FILE in os.environ:
                _tell(_in_one_line(f"{type(error).__name__}: {message}"), is_own=False)  # the traceback follows
            raise
    else:
        return 0
    if is_own and _is_lost(message):
        time.sleep(_PATIENCE)  # torchrun ends this process before it reports an error that follows from another error
        message = f"lost another rank, whose error is the cause: {message}"
    _tell(_in_one_line(message), is_own)
    return 2


def _is_lost(message: str) -> bool:
    """Tells whether the error of a process of torchrun says that another process has ended."""
    return _ERROR_FILE in os.environ and any(words in message for words in _LOST)


def _in_one_line(message: str) -> str:
    message = "".join(character if character.isprintable() else " " for character in message)
    message = " ".join(message.split())
    return f"{message[:_MOST_SHOWN]} ..." if len(message) > _MOST_SHOWN else message


def _tell(error: str, is_own: bool) -> None:
    """Prints the error. A process of torchrun writes the error to a file. At the end torchrun prints the first error.

    Without the file, torchrun would add a report that lacks the error. An error that all processes have is not printed
    by every process.

    Args:
        error: The error.
        is_own: Whether the error may be an error of this process alone.
    """
    path = os.environ.get(_ERROR_FILE)
    error = f"vmoe-routers: {error}" if path is None else f"vmoe-routers: rank {os.environ['RANK']}: {error}"
    if path is None or is_own:
        print(error, file=sys.stderr, flush=True)
    if path is not None:
        told = {"message": error, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": told}))


def _command_name(arguments: Sequence[str]) -> str:
    """Returns the first argument that is not an option; "" if there is none."""
    return next((argument for argument in arguments if not argument.startswith("-")), "")


def _as_typed(name: str, arguments: Sequence[str]) -> str:
    """Returns an option as the user typed it, or as the help shows it. Positional arguments keep their names."""
    command = COMMANDS.get(_command_name(arguments))
    parameters = signature(command.load()).parameters if command is not None else {}
    is_required = name in parameters and parameters[name].default is Parameter.empty
    if command is not None and command.positional and is_required:
        return name
    for argument in arguments:
        typed = argument.partition("=")[0]
        key = typed[2:].replace("-", "_")
        if typed.startswith("--") and key == name:
            return typed
    return "--" + name.replace("_", "-")


def _plain(message: str, arguments: Sequence[str]) -> str:
    """Returns the parser's message, with commands and options as the user types them."""
    missing = re.fullmatch(r"the following arguments are required: (.*)", message)
    if missing:
        typed = (_as_typed(name.rpartition(".")[2], arguments) for name in missing[1].split(", "))
        shown = (name if name.startswith("--") else _METAVARS.get(name, name.upper()) for name in typed)
        return f"missing: {', '.join(shown)}"
    unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
    if unknown:
        return _unknown(unknown[1].partition("=")[0], arguments)
    no_command = re.match(r"argument subcommand: invalid choice: '(.*?)'", message)
    if no_command:
        return f"no command {no_command[1]!r}{did_you_mean(no_command[1], COMMANDS)}; there are {', '.join(COMMANDS)}"
    no_value = re.fullmatch(r"argument (--\w+): expected one argument", message)
    if no_value:
        return f"{_as_typed(no_value[1][2:], arguments)} needs a value"
    key, kind = re.match(r'Parser key "(\w+)"', message), re.search(r"<class '(?!NoneType)(\w+)'>", message)
    count, value = re.search(r"tuple with (\d+) elements", message), re.search(r"(?:Given|Got) value: (.*)", message)
    wanted = _KINDS.get(kind[1], kind[1]) if kind else ""
    wanted = f"{count[1]} values with commas between them" if count else wanted
    if not (key and wanted and value):
        return message
    return f"{_as_typed(key[1], arguments)} must be {wanted}, got {value[1]}"


def _unknown(word: str, arguments: Sequence[str]) -> str:
    """Describes an argument that the command does not take."""
    command = COMMANDS.get(_command_name(arguments))
    if command is None:
        return f"no option {word}{did_you_mean(word, ['--help', '--version', '--print-completion'])}"
    parameters = signature(command.load()).parameters
    required = [name for name in parameters if parameters[name].default is Parameter.empty]
    if word.startswith("-"):
        name = word.lstrip("-").replace("-", "_")
        if command.positional and name in required:
            usage = " ".join(_METAVARS.get(name, name.upper()) for name in required)
            return f"{word} is no option; {name} is a positional argument: {_command_name(arguments)} {usage}"
        options = parameters.keys() - ({*command.hidden} | ({*required} if command.positional else set()))
        options |= {*command.added}
        word = _as_typed(name, arguments) if word.startswith("--") else word
        return f"no option {word}{did_you_mean(word, ['--' + name.replace('_', '-') for name in options])}"
    likely = [] if command.positional else [*required, *({"data"} & parameters.keys())]
    return f"{word!r} follows no option" + (f"; did you mean --{likely[0]} {word}?" if likely else "")


def _parse(arguments: Sequence[str]) -> tuple[str, Any, dict[str, Any]]:
    """Parses the arguments. Returns the command's name, its target, and the options by name."""
    # Imported here, so that `main` reports a missing package in one line.
    from jsonargparse import ArgumentParser, set_parsing_settings

    shows = not {"-h", "--help"}.isdisjoint(arguments)
    set_parsing_settings(add_print_completion_argument=True)
    completes = any(argument.replace("-", "_").startswith("__print_completion") for argument in arguments)
    parser = ArgumentParser(
        prog="vmoe-routers",
        version=__version__,
        description="Routers in vision mixtures of experts.",
        formatter_class=_help_formatter(),  # also for the commands
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True)
    chosen, target = _command_name(arguments), None
    lists: set[str] = set()
    flags: set[str] = set()
    for name, command in COMMANDS.items():
        options = ArgumentParser(
            usage=f"vmoe-routers {name} [options]",
            description=command.description,
            epilog=f"Example: {command.example}",
            exit_on_error=False,
            allow_abbrev=False,  # _add_recipes reads options by their whole names
        )
        if name == chosen or completes:
            target = command.load()
            add = options.add_class_arguments if isinstance(target, type) else options.add_function_arguments
            add(target, as_group=False, as_positional=command.positional, skip={*command.hidden})
            _document(options, target)
            kinds = {f"--{key}": str(value.annotation) for key, value in signature(target).parameters.items()}
            lists = {option for option, kind in kinds.items() if kind.startswith(("list", "tuple"))}
            flags = {option for option, kind in kinds.items() if kind == "bool"}
            if command.prepare is not None:
                flags.add("--dry_run")
                command.prepare(options, [] if completes else _spelled_out(arguments, set(), flags))
            if completes or shows:
                _display(options, flags, target)
        commands.add_subcommand(name, options, help=command.help)
    spelled = _spelled_out(arguments, lists, flags)
    _check_keys(spelled)
    parsed = parser.parse_args(spelled)
    found = vars(parsed[parsed.subcommand])
    assert target is not None  # the parser refuses an unknown command
    for name, parameter in signature(target).parameters.items():
        # The parser accepts null for every option.
        if found.get(name, parameter) is None and not str(parameter.annotation).endswith("None"):
            raise OptionError(f"{name} must not be null", name)
    return parsed.subcommand, target, found


def _document(parser: Any, target: Any) -> None:
    """Gives options their help from the docstrings of the classes that a dataclass extends."""
    from docstring_parser import parse

    for base in getattr(target, "__mro__", ())[1:-1]:
        found = parse(base.__doc__ or "").params
        texts = {name: text.description for text in found for name in text.arg_name.split(", ")}
        for action in parser._actions:
            if not action.help and action.dest in texts:
                action.help = texts[action.dest]


def _display(parser: Any, flags: set[str], target: Any) -> None:
    """Makes a parser for help and completion: names have dashes, and a letter or word shows the kind of value.

    --recipe and the options of a dataclass come first. The options of each class that it extends follow, under the
    first line of the docstring of this class.
    """
    own = list(get_annotations(target)) if isinstance(target, type) else []
    first = parser._optionals._group_actions
    first.sort(key=lambda action: own.index(action.dest) if action.dest in own else -1)
    for base in getattr(target, "__mro__", ())[1:-1]:
        group = parser.add_argument_group((base.__doc__ or "").partition("\n")[0].rstrip(".").lower())
        inherited = get_annotations(base).keys() - {*own}
        group._group_actions += [action for action in first if action.dest in inherited]
        first[:] = [action for action in first if action not in group._group_actions]
    for action in parser._actions:
        kind = str(getattr(action, "_typehint", ""))
        if action.option_strings and kind:
            is_flag = action.option_strings[0] in flags
            action.option_strings = [action.option_strings[0].replace("_", "-")]
            action.metavar = "[true|false]" if is_flag else _metavar(kind)
        elif not action.option_strings and hasattr(action, "_typehint"):
            action.metavar = action.metavar or action.dest.upper()
            parser.usage += f" {action.metavar}" + (" ..." if action.nargs == "+" else "")


def _metavar(kind: str) -> str:
    """Returns the placeholder of an option's value in the help, from the text of its type."""
    found = re.search(r"\b(list|tuple|dict|int|float|Path|str)\b(?:\[(\w+))?", kind)
    if found is None:
        return "VALUE"
    single = {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}
    if found[1] == "dict":
        return "{NAME: VALUE, ...}"
    if found[1] in ("list", "tuple"):
        return f"{single.get(found[2], 'VALUE')},..."
    return single[found[1]]


def _help_formatter() -> Any:
    """Makes the class that writes the help of an option: its text, and its default if the option has one."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _get_help_string(self, action: Any) -> str:
            if action.default is SUPPRESS:
                return super()._get_help_string(action)
            text = (action.help or "").replace("`", "")
            if action.default is None:
                required = " (required)" if action.required and action.option_strings else ""
                return _with_null(text.replace("None: ", "Default: ")) + required
            return f"{_with_null(text)} (default: {_shown(action.default)})"

    return Formatter


def _with_null(text: str) -> str:
    """Replaces None, Python's word, by null, the command line's word."""
    return re.sub(r"\bNone\b", "null", text)


def _shown(default: Any) -> str:
    """Returns a default in the words of the command line."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple)):
        return ", ".join(map(str, default)) or "none"
    return str(default) if default != {} else "none"


def _spelled_out(arguments: Sequence[str], lists: set[str], flags: set[str]) -> list[str]:
    """Converts arguments to the form that jsonargparse takes.

    ``--top-k 1,2`` becomes ``--top_k [1,2]`` if `lists` has ``--top_k``. ``--benchmark`` without a value becomes
    ``--benchmark=true`` if `flags` has ``--benchmark``.

    Raises:
        OptionError: The value of an option is empty, for example an unset variable of the shell.
        ValueError: An argument is not valid UTF-8.
    """
    found, option = [], ""
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        if any("\ud800" <= character <= "\udfff" for character in argument):  # Python's form of invalid bytes
            raise ValueError(f"argument {argument!r} is not valid UTF-8")
        name, equals, value = argument.partition("=")
        is_option = argument.startswith("--")
        if is_option:
            option = "--" + name[2:].replace("-", "_")
        if option and (argument == "" or (is_option and equals and value == "")):
            raise OptionError(f"{option[2:]} must not be empty", option[2:])
        if is_option:
            if option in flags and not equals and following.startswith("--"):
                equals, value = "=", "true"
            found.append(option + equals + (_in_brackets(value) if equals and option in lists else value))
        else:
            found.append(_in_brackets(argument) if option in lists else argument)
            option = ""
    return found


def _check_keys(arguments: Sequence[str]) -> None:
    """Refuses a key that an option with values by name has twice. The parser would take the last value."""
    import yaml

    from vmoe_routers.unique_keys import UniqueKeys

    for option, value in _given(arguments).items():
        if value.startswith("{"):
            try:
                yaml.compose(value, UniqueKeys)
            except yaml.constructor.ConstructorError as error:
                raise OptionError(f"{option[2:]}: {error.problem}", option[2:]) from error
            except yaml.YAMLError:
                pass  # the parser names the option


def _in_brackets(value: str) -> str:
    return value if value.startswith("[") or value == "null" else f"[{value}]"


if __name__ == "__main__":
    sys.exit(main())
