"""A picture of a text shows that text: nothing lost, nothing added, nothing taken for markup."""

import io
import random
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_ssm import ImplicitAttentionRollout, LayerImplicitAttention, models
from captum_ssm.errors import InvalidInputError
from captum_ssm.visualization import (
    Passage,
    Piece,
    flow_figure,
    layers_figure,
    rollout_steps,
    text_figure,
    text_html,
    text_terminal,
    token_heatmap,
)

ALPHABET = "abc XYZ  \n\t.,<>&\"'$_[]/\\éß中文字😀\u0301\u200d\u00a0"
SEEDS = range(25)
every_seed = pytest.mark.parametrize("seed", SEEDS)
HOSTILE = [
    "<script>alert(1)</script>",
    "a & b &amp; c &lt;",
    "\"quoted\" 'text' `here`",
    "</p></body></html><!-- <![CDATA[",
    "<img src=x onerror=alert(1)>",
    "[red]not red[/red] [bold] [/] [link=http://a]x[/link]",
    "cost $5 and $x_1^2$ \\frac{a}{b} a_b_c",
    "$\\frac{a and b$ c_d x^2_3",  # broken mathematics, if read as such
    "中文字 日本語 😀 e\u0301",
    "line one\nline two\n\n  indented\tand tabbed",
    "w" * 300,
]
every_hostile = pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))


def spans(text: str, draw: random.Random) -> list[tuple[int, int]]:
    """Token spans in reading order: some overlap, some are empty, some stand for added tokens."""
    cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 12)))
    offsets = [(start, min(len(text), start + draw.randint(0, 4))) for start in cuts]
    for _ in range(draw.randint(0, 3)):
        offsets.insert(draw.randint(0, len(offsets)), (0, 0))
    return offsets


def make(seed: int) -> tuple[str, list[tuple[int, int]], Passage]:
    draw = random.Random(seed)
    text = "".join(draw.choice(ALPHABET) for _ in range(draw.randint(0, 40)))
    offsets = spans(text, draw)
    scores = torch.randn(len(offsets), generator=torch.Generator().manual_seed(seed))
    return text, offsets, Passage.from_offsets(text, offsets, scores)


def joined(passage: Passage) -> str:
    return "".join(piece.text for piece in passage.pieces)


def scored(text: str) -> Passage:
    """Every word a token, with alternating scores of growing size."""
    words, offsets = text.split(), []
    at = 0
    for word in words:
        at = text.index(word, at)
        offsets.append((at, at + len(word)))
        at += len(word)
    scores = torch.tensor([(-1.0) ** k * (k + 1) for k in range(len(words))])
    return Passage.from_offsets(text, offsets, scores, title=text, facts={text: text, "other": "value"})


# --- Cutting a text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_joined_pieces_are_the_text(seed: int) -> None:
    text, offsets, passage = make(seed)
    assert joined(passage) == text
    assert all(piece.text for piece in passage.pieces)
    assert sum(piece.score is not None for piece in passage.pieces) <= len(offsets)


@every_seed
def test_tokens_that_neither_overlap_nor_are_blank_all_keep_their_scores(seed: int) -> None:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abéß中", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 8))]
    text, offsets = "", []
    for word in words:
        start = len(text) + draw.randint(0, 1)
        text = text.ljust(start) + word
        offsets.append((start, len(text)))
    scores = torch.randn(len(words))
    passage = Passage.from_offsets(text, offsets, scores)
    kept = [(piece.text, piece.score) for piece in passage.pieces if piece.score is not None]
    assert kept == list(zip(words, scores.tolist(), strict=True))
    assert joined(passage) == text
    assert passage.scale == scores.abs().max().item()


def test_a_leading_space_in_a_token_is_not_coloured() -> None:
    """Byte-level tokenizers count it to the word."""
    passage = Passage.from_offsets("one two", [(0, 3), (3, 7)], torch.tensor([1.0, 2.0]))
    assert passage.pieces == (Piece("one", 1.0), Piece(" "), Piece("two", 2.0))


def test_what_lies_between_tokens_has_no_score() -> None:
    passage = Passage.from_offsets("-one--two-", [(1, 4), (6, 9)], torch.tensor([1.0, 2.0]))
    assert passage.pieces == (Piece("-"), Piece("one", 1.0), Piece("--"), Piece("two", 2.0), Piece("-"))


def test_added_and_repeated_tokens_show_no_text() -> None:
    """A special token at either end, and a character of two tokens, as in byte-level vocabularies."""
    offsets = [(0, 0), (0, 1), (0, 1), (1, 2), (0, 0)]
    passage = Passage.from_offsets("éa", offsets, torch.tensor([9.0, 1.0, 9.0, 2.0, 9.0]))
    assert passage.pieces == (Piece("é", 1.0), Piece("a", 2.0))


def test_a_token_that_overlaps_the_last_shows_what_is_left_of_it() -> None:
    passage = Passage.from_offsets("abcd", [(0, 3), (1, 4)], torch.tensor([1.0, 2.0]))
    assert passage.pieces == (Piece("abc", 1.0), Piece("d", 2.0))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_scores_than_tokens_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"2 tokens but {count} scores"):
        Passage.from_offsets("a b", [(0, 1), (2, 3)], torch.ones(count))


