"""Tables that users extend: entries by name, each name once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, ValuesView
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, in order of registration. A name that is taken stays taken until it is removed.

    Layers are looked up by the name of their class, so that no model library is imported.

    Args:
        noun: What an entry is called in messages, such as ``"An adapter"``.
        remover: The public function that removes an entry, such as ``"captum_ssm.unregister"``.

    Example:
        >>> adapters = Registry("An adapter", "captum_ssm.unregister")
        >>> adapters.add("Sequential", len)
        >>> from torch import nn
        >>> adapters.of_class(nn.Sequential()) is len
        True
    """

    def __init__(self, noun: str, remover: str) -> None:
        self._noun = noun
        self._remover = remover
        self._entries: dict[str, Entry] = {}
        self._owners: dict[str, Callable[..., Any] | None] = {}

    def add(self, name: str, entry: Entry, owner: Callable[..., Any] | None = None) -> None:
        """Add an entry.

        Args:
            name: The entry's name.
            entry: The entry.
            owner: The function that an error names if the name is asked for once more; the entry itself by default.

        Raises:
            ValueError: If the name is taken; the message names its owner.
        """
        self.refuse_taken(name)
        self._entries[name] = entry
        self._owners[name] = owner if owner is not None else entry if callable(entry) else None

    def decorator(self, *names: str) -> Callable[[Entry], Entry]:
        """Return a decorator that adds the decorated function under all these names, or under none.

        Raises:
            ValueError: When it is applied, if a name is taken; the message names its owner.
        """

        def decorate(entry: Entry) -> Entry:
            self.refuse_taken(*names)
            for name in names:
                self.add(name, entry)
            return entry

        return decorate

    def refuse_taken(self, *names: str) -> None:
        """Raise if one of the names is taken.

        Raises:
            ValueError: With the owner of the name, and how to remove the entry.
        """
        for name in names:
            if name in self._entries:
                owner = self._owners[name]
                name_of_owner = getattr(owner, "__qualname__", None)
                where = f": {owner.__module__}.{name_of_owner}" if name_of_owner else ""
                raise ValueError(
                    f"{self._noun} for {name!r} is already registered{where}. "
                    f"To replace it, call {self._remover}({name!r}) first."
                )

    def remove(self, name: str) -> None:
        """Remove the entry of this name.

        Raises:
            KeyError: If there is none.
        """
        del self._entries[name]
        del self._owners[name]

    def of_class(self, instance: object) -> Entry | None:
        """Return the entry of an object's class, or of the nearest class that it derives from, or None."""
        return next((self._entries[c.__name__] for c in type(instance).__mro__ if c.__name__ in self._entries), None)

    def values(self) -> ValuesView[Entry]:
        """Return all entries."""
        return self._entries.values()

    def items(self) -> list[tuple[str, Entry]]:
        """Return all names with their entries."""
        return list(self._entries.items())

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of this name."""
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is an entry of this name."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._entries)
