"""Plots as SVG: a few lines each, which follow the colours of the page that they stand in.

Shape suffixes: E bins, K kinds.
"""

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 200
LEFT, RIGHT, BOTTOM = 8, 8, 24
LINE = 12
"""Height of a line of text; each mark has one of its own above the bars, so that no names overlap."""


def bars(
    parts_EK: Sequence[Sequence[float]],
    colours: Sequence[str],
    start: float,
    width: float,
    marks: Sequence[tuple[float, str]] = (),
    labels: Sequence[tuple[float, str]] | None = None,
) -> str:
    """A histogram of stacked bars, with marked values.

    Args:
        parts_EK: For each bin the height of each kind, from the bottom.
        colours: CSS colour of each kind.
        start: Where the first bin begins.
        width: Width of a bin.
        marks: Values with a line and its name.
        labels: Values to name below the axis, where it has them; None: the first, the middle and the last edge of a bin.
    """
    edges = [start, start + width * len(parts_EK)]
    low = min([edges[0], *(value for value, _ in marks)])
    high = max([edges[1], *(value for value, _ in marks)])
    tallest = max(sum(parts) for parts in parts_EK)
    top = LINE * len(marks) + 6
    scale_x, scale_y = (WIDTH - LEFT - RIGHT) / (high - low), (HEIGHT - top - BOTTOM) / tallest
    shapes = []
    for number, parts in enumerate(parts_EK):
        x, bottom = LEFT + (start + number * width - low) * scale_x, float(HEIGHT - BOTTOM)
        for part, colour in zip(parts, colours, strict=True):
            if part > 0:
                height = part * scale_y
                bar_width = max(width * scale_x - 1, 1)
                shapes.append(_rect(x, bottom - height, bar_width, height, colour))
                bottom -= height
    shapes.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}.5H{WIDTH - RIGHT}" stroke="var(--line)"/>')
    if labels is None:
        labels = [(value, f"{value:,.0f}") for value in (low, (low + high) / 2, high)]
    for value, text in labels:
        if not low <= value <= high:
            continue
        x = LEFT + (value - low) * scale_x
        shapes.append(_text(x, HEIGHT - 8, text, _anchor(x)))
    for number, (value, text) in enumerate(marks):
        x, y = LEFT + (value - low) * scale_x, LINE * (number + 1) - 2
        shapes.append(f'<path d="M{x:.1f} {y + 4}V{HEIGHT - BOTTOM}" stroke="var(--text)" stroke-dasharray="3 3" opacity=".6"/>')
        shapes.append(_text(x, y, text, _anchor(x)))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


def waveform(lows: Sequence[float], highs: Sequence[float]) -> str:
    """A sound by its lowest and highest amplitude in each of a few spans, full scale from -1 to 1."""
    width, height = len(lows), 40
    steps = [
        f"M{x}.5 {height * (1 - high) / 2:.1f}V{height * (1 - low) / 2 + 0.5:.1f}"
        for x, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]
    return (
        f'<svg class="sound" viewBox="0 0 {width} {height}" role="img"><path d="M0 {height / 2}H{width}" stroke="var(--line)"/>'
        f'<path d="{"".join(steps)}" stroke="var(--audio-tokens)" fill="none"/></svg>'
    )


def share_bar(share: float, colour: str) -> str:
    """A bar that is filled by a share, to stand beside a figure."""
    return f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none">{_rect(0, 0, 100 * share, 8, colour)}</svg>'


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _anchor(x: float) -> str:
    """How a text at a place is aligned, so that it stays inside the plot."""
    return "start" if x < 40 else "end" if x > WIDTH - 40 else "middle"
