"""Measure how the library's source reads: sizes, docstrings, rooms, and the files that one explanation passes through.

Run it from the repository with the package's ``cli`` extra installed; another tree is named by its root::

    python scripts/house.py
    python scripts/house.py ../another-tree

Everything but the last two rows is read off the sources, so two versions with different modules can be compared. A
*room* is a direct child of ``captum_ssm``: a subpackage, or a loose module.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "captum_ssm"
LAYERS = 2
"""The number of layers of the shipped model that the followed calls run, the first ones."""

NEXT = "\n" + " " * 26
"""The start of another line of the same row of the table."""

WORD = re.compile(r"[A-Za-z']+")
BACK_REFERENCE = re.compile(r"\b(likewise|as\s+there|as\s+in)\b", re.IGNORECASE)
_SIZE = r"(?:\d*[A-Z][a-z]?|\d+|[a-z]+(?: [a-z]+)?)(?:\s?[-·*+/]\s?(?:\d*[A-Z][a-z]?|\d+))*"
_AXIS = rf"\s*(?:{_SIZE})?(?:\.\.\.)?\s*"
SHAPE = re.compile(rf"\((?=[^()]*\b\d*[A-Z][a-z]?\b){_AXIS}(?:,{_AXIS}|(?<=\.\.\.))+\)")
"""A shape such as ``(B, L, E)``, ``(B, L...)``, ``(2B, ...)`` or ``(L,)``."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Place:
    """A function with the names on the way to it.

    Args:
        path: Names of the module's parts, the classes and the function.
        node: Its definition.
        nested: Whether it is defined inside another function.
    """

    path: tuple[str, ...]
    node: Function
    nested: bool

    @property
    def public(self) -> bool:
        """Whether no name of the path begins with an underscore."""
        return not self.nested and not any(name.startswith("_") for name in self.path)

    @property
    def lines(self) -> int:
        """The number of lines, without decorators."""
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def with_tensors(self) -> bool:
        """Whether an argument or the result is annotated with a Tensor."""
        arguments = self.node.args
        each = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        annotations = [argument.annotation for argument in each if argument] + [self.node.returns]
        return any(re.search(r"\bTensor\b", ast.unparse(a)) for a in annotations if a)

    @property
    def states_shape(self) -> bool:
        """Whether the docstring holds a shape."""
        return SHAPE.search(ast.get_docstring(self.node) or "") is not None


@dataclass(frozen=True)
class Module:
    """A module of the package.

    Args:
        name: Full name, such as ``captum_ssm.operators.chain``.
        source: Text of the file.
        is_package: Whether the file is an ``__init__.py``.
    """

    name: str
    source: str
    is_package: bool

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source)

    @property
    def room(self) -> str:
        """The first name below the package, or the package's own name."""
        return room(self.name)

    @property
    def lines(self) -> int:
        """The number of lines."""
        return len(self.source.splitlines())

    def docstrings(self, attributes: bool = True) -> list[str]:
        """Return the docstrings of the module, its classes and functions, and if wanted of attributes."""
        texts = []
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Module | ast.ClassDef | Function):
                continue
            text = ast.get_docstring(node)
            texts += [text] if text else []
            for statement in node.body[bool(text) :] if attributes else ():
                match statement:
                    case ast.Expr(ast.Constant(str(value))):
                        texts.append(value)
        return texts

    def functions(self) -> Iterator[Place]:
        """Yield every function and method, nested ones included."""

        def walk(node: ast.AST, path: tuple[str, ...], nested: bool) -> Iterator[Place]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, Function):
                    yield Place((*path, child.name), child, nested)
                    yield from walk(child, (*path, child.name), True)
                elif isinstance(child, ast.ClassDef):
                    yield from walk(child, (*path, child.name), nested)
                else:
                    yield from walk(child, path, nested)

        return walk(self.tree, tuple(self.name.split(".")), False)

    def imports(self) -> Iterator[tuple[str, str]]:
        """Yield the full name of everything imported, wherever the import stands, and the name that it is bound to."""
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, alias.asname or alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                yield from ((f"{source}.{alias.name}", alias.asname or alias.name) for alias in node.names)

    def shape_comments(self) -> int:
        """Return the number of lines of code with a comment that holds a shape."""
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        comments = (token for token in tokens if token.type == tokenize.COMMENT)
        return sum(bool(token.line[: token.start[1]].strip() and SHAPE.search(token.string)) for token in comments)


