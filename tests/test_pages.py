"""A page of several views holds all scores as text, and takes no token for markup. See also ``tests/pages``."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from captum_ssm import ImplicitAttentionAttribution, InvalidInputError, LLMImplicitAttention
from captum_ssm.cli.layers import blocks
from captum_ssm.models import REVIEWS
from captum_ssm.pages import palette
from captum_ssm.pages.token_texts import offset_texts
from captum_ssm.visualization import Passage, Piece, Views, text_html, token_texts, views_html
from tests.families import FAMILIES
from tests.test_visualization import HOSTILE, contrast, luminance


class Cells(HTMLParser):
    """The texts of a page's table, row by row; a script's text is not read."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.names = set[str]()
        self.inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.inside = tag in ("td", "th") or (self.inside and tag == "bdi")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def read(cell: str) -> float | None:
    return float(cell.replace("\N{MINUS SIGN}", "-")) if cell else None


def answer(tokens: list[str], written: int = 2) -> Views:
    L = len(tokens)
    scores = torch.randn(written, L - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores *= torch.arange(L - 1) < torch.arange(L - written, L)[:, None]
    return Views.of_answer([f" {token}" for token in tokens], tokens, scores)


def test_the_table_has_every_score() -> None:
    views = answer(list("abcdef"), 3)
    head, total, *rows = Cells(views_html(views)).rows
    assert head == ["", *"abcdef"] and [row[0] for row in rows] == list("def")
    for k, row in enumerate(rows):
        found = [read(cell) for cell in row[1:]]
        assert found[3 + k :] == [None] * (3 - k), "a token comes from those before it alone"
        torch.testing.assert_close(torch.tensor(found[: 3 + k]).double(), views.scores[k, : 3 + k], rtol=6e-4, atol=0)
    sums = torch.tensor([read(cell) or 0.0 for cell in total[1:]]).double()
    torch.testing.assert_close(sums, views.scores.sum(0), rtol=6e-4, atol=1e-12)


@pytest.mark.parametrize("token", [*HOSTILE, "</script>", "\n", "", " ", "\N{REPLACEMENT CHARACTER}", "\u202e", "\x00"])
def test_no_token_is_markup(token: str) -> None:
    plain, page = (Cells(views_html(answer(["a", text, "b", text]))) for text in ("x", token))
    assert page.tags == plain.tags and page.names == plain.names and "id" not in page.names
    assert [len(row) for row in page.rows] == [len(row) for row in plain.rows]


def test_a_fragment_is_a_part_of_the_page_and_needs_nothing_from_elsewhere() -> None:
    views = answer(list("abc"))
    page, part = views_html(views), views_html(views, page=False)
    assert views._repr_html_() == part and part.startswith("<div") and part.rstrip().endswith("</div>")
    assert "http" not in page and "url(" not in page and "@import" not in page and "src=" not in page
    assert {"html", "head", "body", "h1"}.isdisjoint(Cells(part).tags)


@pytest.mark.parametrize("share", [k / 20 for k in range(-20, 21)])
def test_every_level_lets_the_text_be_read_on_both_grounds(share: float) -> None:
    assert contrast(*palette.on_light(share)) >= 4.5 <= contrast(*palette.on_dark(share))
    if share == 0:
        assert luminance(palette.on_dark(0)[0]) < 0.05 < 0.8 < luminance(palette.on_light(0)[0])


def test_levels_go_one_way_on_dark_grounds() -> None:
    for sign in (1, -1):
        light = [luminance(palette.on_dark(sign * k / 20)[0]) for k in range(21)]
        assert light == sorted(light)


@pytest.mark.parametrize(
    ("scores", "first", "names"),
    [
        (torch.ones(2, 4), None, 2),  # another number of tokens
        (torch.ones(2, 3), None, 1),
        (torch.ones(2, 3), 2, 2),  # views of tokens beyond the last
        (torch.ones(2, 3), -1, 2),
        (torch.full((2, 3), torch.nan), None, 2),
    ],
)
def test_views_that_do_not_fit_are_refused(scores: torch.Tensor, first: int | None, names: int) -> None:
    total = Passage(tuple(Piece(text, 1.0) for text in "abc"))
    with pytest.raises(InvalidInputError):
        Views(total, "all", ["x"] * names, scores, first)


@pytest.mark.parametrize("shape", [(0, 2), (1, 3), (3, 2)])
def test_an_answer_that_does_not_fit_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidInputError, match="one row for each written token"):
        Views.of_answer(list("abc"), list("abc"), torch.ones(shape))


