"""The timeline picture of an experiment, as SVG: calls by outcome, latencies, attempts, breakers, and what was done."""

from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from testkit.quantiles import quantile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chaos.gameday import Played
    from chaos.measures import Findings
    from testkit.load import Call

BUCKET = 0.5
"""Seconds per column."""
WIDTH, LEFT, RIGHT = 720.0, 66.0, 12.0
HEIGHT, LEGEND, GAP, ROW, STRIP = 84.0, 18.0, 12.0, 14.0, 18.0
"""Of a panel, of the line above it, between panels, of a line of labels, of a breaker. All in the picture's units."""
FONT = 12.0
"""Height of all text; the page keeps the picture wide enough for 9 px on a phone."""
SEAM = 0.4
"""By which the parts of a strip overlap, so that nothing shines through."""
LETTER = 6.6
"""Width of a letter, rather too large than too small: labels must not touch."""
COLOURS = {"good": "#2e8b57", "backend's error": "#d9822b", "gateway's error": "#c23b3b", "left": "#7a8793"}
STATES = {"closed": "#2e8b57", "half_open": "#e0b73a", "open": "#c23b3b"}
LATENCIES = {0.99: ("99th percentile", "#7b4fa3"), 0.5: ("median", "#3572b0")}
ATTEMPTS, REQUESTS = "#c0562f", "#3572b0"
TICKS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
MOST_TICKS = 12


@dataclass(frozen=True)
class Axis:
    """Seconds since time zero, from left to right."""

    first: float
    last: float

    def x(self, at: float) -> float:
        """Return where an instant is."""
        at = min(max(at, self.first), self.last)
        return LEFT + (at - self.first) * (WIDTH - LEFT - RIGHT) / (self.last - self.first)


def picture(played: "Played") -> str:
    """Return the SVG element."""
    findings = played.findings
    axis = _axis(findings, played.experiment.steady_state.seconds)
    columns = _columns(findings, axis)
    panels = (
        ("calls per second", COLOURS, _bars(columns, axis)),
        ("seconds a caller waited", dict(LATENCIES.values()), _lines(columns, axis)),
        (
            "at the gateway, per second",
            {"requests": REQUESTS, "attempts at the backend": ATTEMPTS},
            _rates(findings, axis),
        ),
        ("breakers", STATES, _breakers(findings, axis)),
    )
    labels, room = _labels(findings.marks, axis)
    parts, bottom = [], 0.0
    for number, (title, colours, (content, height)) in enumerate(panels):
        top = bottom + LEGEND + (room if number == 0 else 0)
        parts.append(_at(bottom, _legend(title, colours)) + _at(top, content + _instants(findings.marks, axis, height)))
        if number == 0:
            parts.append(_at(bottom + LEGEND, labels))
        bottom = top + height + GAP
    bottom -= GAP
    parts.append(_ticks(axis, bottom))
    label = escape(f"{played.experiment.title}: calls, latency, attempts and breakers over {axis.last:.0f} seconds")
    return (
        f"<svg viewBox='0 0 {WIDTH:.0f} {bottom + 20:.0f}' role='img' aria-label='{label}' font-size='{FONT:g}' "
        f"xmlns='http://www.w3.org/2000/svg'>{''.join(parts)}</svg>"
    )


def _axis(findings: "Findings", seconds: float) -> Axis:
    sent = min((call.started - findings.began for call in findings.calls), default=0.0)
    ends = [call.ended - findings.began for call in findings.calls] + [at for at, _ in findings.marks]
    whole = [at for at in ends if at > seconds]
    return Axis(min(0.0, sent), max([seconds, *whole]))