@dataclass(frozen=True)
class House:
    """The package's sources below one root."""

    root: Path

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every module by its full name."""
        modules = {}
        for path in sorted((self.root / PACKAGE).rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules[name] = Module(name, path.read_text(encoding="utf-8"), is_package)
        return modules

    @property
    def functions(self) -> list[Place]:
        """Every function of every module."""
        return [place for module in self.modules.values() for place in module.functions()]

    @property
    def loose(self) -> set[str]:
        """The modules that lie directly in the package, by their last name."""
        return {module.room for name, module in self.modules.items() if name.count(".") == 1 and not module.is_package}

    def docstrings(self, attributes: bool = True) -> list[str]:
        """Return the docstrings of all modules; see :meth:`Module.docstrings`."""
        return [text for module in self.modules.values() for text in module.docstrings(attributes)]

    def rooms(self) -> dict[str, set[str]]:
        """Return the rooms that each room imports."""
        imported: dict[str, set[str]] = {}
        for module in self.modules.values():
            names = {name for name, _ in module.imports() if name.split(".")[0] == PACKAGE}
            rooms = {room(name) if name.count(".") and self._is_room(room(name)) else PACKAGE for name in names}
            imported.setdefault(module.room, set()).update(rooms - {module.room})
        return imported

    def _is_room(self, name: str) -> bool:
        return f"{PACKAGE}.{name}" in self.modules

    def cycle(self) -> list[str]:
        """Return the rooms of a cycle of imports, the first one again at the end; nothing if there is none."""
        try:
            TopologicalSorter(self.rooms()).prepare()
        except CycleError as error:
            return list(error.args[1])
        return []

    def private_calls(self) -> list[str]:
        """Return where code calls a private method of another class or a private function of another module.

        A call ``x._name(...)`` counts if the package defines a function ``_name`` and the class around the call does
        not, unless x is ``self``, ``cls`` or ``super()``. A call ``_name(...)`` counts if ``_name`` is imported from
        the package.
        """
        defined = {place.node.name for place in self.functions if is_private(place.node.name)}
        calls = []
        for module in self.modules.values():
            imported = {
                bound for name, bound in module.imports() if name.startswith(f"{PACKAGE}.") and is_private(bound)
            }
            for call, own in calls_of(module.tree):
                match call.func:
                    case ast.Attribute(value, name):
                        owner = ast.unparse(value)
                        private = name in defined - own and owner not in ("self", "cls", "super()")
                    case ast.Name(name):
                        private = name in imported
                    case _:
                        private = False
                if private:
                    calls.append(f"{module.name}:{call.lineno} {ast.unparse(call.func)}")
        return calls

    def declared(self) -> dict[str, list[str]]:
        """Return the modules that the package's docstring declares, by ``"Public"`` and ``"Internal"``.

        Each is a paragraph that begins with the word and a colon; names stand between commas, full stops end none.
        """
        text = ast.get_docstring(self.modules[PACKAGE].tree) or ""
        found = re.findall(r"^(Public|Internal):\s(.*?)(?=\n\s*\n|\n(?:Public|Internal):|\Z)", text, re.M | re.S)
        return {word: [name.strip(" `\n") for name in names.rstrip(".").split(",")] for word, names in found}


def room(name: str) -> str:
    """Return the room in which a module or something of it lies, by its full name."""
    return name.split(".")[1] if "." in name else name


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def covers(entry: str, name: str) -> bool:
    """Whether an entry of the declared modules covers a module: ``a.b`` itself and all below, ``a.b.*`` all below."""
    return name == entry or fnmatchcase(name, entry if entry.endswith(".*") else f"{entry}.*")


def calls_of(tree: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[tuple[ast.Call, frozenset[str]]]:
    """Yield every call, with the names of the methods of the classes around it."""
    for child in ast.iter_child_nodes(tree):
        inside = own
        if isinstance(child, ast.ClassDef):
            inside = own | {node.name for node in child.body if isinstance(node, Function)}
        elif isinstance(child, ast.Call):
            yield child, own
        yield from calls_of(child, inside)


def followed() -> dict[str, dict[str, int]]:
    """Run one attribution and one relevance on the shipped model, and return which files they pass through.

    Python's calls of named functions and methods of the package count, in their order, without returns, lambdas and
    comprehensions. A change is a call that lies in another file than the call before it.

    Returns:
        ``files`` and ``changes`` by the name of the call. The second call of the same method has warm caches.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import captum_ssm
    from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRelevance, models

    model: Any = AutoModelForCausalLM.from_pretrained(models.REVIEWS, num_hidden_layers=LAYERS)
    tokenizer: Any = AutoTokenizer.from_pretrained(models.REVIEWS)
    inputs = tokenizer("A gorgeous, witty film", return_tensors="pt").input_ids
    target = tokenizer.convert_tokens_to_ids("positive")
    attribution, relevance = ImplicitAttentionAttribution(model), ImplicitAttentionRelevance(model)
    calls: dict[str, Callable[[], object]] = {
        "attribution": lambda: attribution.attribute(inputs, target=target),
        "relevance": lambda: relevance.attribute(inputs, target=target, baselines=tokenizer.unk_token_id),
    }
    package = str(Path(str(captum_ssm.__file__)).parent)
    passed = {}
    for name, call in calls.items():
        for turn in ("first", "second"):
            files = [file for file, _ in groupby(files_called(call, package))]
            passed[f"{name}, {turn} call"] = {"files": len(set(files)), "changes": len(files) - 1}
    return passed


