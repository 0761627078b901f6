"""Build the documentation site, and fail if a link is broken or a docstring is missing.

Run from the root of the repository, in the environment of ``constraints-docs.txt``::

    python -m scripts.build_docs                # the site, in out/docs/html
    python -m scripts.build_docs --unexecuted   # under a minute: tutorials without outputs, in out/check-docs/html

The sources are gathered in the folder ``source`` beside it: the folder ``docs``, the ``PAGES`` that stand elsewhere, a
page of the reference for each public module, and the tutorials, executed here. A link between two of them stays one; a
link to another file of the repository becomes one to its place on the web.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
from base64 import b64decode
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import captum_ssm
from scripts.house import House

ROOT = Path(__file__).resolve().parents[1]
SITE, CHECK = ROOT / "out" / "docs", ROOT / "out" / "check-docs"
"""Where the site is built, and where one whose tutorials have no outputs, which nobody is to read."""
REPOSITORY = "https://github.com/captum-ssm/captum-ssm"
PAGES = {
    "benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "captum_ssm/models/reviews/README.md": "reviews.md",
}
"""Pages of the site that stand outside ``docs``, with their place in it."""
LINK = re.compile(r"(\]\()([^)#\s]*)((?:#[^)\s]*)?\))")
"""A link of Markdown: its beginning, its address, and its anchor."""
REFERENCE = """# `{name}`

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :undoc-members:
   :exclude-members: {elsewhere}
   :inherited-members: {others}
   :show-inheritance:

{constants}
```
"""
OTHERS = (
    "Attribution", "GradientAttribution", "InternalAttribution", "LayerGradientXActivation", "LayerAttribution",
    "NeuronAttribution", "LLMAttributionResult", "BaseException", "Exception", "ValueError", "RuntimeError", "dict",
    "list", "tuple", "object",
)  # fmt: skip
"""Classes of other packages, whose members the reference does not repeat."""


CAPTUMS = ("compute_convergence_delta",)
"""Methods of Captum that the reference leaves out, wherever they come from."""


def stage(source: Path, execute: bool) -> None:
    """Gather the sources of the site, with their links.

    Args:
        source: The folder that they are gathered in.
        execute: Whether the tutorials are executed; else they are as they are in the repository, without outputs.

    Raises:
        SystemExit: If a link leads nowhere.
    """
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("__pycache__"))
    places = {path: path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*") if path.is_file()}
    places |= {ROOT / name: Path(place) for name, place in PAGES.items()}
    places |= {path: Path("tutorials") / path.name for path in (ROOT / "tutorials").glob("*.ipynb")}
    for path in [*(ROOT / "benchmarks").glob("*.png")]:
        places[path] = Path(path.name)
    broken: list[str] = []
    entries: dict[str, str] = {}
    for path, place in places.items():
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        linked = partial(LINK.sub, partial(_link, path=path, places=places, broken=broken))
        if path.suffix == ".md":
            (source / place).write_text(linked(path.read_text(encoding="utf-8")), encoding="utf-8")
        elif path.suffix == ".ipynb":
            notebook = json.loads(executed(path) if execute else path.read_text(encoding="utf-8"))
            for cell in notebook["cells"]:
                if cell["cell_type"] == "markdown":
                    cell["source"] = linked("".join(cell["source"]))
            (source / place).write_text(json.dumps(notebook), encoding="utf-8")
            entries[path.stem] = entry(notebook, place, source)
        else:
            shutil.copy(path, source / place)
    if broken:
        sys.exit("links that lead nowhere:\n" + "\n".join(broken))
    with (source / "tutorials.md").open("a", encoding="utf-8") as gallery:
        gallery.writelines(entries[name] for name in sorted(entries))
    for name in public():
        page = source / "api" / f"{name}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(reference(name), encoding="utf-8")


def entry(notebook: dict[str, Any], place: Path, source: Path) -> str:
    """Return a notebook's entry in the gallery: its title, its first paragraph, and its first picture.

    Args:
        notebook: The notebook with its outputs; a picture of them is stored beside it.
        place: Its place in the site.
        source: The folder of the site's sources.
    """
    title, text, *_ = notebook["cells"][0]["source"].split("\n\n")
    outputs = (output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", ()))
    picture = next((data["image/png"] for data in outputs if "image/png" in data), None)
    shown = ""
    if picture is not None:
        (source / place).with_suffix(".png").write_bytes(b64decode("".join(picture)))
        shown = f"\n\n[![{title.lstrip('# ')}]({place.with_suffix('.png')}){{height=240px}}]({place})"
    return f"\n#{title}\n\n{text} [Read it]({place}).{shown}\n"


def _link(link: re.Match[str], path: Path, places: dict[Path, Path], broken: list[str]) -> str:
    """Return a link of a page as it must be in the site.

    Args:
        link: A match of ``LINK``.
        path: The page that has it.
        places: The place in the site of every file that has one.
        broken: Gets the links that lead nowhere.
    """
    before, address, after = link.groups()
    if not address or re.match(r"[a-z]+:", address):
        return link.group()
    target = (path.parent / address).resolve()
    if target in places:
        return f"{before}{os.path.relpath(places[target], places[path].parent)}{after}"
    if not target.exists() or not target.is_relative_to(ROOT):
        broken.append(f"{path.relative_to(ROOT)}: {address}")
        return link.group()
    return f"{before}{REPOSITORY}/blob/main/{target.relative_to(ROOT)}{after}"


def reference(name: str) -> str:
    """Return the page of a public module. What it takes from another public module is documented there.

    Args:
        name: The name of the module.
    """
    module, others = sys.modules[name], set(public()) - {name}
    elsewhere = [member for member in getattr(module, "__all__", ()) if _module(getattr(module, member)) in others]
    constants = [
        member
        for member in getattr(module, "__all__", ())
        if not inspect.isclass(value := getattr(module, member))
        and not inspect.isroutine(value)
        and not inspect.ismodule(value)
    ]
    return REFERENCE.format(
        name=name,
        elsewhere=", ".join([*elsewhere, *constants, *CAPTUMS]),
        others=", ".join(OTHERS),
        constants="\n".join(f".. autodata:: {name}.{constant}\n   :no-value:\n" for constant in constants),
    )


def _module(member: object) -> str:
    """Return the name of the module that a class or function is written in, or that a module is."""
    return str(getattr(member, "__module__", None) or getattr(member, "__name__", ""))


def public() -> Iterator[str]:
    """Yield the names of the public modules, and import each."""
    for name in House(ROOT).declared()["Public"]:
        yield import_module(name).__name__


def executed(path: Path) -> str:
    """Run a notebook from top to bottom, or take the result of a run of the same sources.

    Args:
        path: The notebook.

    Returns:
        It with its outputs, as it is stored.
    """
    import nbformat
    from nbclient import NotebookClient

    from tests.test_tutorials import ThisPython

    sources = [path, *(path.parent).rglob("*.py"), *Path(captum_ssm.__file__).parent.rglob("*.py")]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(sources))).hexdigest()[:16]
    stored = SITE / "executed" / f"{path.stem}-{key}.ipynb"
    if not stored.exists():
        print(f"running {path.name}", flush=True)
        stored.parent.mkdir(parents=True, exist_ok=True)
        for old in stored.parent.glob(f"{path.stem}-*.ipynb"):
            old.unlink()
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path.parent}"
        os.environ.pop("MPLBACKEND", None)  # ipykernel then draws into the notebook
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_manager_class=ThisPython).execute()
        nbformat.write(notebook, stored)
    return stored.read_text(encoding="utf-8")


def main() -> None:
    """Gather the sources and build the site; a warning is an error."""
    from sphinx.cmd.build import build_main

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--unexecuted", action="store_true", help="check all but the tutorials' outputs, in a minute")
    unexecuted = parser.parse_args().unexecuted
    out = CHECK if unexecuted else SITE
    stage(out / "source", execute=not unexecuted)
    arguments = [
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(out / "doctrees"),
        str(out / "source"),
        str(out / "html"),
    ]
    if status := build_main(arguments):
        sys.exit(status)
    print(f"the site is in {(out / 'html' / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