def test_a_text_without_tokens_is_itself() -> None:
    assert Passage.from_offsets("text", [], torch.ones(0)).pieces == (Piece("text"),)
    assert Passage.from_offsets("", [(0, 0)], torch.ones(1)).pieces == ()


def test_scores_of_any_type_are_read() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64):
        assert Passage.from_offsets("a", [(0, 1)], torch.ones(1, dtype=dtype)).pieces == (Piece("a", 1.0),)


# --- Colours ------------------------------------------------------------------------------------------------------


def channels(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return red, green, blue


def luminance(color: str) -> float:
    """Relative luminance by WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_blue_speaks_for_and_red_against() -> None:
    passage = Passage((Piece("a", 2.0), Piece("b", -2.0), Piece("c", 1.0), Piece("d", -0.5), Piece("e", 0.0)))
    for piece in passage.pieces:
        red, _, blue = channels(passage.color(piece)[0])
        assert piece.score is not None
        if piece.score == 0:
            assert abs(blue - red) < 0.02 and min(red, blue) > 0.9
        else:
            assert (blue > red + 0.1) == (piece.score > 0) and (red > blue + 0.1) == (piece.score < 0)


def test_a_larger_score_has_a_stronger_colour() -> None:
    for sign in (1, -1):
        passage = Passage(tuple(Piece("x", sign * k / 10) for k in range(11)))
        light = [luminance(passage.color(piece)[0]) for piece in passage.pieces]
        assert light == sorted(light, reverse=True) and light[0] > 0.8 > 0.3 > light[-1]


def test_colours_depend_on_the_share_of_the_largest_score_alone() -> None:
    small, large = (Passage((Piece("a", f), Piece("b", -0.3 * f), Piece("c", 0.0))) for f in (1e-20, 1e20))
    for one, other in zip(small.pieces, large.pieces, strict=True):
        assert small.color(one) == large.color(other)


@pytest.mark.parametrize("least", [
    3.0,  # WCAG 2, level AA, for large text
    4.5,
])  # fmt: skip
def test_every_colour_lets_the_text_be_read(least: float) -> None:
    passage = Passage(tuple(Piece("x", k / 200) for k in range(-200, 201)))
    assert min(contrast(*passage.color(piece)) for piece in passage.pieces) >= least


@pytest.mark.parametrize("pieces", [(), (Piece("a"),), (Piece("a", 0.0),), (Piece("a", 0.0), Piece("b", -0.0))])
def test_no_score_at_all_is_no_error(pieces: tuple[Piece, ...]) -> None:
    passage = Passage(pieces)
    assert passage.scale == 0 and not passage.signed
    assert all(luminance(passage.color(piece)[0]) > 0.8 for piece in (*pieces, *passage.legend))
    assert "nan" not in text_html(passage)
    assert text_terminal(passage).plain == joined(passage)


def test_the_legend_shows_both_signs_only_if_there_are_both() -> None:
    up, down = Passage((Piece("a", 2.0), Piece("b", 1.0))), Passage((Piece("a", 2.0), Piece("b", -4.0)))
    assert [piece.score for piece in up.legend] == [0.0, 2.0]
    assert [piece.score for piece in down.legend] == [-4.0, 0.0, 4.0]
    assert [piece.text.strip() for piece in down.legend] == ["-4", "0", "+4"]
    for passage in (up, down):  # the ends have the colours of the strongest pieces
        ends = {passage.color(piece) for piece in passage.legend}
        assert passage.color(max(passage.pieces, key=lambda piece: abs(piece.score or 0))) in ends


# --- HTML ---------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """The text of each element, by tag and class; fails if elements are not properly nested."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(f"{tag}.{dict(attrs)['class']}" if "class" in dict(attrs) else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].split(".")[0] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            self.texts[element] = self.texts.get(element, "") + data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


@every_hostile
def test_a_page_shows_the_text_and_takes_none_of_it_for_markup(text: str) -> None:
    passage = scored(text)
    page = Page(text_html(passage))
    assert page.texts["p.text"] == page.texts["h1.title"] == page.texts["title"] == text
    assert page.texts["dt"] == text + "other" and page.texts["dd"] == text + "value"
    plain = Page(text_html(Passage((Piece("plain"), Piece("a", 1.0), Piece("b", -1.0)), "t", {"k": "v", "l": "w"})))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert sum(tag == "span" for tag, _ in page.tags) == len(text.split()) + len(passage.legend)
    assert {name for _, attrs in page.tags for name in attrs} == {name for _, attrs in plain.tags for name in attrs}


@every_seed
def test_a_page_of_any_text_shows_that_text(seed: int) -> None:
    text, _, passage = make(seed)
    assert Page(text_html(passage)).texts.get("p.text", "") == text


def test_a_page_escapes_what_html_would_read() -> None:
    page = text_html(Passage((Piece("<script>", 1.0), Piece("&<b>\"'")), "<script>", {"<script>": '"<script>'}))
    assert "<script" not in page and "<b>" not in page
    assert page.count("&lt;script&gt;") >= 4 and "&amp;&lt;b&gt;&quot;&#x27;" in page


def test_a_piece_shows_its_score() -> None:
    passage = Passage((Piece("good", 0.12345), Piece(" "), Piece("bad", -2.0)))
    spans = [attrs for tag, attrs in Page(text_html(passage)).tags if tag == "span"][:2]
    assert [span["title"] for span in spans] == ["+0.1235", "\N{MINUS SIGN}2"]
    assert [span["class"] for span in spans] == ["l1", "l-20"]


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = text_html(scored("a plain text"))
    assert page.startswith("<!DOCTYPE html>") and '<meta charset="utf-8">' in page
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in Page(page).tags)
    assert "http" not in page and "url(" not in page and "@import" not in page


