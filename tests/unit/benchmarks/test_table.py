"""What the benchmark says of two sides' figures: rates, shares, and when a comparison does not count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fairness import problems_of
from benchmarks.jobs import Measured, Options, Result, Work
from benchmarks.page import marker
from benchmarks.sweep import SweepResult
from benchmarks.table import render, write_page

BEGIN, END = marker("bench", "begin"), marker("bench", "end")

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = Options(preset="tiny", threads=2, rows_per_step=8, steps=3, runs=1, pack_tokens=64)


def measured(side: str = "ours", **changed: Any) -> Measured:
    """A side that takes 10 s for each of two timed updates."""
    values: dict[str, Any] = {
        "side": side, "losses": [0.7, 0.6, 0.5], "step_ends_s": [100.0, 110.0, 120.0], "peak_bytes": 2**30,
        "digests": ["a", "b", "c"], "tokens": 90, "counted_tokens": 30, "trainable_parameters": 7,
        "versions": {"torch": "2"},
    }  # fmt: skip
    return Measured.model_validate(values | changed)


def result(ours: Measured, peer: Measured, **changed: Any) -> Result:
    values: dict[str, Any] = {
        "job": "dpo", "options": OPTIONS, "processor": "a processor", "dtype": "float32",
        "matmul_flops": {"fp32": 1e11, "bf16": 1e9},
        "work": Work(pairs=16, tokens=6000, counted_tokens=2000, flops=5e11),
        "runs": {"ours": [ours], "peer": [peer]}, "problems": [],
    }  # fmt: skip
    return Result.model_validate(values | changed)


def test_the_first_update_is_not_timed_and_the_reference_counts_for_the_timed_ones() -> None:
    assert measured().timed_s == 20.0
    assert measured(reference_s=9.0).timed_s == 26.0  # two of three updates: 6 of its 9 s


def test_a_line_of_the_table() -> None:
    # 16 pairs in 20 s and in 80 s; 5e11 operations in these times at 1e11 a second: 25 % and 6 %.
    line = render([result(measured(), measured("peer", step_ends_s=[0.0, 40.0, 80.0], peak_bytes=4 * 2**30))], [])
    assert (
        "| DPO, reference computed before on both sides | 0.80 pairs/s | 0.20 pairs/s | 4.00 × (≥ 4) | "
        "1.00 / 4.00 GiB | 0.25 (≤ 0.5) | 25% / 6% | 0.5000 / 0.5000 (0.00%) |"
    ) in line


def test_the_median_of_paired_runs_counts() -> None:
    slow = measured(step_ends_s=[0.0, 50.0, 100.0])
    ours, peer = [measured(), slow, measured()], [measured("peer"), slow, measured("peer")]
    line = render([result(ours[0], peer[0], runs={"ours": ours, "peer": peer})], [])
    assert "| 0.80 pairs/s | 0.80 pairs/s | 1.00 × (≥ 4) |" in line


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"losses": [0.7, 0.6, 0.506]}, "last losses are 1.2% apart"),
        ({"losses": [0.7, 0.6, float("nan")]}, "last losses"),
        ({"losses": [0.7, 0.6]}, "3 updates on our side, 2 on the other"),
        ({"digests": ["a", "x", "c"]}, "token ids or labels differ in 1 of 3 updates, first in update 2"),
        ({"digests": ["a", "b"]}, "differ in 1 of 3 updates, first in update 3"),
        ({"counted_tokens": 29}, "90 tokens, 30 of them counted, on our side; 90 and 29 on the other"),
        ({"trainable_parameters": 8}, "we train 7 numbers, the other side 8"),
    ],
)
def test_an_unfair_comparison_does_not_count(changed: dict[str, Any], reason: str) -> None:
    peer = measured("peer").model_copy(update=changed)  # a NaN never passes validation; here it must be refused too
    compared = result(measured(), measured("peer")).model_copy(update={"runs": {"ours": [measured()], "peer": [peer]}})
    problems = problems_of(compared)
    assert any(reason in problem for problem in problems), problems
    line = render([compared.model_copy(update={"problems": problems})], [])
    assert "does not count: " in line
    assert "pairs/s" not in line


def test_losses_within_one_percent_count() -> None:
    assert problems_of(result(measured(), measured("peer", losses=[0.9, 0.6, 0.5049]))) == []


def test_other_rows_from_run_to_run_do_not_count() -> None:
    runs = {"ours": [measured(), measured(digests=["a", "b", "d"])], "peer": [measured("peer"), measured("peer")]}
    assert problems_of(result(measured(), measured(), runs=runs)) == ["ours trained on other rows from run to run"]


def test_the_page_keeps_what_people_wrote(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "performance.md"
    results.mkdir()
    (results / "tiny-dpo.json").write_text(result(measured(), measured("peer")).model_dump_json())
    sweep = SweepResult(
        options=OPTIONS, processor="a processor", dtype="float32", rows=24, ours_s=[2.0, 0.0, 0.0],
        peer_s=[4.0, 4.0, 4.0], peer_scored_rows=[24, 24, 24],
    )  # fmt: skip
    (results / "tiny-sweep.json").write_text(sweep.model_dump_json())
    page.write_text(f"# Time\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    write_page(results, page)
    text = page.read_text()
    assert text.startswith("# Time\n\nBefore.\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    assert "24 pairs: ours 2.0 s (2.0, 0.0, 0.0), TRL 12.0 s (4.0, 4.0, 4.0): 6.0 × faster." in text
    write_page(results, page)
    assert page.read_text() == text


def test_a_page_without_the_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("# Time\n")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_page(tmp_path, page)
    assert page.read_text() == "# Time\n"


def test_the_driver_holds_no_torch() -> None:
    """A child inherits its parent's peak memory across exec, so the driver's must be small."""
    code = "import sys, benchmarks.peers; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
