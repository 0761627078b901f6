"""Which module may import which, and what the package may need: read off the sources themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import captum_ssm
from tests.cases import on_all

PACKAGE = Path(captum_ssm.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
MODEL_LIBRARIES = {"transformers", "mamba_ssm", "fla", "causal_conv1d", "peft", "accelerate", "bitsandbytes"}
OPERATORS = sorted(path for path in SOURCES if path.startswith("operators/"))
ADAPTERS = sorted(path for path in SOURCES if path.startswith("layers/adapters/"))
LOADS_MODELS, PRINTS = {"cli/loading.py", "datasets/loading.py"}, "cli/output.py"
LOOSE = {"errors", "_captum", "_progress"}
"""Modules outside the rooms that every room but the operators may import."""
ROOMS: dict[str, set[str]] = {
    "operators": set(),
    "pages": set(),
    "layers": {"operators"},
    "network": {"layers", "operators"},
    "matrices": {"network", "layers", "operators"},
    "relevance": {"network", "layers", "operators"},
    "attr": {"pages", "relevance", "matrices", "network", "layers", "operators"},
    "metrics": {"network"},
    "visualization": {"metrics", "pages"},
    "datasets": {"visualization", "pages", "metrics", "attr", "network", "layers"},
    "models": set(),
}
"""Rooms of the package, and those that each may import: an arrow points down, never up."""
ROOMY = sorted(path for path in SOURCES if path.split("/")[0] in ROOMS)


def imports(source: str, path: str) -> Iterator[str]:
    """Yield the full name of everything imported, wherever it stands in the file, also by function call."""
    package = ["captum_ssm", *Path(path).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)


@cache
def imported(path: str) -> set[str]:
    return set(imports(SOURCES[path], path))


def within(names: set[str], *packages: str) -> set[str]:
    """Those of the names that lie in any of the packages."""
    return {name for name in names for package in packages if f"{name}.".startswith(f"{package}.")}


every_source = on_all("path", sorted(SOURCES))


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b, c
from d import e as f
from . import g
from ..h import i
if TYPE_CHECKING:
    from j import k
def later():
    import m
    importlib.import_module("n.o")
    __import__("p")
"""
    found = set(imports(source, "attr/base.py"))
    assert found == {"a.b", "c", "d.e", "captum_ssm.attr.g", "captum_ssm.h.i", "j.k", "m", "n.o", "p"}
    assert within({"rich.text.Text", "richer", "rich"}, "rich") == {"rich.text.Text", "rich"}
    assert len(OPERATORS) >= 5 <= len(ADAPTERS) and "attr/base.py" in SOURCES
    assert {"cli/__init__.py", *LOADS_MODELS, PRINTS} <= set(SOURCES)
    assert {path.split("/")[0] for path in SOURCES if "/" in path} == {*ROOMS, "cli"}


@every_source
def test_only_the_command_line_and_data_sets_import_a_model_library(path: str) -> None:
    found = within(imported(path), *MODEL_LIBRARIES)
    if path in LOADS_MODELS:
        assert within(found, "transformers", "peft") == found
    else:
        assert not found


@every_source
def test_ray_and_arrow_are_imported_by_one_engine_alone(path: str) -> None:
    """All else asks for them when they are needed, and says which extra has them."""
    if path != "datasets/ray_blocks.py":
        assert not within(imported(path), "ray", "pyarrow", "datasets")


@every_source
def test_the_command_line_and_pictures_alone_import_rich(path: str) -> None:
    if path != PRINTS and not path.startswith("visualization/"):
        assert not within(imported(path), "rich")


@every_source
def test_nothing_imports_the_command_line(path: str) -> None:
    if not path.startswith("cli/"):
        assert not within(imported(path), "captum_ssm.cli")


@every_source
def test_captums_private_helpers_are_imported_in_one_place(path: str) -> None:
    private = {
        name for name in within(imported(path), "captum") if any(part.startswith("_") for part in name.split("."))
    }
    assert bool(private) == (path == "_captum.py"), private


def test_errors_import_nothing_of_the_package() -> None:
    assert not within(imported("errors.py"), "captum_ssm")


