"""The benchmark of rollouts: every side samples the same prompts; only tokens up to an end count."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.page import marker
from benchmarks.rollouts import OURS, PLAIN, make_prompts, measure
from benchmarks.rollouts_report import Result, Run, write_section
from tests.toy import encoder

BEGIN, END = marker("rollouts", "begin"), marker("rollouts", "end")


def run(side: str, number: int, seconds: float, lengths: list[int]) -> Run:
    return Run(side=side, number=number, seconds=seconds, cpu_seconds=2 * seconds, lengths=lengths)


def result(*runs: Run) -> Result:
    return Result(
        model="toy", prompts=2, batch=2, max_new_tokens=9, prompt_tokens=[3, 5], dtype="float32", processor="one",
        goal=1.3, runs=list(runs), versions={"torch": "2"},
    )  # fmt: skip


def test_speed_is_compared_run_by_run() -> None:
    found = result(
        run("batched", 1, 1.0, [4, 6]), run("batched", 0, 2.0, [4, 6]), run("batched", 2, 1.0, [10, 2]),
        run(PLAIN, 0, 4.0, [9, 1]), run(PLAIN, 1, 4.0, [9, 9]), run(PLAIN, 2, 4.0, [9, 7]),
    )  # fmt: skip
    # 5 / 2.5, 10 / 4.5, 12 / 4 tokens a second
    assert found.speedup("batched") == 10 / 4.5
    assert found.cpu_speedup("batched") == 10 / 4.5
    assert found.speedup(PLAIN) == 1.0


def test_the_section_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nBefore.\n")
    found = result(run("batched", 0, 2.0, [4, 6]), run(PLAIN, 0, 4.0, [9, 1]))
    (tmp_path / "one.json").write_text(found.model_dump_json())
    first = write_section(tmp_path, page)
    assert "| `batched` | 5.0 (5.0 to 5.0) | 2.00 | 2.00 | 5 | 2.0 |" in first
    once = page.read_text()
    assert once.startswith("# Page\n\nBefore.\n\n## Rollouts\n")
    assert once.endswith(f"{BEGIN}\n{first}\n{END}\n")
    write_section(tmp_path, page)
    assert page.read_text() == once


def test_prompts_are_of_uneven_lengths_and_all_different() -> None:
    prompts = make_prompts(encoder(max_prompt_tokens=192), count=12)
    assert len({tuple(prompt) for prompt in prompts}) == 12
    assert max(map(len, prompts)) < 192
    assert prompts == make_prompts(encoder(max_prompt_tokens=192), count=12)


def test_every_side_answers_every_prompt(tmp_path: Path) -> None:
    chosen = argparse.Namespace(model="tiny-random", prompts=5, batch=3, max_new_tokens=6, runs=1)
    found = measure(tmp_path, chosen)
    assert {one.side for one in found.runs} == {PLAIN, *OURS}
    for one in found.runs:
        assert len(one.lengths) == 5
        assert all(1 <= length <= 6 for length in one.lengths)
    assert found.of("batched")[0].lengths == found.of("continuous")[0].lengths
