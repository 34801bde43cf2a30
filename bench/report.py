"""From samples to medians, ratios, tables and goals."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.load import Sample
from bench.systems import BARE, GATEWAY, LITELLM, SAMPLED

FLAT = 1.10
"""Up to this ratio a cost counts as flat: differences below 8 % are noise here."""
LINEAR = 1.5
"""Up to this ratio of two slopes a cost counts as linear: caches alone make 1.3, a quadratic cost would be 4.3."""
GROWTH_MB = 2.0
MISSING = "-"


class Figures:
    """All samples, by measure, setting and system."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def settings(self, measure: str) -> list[str]:
        """Return the settings of a measure, in the order in which they were run."""
        return list(dict.fromkeys(sample.setting for sample in self._samples if sample.measure == measure))

    def systems(self, measure: str) -> list[str]:
        """Return the systems of a measure."""
        return list(dict.fromkeys(sample.system for sample in self._samples if sample.measure == measure))

    def values(self, measure: str, setting: str, system: str, name: str) -> dict[int, float]:
        """Return a figure in each round."""
        return {
            sample.round: sample.values[name]
            for sample in self._samples
            if (sample.measure, sample.setting, sample.system) == (measure, setting, system) and name in sample.values
        }

    def median(self, measure: str, setting: str, system: str, name: str) -> float | None:
        """Return a figure's median; None without one."""
        values = self.values(measure, setting, system, name)
        return statistics.median(values.values()) if values else None

    def ratios(self, measure: str, setting: str, name: str, system: str, other: str) -> list[float]:
        """Return a figure relative to another system's, in each round that has both."""
        mine = self.values(measure, setting, system, name)
        theirs = self.values(measure, setting, other, name)
        return [mine[number] / theirs[number] for number in mine if theirs.get(number)]

    def between(self, measure: str, setting: str, base: str, system: str) -> float | None:
        """Return the CPU time per request of one setting relative to another's: the median of the rounds."""
        mine = self.values(measure, setting, system, "cpu_us")
        theirs = self.values(measure, base, system, "cpu_us")
        ratios = [mine[number] / theirs[number] for number in mine if theirs.get(number)]
        return statistics.median(ratios) if ratios else None


class Goal(NamedTuple):
    """One line of the goals.

    Attributes:
        name: what.
        wanted: in words.
        measured: in words.
        met: None when it was not measured.
    """

    name: str
    wanted: str
    measured: str
    met: bool | None


def at_least(limit: float) -> "Callable[[float], bool]":
    """Return a check that a value reaches a limit."""
    return lambda value: value >= limit


def at_most(limit: float) -> "Callable[[float], bool]":
    """Return a check that a value stays within a limit."""
    return lambda value: value <= limit


