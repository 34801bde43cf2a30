"""`make bench` works: not how fast, only that it measures and says so."""

import subprocess
import sys
from math import isfinite
from pathlib import Path

import msgspec
import pytest

from bench.chart import Result
from bench.systems import BARE, GATEWAY
from testkit import REPOSITORY


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the bench pins processes and reads /proc")
@pytest.mark.timeout(180)
def test_a_quick_bench_measures_and_saves_what_it_measured(tmp_path: Path) -> None:
    options = ["--quick", "--only", "first-token", "--systems", BARE, GATEWAY, "--results", str(tmp_path)]
    bench = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "bench", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert bench.returncode == 0, bench.stderr
    assert "added time to first token / bare's" in bench.stdout
    (saved,) = tmp_path.glob("*.json")
    assert saved.with_suffix(".svg").read_text().startswith("<svg")
    result = msgspec.json.decode(saved.read_bytes(), type=Result)
    assert not result.problems
    assert {(sample.measure, sample.system) for sample in result.samples} == {
        ("first token", name) for name in (BARE, GATEWAY, "(direct)")
    }
    measured = {"added_p50", "added_p99"}
    assert all(sample.values.keys() == measured for sample in result.samples if sample.system != "(direct)")
    assert all(isfinite(value) and value for sample in result.samples for value in sample.values.values())
