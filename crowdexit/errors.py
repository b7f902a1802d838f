"""Errors that a user can correct: every command prints the message as one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Callable


class CrowdExitError(Exception):
    """Input or a setting that cannot be used; the message is one line and says what is wrong with what."""


class Option(str):
    """The name of a setting, as it stands in a message of :class:`OptionError`."""


class OptionError(CrowdExitError):
    """Settings that do not fit together or do not suit the input.

    The message names settings as Python does; a command line puts its flags there with :meth:`with_names`.

    Args:
        text: the message, with ``{}`` in place of each value. values: settings' names (:class:`Option`) and others.

    Examples:
        >>> error = OptionError("{} parquet: name a file with {}", Option("format"), Option("out"))
        >>> print(error)
        format parquet: name a file with out
        >>> error.with_names(lambda name: f"--{name}")
        '--format parquet: name a file with --out'
    """

    def __init__(self, text: str, *values: object) -> None:
        self._text, self._values = text, values
        super().__init__(self.with_names(str))

    def with_names(self, named: Callable[[str], str]) -> str:
        """The message with other names of the settings."""
        if not self._values:
            return self._text
        return self._text.format(*(named(value) if isinstance(value, Option) else value for value in self._values))