@every_hostile
def test_a_fragment_is_the_element_that_the_page_holds(text: str) -> None:
    passage = scored(text)
    fragment = text_html(passage, page=False)
    assert fragment == passage._repr_html_()
    assert fragment.startswith("<div") and fragment.rstrip().endswith("</div>")
    page, part = Page(text_html(passage)), Page(fragment)
    assert {"html", "head", "body", "meta", "h1"}.isdisjoint(tag for tag, _ in part.tags)
    assert part.texts["p.text"] == part.texts["p.title"] == text
    for element in ("p.text", "p.legend", "dt", "dd", "span"):
        assert part.texts.get(element) == page.texts.get(element)
    assert [attrs for tag, attrs in part.tags if tag == "span"] == [attrs for tag, attrs in page.tags if tag == "span"]


def test_a_fragment_styles_nothing_but_itself() -> None:
    part = Page(text_html(scored("a plain text"), page=False))
    outer = next(attrs["class"] for _, attrs in part.tags)
    style = re.sub(r"/[*].*?[*]/|@media[^{]*{|\([^()]*\)", "", part.texts["style"])  # rules, without lists in brackets
    rules = [rule.split("{")[0] for rule in style.split("}") if "{" in rule]
    assert len(rules) > 3
    for selector in ",".join(rules).split(","):
        assert f".{outer}" in selector.split()


# --- Terminal -----------------------------------------------------------------------------------------------------


@every_hostile
def test_the_terminal_shows_the_text_and_takes_none_of_it_for_markup(text: str) -> None:
    assert text_terminal(scored(text)).plain == text
    screen = io.StringIO()
    Console(file=screen, width=10_000, no_color=True).print(text_terminal(scored(text)), soft_wrap=True)
    assert screen.getvalue().rstrip("\n").expandtabs() == text.rstrip("\n").expandtabs()


@every_seed
def test_the_terminal_shows_any_text(seed: int) -> None:
    text, _, passage = make(seed)
    assert text_terminal(passage).plain == text


def test_the_terminal_colours_what_has_a_score() -> None:
    passage = Passage((Piece("good", 1.0), Piece(" so "), Piece("bad", -2.0)))
    text = text_terminal(passage)
    coloured = {text.plain[span.start : span.end]: str(span.style) for span in text.spans if str(span.style)}
    assert coloured.keys() == {"good", "bad"}
    for piece in (passage.pieces[0], passage.pieces[2]):
        background, color = passage.color(piece)
        assert coloured[piece.text] == f"{color} on {background}"


# --- Figure -------------------------------------------------------------------------------------------------------