def _columns(findings: "Findings", axis: Axis) -> "dict[int, list[Call]]":
    """Sort calls into columns (counted from time zero) by when they ended."""
    columns: dict[int, list[Call]] = {
        column: [] for column in range(int(axis.first // BUCKET), int(axis.last // BUCKET) + 1)
    }
    for call in findings.calls:
        columns.setdefault(int((call.ended - findings.began) // BUCKET), []).append(call)
    return dict(sorted(columns.items()))


def _labels(marks: list[tuple[float, str]], axis: Axis) -> tuple[str, float]:
    """Write what was done, in as many rows as it takes for labels not to touch; return them and the room they need."""
    rows: list[float] = []
    places = []
    for at, text in sorted(marks):
        x, width = axis.x(at), len(text) * LETTER
        start = max(0.0, min(x + 3, WIDTH - width))
        row = next((number for number, end in enumerate(rows) if start >= end), len(rows))
        rows[row : row + 1] = [start + width + LETTER]
        places.append((start, row, text))
    return "".join(_text(start, ROW * row + 11, text) for start, row, text in places), ROW * len(rows) + 2


def _instants(marks: list[tuple[float, str]], axis: Axis, height: float) -> str:
    """Draw a line across a panel for each instant at which something was done."""
    xs = [axis.x(at) for at, _ in marks]
    return "".join(
        f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height:.0f}' stroke='#223' stroke-dasharray='3 3'/>" for x in xs
    )


def _bars(columns: "dict[int, list[Call]]", axis: Axis) -> tuple[str, float]:
    """Draw calls per second, by outcome."""
    highest = max(1, *map(len, columns.values()))
    parts = [_scale(highest / BUCKET)]
    for column, calls in columns.items():
        left, right = axis.x(column * BUCKET), axis.x((column + 1) * BUCKET)
        y = HEIGHT
        for name, colour in COLOURS.items():
            height = sum(_word(call) == name for call in calls) / highest * HEIGHT
            if height:
                y -= height
                parts.append(_box(left, y, (right - left) * 0.92, height, colour))
    return "".join(parts), HEIGHT


def _lines(columns: "dict[int, list[Call]]", axis: Axis) -> tuple[str, float]:
    """Draw percentiles of the time for which callers waited."""
    latencies = {column: [call.seconds for call in calls] for column, calls in columns.items() if calls}
    highest = max([0.01, *map(max, latencies.values())])
    parts = [_scale(highest)]
    for share, (_, colour) in LATENCIES.items():
        points = ((column * BUCKET + BUCKET / 2, quantile(values, share)) for column, values in latencies.items())
        parts.append(_curve(points, highest, axis, colour))
    return "".join(parts), HEIGHT


def _rates(findings: "Findings", axis: Axis) -> tuple[str, float]:
    """Draw attempts and requests per second, from the gateway's counters."""
    rates = [
        (after.at, (after.attempts - before.attempts) / span, (after.requests - before.requests) / span)
        for before, after in pairwise(findings.samples[::2])
        if (span := after.at - before.at) > 0 and after.attempts >= before.attempts
    ]
    highest = max([1.0, *(max(attempts, requests) for _, attempts, requests in rates)])
    requests = _curve(((at, value) for at, _, value in rates), highest, axis, REQUESTS)
    attempts = _curve(((at, value) for at, value, _ in rates), highest, axis, ATTEMPTS)
    return _scale(highest) + requests + attempts, HEIGHT


def _breakers(findings: "Findings", axis: Axis) -> tuple[str, float]:
    """Draw a strip per replica, coloured by the state of its breaker."""
    names = sorted({name for sample in findings.samples for name in sample.breakers})
    parts = []
    for row, name in enumerate(names):
        y = row * STRIP
        parts.append(_text(2, y + 11, name[-9:]))
        for before, after in pairwise(findings.samples):
            width = axis.x(after.at) - axis.x(before.at)
            if width > 0:
                colour = STATES.get(before.breakers.get(name, ""), "#ccd")
                parts.append(_box(axis.x(before.at), y, width + SEAM, STRIP - 4, colour))
    return "".join(parts), STRIP * max(1, len(names))


def _ticks(axis: Axis, bottom: float) -> str:
    step = next((step for step in TICKS if axis.last / step <= MOST_TICKS), TICKS[-1])
    return "".join(
        _text(axis.x(second), bottom + FONT, f"{second} s", anchor="middle")
        for second in range(0, int(axis.last) + 1, step)
    )


def _at(y: float, content: str) -> str:
    return f"<g transform='translate(0 {y:.0f})'>{content}</g>"


def _scale(highest: float) -> str:
    """Draw the ends of a panel's scale, and its base."""
    return (
        _text(LEFT - 6, FONT - 2, f"{highest:.3g}", anchor="end")
        + _text(LEFT - 6, HEIGHT, "0", anchor="end")
        + f"<line x1='{LEFT:.0f}' x2='{WIDTH:.0f}' y1='{HEIGHT:.0f}' y2='{HEIGHT:.0f}' stroke='#9ab'/>"
    )


def _legend(title: str, colours: dict[str, str]) -> str:
    parts, x = [_text(LEFT, FONT, title, weight=600)], LEFT + (len(title) + 3) * LETTER
    for name, colour in colours.items():
        parts.append(_box(x, FONT - 9, 9, 9, colour) + _text(x + 13, FONT, name.replace("_", " ")))
        x += 13 + (len(name) + 2) * LETTER
    return "".join(parts)


def _curve(points: "Iterable[tuple[float, float]]", highest: float, axis: Axis, colour: str) -> str:
    path = " ".join(
        f"{axis.x(at):.1f},{HEIGHT * (1 - value / highest):.1f}" for at, value in points if at >= axis.first
    )
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6'/>"


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.2f}' height='{height:.2f}' fill='{colour}'/>"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: int = 400) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-weight='{weight}' fill='#445'>{escape(text)}</text>"
    )


def _word(call: "Call") -> str:
    if call.outcome == "ok":
        return "good"
    if call.outcome == "left":
        return "left"
    return "backend's error" if call.outcome == "backend_error" else "gateway's error"