def files_called(run: Callable[[], object], folder: str) -> list[str]:
    """Run a function, and return the file of every named Python function below the folder that it calls, in order."""
    files = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder + os.sep) and not code.co_name.startswith("<"):
            files.append(code.co_filename)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


def followed_in(root: Path) -> dict[str, dict[str, int]]:
    """Return the result of :func:`followed` for the package below a root, run in a process of its own.

    Raises:
        subprocess.CalledProcessError: If the package does not run.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--followed"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    passed: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return passed


def duplicates(root: Path) -> str | None:
    """Return the count that the command ``duplicates`` prints, or None where there is no such command."""
    if shutil.which("duplicates") is None:
        return None
    command = ["duplicates", "--repo", str(root), "--most", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition(",")[0].strip()


def spread(sizes: dict[str, int]) -> str:
    """Return the median, the ninth decile and the maximum of sizes, and the five largest by name."""
    values = list(sizes.values())
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    named = ", ".join(f"{name.removeprefix(f'{PACKAGE}.')} {sizes[name]}" for name in largest)
    ninth = quantiles(values, n=10, method="inclusive")[-1]
    return f"median {median(values):.0f}, p90 {ninth:.0f}, max {max(values)} ({named})"


def frequency(word: str, texts: list[str]) -> float:
    """Return the uses of a word per 1,000 words of the texts."""
    words = [each.lower() for text in texts for each in WORD.findall(text)]
    return 1000 * words.count(word) / len(words)


def back_references(texts: list[str]) -> int:
    """Return the number of back-references: "likewise", "as there" and "as in"."""
    return sum(len(BACK_REFERENCE.findall(text)) for text in texts)


def rows(house: House) -> Iterator[tuple[str, object]]:
    """Yield the rows of the table of measures: a name and a value each."""
    modules, functions = house.modules, house.functions
    yield "lines of modules", spread({name: module.lines for name, module in modules.items()})
    yield "lines of functions", spread({".".join(place.path): place.lines for place in functions})
    yield "modules", f"{len(modules)}; functions {len(functions)}"
    yield "loose modules", f"{len(house.loose)} ({', '.join(sorted(house.loose))})"

    texts, everything = house.docstrings(attributes=False), house.docstrings()
    yield "docstring words", f"{sum(len(WORD.findall(text)) for text in texts):,} in {len(texts)} docstrings"
    with_attributes = f"{frequency('what', everything):.1f} with attributes"
    yield '"what" per 1,000 words', f"{frequency('what', texts):.1f}; {with_attributes}"
    yield 'begin "Return what"', sum(text.startswith("Return what") for text in texts)
    referring = sum(BACK_REFERENCE.search(text) is not None for text in texts)
    uses = f"{back_references(texts)} in {referring} docstrings"
    yield "back-references", f"{uses}; {back_references(everything)} with attributes"
    shapes = {name: module.shape_comments() for name, module in modules.items()}
    inside = sum(count for name, count in shapes.items() if modules[name].room in ("operators", "relevance"))
    yield "shape comments", f"{inside} in operators and relevance, {sum(shapes.values())} in all"

    public = [place for place in functions if place.public and ast.get_docstring(place.node)]
    tensors = [place for place in public if place.with_tensors]
    yield "public functions", f"{len(public)} with a docstring, {len(tensors)} of them with tensors"
    stated = sum(place.states_shape for place in tensors)
    yield "with a shape", f"{stated} of {len(tensors)} ({stated / max(len(tensors), 1):.0%})"

    private = house.private_calls()
    yield "private calls", f"{len(private)}{''.join(f'{NEXT}{call}' for call in private)}"
    yield "cycle of rooms", " -> ".join(house.cycle()) or "none"
    arrows = [f"{name} -> {', '.join(sorted(others)) or '-'}" for name, others in sorted(house.rooms().items())]
    yield "imports of rooms", NEXT.join(arrows)
    for name, passed in followed_in(house.root).items():
        yield name, f"{passed['files']} files, {passed['changes']} changes of file"
    count = duplicates(house.root)
    if count is not None:
        yield "duplicates", count


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="root of a tree (default: this repository)")
    parser.add_argument("--followed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.followed:
        print(json.dumps(followed()))
        return
    for name, value in rows(House(options.root.resolve())):
        print(f"{name:<{len(NEXT) - 1}}{value}")


if __name__ == "__main__":
    main()
