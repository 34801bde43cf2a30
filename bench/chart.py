"""The chart of docs/performance.md, drawn from a result: `python -m bench.chart RESULT.json [CHART.svg]`."""

import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import msgspec

from bench.load import Sample
from bench.report import Figures
from bench.systems import OURS

CHART = Path(__file__).with_name("chart.svg")
WIDTH, LABEL, BAR, LINE = 760, 150, 470, 24
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600 }
.note { font-size: 11px; fill: #59636e }
rect { fill: #8c959f } .ours { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .note { fill: #9198a1 } rect { fill: #656c76 } .ours { fill: #4493f8 } }
"""


class Panel(NamedTuple):
    """One group of bars."""

    title: str
    measure: str
    setting: str
    name: str
    form: str


PANELS = (
    Panel(
        "Requests per second on one core, 32 connections (more is better)",
        "throughput",
        "32 connections",
        "rps",
        "{:,.0f}",
    ),
    Panel("Added time per request, median, ms (less is better)", "overhead", "1 connection", "added_p50", "{:.2f}"),
    Panel(
        "Added time to first token, median, ms (less is better)", "first token", "1 connection", "added_p50", "{:.2f}"
    ),
    Panel(
        "CPU per streamed event, 100 streams, us (less is better)", "slow streams", "100 streams", "cpu_us", "{:.1f}"
    ),
)


class Result(msgspec.Struct, kw_only=True):
    """A saved result.

    Attributes:
        when: ISO date and time, UTC.
        machine: what it ran on, by name.
        samples: all runs.
        problems: what failed.
        missing: peers that were not installed.
    """

    when: str
    machine: dict[str, str]
    samples: list[Sample]
    problems: list[str] = []
    missing: list[str] = []


def draw(result: Result) -> str:
    """Return the chart as SVG."""
    figures = Figures(result.samples)
    parts: list[str] = []
    y = 8
    for panel in PANELS:
        found = {
            system: value
            for system in figures.systems(panel.measure)
            if (value := figures.median(panel.measure, panel.setting, system, panel.name)) is not None
        }
        if not found:
            continue
        y += 20
        parts.append(f'<text class="title" x="8" y="{y}">{escape(panel.title)}</text>')
        longest = max(*found.values(), 1e-9)
        for system, value in sorted(found.items(), key=lambda item: item[1], reverse=panel.name == "rps"):
            y += LINE
            width = max(1.0, BAR * value / longest)
            kind = ' class="ours"' if system in OURS else ""
            parts.append(f'<text x="{LABEL}" y="{y}" text-anchor="end">{escape(system)}</text>')
            parts.append(f'<rect{kind} x="{LABEL + 8}" y="{y - 12}" width="{width:.1f}" height="15" rx="2"/>')
            parts.append(f'<text x="{LABEL + 14 + width:.1f}" y="{y}">{panel.form.format(value)}</text>')
        y += 16
    machine = result.machine
    note = f"{result.when[:10]}, {machine.get('cpu', '')}, {machine.get('python', '')}; medians; make bench"
    parts.append(f'<text class="note" x="8" y="{y + 10}">{escape(note)}</text>')
    height = y + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="What the gateway costs beside other proxies">\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    """Draw the chart of a saved result."""
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else CHART
    target.write_text(draw(msgspec.json.decode(source.read_bytes(), type=Result)))
    print(target)


if __name__ == "__main__":
    main()
