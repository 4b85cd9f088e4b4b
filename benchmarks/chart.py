"""The picture of the results: small panels of bars, as an SVG for light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, GAP, MARGIN = 860, 32, 20
PANEL = (WIDTH - 2 * MARGIN - GAP) / 2
TITLE, BAR, ROW = 46, 14, 24
LABEL = 150  # the room for a bar's name
VALUE = 62  # the room for its number
OURS = "kling_voice"

STYLE = """
text { font: 12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 13px }
.hint { fill: #59636e; font-size: 11px }
.page { fill: #ffffff; stroke: #d1d9e0 }
.bar { fill: #afb8c1 }
.ours { fill: #1f6feb }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .hint { fill: #9198a1 }
  .page { fill: #0d1117; stroke: #3d444d }
  .bar { fill: #59636e }
  .ours { fill: #4493f8 }
}
"""

Bar = tuple[str, float]


def draw(figures: Sequence[Mapping[str, Any]]) -> str:
    """Draw the figures that name a panel; as many panels as there are."""
    panels: dict[str, list[Bar]] = {}
    for figure in figures:
        if figure["panel"] is not None:
            panels.setdefault(figure["panel"], []).append((figure["bar"], figure["median"]))
    rows = [list(panels.items())[place : place + 2] for place in range(0, len(panels), 2)]
    shapes: list[str] = []
    top = float(MARGIN)
    for row in rows:
        for column, (title, bars) in enumerate(row):
            shapes += _panel(MARGIN + column * (PANEL + GAP), top, title, bars)
        top += TITLE + ROW * max(len(bars) for _, bars in row) + MARGIN / 2
    height = top + MARGIN / 2
    page = f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}"'
            f' viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="Benchmark results">',
            f"<style>{STYLE}</style>",
            page,
            *shapes,
            "</svg>\n",
        ]
    )


def _panel(left: float, top: float, title: str, bars: Sequence[Bar]) -> list[str]:
    name, _, hint = title.partition("; ")
    shapes = [
        f'<text class="title" x="{left:g}" y="{top + 14:g}">{escape(name)}</text>',
        f'<text class="hint" x="{left:g}" y="{top + 31:g}">{escape(hint)}</text>',
    ]
    longest = max(value for _, value in bars)
    room = PANEL - LABEL - VALUE
    for place, (label, value) in enumerate(bars):
        y = top + TITLE + place * ROW
        kind = "ours" if label.startswith(OURS) else "bar"
        width = max(1.0, room * value / longest)
        line = f'y="{y + 11:g}"'
        shapes += [
            f'<text x="{left + LABEL - 8:g}" {line} text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{left + LABEL:g}" y="{y:g}" width="{width:.1f}"'
            f' height="{BAR}" rx="2"/>',
            f'<text x="{left + LABEL + width + 6:.1f}" {line}>{_number(value)}</text>',
        ]
    return shapes


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
