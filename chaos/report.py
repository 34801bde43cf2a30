"""One page about a game day: verdicts and pictures, nothing loaded from anywhere, fit for a phone and for paper."""

import os
import platform
from html import escape
from typing import TYPE_CHECKING

from chaos.picture import FONT, WIDTH, picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.gameday import Played

READABLE = 9.5
"""Pixels that text in a picture is high at least; where the page is too narrow for that, the picture scrolls."""
STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 780px; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; margin: .5rem 0; }} h2 {{ font-size: 1.2rem; margin: 2rem 0 .3rem; }}
table {{ border-collapse: collapse; width: 100%; margin: .5rem 0; font-size: .92rem; }}
td, th {{ text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #dde3e9; vertical-align: top; }}
th, td:last-child {{ white-space: nowrap; }}
.pass {{ color: #1d6b41; font-weight: 600; }} .fail {{ color: #a82424; font-weight: 600; white-space: pre-wrap; }}
.picture {{ overflow-x: auto; }}
svg {{ display: block; width: 100%; min-width: {WIDTH * READABLE / FONT:.0f}px; height: auto;
  font-family: system-ui, sans-serif; }}
.small {{ font-size: .85rem; color: #556; margin: .4rem 0; }} code {{ font-size: .95em; }}
@media print {{ :root {{ font-size: 12px; }} body {{ max-width: none; padding: 0; }} .picture {{ overflow: visible; }}
  svg {{ min-width: 0; width: 80%; }}
  svg, tr, h2 {{ break-inside: avoid; }} h1, h2 {{ break-after: avoid; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}
"""


def report(
    results: "Sequence[Played]", *, chosen: int, where: str, when: str, command: str, title: str = "Game day"
) -> str:
    """Return the page, as HTML.

    Args:
        results: one for each experiment so far.
        chosen: how many there were to play.
        where: what was played on.
        when: date and time.
        command: repeats it all.
        title: of the page.
    """
    passed = sum(played.passed for played in results)
    rows = "".join(
        f"<tr><td><a href='#experiment-{number}'>{escape(played.experiment.title)}</a></td>"
        f"<td>{_mark(kept=played.passed)}</td></tr>"
        for number, played in enumerate(results, 1)
    )
    left = chosen - len(results)
    missing = f"<p class='fail'>{left} more were chosen and not played.</p>" if left else ""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}: {passed} of {len(results)} passed</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}: {passed} of {len(results)} experiments passed</h1>{missing}"
        f"<p class='small'>{escape(when)}; {escape(where)}; {_machine()}.<br>"
        f"Again: <code>{escape(command)}</code></p>"
        f"<table><tr><th>Experiment</th><th>Verdict</th></tr>{rows}</table>"
        f"{''.join(_section(number, played) for number, played in enumerate(results, 1))}</body></html>\n"
    )


def _machine() -> str:
    system = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"
    return escape(f"Python {platform.python_version()}, {system}")


def _section(number: int, played: "Played") -> str:
    experiment = played.experiment
    verdicts = "".join(
        f"<tr><td>{escape(v.promise)}</td><td>{escape(v.measured)}</td><td>{_mark(kept=v.kept)}</td></tr>"
        for v in played.verdicts
    )
    table = f"<table><tr><th>Promise</th><th>Measured</th><th></th></tr>{verdicts}</table>" if verdicts else ""
    problem = f"<p class='fail'>{escape(played.problem)}</p>" if played.problem else ""
    drawn = f"<div class='picture' tabindex='0'>{picture(played)}</div>" if played.findings.calls else ""
    return (
        f"<section id='experiment-{number}'><h2>{escape(experiment.title)} {_mark(kept=played.passed)}</h2>"
        f"<p>{escape(experiment.story)}</p>{problem}{table}{drawn}{_environment(played)}</section>"
    )


def _environment(played: "Played") -> str:
    """Describe what it takes to see the same again."""
    settings = " ".join(f"{key}={value}" for key, value in sorted(played.settings.items()))
    return (
        f"<p class='small'>Load: {escape(str(played.experiment.steady_state))}; seed {played.seed}. "
        f"Gateway {escape(played.gateway)}, {played.experiment.system.mocks} mock model(s); "
        f"{f'settings: <code>{escape(settings)}</code>' if settings else 'settings as it runs'}.<br>"
        f"Again: <code>{escape(played.command)}</code></p>"
    )


def _mark(*, kept: bool) -> str:
    return "<span class='pass'>pass</span>" if kept else "<span class='fail'>FAIL</span>"
