"""The argument parser of the command line: jsonargparse, with flags as flags and errors in one line."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import docstring_parser
import jsonargparse

from dynanet.experiment.config import DATA_MODULES


def command_name(command: Callable) -> str:
    """The name of a command as it is typed: `export_bundle` is export-bundle."""
    return command.__name__.replace("_", "-")


class Parser(jsonargparse.ArgumentParser):
    """A parser in which booleans are flags, and errors take one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, "allow_abbrev": False, **kwargs})

    def add_function_arguments(self, function: Callable, *args: Any, **kwargs: Any) -> list[str]:
        """The parameters of a command, described by its docstring."""
        described = docstring_parser.parse(inspect.getdoc(function) or "")
        self.description = "\n\n".join(filter(None, (described.short_description, described.long_description)))
        parameters = inspect.signature(function).parameters.values()
        flags = {p.name for p in parameters if p.annotation is bool}
        added = super().add_function_arguments(function, *args, **{**kwargs, "sub_configs": False, "skip": flags})
        for each in described.params:
            if each.arg_name in flags:
                self.add_argument(f"--{each.arg_name}", action="store_true", help=each.description)
        for action in self._actions:
            if action.option_strings and action.dest in ("data", "model", "recipe"):
                action.help = argparse.SUPPRESS  # a file for a part of them: --config takes them all
            if action.dest == "data.name":
                action.metavar = f"{{{','.join(DATA_MODULES)}}}"
        places = [p.name for p in parameters if p.default is p.empty]
        self.usage = " ".join(["dynanet", command_name(function), *places, "[options]"])
        return added

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add the commands."""
        self.usage = "dynanet COMMAND [options]"
        for action in self._actions:
            if action.dest in ("config", "print_config"):
                action.help = argparse.SUPPRESS  # every command has its own
        return super().add_subcommands(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line that says where help is, and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        usage = (getattr(ex, "subcommand_parser", None) or self).usage or ""
        command = re.search(r"required: ([\w-]+)\.", message) or re.match(r"dynanet ([a-z-]+)", usage)
        help_ = f"dynanet {command[1]} --help" if command else "dynanet --help"
        print(f"dynanet: {_plain(message)}; see: {help_}", file=sys.stderr)
        raise SystemExit(2)


def written_out(arguments: list[str]) -> list[str]:
    """Lists as the parser reads them: `--shares 0.5 0.25` and `--shares 0.5,0.25` become `--shares [0.5,0.25]`."""
    written: list[str] = []
    for argument in arguments:
        number = re.fullmatch(r"[\d.]+(e-?\d+)?(,[\d.]+(e-?\d+)?)*", argument)
        lists: tuple[str, ...] = _LISTS if number else _LISTS_OF_PATHS
        if not number and argument.startswith(("-", "[")):
            lists = ()
        if written and written[-1] in lists:
            written.append(f"[{argument}]")
        elif len(written) > 1 and written[-2] in lists and written[-1].endswith("]"):
            written[-1] = f"{written[-1][:-1]},{argument}]"
        else:
            written.append(argument)
    return written


class _Help(jsonargparse.DefaultHelpFormatter):
    """Help without types: names and descriptions say what is expected."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if "--print_config" in action.option_strings:
            return "print all options as YAML, for --config, and exit"
        default = action.default
        shown = action.option_strings and default is not None and default is not False and default != argparse.SUPPRESS
        return (action.help or "").rstrip(".") + (" (default: %(default)s)" if shown else "")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return re.sub(r", --[\w.]+\+ .*| \[=flags\]", "", super()._format_action_invocation(action))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(super(_Help, self)._fill_text(line, width, indent) for line in text.splitlines())


_LISTS = ("--shares", "--batches", "--threads", "--recipe.exit_weights")
_LISTS_OF_PATHS = ("--static",)


def _plain(message: str) -> str:
    """A message of jsonargparse, in one line and without types."""
    text = " ".join(line.strip(" -") for line in message.splitlines() if line.strip())
    for pattern, instead in _IN_WORDS:
        text = re.sub(pattern, instead, text)
    return text.rstrip(" .:;")


_IN_WORDS = (
    (r"Parser key \"([^\"]*)\":", r"\1:"),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* value: ",
        r"expected \1; got ",
    ),
    (r"Expected an? (.*?)\. Got value: ", r"expected \1; got "),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r", NoneType", " or null"),
    (r"required: \w[\w-]*\.", "required: "),
    (r"Subcommand '([\w-]+)' does not accept option '(.*?)'", r"\1 has no option \2"),
)
