"""Configuration files: every run writes the arguments that repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from patchflow.errors import InputError
from patchflow.io.atomic import read_bytes, write_text

Words = tuple[str, ...]


def command_line(words: str, values: Mapping[str, object], positional: str | None = None) -> str:
    """The command that repeats a run: every argument spelled out, quoted for a shell."""
    given = values[positional] if positional is not None else []
    parts = ["patchflow", *words.split(), *map(str, given if isinstance(given, list) else [given])]
    parts += [
        _flag(key, value)
        for key, value in values.items()
        if key != positional and value is not None
    ]
    return " ".join(shlex.quote(part) for part in parts)


def write_config(path: Path, words: str, values: Mapping[str, object]) -> None:
    """Write the configuration file that repeats a run with ``--config``."""
    plain = {key: value for key, value in values.items() if value is not None}
    write_text(path, yaml.safe_dump({"command": words, **plain}, sort_keys=False))


def expand_config(arguments: list[str], commands: Mapping[Words, str | None]) -> list[str]:
    """Replace ``--config FILE`` by the arguments in the file; those on the command line come later and win.

    Args:
        arguments: The command line without the program's name.
        commands: The name of the positional argument of each command.

    Raises:
        InputError: If the file is missing, not a configuration, or of another command.
    """
    place = next((k for k, word in enumerate(arguments) if word.split("=")[0] == "--config"), None)
    if place is None:
        return arguments
    _, joined, path = arguments[place].partition("=")
    behind = place + 1
    if not joined and behind < len(arguments):
        path, behind = arguments[behind], behind + 1
    rest = arguments[:place] + arguments[behind:]
    words = next((words for words in commands if tuple(rest[: len(words)]) == words), None)
    if words is None or not path:
        raise InputError(
            "--config needs a command before it and a file behind it: patchflow reconstruct --config run.yaml."
        )
    try:
        document = yaml.safe_load(read_bytes(path, "configuration file").decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a YAML configuration; give the .yaml file that a run wrote beside its output."
        ) from error
    if not isinstance(document, dict) or document.pop("command", None) != " ".join(words):
        raise InputError(
            f"{path} is not a configuration of patchflow {' '.join(words)}; give a file that this command wrote."
        )
    positional = commands[words]
    given = document.pop(positional, []) if positional is not None else []
    own = rest[len(words) :]
    # Files come right behind the command, so that they cannot be mistaken for the value of a flag.
    first_flag = next((k for k, word in enumerate(own) if word.startswith("-")), len(own))
    files = own[:first_flag] or [
        str(item) for item in (given if isinstance(given, list) else [given])
    ]
    flags = [_flag(key, value) for key, value in document.items() if value is not None]
    return [*words, *files, *flags, *own[first_flag:]]


def _flag(key: str, value: object) -> str:
    if isinstance(value, str):
        return f"--{key}={value}"
    # A YAML document that is a bare scalar ends in "...".
    text = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
    return f"--{key}={text}"
