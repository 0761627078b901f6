"""A picture of a text shows that text: nothing lost, nothing added, nothing taken for markup."""

import io
import random
import struct
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from captum_ssm.visualization import Passage, Piece, text_figure, text_html, text_terminal

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
    assert page.texts["p.text"] == page.texts["h1"] == page.texts["title"] == text
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


def test_a_piece_shows_its_score_and_colours() -> None:
    passage = Passage((Piece("good", 0.12345), Piece(" "), Piece("bad", -2.0)))
    spans = [attrs for tag, attrs in Page(text_html(passage)).tags if tag == "span"][:2]
    assert [span["title"] for span in spans] == ["+0.1235", "-2"]
    for span, piece in zip(spans, (passage.pieces[0], passage.pieces[2]), strict=True):
        background, color = passage.color(piece)
        assert span["style"] == f"background:{background};color:{color}"


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = text_html(scored("a plain text"))
    assert page.startswith("<!DOCTYPE html>") and '<meta charset="utf-8">' in page
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in Page(page).tags)
    assert "http" not in page and "url(" not in page and "@import" not in page


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
        for patch in axes.patches:
            assert patch.get_x() >= left and patch.get_x() + patch.get_width() <= right + 1e-9


def test_a_coloured_box_stands_behind_its_characters() -> None:
    passage = Passage((Piece("good", 1.0), Piece(" and "), Piece("bad", -1.0)))
    axes = text_figure(passage).axes[0]
    boxes = [(box.get_x(), box.get_width(), box.get_y(), box.get_height()) for box in axes.patches[:2]]
    characters = [label for label in axes.texts if label.get_text() in "godba"]
    for (x, width, y, height), word in zip(boxes, ("good", "bad"), strict=True):
        inside = [
            label.get_text()
            for label in characters
            if x < label.get_position()[0] < x + width and y < label.get_position()[1] < y + height
        ]
        assert "".join(inside) == word and width == len(word)


def test_a_figure_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib
    from matplotlib import pyplot

    before, numbers = dict(matplotlib.rcParams), pyplot.get_fignums()
    text_figure(scored("some text"))
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == numbers
