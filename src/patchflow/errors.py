"""The one exception that users meet: a sentence that names the value, the expectation and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one sentence: the value, what was expected, and what to do. The command line prints it and exits with
    code 2, without a traceback; in Python it is an ordinary :class:`ValueError`.
    """


class NumericalError(ArithmeticError):
    """A computation left the finite numbers. The message says where and what to change."""