def size(path: Path) -> tuple[int, int]:
    """Width and height that a PNG file states."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" in data[-12:]
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def shown(passage: Passage) -> str:
    return "".join(text.get_text() for text in text_figure(passage).axes[0].texts)


@every_hostile
def test_a_figure_of_any_text_is_a_picture(text: str, tmp_path: Path) -> None:
    passage = scored(text)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        text_figure(passage).savefig(tmp_path / "figure.png")
    width, height = size(tmp_path / "figure.png")
    assert width > 400 and height > 100


@pytest.mark.parametrize("passage", [
    Passage(()), Passage((Piece("word"),)), Passage((Piece("a", 0.0),)), Passage((Piece("\n \n"),), "t", {}),
    Passage((Piece("a", 1.0), Piece("a", -1.0)), "", {"": ""}),
], ids=["empty", "no scores", "zero scores", "white space", "empty facts"])  # fmt: skip
def test_a_figure_of_almost_nothing_is_a_picture(passage: Passage, tmp_path: Path) -> None:
    text_figure(passage).savefig(tmp_path / "figure.png")
    assert min(size(tmp_path / "figure.png")) > 100


@every_hostile
def test_a_figure_shows_every_character_but_white_space(text: str) -> None:
    passage = scored(text)
    expected = "".join(f"{text}{text}{text}:{text}other:value{joined(Passage(passage.legend))}".split())
    assert sorted("".join(shown(passage).split())) == sorted(expected)


def test_a_longer_text_makes_a_higher_figure_that_is_never_wider_than_a_page() -> None:
    sizes = [text_figure(scored("some words " * n)).get_size_inches().tolist() for n in (1, 20, 100)]
    assert sizes[0][0] <= sizes[1][0] <= sizes[2][0] <= 10
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]


def test_nothing_of_a_figure_lies_outside_of_it() -> None:
    for text in ("w" * 300, "some words " * 60, "x " * 200, "a" * 77 + " " + "b" * 78 + " c"):
        figure = text_figure(Passage(scored(text).pieces, "title", {"model": text}))
        axes = figure.axes[0]
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for label in axes.texts:
            x, y = label.get_position()
            assert left <= x < right and top <= y < bottom
        for patch in rectangles(axes):
            assert patch.get_x() >= left and patch.get_x() + patch.get_width() <= right + 1e-9


def test_a_coloured_box_stands_behind_its_characters() -> None:
    passage = Passage((Piece("good", 1.0), Piece(" and "), Piece("bad", -1.0)))
    axes = text_figure(passage).axes[0]
    boxes = [(box.get_x(), box.get_width(), box.get_y(), box.get_height()) for box in rectangles(axes)[:2]]
    characters = [label for label in axes.texts if label.get_text() in "godba"]
    for (x, width, y, height), word in zip(boxes, ("good", "bad"), strict=True):
        inside = [
            label.get_text()
            for label in characters
            if x < label.get_position()[0] < x + width and y < label.get_position()[1] < y + height
        ]
        assert "".join(inside) == word and width == len(word)


# --- Heat maps ----------------------------------------------------------------------------------------------------

TOKENS = ["<script>", "$\\frac{a", "a_b_c", '& "quoted" \'', "中文", "$x_1^2$", "{", "%s \\alpha", "~#^", "e\u0301"]
FORMATS = ["png", "svg", "pdf"]


def lower(*shape: int, seed: int = 0, signed: bool = False) -> Tensor:
    numbers = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers - 0.5 * signed).tril()


def pictures(tokens: list[str], signed: bool = False) -> dict[str, Figure]:
    """One of each kind."""
    matrices = lower(3, len(tokens), len(tokens), signed=signed)
    return {
        "layers": layers_figure(matrices, tokens, tokens[:3], label=tokens[0], title=tokens[-1]),
        "layers, common": layers_figure(matrices, tokens, scale="common", quantile=0.5),
        "heat map": token_heatmap(matrices[0], tokens, title=tokens[0], label=tokens[1]),
        "flow": flow_figure(rollout_steps(matrices), tokens, threshold=0),
        "flow, title": flow_figure(rollout_steps(matrices), tokens, 0, title=tokens[1]),
    }


def heat_maps(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def drawn(axes: Axes) -> np.ma.MaskedArray:
    (image,) = axes.images
    array: Any = image.get_array()
    return array


def rectangles(axes: Axes) -> list[Rectangle]:
    assert all(isinstance(patch, Rectangle) for patch in axes.patches)
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def bar_of(axes: Axes) -> Colorbar:
    bar = axes.images[0].colorbar
    assert bar is not None
    return bar


def names(axes: Axes) -> tuple[list[str], list[str]]:
    """The labels of rows and columns, and that they stand where their row or column is."""
    for axis in (axes.xaxis, axes.yaxis):
        assert all(position == round(position) for position in axis.get_ticklocs())
    return [label.get_text() for label in axes.get_yticklabels()], [t.get_text() for t in axes.get_xticklabels()]


def title_of(figure: Figure) -> str:
    return figure.texts[0].get_text()


def words(figure: FigureBase) -> str:
    texts: list[Any] = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(text.get_text() for text in texts)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 12, 24])
@pytest.mark.parametrize("scale", ["layer", "common"])
def test_every_layer_has_one_heat_map_in_order(count: int, scale: Any) -> None:
    matrices = lower(count, 4, 4, seed=count)
    figure = layers_figure(matrices, list("abcd"), scale=scale)
    panels = heat_maps(figure)
    assert [axes.get_title() for axes in panels] == [f"layer {k}" for k in range(count)]
    for axes, matrix in zip(panels, matrices, strict=True):
        assert torch.equal(torch.tensor(drawn(axes).filled(0)), matrix)
    assert len(figure.axes) - count == (count if scale == "layer" else 1)  # colour bars, and nothing left over
    boxes: list[Any] = [axes.get_subplotspec() for axes in panels]
    assert [box.num1 for box in boxes] == list(range(count))  # in reading order


def test_titles_name_the_layers() -> None:
    figure = layers_figure(lower(2, 3, 3), list("abc"), ["first", "last"])
    assert [axes.get_title() for axes in heat_maps(figure)] == ["first", "last"]


@pytest.mark.parametrize("signed", [False, True])
def test_entries_that_cannot_exist_are_blank_and_no_others(signed: bool) -> None:
    matrices = lower(2, 5, 5, signed=signed)
    matrices[:, 3, 1] = 0
    future = torch.ones(5, 5).triu(1).bool().numpy()
    for figure in (layers_figure(matrices, list("abcde")), token_heatmap(matrices[0], list("abcde"))):
        for axes in heat_maps(figure):
            assert (np.ma.getmaskarray(drawn(axes)) == future).all()


@pytest.mark.parametrize(("reads", "rows", "diagonal"), [
    ("up to itself", 4, 0), ("up to itself", 2, 2), ("up to itself", 1, 3),
    ("before itself", 4, -1), ("before itself", 2, 1), ("before itself", 1, 2),
    ("all", 4, 9), ("all", 2, 9), ("all", 9, 9),
])  # fmt: skip
def test_queries_are_the_last_of_the_keys(reads: Any, rows: int, diagonal: int) -> None:
    queries, keys = [f"q{i}" for i in range(rows)], [f"k{j}" for j in range(4)]
    exists = torch.ones(rows, 4, dtype=torch.bool).tril(diagonal)
    for left_out in (0.0, float("nan")):  # either says that there is no entry
        matrix = torch.rand(rows, 4).where(exists, left_out)
        (axes,) = heat_maps(token_heatmap(matrix, queries, keys, reads=reads))
        assert (np.ma.getmaskarray(drawn(axes)) == ~exists.numpy()).all()
        assert drawn(axes).compressed() == pytest.approx(matrix[exists].numpy())
        assert names(axes) == (queries, keys)


@pytest.mark.parametrize("quantile", [1.0, 0.5])
def test_signed_colours_are_symmetric_about_zero_and_others_start_there(quantile: float) -> None:
    matrices = lower(3, 6, 6, signed=True)
    matrices[2] = matrices[2].abs()  # not signed by itself: its colours mean the same as those beside it
    tokens = list("abcdef")
    signed = [*heat_maps(layers_figure(matrices, tokens, quantile=quantile)),
              *heat_maps(layers_figure(matrices, tokens, scale="common", quantile=quantile)),
              *heat_maps(token_heatmap(-matrices[2], tokens, quantile=quantile))]  # fmt: skip
    unsigned = heat_maps(layers_figure(matrices.abs(), tokens, quantile=quantile))
    for axes in signed:
        low, high = axes.images[0].get_clim()
        assert low == -high < 0
        red, _, blue, _ = axes.images[0].to_rgba(np.array([0.0, high, low])).T
        assert abs(red[0] - blue[0]) < 0.02 and min(red[0], blue[0]) > 0.9  # 0 is white, for is blue, against is red
        assert blue[1] > red[1] and red[2] > blue[2]
    for axes in unsigned:
        low, high = axes.images[0].get_clim()
        assert low == 0 < high
        assert axes.images[0].to_rgba(np.array([0.0]))[0, :3].min() > 0.9


def test_the_scale_is_of_each_layer_or_of_all_and_the_picture_says_which() -> None:
    matrices = lower(3, 4, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    own, common = (layers_figure(matrices, list("abcd"), scale=scale) for scale in ("layer", "common"))
    assert [axes.images[0].get_clim()[1] for axes in heat_maps(own)] == matrices.amax((1, 2)).tolist()
    assert {axes.images[0].get_clim()[1] for axes in heat_maps(common)} == {matrices.max().item()}
    assert "each layer has its own colour scale" in words(own)
    assert "one colour scale for all layers" in words(common)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_quantile_ends_the_colours_and_an_arrow_says_so(sign: int) -> None:
    matrix = torch.arange(100, dtype=torch.float64).reshape(10, 10)
    for quantile, arrow in ((1.0, "neither"), (0.5, "max" if sign > 0 else "min")):
        figure = token_heatmap(sign * matrix, ["x"] * 10, reads="all", quantile=quantile)
        (axes,) = heat_maps(figure)
        assert axes.images[0].get_clim()[1] == matrix.quantile(quantile)
        assert bar_of(axes).extend == arrow
    both = torch.cat([matrix, -matrix])
    (axes,) = heat_maps(token_heatmap(both, ["x"] * 20, ["y"] * 10, reads="all", quantile=0.5))
    assert bar_of(axes).extend == "both"
    (axes,) = heat_maps(token_heatmap(torch.eye(20), ["x"] * 20, quantile=0.5))  # the quantile is 0
    assert axes.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("numbers", [torch.zeros(3, 3), 1e-30 * torch.eye(3), 1e30 * torch.eye(3)])
def test_numbers_of_any_size_are_drawn(numbers: Tensor, tmp_path: Path) -> None:
    for figure in (token_heatmap(numbers, list("abc")), layers_figure([numbers], list("abc"), scale="common")):
        figure.savefig(tmp_path / "figure.png")
        (axes,) = heat_maps(figure)
        assert axes.images[0].get_clim() == (0, numbers.double().max().item() or 1)


def test_a_picture_names_its_axes_and_numbers() -> None:
    matrix = lower(3, 3)
    for figure in (
        layers_figure([matrix], list("abc"), label="logits"),
        token_heatmap(matrix, list("abc"), label="logits"),
    ):
        for name in ("query (output) token", "key (source) token", "logits"):
            assert name in words(figure)


def test_every_token_is_named_in_order() -> None:
    tokens = [f"token{k}" for k in range(41)]
    figures = (token_heatmap(lower(41, 41), tokens), layers_figure(lower(3, 41, 41), tokens))
    for figure in figures:
        for k, axes in enumerate(heat_maps(figure)):
            rows, columns = names(axes)
            assert columns == tokens and rows == (tokens if k == 0 else [])  # one row of the grid: named on its left
    for axes in flow_figure(rollout_steps(lower(2, 41, 41)), tokens).axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == tokens


def test_rows_name_queries_and_columns_name_keys() -> None:
    (axes,) = heat_maps(token_heatmap(lower(2, 4), ["c", "d"], list("abcd"), reads="all"))
    assert names(axes) == (["c", "d"], ["a", "b", "c", "d"])
    assert axes.get_xlabel().startswith("key") and axes.get_ylabel().startswith("query")


def test_of_many_tokens_some_are_named_where_they_stand_and_the_picture_says_so() -> None:
    tokens = [f"token{k}" for k in range(300)]
    (panel,) = heat_maps(token_heatmap(lower(300, 300), tokens))
    figures = (panel.figure, layers_figure(lower(2, 300, 300), tokens), flow_figure(lower(2, 300, 300), tokens))
    for figure in figures:
        axes = figure.axes[0]
        places = axes.xaxis.get_ticklocs().astype(int).tolist()
        step = places[1]
        assert step > 1 and places == list(range(0, 300, step))
        assert [label.get_text() for label in axes.get_xticklabels()] == tokens[::step]
        named = [line for line in words(figure).split("\n") if f"one in {step} named" in line]
        assert len(set(named)) == (1 if axes.collections else 2)  # each axis of a heat map, the tokens of a flow
    assert names(panel)[0] == names(panel)[1]


def test_labels_do_not_overlap() -> None:
    """Measured in the drawn picture, along the axis."""
    for count in (1, 8, 41, 90, 300):
        tokens = ["Wjg|"] * count
        for figure in (token_heatmap(lower(count, count), tokens), layers_figure(lower(4, count, count), tokens)):
            figure.draw_without_rendering()
            axes = figure.axes[0]
            tall = [label.get_window_extent() for label in axes.get_yticklabels()]
            assert all(a.y0 >= b.y1 for a, b in pairwise(tall))


@pytest.mark.parametrize(("token", "label"), [
    ("word", "word"), (" word", " word"), ("", ""), (" ", "␣"), ("   ", "␣␣␣"),
    ("\n", "\\n"), ("a\tb\r\n", "a\\tb\\r\\n"),
    ("\x00\x1b[0m", "\\x00\\x1b[0m"), ("\u200d", "\\u200d"),
    ("\ud800", "\\ud800"), ("\u00a0", "\\xa0"), ("中文", "中文"),
    ("w" * 16, "w" * 16), ("w" * 17, "w" * 15 + "…"), ("<script>", "<script>"), ("$x_1$", "$x_1$"), ("\\n", "\\n"),
])  # fmt: skip
def test_a_label_shows_what_there_is_of_a_token(token: str, label: str) -> None:
    (axes,) = heat_maps(token_heatmap(torch.ones(1, 1), [token]))
    assert names(axes) == ([label], [label])
    flow = flow_figure(torch.ones(1, 1, 1), [token])
    assert f"'{label}'" in title_of(flow)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("signed", [False, True])
def test_tokens_are_never_taken_for_mathematics_or_markup(form: str, signed: bool, tmp_path: Path) -> None:
    """Broken mathematics would raise; other would lose its dollar signs."""
    for kind, figure in pictures(TOKENS, signed).items():
        path = tmp_path / f"{kind}.{form}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(path)
        assert path.stat().st_size > 1000
        texts: list[Any] = figure.findobj(lambda artist: hasattr(artist, "get_parse_math"))
        for text in texts:
            if any(token in text.get_text() for token in TOKENS if len(token) > 1):
                assert not text.get_parse_math(), text
        if form == "svg":
            assert "<script" not in path.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("convert", [
    Tensor.numpy, Tensor.float, lambda m: m.float().bfloat16(), lambda m: m.float().half(), Tensor.requires_grad_,
    lambda m: np.asfortranarray(m.numpy()), lambda m: m.numpy()[::1, ::-1][:, ::-1], lambda m: (4 * m).int(),
], ids=["numpy", "float32", "bfloat16", "float16", "graph", "fortran", "strides", "int"])  # fmt: skip
def test_numbers_of_any_type_are_read(convert: Callable[[Tensor], Tensor]) -> None:
    matrix = lower(4, 4)
    given = convert(matrix.clone())
    expected = torch.as_tensor(np.array(given.tolist()))
    for figure in (
        token_heatmap(given, list("abcd")),
        layers_figure([given], list("abcd")),
        layers_figure(given[None], list("abcd")),
    ):
        assert np.array_equal(drawn(heat_maps(figure)[0]).filled(0), expected.numpy())
    steps = rollout_steps(given[None])
    assert steps == pytest.approx(rollout_steps(expected[None]))
    flow_figure(torch.tensor(steps), list("abcd"), query=torch.tensor(2))
    flow_figure(steps, list("abcd"), query=np.int64(2))  # type: ignore[arg-type]


def test_what_is_given_stays_as_it_is() -> None:
    matrices = lower(2, 4, 4).numpy()
    before = matrices.copy()
    figures = layers_figure(matrices, list("abcd")), token_heatmap(matrices[0], list("abcd"))
    flow_figure(matrices, list("abcd"))
    assert (matrices == before).all()
    matrices[:] = -1
    for figure in figures:
        assert (drawn(heat_maps(figure)[0]) >= 0).all()


NAN = torch.full((3, 3), float("nan"))
ABC = list("abc")
one = lower(3, 3)


@pytest.mark.parametrize(("draw", "message"), [
    (lambda: layers_figure([], ABC), "0 of shape"),
    (lambda: layers_figure(one, ABC), r"3 of shape \(3,\).*goes into a list"),
    (lambda: layers_figure([one[None]], ABC), r"\(1, 3, 3\).*matrix\[0\]"),
    (lambda: layers_figure(lower(2, 2, 3), ABC), r"shape \(2, 3\)"),
    (lambda: layers_figure([one, lower(2, 2)], ABC), r"\(2, 2\), \(3, 3\)"),
    (lambda: layers_figure(torch.ones(2, 0, 0), []), r"\(0, 0\)"),
    (lambda: layers_figure([one], list("ab")), "2 tokens but 3 rows and columns"),
    (lambda: layers_figure([one], "abc"), "convert_ids_to_tokens"),
    (lambda: layers_figure([one], [1, 2, 3]), "convert_ids_to_tokens"),  # type: ignore[list-item]
    (lambda: layers_figure([one], ABC, ["a", "b"]), "2 titles but 1 layers"),
    (lambda: layers_figure([one, NAN], ABC), "layer 1: the matrix has NaN"),
    (lambda: layers_figure([one.clone().fill_diagonal_(float("inf"))], ABC), "NaN or infinite"),
    (lambda: layers_figure([one, one.T], ABC), "layer 1: row 0, column 1 is .*transposed.*reads='all'"),
    (lambda: layers_figure([one], ABC, scale="row"), "'layer' or 'common', not 'row'"),  # type: ignore[arg-type]
    (lambda: layers_figure([one], ABC, quantile=0), "quantile"),
    (lambda: layers_figure([one], ABC, quantile=95), "quantile"),
    (lambda: layers_figure([one], ABC, reads="past"), "'before itself'"),  # type: ignore[arg-type]
    (lambda: token_heatmap(lower(1, 3, 3), ABC), "layers_figure"),
    (lambda: token_heatmap(torch.ones(0, 3), [], ABC), r"\(0, 3\)"),
    (lambda: token_heatmap(lower(2, 3), ABC), "3 tokens but 2 rows"),
    (lambda: token_heatmap(lower(2, 3), ["a", "b"]), "2 tokens but 3 columns"),
    (lambda: token_heatmap(lower(2, 3), ["a", "b"], ["a", "b"]), "2 tokens but 3 columns"),
    (lambda: token_heatmap(NAN, ABC), "NaN or infinite"),
    (lambda: token_heatmap(one, ABC, reads="before itself"), "row 0, column 0"),
    (lambda: token_heatmap(lower(3, 2), ABC, ["a", "b"]), "3 queries and 2 keys.*reads='all'"),
    (lambda: token_heatmap(one, ABC, quantile=float("nan")), "quantile"),
    (lambda: flow_figure(one, ABC), "goes into a list"),
    (lambda: flow_figure([one], ["a"]), "1 tokens but 3"),
    (lambda: flow_figure([NAN], ABC), "NaN or infinite"),
    (lambda: flow_figure([one], ABC, 3), "query 3 lies outside the 3 tokens"),
    (lambda: flow_figure([one], ABC, -4), "query -4 lies outside the 3 tokens"),
    (lambda: flow_figure([one], ABC, torch.ones(2)), "3 finite weights"),
    (lambda: flow_figure([one], ABC, torch.zeros(3)), "3 finite weights"),
    (lambda: flow_figure([one], ABC, NAN[0]), "3 finite weights"),
    (lambda: flow_figure([one], ABC, threshold=1), "threshold"),
    (lambda: flow_figure([one], ABC, threshold=-0.1), "threshold"),
    (lambda: rollout_steps(one), "goes into a list"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_with_its_cause(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        draw()


# --- Flow ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a flow figure shows: lines by (layer, i, j), nodes by (row, token), and the bars."""

    widths: dict[tuple[int, int, int], float]
    reds: set[tuple[int, int, int]]
    nodes: dict[tuple[int, int], float]
    bars: list[float]