# --- The characters of tokens -------------------------------------------------------------------------------------

TEXTS = [
    "a witty film",
    " two  spaces\n\nand lines\n",
    "naïve 中文字 😀👍🏽 e\u0301",
    "فيلم رائع جدا",
    "</script>&<b>",
    "a",
]


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, so most characters that are not Latin are several."""
    tokenizer = Tokenizer(models.BPE({c: k for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece has it: bytes stand in for characters that the vocabulary lacks."""
    words = ["<unk>", *(f"<0x{k:02X}>" for k in range(256)), "▁", *"aeiouwtfilmyns"]
    tokenizer = Tokenizer(models.BPE({w: k for k, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_characters_of_all_tokens_are_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text == tokenizer.decode(ids) and len(texts) == len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in texts)
    passage = Passage.from_tokens(texts, tokenizer.convert_ids_to_tokens(ids), torch.ones(len(ids)))
    assert len(passage.tokens) == len(ids) and all(piece.text.strip() for piece in passage.tokens)


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_does() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a😀").input_ids[:-1]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_offsets_give_each_token_its_characters() -> None:
    offsets = [(0, 0), (0, 1), (0, 1), (2, 6), (6, 6)]
    assert offset_texts("é film ", offsets) == ["", "é", "", " film", ""]


def test_a_token_without_characters_shows_its_name() -> None:
    passage = Passage.from_tokens(["a", "\n", "", "  b", ""], ["a", "Ċ", "<0xF0>", "▁b", ""], torch.arange(5.0))
    assert [piece.text for piece in passage.pieces] == ["a", "\\n", "\n", "<0xF0>", "  ", "b", "␣"]
    assert [piece.score for piece in passage.tokens] == [0.0, 1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="2 texts and 1 names, but 2 scores"):
        Passage.from_tokens(["a", "b"], ["a"], torch.ones(2))


# --- Results ------------------------------------------------------------------------------------------------------


def test_a_notebook_shows_a_generation() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    llm = LLMImplicitAttention(ImplicitAttentionAttribution(model, rectify=None), tokenizer)
    result = llm.attribute("a gorgeous film", gen_args={"max_new_tokens": 3, "do_sample": False})
    page = Cells(result._repr_html_())
    assert page.rows[0][1:-1] == [token.strip() for token in result.input_tokens]
    for row, scores in zip(page.rows[2:], result.token_attr):
        shown = [read(cell) or 0.0 for cell in row[1:-1]]
        torch.testing.assert_close(torch.tensor(shown), scores.float(), rtol=6e-4, atol=1e-9)
    assert len(page.rows) == 2 + len(result.output_tokens)
    assert "".join(result.texts).strip() == tokenizer.decode(
        tokenizer.convert_tokens_to_ids([*result.input_tokens, result.output_tokens[-1]])
    )


@pytest.mark.parametrize("family", ["mamba", "zamba", "jamba", "recurrent_gemma"])
def test_layers_are_the_items_of_the_longest_list(family: str) -> None:
    model = FAMILIES[family].build()
    names = blocks(model)
    assert len(names) == model.config.num_hidden_layers and re.fullmatch(r"\w+\.layers\.0", names[0])
    assert not blocks(torch.nn.Linear(1, 1))


def test_experts_are_no_layers() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=5, hidden_size=4, num_hidden_layers=2, state_size=2))
    model.backbone.layers[1].experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(9))
    assert blocks(model) == ["backbone.layers.0", "backbone.layers.1"]


def test_the_style_of_a_page_has_the_colours_of_the_passage() -> None:
    passage = Passage((Piece("a", 2.0), Piece("b", -1.0), Piece("c", 0.0)))
    html = text_html(passage)
    for piece, name in zip(passage.pieces, ("l20", "l-10", "l0")):
        background, color = passage.color(piece)
        assert f'<span class="{name}"' in html and f".{name} {{ background: {background}; color: {color};" in html