@on_all("path", ROOMY)
def test_rooms_import_those_below_alone(path: str) -> None:
    room = path.split("/")[0]
    loose = set() if room == "operators" else LOOSE
    names = within(imported(path), "captum_ssm")
    assert names == within(names, *(f"captum_ssm.{name}" for name in {room, *ROOMS[room], *loose}))


@on_all("path", ADAPTERS)
def test_adapters_know_nothing_of_calls_and_checks(path: str) -> None:
    names = within(imported(path), "captum_ssm")
    assert names and not within(names, "captum_ssm.layers.call", "captum_ssm.layers.fidelity")


@on_all("path", ADAPTERS)
def test_no_adapter_imports_another(path: str) -> None:
    if path != "layers/adapters/__init__.py":
        assert not within(imported(path), "captum_ssm.layers.adapters")


def test_the_package_of_adapters_imports_them_all() -> None:
    names = {f"captum_ssm.{path[:-3].replace('/', '.')}" for path in ADAPTERS}
    assert imported("layers/adapters/__init__.py") == names - {"captum_ssm.layers.adapters.__init__"}


@on_all("path", [path for path in ROOMY if path.startswith("layers/") and path not in ADAPTERS])
def test_nothing_that_adapters_share_imports_an_adapter(path: str) -> None:
    assert not within(imported(path), "captum_ssm.layers.adapters")


def test_the_rooms_name_their_modules_and_not_the_package() -> None:
    """``from captum_ssm import X`` would need the package's public names before they are there."""
    for path in ROOMY:
        public = {f"captum_ssm.{name}" for name in captum_ssm.__all__}
        assert not imported(path) & public, path


def test_imports_inside_the_package_make_no_circle() -> None:
    modules = {
        f"captum_ssm.{path[:-3].replace('/', '.')}": path for path in SOURCES if not path.endswith("__init__.py")
    }
    edges = {
        module: {other for other in modules for name in imported(path) if f"{name}.".startswith(f"{other}.")}
        for module, path in modules.items()
    }
    left = dict(edges)
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


BLOCK = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def run(code: str, names: set[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK.format(names=sorted(names)) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent, check=False)


def test_the_package_works_without_any_model_library() -> None:
    """Import, decompose and attribute with a model of one's own; pictures need no rich either."""
    code = """
import torch
from torch import nn
import captum_ssm, captum_ssm.testing, captum_ssm.visualization
from captum_ssm.operators import CausalConv, Chain

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 2))
    def forward(self, x):
        return nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] * self.w[:, 0] + x * self.w[:, 1]

@captum_ssm.register("Layer")
def layer(mixer, x, kwargs):
    return Chain({"conv": CausalConv(mixer.w)})

model = nn.Sequential(nn.Embedding(5, 4), Layer()).eval()
method = captum_ssm.ImplicitAttentionAttribution(lambda ids: model(ids)[:, -1], model=model)
ids = torch.tensor([[1, 2, 3]])
assert method.attribute(ids, target=1).shape == (1, 3)
passage = captum_ssm.visualization.Passage.from_offsets("a b", [(0, 1), (2, 3)], torch.tensor([1.0, -1.0]))
captum_ssm.visualization.text_html(passage)
loaded = [name for name, module in sys.modules.items() if module is not None and name.split(".")[0] in {banned!r}]
assert not loaded, loaded
print("done")
""".replace("{banned!r}", repr(sorted(MODEL_LIBRARIES | {"rich"})))
    done = run(code, MODEL_LIBRARIES | {"rich"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done" and not done.stderr


def test_the_command_line_says_what_to_install() -> None:
    code = "from captum_ssm.cli import main\nsys.exit(main(['explain', 'good']))"
    done = run(code, {"transformers", "rich"})
    assert done.returncode == 2, done.stderr
    assert "pip install 'captum-ssm[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_edits_the_path_of_imports() -> None:
    """Tests, benchmarks, scripts and tutorials import one another as the packages that they are."""
    root, path = Path(__file__).parents[1], "sys" + ".path"
    folders = ("captum_ssm", "tests", "benchmarks", "scripts", "tutorials")
    files = [file for folder in folders for kind in ("*.py", "*.ipynb") for file in (root / folder).rglob(kind)]
    assert {file.parent.name for file in files} >= {*folders, "native"} and any(f.suffix == ".ipynb" for f in files)
    assert [file for file in files if path in file.read_text(encoding="utf-8")] == []
