"""The HTML page of a summary."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import tensor

from captum_ssm.datasets.findings import Findings, Line, Surprise
from captum_ssm.visualization import Passage, Piece, text_html

_STYLE = """
.captum-ssm-summary { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #ffffff; padding: 1rem; }
.captum-ssm-summary .pair { display: flex; flex-wrap: wrap; gap: 1rem 3rem; }
.captum-ssm-summary table { border-collapse: collapse; font-size: 0.95rem; margin: 0.5rem 0 1.5rem; }
.captum-ssm-summary caption { text-align: left; font-weight: bold; padding: 0.3rem 0; }
.captum-ssm-summary th, .captum-ssm-summary td { padding: 0.15rem 0.8rem 0.15rem 0; text-align: right; }
.captum-ssm-summary th:first-child, .captum-ssm-summary td:first-child { text-align: left; overflow-wrap: anywhere; }
.captum-ssm-summary th { color: #5a5a5a; font-weight: normal; border-bottom: 1px solid #c0c0c0; }
.captum-ssm-summary .scroll { overflow-x: auto; }
"""


def summary_page(summary: Findings, count: int, *, page: bool = True) -> str:
    """Return a summary as HTML. All text is escaped.

    Args:
        summary: The summary.
        count: How many words for and against each class, and surprises.
        page: Return a complete page, for a file. Else one ``<div>`` with its style.

    Returns:
        HTML that refers to no other file.
    """
    parts = ["".join(f"<p>{escape(line)}</p>" for line in summary.report.lines())]
    parts.append(f"<p>{summary.right:.1%} of the predictions are the target.</p>")
    for name, rows in summary.classes.items():
        for_it, against = summary.spoken(name, count)
        tables = _words(f"for {name}", for_it) + _words(f"against {name}", against)
        parts.append(f'<h2>{escape(name)}, {rows} rows</h2><div class="pair">{tables}</div>')
    positions = [
        [f"{k / len(summary.positions):.0%} to {(k + 1) / len(summary.positions):.0%}", *map(_number, numbers)]
        for k, pair in enumerate(summary.positions)
        for numbers in [(pair[0].mean, pair[0].error, pair[1].mean)]
    ]
    head = ["part of the text", "mean score", "± standard error", "without sign"]
    parts.append("<h2>Where words stand</h2>" + _table("mean score of a word by its place", head, positions))
    if summary.layers:
        shares = [[name, f"{share:+.1%}"] for name, share in summary.layers.items()]
        parts.append(
            "<h2>Layers</h2>" + _table("share of the score that passes each layer", ["layer", "share"], shares)
        )
    shown = summary.surprises[:count]
    if shown:
        parts.append("<h2>Most surprising</h2>" + "".join(_surprise(summary, surprise) for surprise in shown))
    heading = "h1" if page else "p"
    title = f"Explanations of {summary.report.rows} rows"
    body = f'<{heading} class="title">{title}</{heading}>{"".join(parts)}'
    fragment = f'<div class="captum-ssm-summary">\n<style>{_STYLE}</style>\n{body}\n</div>\n'
    if not page:
        return fragment
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
</head>
<body style="max-width: 60rem; margin: 2rem auto">
{fragment}</body>
</html>
"""


def _words(caption: str, lines: Sequence[Line]) -> str:
    """Return a table of words."""
    rows = [[line.word, str(line.times), _number(line.mean), _number(line.error)] for line in lines]
    return _table(caption, ["word", "times", "mean score", "± standard error"], rows)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><caption>{escape(caption)}</caption><tr>{top}</tr>{body}</table></div>'


def _surprise(summary: Findings, surprise: Surprise) -> str:
    """Return a row as coloured text."""
    columns, text = surprise.columns, summary.text(surprise)
    title = f"row {surprise.row}: F(x) = {surprise.value:+.3f}"
    facts = {
        name: str(columns[f"{name}_name"]) for name in ("target", "contrast", "prediction") if columns[f"{name}_name"]
    }
    offsets = list(zip(columns.get("starts") or [], columns.get("ends") or []))
    if offsets and min(start for start, _ in offsets) >= 0 and offsets[-1][1] <= len(text):
        passage = Passage.from_offsets(text, offsets, tensor(columns["scores"]), title, facts)
    else:
        tokens = columns.get("tokens") or []
        pieces = [piece for pair in zip(tokens, columns["scores"]) for piece in (Piece(*pair), Piece(" "))]
        passage = Passage(tuple(pieces), title, facts)
    return text_html(passage, page=False)


def _number(value: float) -> str:
    return "" if value != value else f"{value:+.3f}"
