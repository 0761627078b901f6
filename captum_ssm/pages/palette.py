"""The colours of scores: blue speaks for what is explained, red against it, on a light or a dark ground."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, to_hex

_ON_LIGHT = colormaps["RdBu"]
_ON_DARK = LinearSegmentedColormap.from_list("RdBu on dark", ["#f0705c", "#7d2a23", "#242424", "#1f4a7d", "#5ea8f2"])
LEVELS = 20
"""Colours of either sign in a page, besides that of 0."""


def on_light(share: float) -> tuple[str, str]:
    """Return the background and the text colour (hexadecimal) of a score on a light ground.

    Args:
        share: The score divided by the largest absolute one, from -1 to 1.
    """
    return _colors(_ON_LIGHT(0.5 + 0.45 * share))


def on_dark(share: float) -> tuple[str, str]:
    """Return the background and the text colour (hexadecimal) of a score on a dark ground.

    Args:
        share: The score divided by the largest absolute one, from -1 to 1.
    """
    return _colors(_ON_DARK(0.5 + 0.5 * share))


def _colors(color: tuple[float, float, float, float]) -> tuple[str, str]:
    """Return a background (red, green, blue, opacity) with the text colour that it lets be read."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    dark = 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05  # white has the larger contrast (WCAG 2)
    return to_hex(color[:3]), "#ffffff" if dark else "#000000"


def level(share: float) -> str:
    """Return the class that a page gives to a score: ``"l-20"`` to ``"l20"``.

    Args:
        share: The score divided by the largest absolute one, from -1 to 1.
    """
    return f"l{round(LEVELS * share)}"


def rules(scope: str) -> str:
    """Return the style of all levels, each for a light and a dark ground.

    Args:
        scope: The selector of the element that they apply within.
    """
    lines = []
    for number in range(-LEVELS, LEVELS + 1):
        (light, light_text), (dark, dark_text) = on_light(number / LEVELS), on_dark(number / LEVELS)
        lines.append(
            f"{scope} .{level(number / LEVELS)} {{ background: {light}; color: {light_text}; "
            f"background: light-dark({light}, {dark}); color: light-dark({light_text}, {dark_text}); }}"
        )
    return "\n".join(lines)
