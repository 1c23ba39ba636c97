"""Small charts as inline SVG: no script, no font, no file; colours are the page's own, so dark mode and print hold.

Every function gives the text of one `<svg>` element. Labels are escaped here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

LEFT, RIGHT, TOP, BOTTOM = 50, 16, 8, 34  # of the frame, in the chart's own units


@dataclass(frozen=True)
class Line:
    """One curve: points left to right, where it is on the scale of colours (0 to 1), what it is, a point to mark."""

    points: Sequence[tuple[float, float]]
    tone: float
    label: str
    mark: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dot:
    """One model in a plot of loss against cost; `best` when none is better in both."""

    x: float
    y: float
    label: str
    best: bool


def lines(curves: Sequence[Line], *, x_label: str, y_label: str, low: float = 1e-4) -> str:
    """Curves over [0, 1] with a logarithmic y from `low` to 1; what falls below `low` is cut off there."""
    width, height = 300, 210
    x = _scale(0, 1, LEFT, width - RIGHT)
    y = _scale(log10(low), 0, height - BOTTOM, TOP)

    def place(point: tuple[float, float]) -> str:
        return f"{x(point[0]):.1f},{y(log10(max(point[1], low))):.1f}"

    parts = [_tick_x(x(v), f"{v:.0%}", height) for v in (0, 0.25, 0.5, 0.75, 1)]
    parts += [_tick_y(y(e), f"{10.0**e:g}", width) for e in range(round(log10(low)), 1)]
    for line in curves:
        style = f"--tone:{line.tone:.2f}"
        points = " ".join(place(p) for p in _until_below(line.points, low))
        parts.append(
            f'<polyline class="curve" style="{style}" points="{points}"><title>{escape(line.label)}</title></polyline>'
        )
    for line in curves:  # marks above all curves
        if line.mark is not None:
            cx, cy = place(line.mark).split(",")
            title = f"<title>{escape(line.label)}</title>"
            parts.append(
                f'<circle class="mark" style="--tone:{line.tone:.2f}" cx="{cx}" cy="{cy}" r="2.6">{title}</circle>'
            )
    return _svg(width, height, parts, x_label, y_label, f"{len(curves)} curves: {y_label} against {x_label}")


def scatter(dots: Sequence[Dot], *, x_label: str, y_label: str) -> str:
    """Labelled points, and a step line along those that nothing beats in both directions (low is good)."""
    width, height = 560, 320
    x_low, x_high = _room([dot.x for dot in dots])
    y_low, y_high = _room([dot.y for dot in dots])
    x, y = _scale(x_low, x_high, LEFT, width - RIGHT), _scale(y_low, y_high, height - BOTTOM, TOP)
    parts = [_tick_x(x(v), f"{v:g}", height) for v in ticks(x_low, x_high)]
    parts += [_tick_y(y(v), f"{v:g}", width) for v in ticks(y_low, y_high)]
    front = sorted((dot for dot in dots if dot.best), key=lambda dot: dot.x)
    corners = [(x(dot.x), y(dot.y)) for dot in front]
    path = "".join(f"H{cx:.1f}V{cy:.1f}" for cx, cy in corners[1:])
    if corners:
        parts.append(f'<path class="front" d="M{corners[0][0]:.1f},{corners[0][1]:.1f}{path}"/>')
    for dot in dots:
        cx, cy = x(dot.x), y(dot.y)
        anchor, shift = ("end", -8) if cx > width * 0.7 else ("start", 8)
        kind = "best" if dot.best else "beaten"
        parts.append(f'<circle class="dot {kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="4.5"/>')
        at = f'x="{cx + shift:.1f}" y="{cy - 7:.1f}"'
        parts.append(f'<text class="name" {at} text-anchor="{anchor}">{escape(dot.label)}</text>')
    return _svg(width, height, parts, x_label, y_label, f"{len(dots)} models: {y_label} against {x_label}")


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers in `[low, high]`."""
    raw = (high - low) / 5
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = ceil(low / step)
    return [round(n * step, 12) for n in range(first, floor(high / step) + 1)]


def _room(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with a tenth of room at both ends, never empty."""
    low, high = min(values), max(values)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _until_below(points: Sequence[tuple[float, float]], low: float) -> list[tuple[float, float]]:
    """The points up to the first that falls below the frame, which would else draw a line along its floor."""
    below = next((i for i, (_, value) in enumerate(points) if value < low), len(points))
    return list(points[: below + 1])


def _tick_x(at: float, text: str, height: int) -> str:
    bottom = height - BOTTOM
    return (
        f'<path class="grid" d="M{at:.1f},{TOP}V{bottom}"/>'
        f'<text x="{at:.1f}" y="{bottom + 13}" text-anchor="middle">{text}</text>'
    )


def _tick_y(at: float, text: str, width: int) -> str:
    return (
        f'<path class="grid" d="M{LEFT},{at:.1f}H{width - RIGHT}"/>'
        f'<text x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>'
    )


def _svg(width: int, height: int, parts: Sequence[str], x_label: str, y_label: str, about: str) -> str:
    middle, centre = (LEFT + width - RIGHT) / 2, (TOP + height - BOTTOM) / 2
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(about, quote=True)}">'
        f"{''.join(parts)}"
        f'<text class="axis" x="{middle:.1f}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis" transform="translate(10 {centre:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
        "</svg>"
    )