def goals(figures: Figures) -> list[Goal]:
    """Return the goals, and what was measured."""

    def ratio(name: str, wanted: str, good: "Callable[[float], bool]", ratios: list[float]) -> Goal:
        if not ratios:
            return Goal(name, wanted, MISSING, None)
        middle = statistics.median(ratios)
        return Goal(name, wanted, f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", good(middle))

    def number(
        name: str, wanted: str, value: float | None, good: "Callable[[float], bool]", form: str = "{:.2f}"
    ) -> Goal:
        return (
            Goal(name, wanted, MISSING, None) if value is None else Goal(name, wanted, form.format(value), good(value))
        )

    def beside(measure: str, setting: str, key: str, system: str = GATEWAY, other: str = BARE) -> list[float]:
        return figures.ratios(measure, setting, key, system, other)

    rps = ("throughput", "32 connections", "rps")
    found = [
        ratio("rps / bare aiohttp, all traced", ">= 0.60", at_least(0.60), beside(*rps)),
        ratio("rps / bare aiohttp, 10 % sampled", ">= 0.85", at_least(0.85), beside(*rps, SAMPLED)),
        ratio("rps / LiteLLM, all traced", ">= 30", at_least(30), beside(*rps, GATEWAY, LITELLM)),
        ratio("p99 at 1 connection / bare's", "<= 3", at_most(3), beside("throughput", "1 connection", "p99")),
        ratio(
            "added time to first token / bare's",
            "<= 1.3",
            at_most(1.3),
            beside("first token", "1 connection", "added_p50"),
        ),
    ]
    found += [
        ratio(f"CPU per event / bare's, {streams}", "<= 1.3", at_most(1.3), beside("slow streams", streams, "cpu_us"))
        for streams in figures.settings("slow streams")
    ]
    rss = figures.median("throughput", "256 connections", GATEWAY, "rss_mb")
    found.append(number("RSS at 256 connections, MB", "<= 90", rss, at_most(90), "{:.0f}"))
    settings = figures.settings("memory")
    sizes = [figures.median("memory", setting, GATEWAY, "rss_mb") for setting in settings]
    growth = sizes[-1] - sizes[0] if len(sizes) > 1 and sizes[0] is not None and sizes[-1] is not None else None
    found.append(
        number(
            f"RSS growth from {' to '.join(settings) or 'start to end'}, MB",
            f"+- {GROWTH_MB:g}",
            growth,
            lambda value: abs(value) <= GROWTH_MB,
            "{:+.1f}",
        )
    )
    for measure in ("idle connections", "backends"):
        settings = figures.settings(measure)
        factor = figures.between(measure, settings[-1], settings[0], GATEWAY) if len(settings) > 1 else None
        found.append(
            number(f"CPU per request, {measure} {' to '.join(settings)}", f"flat: <= {FLAT}", factor, at_most(FLAT))
        )
    for measure in ("prompt bytes", "answer bytes"):
        found.append(
            number(
                f"CPU per byte, {measure}, 300 KB to 1 MB / up to 300 KB",
                f"linear: <= {LINEAR}",
                _slopes(figures, measure),
                at_most(LINEAR),
            )
        )
    return found


def _slopes(figures: Figures, measure: str) -> float | None:
    """Return the CPU time per byte from 300 KB to 1 MB, relative to the one from 1 KB to 300 KB."""
    costs = [figures.median(measure, f"{size:,}", GATEWAY, "cpu_us") for size in (1_000, 300_000, 1_000_000)]
    small, middle, large = costs
    if small is None or middle is None or large is None or middle <= small:
        return None
    return ((large - middle) / 700_000) / ((middle - small) / 299_000)


COLUMNS = {
    "rps": "requests/s",
    "streams_s": "streams/s",
    "p50": "p50 ms",
    "p99": "p99 ms",
    "added_p50": "added p50 ms",
    "added_p99": "added p99 ms",
    "cpu_us": "CPU us",
    "lag_p50": "lag p50 ms",
    "lag_p99": "lag p99 ms",
    "reads": "reads/event",
    "rss_mb": "RSS MB",
    "spans": "spans/request",
    "requests": "requests",
    "rest": "CPU % at rest",
}
RATIO_OF = ("rps", "streams_s", "cpu_us", "added_p50")
"""The first of these that a measure has is compared with bare aiohttp's."""


def tables(figures: Figures, measures: Sequence[str]) -> str:
    """Return a table per measure: medians, the spread of the first figure, its ratio to bare aiohttp."""
    return "\n".join(_table(figures, measure) for measure in measures if figures.settings(measure))


def _table(figures: Figures, measure: str) -> str:
    settings, systems = figures.settings(measure), figures.systems(measure)
    names = [
        name
        for name in COLUMNS
        if any(figures.values(measure, setting, system, name) for setting in settings for system in systems)
    ]
    main = next((name for name in RATIO_OF if name in names), names[0])
    rows = [["", measure, *(COLUMNS[name] for name in names), f"{COLUMNS[main]}: min to max", "/ bare aiohttp"]]
    for setting in settings:
        for system in systems:
            values = figures.values(measure, setting, system, main) or {}
            if not any(figures.values(measure, setting, system, name) for name in names):
                continue
            ratios = figures.ratios(measure, setting, main, system, BARE)
            spread = f"{_short(min(values.values()))} to {_short(max(values.values()))}" if values else MISSING
            rows.append(
                [
                    setting,
                    system,
                    *(_short(figures.median(measure, setting, system, name)) for name in names),
                    spread,
                    f"{statistics.median(ratios):.2f}" if ratios else MISSING,
                ]
            )
    return grid(rows)


def grid(rows: list[list[str]]) -> str:
    """Align columns, the first two to the left, figures to the right; the result is a Markdown table, too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rules = [
                ":" + "-" * (width - 1) if column < 2 else "-" * (width - 1) + ":"
                for column, width in enumerate(widths)
            ]
            lines.append(f"| {' | '.join(rules)} |")
    return "\n".join(lines) + "\n"


def goals_table(found: list[Goal]) -> str:
    """Return the goals as a table."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [["goal", "wanted", "measured", ""]]
    return grid(rows + [[goal.name, goal.wanted, goal.measured, words[goal.met]] for goal in found])


def _short(value: float | None) -> str:
    if value is None:
        return MISSING
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