def flow_of(figure: Figure) -> Shown:
    upper, under = figure.axes
    (lines,) = (c for c in upper.collections if isinstance(c, LineCollection))
    (dots,) = (c for c in upper.collections if isinstance(c, PathCollection))
    places = []
    for (j, below), (i, above) in lines.get_segments():
        assert above == below + 1
        places.append((int(below), int(i), int(j)))
    reds = {
        place for place, (red, _, blue, _) in zip(places, np.asarray(lines.get_colors()), strict=True) if red > blue
    }
    offsets = np.asarray(dots.get_offsets()).tolist()
    nodes = {(int(row), int(token)): size for (token, row), size in zip(offsets, dots.get_sizes(), strict=True)}
    assert len(nodes) == len(offsets) and len(set(places)) == len(places)
    thickness: Any = lines.get_linewidth()
    widths = dict(zip(places, thickness, strict=True))
    return Shown(widths, reds, nodes, [bar.get_height() for bar in rectangles(under)])


@pytest.mark.parametrize("signed", [False, True])
def test_steps_are_the_rows_of_the_residual_and_the_layer_shared_out(signed: bool) -> None:
    matrices = lower(3, 5, 5, signed=signed)
    steps = torch.tensor(rollout_steps(matrices))
    for matrix, step in zip(matrices, steps, strict=True):
        for i in range(5):
            whole = 1 + abs(sum(matrix[i]))
            assert step[i].tolist() == pytest.approx([((matrix[i, j] + (i == j)) / whole).item() for j in range(5)])
    if not signed:
        torch.testing.assert_close(steps.sum(-1), torch.ones(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("query", [-1, 2, [0.5, 0, 0, -0.2, 0.7]])
def test_a_line_carries_what_a_token_hands_on(signed: bool, query: int | list[float]) -> None:
    """The widths by a walk over all paths, written out."""
    steps = lower(3, 5, 5, signed=signed)
    weights = torch.eye(5, dtype=torch.float64)[query] if isinstance(query, int) else torch.tensor(query).double()
    given = query if isinstance(query, int) else weights
    seen = flow_of(flow_figure(steps, list("abcde"), given, threshold=0))
    relevance = weights.tolist()
    nodes, flows = {(3, i): r for i, r in enumerate(relevance)}, {}
    for layer in (2, 1, 0):
        below = [0.0] * 5
        for i in range(5):
            for j in range(5):
                flows[layer, i, j] = relevance[i] * steps[layer, i, j].item()
                below[j] += flows[layer, i, j]
        relevance = below
        nodes |= {(layer, j): r for j, r in enumerate(relevance)}
    flows = {at: value for at, value in flows.items() if value}
    nodes = {at: value for at, value in nodes.items() if value}
    assert seen.bars == pytest.approx(relevance)
    assert seen.widths.keys() == flows.keys() and seen.nodes.keys() == nodes.keys()
    assert seen.reds == {at for at, value in flows.items() if value < 0}
    pairs: list[tuple[Any, Any]] = [(seen.widths, {at: abs(v) ** 0.5 for at, v in flows.items()}), (seen.nodes, nodes)]
    for shown, expected in pairs:
        most = max(expected, key=lambda at: abs(expected[at]))
        assert shown == pytest.approx({at: abs(expected[at] / expected[most]) * shown[most] for at in expected})


def test_the_residual_path_goes_straight_up_and_nothing_reads_the_future() -> None:
    seen = flow_of(flow_figure(rollout_steps(torch.zeros(4, 3, 3)), ABC, 1))
    assert seen.widths.keys() == {(layer, 1, 1) for layer in range(4)}
    assert len(set(seen.widths.values())) == 1 and seen.bars == [0, 1, 0]
    seen = flow_of(flow_figure(rollout_steps(lower(4, 6, 6)), list("abcdef"), threshold=0))
    assert all(j <= i for _, i, j in seen.widths)


def test_lines_below_the_threshold_are_counted_instead() -> None:
    steps = rollout_steps(lower(3, 8, 8))
    every = flow_of(flow_figure(steps, list("abcdefgh"), threshold=0)).widths
    figure = flow_figure(steps, list("abcdefgh"), threshold=0.05)
    kept = flow_of(figure).widths
    assert 0 < len(kept) < len(every) and kept == {at: every[at] for at in kept}
    assert min(kept.values()) > max(width for at, width in every.items() if at not in kept)
    assert f"Not drawn: {len(every) - len(kept)} of {len(every)} lines, which carry less than 5 %" in words(figure)
    assert "Not drawn" not in words(flow_figure(steps, list("abcdefgh"), threshold=0))
    doubled = flow_figure(steps, list("abcdefgh"), 2 * torch.eye(8)[-1], threshold=0.05)
    assert flow_of(doubled).widths == pytest.approx(kept)  # a share of what is explained


def test_strong_lines_lie_on_weak_ones() -> None:
    widths = list(flow_of(flow_figure(lower(3, 8, 8, signed=True), list("abcdefgh"))).widths.values())
    assert widths == sorted(widths)


def test_a_flow_names_rows_and_what_is_explained() -> None:
    steps = rollout_steps(lower(2, 3, 3))
    figure = flow_figure(steps, ["x", "y", "z"], 1)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "embeddings", "after layer 0", "after layer 1",
    ]  # fmt: skip
    assert title_of(figure) == "Where the relevance of 'y' comes from"
    assert "the explained tokens" in title_of(flow_figure(steps, ABC, torch.ones(3)))
    assert title_of(flow_figure(steps, ABC, title="mine")) == "mine"
    assert "red negative" in words(flow_figure(-steps, ABC)) and "red negative" not in words(figure)


def test_the_bars_of_the_shipped_model_are_the_scores_of_the_rollout() -> None:
    model = AutoModelForCausalLM.from_pretrained(models.REVIEWS).eval()
    tokenizer = AutoTokenizer.from_pretrained(models.REVIEWS)
    ids = tokenizer("A clumsy, overlong film, yet strangely touching.", return_tensors="pt").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    layers = (LayerImplicitAttention(model, k) for k in range(model.config.num_hidden_layers))
    matrices = [layer.attribute(ids, fusion="root")[0] for layer in layers]
    for query in (-1, 4):
        scores = ImplicitAttentionRollout(model).attribute(ids, target=0, query=query)[0]
        figure = flow_figure(rollout_steps(matrices), tokens, query)
        assert flow_of(figure).bars == pytest.approx(scores.tolist(), abs=1e-6)
    assert len(heat_maps(layers_figure(matrices, tokens))) == len(matrices)


def test_a_figure_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib
    from matplotlib import pyplot

    before, numbers = dict(matplotlib.rcParams), pyplot.get_fignums()
    text_figure(scored("some text"))
    pictures(list("abcd"))
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == numbers
