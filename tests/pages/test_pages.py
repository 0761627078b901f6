"""Pages in a real browser: with mouse, finger and keyboard, light and dark, without scripts, and beside others."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_ssm.cli import main
from captum_ssm.visualization import Passage, Piece, Views, text_html, views_html

Opened = Callable[..., Any]

HOSTILE = (
    "A", "</script>", "<b>", '"', "'", "&amp;", "<!--", "\n", "\u0641\u064a\u0644\u0645", "\u202eevil", "é", "`${x}`",
    "\\", "]]>", "a", "b", "a",
)  # fmt: skip


def answer(tokens: tuple[str, ...] = HOSTILE, written: int = 4, seed: int = 0) -> Views:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(written, len(tokens) - 1, generator=draw, dtype=torch.float64)
    scores *= torch.arange(len(tokens) - 1) < torch.arange(len(tokens) - written, len(tokens))[:, None]
    texts = [token if token.isspace() else f" {token}" for token in tokens]
    return Views.of_answer(texts, list(tokens), scores, "Where </title> comes from", {"<fact>": "</dl>"})


def layered() -> Views:
    total = Passage.from_tokens([" a", " good", " film"], list("abc"), torch.tensor([0.0, 2.0, -1.0]), "Why?")
    return Views(total, "embeddings", ["before layer 0", "before layer 1"], torch.tensor([[0, 2.0, -1], [1, 1.0, -1]]))


def spoken(score: float, digits: int = 4) -> str:
    return f"{score:+.{digits}g}".replace("-", "\u2212")


def shown(page: Any, root: str = ".captum-ssm") -> list[str]:
    """The scores that the text shows, by token."""
    return [str(piece.get_attribute("title")) for piece in page.query_selector_all(f"{root} .text span")]


def expected(views: Views, row: int) -> list[str]:
    first = len(views.total.tokens) if views.first is None else views.first + row
    scores = [spoken(score) for score in views.scores[row].tolist()]
    return [score if j < first else "" for j, score in enumerate(scores)]


def sums(views: Views) -> list[str]:
    return [spoken(token.score or 0.0) for token in views.total.tokens]


def status(page: Any) -> str:
    return str(page.get_by_role("status").inner_text())


def test_a_text_shows_itself_and_takes_none_of_it_for_markup(opened: Opened) -> None:
    views = answer()
    page = opened(views_html(views))
    assert page.title() == "Where </title> comes from"
    joined = "".join(piece.text for piece in views.total.pieces)
    assert page.text_content(".text") == joined
    names = page.locator("thead bdi").all_text_contents()
    assert names[1:7] == list(HOSTILE[1:7]) and names[7] == "\\n"
    assert page.text_content("dt") == "<fact>" and page.text_content("dd") == "</dl>"


def test_the_mouse_shows_where_a_token_comes_from(opened: Opened) -> None:
    views = answer()
    page = opened(views_html(views))
    assert shown(page) == sums(views)
    page.locator(".view").nth(2).hover()
    assert shown(page) == expected(views, 2)
    best = max(range(15), key=lambda j: abs(float(views.scores[2, j])))
    assert status(page).startswith("b: ") and spoken(float(views.scores[2, best]), 3) in status(page).split(",")[0]
    page.mouse.move(0, 0)
    assert shown(page) == sums(views)
    page.locator(".view").nth(1).click()
    page.mouse.move(0, 0)
    page.locator(".table").focus()
    assert shown(page) == expected(views, 1), "a click keeps it"
    page.get_by_role("button", name="all written tokens").click()
    assert shown(page) == sums(views)


def test_a_finger_shows_where_a_token_comes_from(opened: Opened) -> None:
    views = answer()
    page = opened(views_html(views), has_touch=True, is_mobile=True, viewport={"width": 360, "height": 640})
    page.locator(".view").nth(3).tap()
    assert shown(page) == expected(views, 3)
    page.locator(".view").nth(3).tap()
    assert shown(page) == sums(views)


def test_the_keyboard_alone_reaches_every_token_and_the_table(opened: Opened) -> None:
    views = answer()
    page = opened(views_html(views), viewport={"width": 500, "height": 800})
    press = page.keyboard.press
    press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "all written tokens"
    press("Tab")  # light or dark
    for row in range(4):
        press("Tab")
        assert shown(page) == expected(views, row)
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
    press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY" and shown(page) == sums(views)
    press("Tab")
    press("ArrowRight")
    page.wait_for_function("document.querySelector('.table').scrollLeft > 0")
    for _ in range(3):
        press("Shift+Tab")
    press("Home")
    press("ArrowRight")
    assert shown(page) == expected(views, 0)
    press("End")
    assert shown(page) == expected(views, 3)
    press("ArrowLeft")
    press("Enter")
    page.locator(".table").focus()
    assert shown(page) == expected(views, 2)
    page.locator(".view").nth(2).focus()
    press("Escape")
    assert shown(page) == sums(views)
    press("Space")
    assert shown(page) == expected(views, 2)
    assert page.locator(".view").nth(2).get_attribute("aria-pressed") == "true"


def test_layers_are_shown_on_request(opened: Opened) -> None:
    views = layered()
    page = opened(views_html(views))
    for row, name in enumerate(views.names):
        page.get_by_role("button", name=name).click()
        assert shown(page) == expected(views, row)
        assert page.get_by_role("button", name=name).get_attribute("aria-pressed") == "true"
        assert status(page).startswith(f"{name}: ")
    assert status(page) == "before layer 1: \u2018a\u2019 +1, \u2018good\u2019 +1, \u2018film\u2019 \u22121; sum +1"


def test_what_a_screen_reader_reads(opened: Opened) -> None:
    page = opened(views_html(answer()))
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"
    page.get_by_role("button", name="b", exact=True).focus()
    assert re.search(r"‘.+’ .*[+\u2212]\d", status(page)) and "sum" in status(page)
    assert "\u2018a\u2019 (token 15)" in status(page), "one of two tokens of one name"
    assert page.get_by_role("columnheader").count() == len(HOSTILE)
    assert page.get_by_role("cell").count() == 5 * len(HOSTILE) + 1  # and the empty one in the corner
    assert page.get_by_role("rowheader").all_text_contents()[0] == "all written tokens"
    assert page.get_by_role("region").get_attribute("aria-label")


@pytest.mark.parametrize("off", ["scripts", "policy"])
def test_without_scripts_all_scores_are_there(opened: Opened, off: str) -> None:
    views, html = answer(), views_html(answer())
    if off == "policy":
        html = html.replace(
            "<head>", '<head><meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
        )
    page = opened(html, java_script_enabled=off != "scripts")
    assert page.locator("tbody td").all_inner_texts() == [
        *sums(views),
        *(s for k in range(4) for s in expected(views, k)),
    ]
    assert page.locator(".table").is_visible()
    assert not page.locator(".view").count() and not page.locator("button").count()


def test_fragments_of_one_document_leave_one_another_alone(opened: Opened) -> None:
    one, other = answer(seed=1), answer(seed=2)
    plain = "<p class=text>words <span>more</span></p><table><tr><td>1</td></tr></table><button>b</button>"
    page = opened(f"<!DOCTYPE html>{plain}")
    look = """[...document.querySelectorAll("body > :not(.captum-ssm), body > p span")].map(
        e => JSON.stringify([...getComputedStyle(e)].map(k => getComputedStyle(e)[k])))"""
    before = page.evaluate(look)
    page = opened(
        "<!DOCTYPE html>" + plain + one._repr_html_() + other._repr_html_() + text_html(one.total, page=False)
    )
    assert page.evaluate(look) == before
    assert page.evaluate("document.querySelectorAll('[id]').length") == 0
    roots = page.locator(".captum-ssm")
    roots.nth(1).locator(".view").nth(2).click()
    titles = lambda k: [p.get_attribute("title") for p in roots.nth(k).locator(".text span").all()]  # noqa: E731
    assert titles(0) == sums(one) and titles(1) == expected(other, 2) and titles(2) == sums(one)


def test_a_notebook_that_adds_outputs_later_runs_each_once(opened: Opened) -> None:
    """As JupyterLab does: HTML is inserted, and its scripts are made anew."""
    views = layered()
    page = opened("<!DOCTYPE html><body></body>")
    for _ in range(2):
        page.evaluate(
            """html => { const host = document.createElement("div"); host.innerHTML = html;
            for (const old of host.querySelectorAll("script")) { const script = document.createElement("script");
            script.textContent = old.textContent; old.replaceWith(script); } document.body.append(host); }""",
            views._repr_html_(),
        )
    assert page.locator(".bar").count() == 2
    page.get_by_role("button", name="before layer 1").last.click()
    first, second = page.locator(".captum-ssm").all()
    assert first.locator("[title='+1']").count() == 0 and second.locator("[title='+1']").count() == 2


SHOWN = ".text span, td[class], .legend span, dd, th, .status, button"
CONTRAST = """shown => [...document.querySelectorAll(shown)].map(e => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  let ground = e;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(c => linear(c / 255))
    .reduce((sum, c, k) => sum + c * [.2126, .7152, .0722][k], 0);
  const [a, b] = [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor].map(rgb).map(light);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
})"""


def ground(page: Any, selector: str = ".captum-ssm") -> float:
    color = page.evaluate("s => getComputedStyle(document.querySelector(s)).backgroundColor", selector)
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 765


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_let_the_text_be_read(opened: Opened, scheme: str) -> None:
    pieces = tuple(Piece(f"x{k} ", k / 20) for k in range(-20, 21))
    views = Views(Passage(pieces, "t", {"a": "b"}), "all", ["one"], torch.linspace(-1, 1, 41)[None])
    page = opened(views_html(views), color_scheme=scheme)
    assert (ground(page) > 0.5) == (scheme == "light")
    assert (ground(page, ".text .l0") > 0.5) == (scheme == "light")
    assert min(page.evaluate(CONTRAST, SHOWN)) >= 4.5


@pytest.mark.parametrize(
    "mark", ["data-theme='{}'", "data-jp-theme-light='{}'", "class='vscode-{}'", "data-md-color-scheme='{}'"]
)
def test_a_theme_that_the_reader_chose_wins(opened: Opened, mark: str) -> None:
    for dark in (True, False):
        words = {"data-jp-theme-light='{}'": ("true", "false"), "data-md-color-scheme='{}'": ("default", "slate")}
        value = words.get(mark, ("light", "dark"))[dark]
        html = f"<!DOCTYPE html><body {mark.format(value)}>{answer()._repr_html_()}</body>"
        page = opened(html, color_scheme="light" if dark else "dark")
        assert (ground(page) < 0.5) == dark


def test_a_page_has_a_button_for_light_and_dark(opened: Opened) -> None:
    for scheme in ("light", "dark"):
        page = opened(views_html(layered()), color_scheme=scheme)
        for dark in (scheme == "light", scheme == "dark"):
            page.get_by_role("button", name="Light or dark").click()
            assert (ground(page) < 0.5) == dark
            assert ground(page, "html") == ground(page)


def test_high_contrast_keeps_the_colours_of_scores(opened: Opened) -> None:
    page = opened(views_html(layered()), forced_colors="active")
    colors = {
        page.evaluate("e => getComputedStyle(e).backgroundColor", p) for p in page.query_selector_all(".text span")
    }
    assert len(colors) == 3


def test_a_long_answer_scrolls_and_its_headers_stay(opened: Opened) -> None:
    draw = random.Random(0)
    tokens = tuple("".join(draw.choices("abcdefgh", k=draw.randint(1, 12))) for _ in range(160))
    views = answer(tokens, 60)
    page = opened(views_html(views), viewport={"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "the page itself does not scroll sideways"
    table = page.locator(".table")
    table.scroll_into_view_if_needed()
    page.evaluate("document.querySelector('.table').scrollTo(4000, 900)")
    box, head = table.bounding_box(), page.locator("thead th").nth(100).bounding_box()
    side = page.locator("tbody th").nth(50).bounding_box()
    assert abs(head["y"] - box["y"]) < 3 and abs(side["x"] - box["x"]) < 3
    page.locator(".view").nth(30).focus()
    line = page.get_by_role("status").bounding_box()
    assert line["y"] + line["height"] <= 641, "the scores in words stay in sight"


def test_a_table_of_many_scores_is_laid_out_on_request(opened: Opened) -> None:
    page = opened(views_html(answer(tuple("ab" * 150), 60)))
    assert not page.locator(".table").is_visible()
    page.locator(".view").nth(5).focus()
    assert "sum" in status(page)
    page.locator("summary").click()
    assert page.locator(".table").is_visible()


@pytest.mark.parametrize("options", [["--generate", "4"], ["--layers"]])
def test_the_command_line_writes_such_a_page(
    opened: Opened, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    assert main(["explain", "A gorgeous, witty film. It is", *options, "--html", str(path)]) == 0
    page = opened(path.read_text(encoding="utf-8"))
    choices = page.locator("[aria-pressed]")
    assert choices.count() >= 4
    choices.nth(2).click()
    assert "gorgeous" in page.text_content(".text") and "sum" in status(page)
