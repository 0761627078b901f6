"""Where the code of a model finds the functions that it calls, and the names under which they are known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn
from torch.autograd import Function

from captum_ssm.network.threads import original


class Called(NamedTuple):
    """A function as an object holds it."""

    home: Any
    """The object: a module of Python, a layer, or a class of functions of autograd."""
    name: str
    """The name by which the object holds it."""
    path: str
    """The name of the module of Python, or of the layer in the model."""
    code: Any
    """The function."""

    @property
    def names(self) -> list[str]:
        """The names by which a rule may know the function: with its module's, as it is called there, and its own."""
        called = getattr(self.home, "__name__", self.name) if self.name == "apply" else self.name
        return [f"{self.path}.{called}", called, _own_name(self.code)]


def called_code(model: nn.Module, names: frozenset[str]) -> Iterator[Called]:
    """Find the functions that a model may call: in the files of its layers and in these, and of these names anywhere.

    Args:
        model: The model.
        names: Names of functions, with or without the module that holds them.

    Yields:
        Each function once for each place that holds it.
    """
    layers = dict(model.named_modules())
    files = {c.__module__ for layer in layers.values() for c in type(layer).__mro__} & sys.modules.keys()
    seen: set[tuple[int, str]] = set()
    for called in (*_of_files(files, names), *_of_layers(layers)):
        place = id(called.home), called.name
        if place not in seen and callable(called.code):
            seen.add(place)
            yield called


def _of_files(files: set[str], names: frozenset[str]) -> Iterator[Called]:
    """Yield the functions of certain names in these modules of Python, by any alias, and in all that are loaded."""
    bare = _without_modules(names)
    sizes = tuple((path, len(vars(sys.modules[path]))) for path in sorted(files) if not path.startswith("torch."))
    for path, name in (*_aliases(bare, sizes), *_loaded(bare, tuple(sys.modules))):
        home = sys.modules.get(path)
        code = original(vars(home).get(name)) if home is not None else None
        if isinstance(code, type):
            if issubclass(code, Function) and not code.__subclasses__():
                yield Called(code, "apply", path, original(code.apply))
        elif code is not None:
            yield Called(home, name, path, code)


@lru_cache(maxsize=4)
def _without_modules(names: frozenset[str]) -> frozenset[str]:
    """Return names of functions without the modules in front."""
    return frozenset(name.rpartition(".")[2] for name in names)


@lru_cache(maxsize=16)
def _aliases(names: frozenset[str], sizes: tuple[tuple[str, int], ...]) -> list[tuple[str, str]]:
    """Return the names that these modules of Python, given with how much they hold, have for functions of names."""
    held = [(path, *item) for path, _ in sizes for item in list(vars(sys.modules[path]).items())]
    return [(path, name) for path, name, code in held if name in names or _own_name(original(code)) in names]


@lru_cache(maxsize=4)
def _loaded(names: frozenset[str], paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return those of these modules of Python, without this package's own, that hold a name, together with the name."""
    others = (path for path in paths if path.partition(".")[0] != __name__.partition(".")[0])
    modules = [(path, module) for path in others if isinstance(module := sys.modules.get(path), ModuleType)]
    return [(path, name) for path, module in modules for name in names if name in vars(module)]


def _of_layers(layers: dict[str, nn.Module]) -> Iterator[Called]:
    """Yield the functions that layers hold, or their classes as static ones."""
    static = {c: _static_functions(c) for c in {type(layer) for layer in layers.values()}}
    for path, layer in layers.items():
        held = {name for name, value in vars(layer).items() if callable(value)}
        for name in held | static[type(layer)]:
            yield Called(layer, name, path, original(getattr(layer, name)))


def _static_functions(layer: type) -> set[str]:
    """Return the names of the functions of a class that are none of its methods."""
    classes = [c for c in reversed(layer.__mro__) if c not in (nn.Module, object)]
    values = {name: value for c in classes for name, value in vars(c).items() if not name.startswith("__")}
    methods = (FunctionType, classmethod, property, type)
    return {n for n, v in values.items() if (callable(v) and not isinstance(v, methods)) or isinstance(v, staticmethod)}


def _own_name(code: Any) -> str:
    """Return the name that a function was defined by; of a function of autograd, its class's."""
    while isinstance(code, partial):
        code = code.func
    owner = getattr(code, "__self__", None)
    return getattr(owner if isinstance(owner, type) else code, "__name__", "")
