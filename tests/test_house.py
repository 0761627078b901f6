"""The laws of the house: how the sources read, which package imports which, and which modules are public."""

from pathlib import Path

import pytest

from scripts.house import SHAPE, House, back_references, covers, files_called, frequency

ROOT = Path(__file__).parent.parent
HOUSE = House(ROOT)
DECLARED = HOUSE.declared()


def test_docstrings_name_things_by_nouns() -> None:
    texts = HOUSE.docstrings()
    assert frequency("what", texts) <= 1
    assert not [text for text in texts if text.startswith("Return what")]


def test_docstrings_describe_instead_of_referring_back() -> None:
    assert back_references(HOUSE.docstrings()) <= 20


def test_packages_import_one_another_without_a_cycle() -> None:
    assert not HOUSE.cycle()


def test_few_modules_lie_outside_a_package() -> None:
    assert HOUSE.loose | {"cli"} == {"errors", "testing", "cli", "_captum", "_progress"}
    assert "captum_ssm.cli" in HOUSE.modules


def test_no_private_method_of_another_class_is_called() -> None:
    assert not HOUSE.private_calls()


def test_the_package_declares_its_modules_public_or_internal() -> None:
    """The package's docstring has one paragraph each, with names between commas, on as many lines as needed::

        Public: captum_ssm, captum_ssm.errors, captum_ssm.operators
        Internal: captum_ssm.attr, captum_ssm.operators.*

    A name under "Public" is that module alone. A name under "Internal" is a module and all below it; with ``.*`` at the
    end, all below it but not the module itself. A module in both is public. Names that begin with an underscore, and
    all below them, are internal anyway.
    """
    assert set(DECLARED) == {"Public", "Internal"}
    public, internal = DECLARED["Public"], DECLARED["Internal"]
    assert len(set(public)) == len(public) and len(set(internal)) == len(internal)
    assert not set(public) & set(internal)
    assert set(public) <= set(HOUSE.modules), "a public module that does not exist"
    assert all(any(covers(entry, name) for name in HOUSE.modules) for entry in internal), "an entry without a module"
    assert not [name for name in public if "._" in name]


def test_every_module_is_declared_or_begins_with_an_underscore() -> None:
    public, internal = DECLARED.get("Public", []), DECLARED.get("Internal", [])
    undeclared = [
        name
        for name in HOUSE.modules
        if name not in public and "._" not in name and not any(covers(entry, name) for entry in internal)
    ]
    assert not undeclared


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A tree that breaks every law."""
    sources = {
        "__init__.py": '"""A package.\n\nPublic: captum_ssm,\n    captum_ssm.a\nInternal: ``captum_ssm.b.*``.\n"""\n',
        "a.py": '"""Return what is."""\nfrom captum_ssm.b import c\nfrom .b.c import _f\n\n_f()\nx = 1\n"""What."""\n',
        "b/__init__.py": "",
        "b/c.py": '''from captum_ssm import a

class C:
    """Likewise, as in D."""

    def run(self, other, x):
        """Return ``x`` (B, L...)."""
        self._g(), other._g(), super()._g(), [].sort()
        return x  # (B, L)

    def _g(self): ...

def _f(c):
    # (B, L)
    c._g()
''',
    }
    for path, source in sources.items():
        file = tmp_path / "captum_ssm" / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    return House(tmp_path)


def test_the_measures_of_docstrings(house: House) -> None:
    texts = house.docstrings()
    assert len(texts) == 5 and len(house.docstrings(attributes=False)) == 4
    assert frequency("what", ["What is it", "Whatever it is"]) == pytest.approx(1000 / 6)
    assert back_references(texts) == 2
    shown = [place.path[-1] for place in house.functions if place.states_shape]
    assert shown == ["run"]
    assert [place.path[-1] for place in house.functions if place.public] == ["run"]
    assert house.modules["captum_ssm.b.c"].shape_comments() == 1  # not the comment on a line without code


def test_the_measures_of_modules(house: House) -> None:
    assert house.loose == {"a"}
    assert house.rooms() == {"captum_ssm": set(), "a": {"b"}, "b": {"a"}}
    assert set(house.cycle()) == {"a", "b"}
    assert house.private_calls() == ["captum_ssm.a:5 _f", "captum_ssm.b.c:15 c._g"]
    assert house.declared() == {"Public": ["captum_ssm", "captum_ssm.a"], "Internal": ["captum_ssm.b.*"]}


@pytest.mark.parametrize(
    "text",
    ["(B, L, E)", "(B, L...)", "(2B, ...)", "(L,)", "(..., L)", "(B, L + 1)", "(J·B, rank)", "(B, input channels)"],
)
def test_a_shape_is_seen(text: str) -> None:
    assert SHAPE.fullmatch(text)


@pytest.mark.parametrize("text", ["(Ali, Zimerman)", "(0, 1)", "(a, b)", "(A)", "(see A, the attention)"])
def test_other_brackets_are_no_shape(text: str) -> None:
    assert not SHAPE.search(text)


def test_an_internal_entry_covers_all_below() -> None:
    assert covers("a.b", "a.b") and covers("a.b", "a.b.c") and not covers("a.b", "a.bc")
    assert covers("a.b.*", "a.b.c.d") and not covers("a.b.*", "a.b")


def test_files_are_those_of_named_functions() -> None:
    def named() -> list[int]:
        return [(lambda: i)() for i in range(3)]

    assert files_called(named, str(ROOT)) == [__file__]
    assert files_called(named, str(ROOT / "captum_ssm")) == []
