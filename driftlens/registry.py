"""Named registries, filled by one ``register`` call per entry and by third-party entry points."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from driftlens.errors import ConfigError, UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to objects of one kind.

    Third-party packages add entries through the entry-point group ``driftlens.<plural>``: each entry
    point names a module that calls ``register`` when imported. They are loaded on first look-up.

    Args:
        kind: singular noun used in error messages, for example ``"method"``.
        group: entry-point group, for example ``"driftlens.methods"``.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name`` and return it.

        Raises:
            ConfigError: the name is taken or is not lower-case kebab-case.
        """
        if not name or name != name.lower() or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"Invalid {self.kind} name {name!r}: use lower-case letters, digits and '-'.")
        if name in self._items and self._items[name] is not item:
            raise ConfigError(f"The {self.kind} {name!r} is registered twice; choose another name.")
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            UnknownNameError: no such entry; the message lists the known names and the nearest one.
        """
        self._load_entry_points()
        try:
            return self._items[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._items) from None

    def names(self) -> list[str]:
        """Return the registered names in alphabetical order."""
        self._load_entry_points()
        return sorted(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _load_entry_points(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points(group=self.group):
            point.load()
