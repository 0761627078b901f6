"""Tables that users extend: entries by name, each name once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, ValuesView
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

Entry = TypeVar("Entry")


Name = str | type
"""A class; the name of a class or of a function; or such a name with that of its module, or of a package around it, in
front: ``"Mamba"``, ``"mamba_ssm.Mamba"``."""


class Registry(Generic[Entry]):
    """Entries by name, in order of registration. A name that is taken stays taken until it is removed.

    Layers are looked up by the name of their class, so that no model library is imported. Of several entries that fit,
    that of the class itself comes first, then those that name its module or a package, the innermost one first, and
    then that of the bare name. So libraries may have different classes of one name.

    Args:
        noun: What an entry is called in messages, such as ``"An adapter"``.
        remover: The public function that removes an entry, such as ``"captum_ssm.unregister"``.

    Example:
        >>> adapters = Registry("An adapter", "captum_ssm.unregister")
        >>> adapters.add("Sequential", len)
        >>> adapters.add("torch.nn.Sequential", repr)
        >>> from torch import nn
        >>> adapters.of_class(nn.Sequential()) is repr
        True
    """

    def __init__(self, noun: str, remover: str) -> None:
        self._noun = noun
        self._remover = remover
        self._entries: dict[Name, Entry] = {}
        self._owners: dict[Name, Callable[..., Any] | None] = {}
        self._found: WeakKeyDictionary[type, Entry | None] = WeakKeyDictionary()

    def add(self, name: Name, entry: Entry, owner: Callable[..., Any] | None = None) -> None:
        """Add an entry.

        Args:
            name: The entry's name, or the class that it is for.
            entry: The entry.
            owner: The function that an error names if the name is asked for once more; the entry itself by default.

        Raises:
            ValueError: If the name is taken; the message names its owner.
        """
        owner = owner if owner is not None else entry if callable(entry) else None
        self.refuse_taken(name, owner=owner)
        self._entries[name] = entry
        self._owners[name] = owner
        self._found.clear()

    def decorator(self, *names: Name) -> Callable[[Entry], Entry]:
        """Return a decorator that adds the decorated function under all these names, or under none.

        Raises:
            ValueError: When it is applied, if a name is taken; the message names its owner.
        """

        def decorate(entry: Entry) -> Entry:
            self.refuse_taken(*names, owner=entry if callable(entry) else None)
            for name in names:
                self.add(name, entry)
            return entry

        return decorate

    def refuse_taken(self, *names: Name, owner: Callable[..., Any] | None = None) -> None:
        """Raise if one of the names is taken.

        Args:
            names: The names.
            owner: The function that asks for them.

        Raises:
            ValueError: With both owners of the name, and how to remove the entry.
        """
        for name in names:
            if name in self._entries:
                shown = repr(name) if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}"
                raise ValueError(
                    f"{self._noun} for {shown} is already registered{_by(self._owners[name])}; it is asked for once "
                    f"more{_by(owner)}. To replace it, call {self._remover}({shown}) first. For another class of this "
                    "name pass the class itself, or its name with that of its package in front."
                )

    def remove(self, name: Name) -> None:
        """Remove the entry of this name.

        Raises:
            KeyError: If there is none.
        """
        del self._entries[name]
        del self._owners[name]
        self._found.clear()

    def of_class(self, instance: object) -> Entry | None:
        """Return the entry of an object's class, or of the nearest class that it derives from, or None."""
        own = type(instance)
        if own not in self._found:
            names = (name for cls in own.__mro__ for name in _names(cls) if name in self._entries)
            self._found[own] = next((self._entries[name] for name in names), None)
        return self._found[own]

    def values(self) -> ValuesView[Entry]:
        """Return all entries."""
        return self._entries.values()

    def items(self) -> list[tuple[str, Entry]]:
        """Return all names with their entries; entries of a class have none."""
        return [(name, entry) for name, entry in self._entries.items() if isinstance(name, str)]

    def __getitem__(self, name: Name) -> Entry:
        """Return the entry of this name."""
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is an entry of this name."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names; entries of a class have none."""
        return iter([name for name, _ in self.items()])


def _names(cls: type) -> Iterator[Name]:
    """Yield all names that a class may be registered by, the most exact one first."""
    yield cls
    packages = cls.__module__.split(".")
    for depth in range(len(packages), -1, -1):
        yield ".".join([*packages[:depth], cls.__name__])


def _by(owner: Callable[..., Any] | None) -> str:
    name = getattr(owner, "__qualname__", None)
    return f" by {owner.__module__}.{name}" if name else ""
