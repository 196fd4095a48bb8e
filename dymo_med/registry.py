"""An explicit table from names to classes; unknown names list the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from dymo_med.errors import ConfigError, Problem

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """Return a remedy sentence that names the known names, the closest one first.

    Args:
        name: The name that was given.
        known: The names that exist.

    Returns:
        For example ``Did you mean 'dymo'? Known: dymo, observed_only``.
    """
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(known)}"


class Registry(Mapping[str, type[T]], Generic[T]):
    """A read-only table of one sort of component.

    Args:
        noun: What the table holds, for error messages ("imputer").
        entries: Name to class.
    """

    def __init__(self, noun: str, entries: Mapping[str, type[T]]) -> None:
        self.noun = noun
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> type[T]:
        """Return the class called `name`.

        Raises:
            ConfigError: If there is none.
        """
        if name not in self._entries:
            raise ConfigError(
                Problem(
                    where=self.noun,
                    what=f"there is no {self.noun} called '{name}'",
                    expected="a name from the table",
                    remedy=nearest(name, list(self._entries)),
                )
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is a class called `name`."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over names in table order."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)
