"""One page about a game day: verdicts and pictures, nothing loaded from anywhere, fit for a phone and for paper."""

import platform
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from chaos.promises import quantile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chaos.gameday import Played
    from chaos.load import Call
    from chaos.measures import Findings

BUCKET = 0.5
"""Seconds per column of a picture."""
WIDTH, LEFT, HEIGHT, GAP = 720.0, 62.0, 90.0, 26.0
COLOURS = {"good": "#2e8b57", "backend's error": "#d9822b", "gateway's error": "#c23b3b", "left": "#7a8793"}
STATES = {"closed": "#2e8b57", "half_open": "#e0b73a", "open": "#c23b3b"}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 780px; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; font-size: .92rem; }
td, th { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #dde3e9; vertical-align: top;
  overflow-wrap: anywhere; }
th, td:last-child { white-space: nowrap; }
.pass { color: #1d6b41; font-weight: 600; } .fail { color: #a82424; font-weight: 600; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #445; }
.key span { display: inline-block; margin-right: 1rem; font-size: .85rem; } .key i { display: inline-block; width: .8em;
  height: .8em; margin-right: .3em; border-radius: 2px; }
p.small { font-size: .85rem; color: #556; }
@media print { body { max-width: none; padding: 0; } section { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def report(results: "list[Played]", *, where: str, when: str) -> str:
    """The page, as HTML."""
    passed = sum(played.passed for played in results)
    rows = "".join(
        f"<tr><td><a href='#{escape(p.experiment.name)}'>{escape(p.experiment.title)}</a></td>"
        f"<td>{_mark(kept=p.passed)}</td></tr>"
        for p in results
    )
    seeds = ", ".join(sorted({str(played.seed) for played in results}))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Game day: {passed} of {len(results)} passed</title><style>{STYLE}</style></head><body>"
        f"<h1>Game day: {passed} of {len(results)} experiments passed</h1>"
        f"<p class='small'>{escape(when)}; {escape(where)}; seed {escape(seeds)}; Python {platform.python_version()}, "
        f"{escape(platform.system())} {escape(platform.machine())}</p>"
        f"<table><tr><th>Experiment</th><th>Verdict</th></tr>{rows}</table>"
        f"{''.join(map(_section, results))}</body></html>\n"
    )


def _section(played: "Played") -> str:
    experiment = played.experiment
    verdicts = "".join(
        f"<tr><td>{escape(v.promise)}</td><td>{escape(v.measured)}</td><td>{_mark(kept=v.kept)}</td></tr>"
        for v in played.verdicts
    )
    problem = f"<p class='fail'>{escape(played.problem)}</p>" if played.problem else ""
    picture = _picture(played) if played.findings.calls else ""
    return (
        f"<section id='{escape(experiment.name)}'><h2>{escape(experiment.title)} {_mark(kept=played.passed)}</h2>"
        f"<p>{escape(experiment.story)}</p>{problem}"
        f"<table><tr><th>Promise</th><th>Measured</th><th></th></tr>{verdicts}</table>{picture}</section>"
    )


def _mark(*, kept: bool) -> str:
    return "<span class='pass'>pass</span>" if kept else "<span class='fail'>FAIL</span>"


def _word(call: "Call") -> str:
    if call.outcome == "ok":
        return "good"
    if call.outcome == "left":
        return "left"
    return "backend's error" if call.outcome == "backend_error" else "gateway's error"


def _picture(played: "Played") -> str:
    """Calls by outcome, latencies, attempts at the backend and breakers over time; the steps as lines across."""
    findings = played.findings
    seconds = max([played.experiment.seconds, *(call.ended - findings.began for call in findings.calls)])
    scale = (WIDTH - LEFT - 20) / seconds
    columns = int(seconds / BUCKET) + 1
    ended: list[list[Call]] = [[] for _ in range(columns)]
    for call in findings.calls:
        ended[min(columns - 1, max(0, int((call.ended - findings.began) / BUCKET)))].append(call)
    parts = [
        _bars(ended, scale, top=14),
        _lines(ended, scale, top=14 + HEIGHT + GAP),
        _attempts(findings, scale, top=14 + 2 * (HEIGHT + GAP)),
    ]
    top = 14 + 3 * (HEIGHT + GAP)
    strips, bottom = _breakers(findings, scale, seconds, top)
    marks = "".join(
        f"<line x1='{LEFT + at * scale:.1f}' x2='{LEFT + at * scale:.1f}' y1='4' y2='{bottom:.0f}' stroke='#223' "
        f"stroke-dasharray='3 3'/>"
        f"<text x='{LEFT + at * scale + 3:.1f}' y='{11 + 11 * (number % 2)}'>{escape(text)}</text>"
        for number, (at, text) in enumerate(findings.marks)
    )
    ticks = "".join(
        f"<text x='{LEFT + second * scale:.1f}' y='{bottom + 12:.0f}'>{second} s</text>"
        for second in range(0, int(seconds) + 1, max(1, int(seconds / 8)))
    )
    key = "".join(f"<span><i style='background:{colour}'></i>{name}</span>" for name, colour in COLOURS.items())
    states = "".join(f"<span><i style='background:{c}'></i>breaker {name}</span>" for name, c in STATES.items())
    label = escape(f"{played.experiment.title}: calls, latency, attempts and breakers over {seconds:.0f} seconds")
    return (
        f"<svg viewBox='0 0 {WIDTH:.0f} {bottom + 18:.0f}' role='img' aria-label='{label}' "
        f"xmlns='http://www.w3.org/2000/svg'>{''.join(parts)}{strips}{marks}{ticks}</svg>"
        f"<p class='key'>{key}{states}</p>"
    )


def _axis(top: float, highest: float, unit: str) -> str:
    return (
        f"<text x='2' y='{top + 10:.0f}'>{highest:.3g}</text><text x='2' y='{top + HEIGHT:.0f}'>0</text>"
        f"<text x='2' y='{top + HEIGHT / 2 + 4:.0f}'>{unit}</text>"
        f"<line x1='{LEFT}' x2='{WIDTH}' y1='{top + HEIGHT}' y2='{top + HEIGHT}' stroke='#9ab'/>"
    )


def _bars(ended: "list[list[Call]]", scale: float, *, top: float) -> str:
    """Calls per second, by outcome."""
    highest = max(1, *map(len, ended))
    parts = [_axis(top, highest / BUCKET, "calls/s")]
    for column, calls in enumerate(ended):
        y = top + HEIGHT
        for name, colour in COLOURS.items():
            number = sum(_word(call) == name for call in calls)
            if number:
                height = number / highest * HEIGHT
                y -= height
                parts.append(
                    f"<rect x='{LEFT + column * BUCKET * scale:.1f}' y='{y:.1f}' width='{BUCKET * scale * 0.92:.1f}' "
                    f"height='{height:.1f}' fill='{colour}'/>"
                )
    return "".join(parts)


def _lines(ended: "list[list[Call]]", scale: float, *, top: float) -> str:
    """Median and 99th percentile of the time callers waited."""
    latencies = [[call.seconds for call in calls] for calls in ended]
    highest = max([0.01, *(max(values) for values in latencies if values)])
    parts = [_axis(top, highest, "s")]
    for row, (share, colour) in enumerate(((0.99, "#7b4fa3"), (0.5, "#3572b0"))):
        points = [
            (LEFT + (column + 0.5) * BUCKET * scale, top + HEIGHT * (1 - quantile(values, share) / highest))
            for column, values in enumerate(latencies)
            if values
        ]
        parts.append(_polyline(points, colour))
        y = top + 10 + 12 * row
        parts.append(f"<text x='{WIDTH - 34}' y='{y}' style='fill:{colour}'>p{share * 100:.0f}</text>")
    return "".join(parts)


def _attempts(findings: "Findings", scale: float, *, top: float) -> str:
    """Attempts and requests per second, from the gateway's counters."""
    samples = findings.samples
    rates = [
        (after.at, (after.attempts - before.attempts) / span, (after.requests - before.requests) / span)
        for before, after in pairwise(samples)
        if (span := after.at - before.at) > 0 and after.attempts >= before.attempts
    ]
    highest = max([1.0, *(max(attempts, requests) for _, attempts, requests in rates)])

    def points(values: "Iterable[tuple[float, float]]") -> list[tuple[float, float]]:
        return [(LEFT + at * scale, top + HEIGHT * (1 - value / highest)) for at, value in values]

    return (
        _axis(top, highest, "per s")
        + _polyline(points((at, requests) for at, _, requests in rates), "#3572b0")
        + _polyline(points((at, attempts) for at, attempts, _ in rates), "#c0562f")
        + f"<text x='{WIDTH - 60}' y='{top + 10}'>attempts</text><text x='{WIDTH - 60}' y='{top + 22}'>requests</text>"
        + f"<rect x='{WIDTH - 72}' y='{top + 2}' width='9' height='9' fill='#c0562f'/>"
        + f"<rect x='{WIDTH - 72}' y='{top + 14}' width='9' height='9' fill='#3572b0'/>"
    )


def _breakers(findings: "Findings", scale: float, seconds: float, top: float) -> tuple[str, float]:
    """A strip per replica, coloured by the state of its breaker; and where they end."""
    names = sorted({name for sample in findings.samples for name in sample.breakers})
    parts = []
    for row, name in enumerate(names):
        y = top + row * 18
        parts.append(f"<text x='2' y='{y + 10:.0f}'>{escape(name[-9:])}</text>")
        for number, sample in enumerate(findings.samples):
            until = findings.samples[number + 1].at if number + 1 < len(findings.samples) else min(seconds, sample.at)
            colour = STATES.get(sample.breakers.get(name, ""), "#ccd")
            parts.append(
                f"<rect x='{LEFT + max(0.0, sample.at) * scale:.1f}' y='{y:.0f}' "
                f"width='{max(0.0, until - max(0.0, sample.at)) * scale:.1f}' height='12' fill='{colour}'/>"
            )
    return "".join(parts), top + max(1, len(names)) * 18


def _polyline(points: list[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6'/>"
