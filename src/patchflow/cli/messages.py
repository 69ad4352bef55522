"""One sentence for what the parser of the command line refuses: the value, what it must be, and what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

# What a type of Python wants, in the order in which they are looked for.
_WANTED = {
    "list": "a list, such as [32,64]",
    "int": "a whole number, such as 4",
    "float": "a number, such as 0.1",
    "bool": "true or false",
}


def sentence(error: Exception, command: str, names: Collection[str]) -> str:
    """The message of an error in one sentence.

    Args:
        error: The error.
        command: The words of the command that was called, if it is one.
        names: Its parameters.
    """
    text = " ".join(str(error).split())
    # jsonargparse names a flag by its place in the configuration.
    missing = re.fullmatch(r"the following arguments are required: (?:[\w-]+\.)*(\w+)", text)
    if missing:
        return f"{_flag(missing[1])} is required; see --help."
    wrong = re.match(r'Parser key "(?:[\w-]+\.)*(\w+)": (.*) (?:Given|Got) value:(?: (.*))?$', text)
    if wrong:
        value = wrong[3] or ""
        return f"{_flag(wrong[1])} is {value!r} but must be {_wanted(wrong[2], value)}"
    alone = re.fullmatch(r"argument (?:-\w/)?--([\w-]+): expected one argument", text)
    if alone:
        return f"{_flag(alone[1])} has no value; give one, behind = if it begins with a dash, or leave it out."
    other = re.match(r"argument (\w+): invalid choice: '(.*?)' \(choose from (.*)\)$", text)
    if other:
        known = _quoted(other[3])
        return f"There is no {other[1]} {other[2]!r}; use one of {', '.join(known)}{_meant(other[2], known)}."
    unknown = re.match(r"unrecognized arguments: ([^\s=]+)", text)
    if unknown:
        return _unknown(unknown[1], command, names)
    return text


def _wanted(refused: str, value: str) -> str:
    """What a value must be, after the types that it was checked against."""
    named = [name for part in re.findall(r"Literal\[(.*?)\]", refused) for name in _quoted(part)]
    if named:
        choices = list(dict.fromkeys(named))
        return f"one of {', '.join(choices)}{_meant(value, choices)}."
    for name, wanted in _WANTED.items():
        if re.search(rf"class '{name}'|\b{name}\[", refused):
            return f"{wanted}."
    return f"of another kind ({refused})."


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _unknown(word: str, command: str, names: Collection[str]) -> str:
    remedy = f"see patchflow {command} --help" if command else "see patchflow --help"
    if not word.startswith("--"):
        return f"{word!r} is one argument too many, or neither true nor false for the flag before it; {remedy}."
    flags = [_flag(name) for name in names]
    given = word.replace("_", "-")
    return f"There is no flag {given} here{_meant(given, flags)}; {remedy}."


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
