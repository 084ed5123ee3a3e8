"""`prefline iterate` as a user runs it: two rounds, the second from the first one's model, and nothing run twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.test_run import cached_stages, finish, start

pytestmark = [pytest.mark.servers, pytest.mark.slow]

# Candidates that sample their own responses, the cheapest there are; no PPO, no baseline candidate.
CANDIDATE = (
    "{method: iterated_dpo, rounds: 1, batch_size: 8, max_prompt_tokens: 192, optimizer: {learning_rate: 1.0e-3}, "
    "sampling: {prompts: 8, samples_per_prompt: 2, max_new_tokens: 8, missing_eos: keep}}"
)
SMALL = [
    "--set", "runtime.threads=1", "--set", "ppo=null", "--set", "dpo=null", "--set", "sample.max_prompts=0",
    "--set", "evaluate.max_prompts=6", "--set", "iterate.start_from=last_candidate", "--set", "iterate.retrain=[]",
    "--set", f"candidates={{idpo: {CANDIDATE}}}",
]  # fmt: skip


@pytest.mark.timeout(800)
def test_two_rounds_and_a_third_that_finds_them_done(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = start(home, "iterate", "smoke", "--rounds", "2", *SMALL)
    out, err = first.communicate(timeout=540)
    assert first.returncode == 0, err
    rounds = re.findall(r"idpo:round-1:preference\s+done in", err)
    assert len(rounds) == 2, "each round trains a candidate of its own"
    assert len(re.findall(r"^sft\s+done in", err, re.MULTILINE)) == 1, "the second round starts from a model"
    assert len(re.findall(r"^reward\s+done in", err, re.MULTILINE)) == 1
    reports = sorted(path.parent.name for path in (home / "reports").glob("*/report.html"))
    assert reports == ["smoke-round-1", "smoke-round-2"]

    code, again, err = finish(start(home, "iterate", "smoke", "--rounds", "2", *SMALL))
    assert code == 0, err
    assert again == out
    assert cached_stages(err) == [], "finished rounds are not even looked up stage by stage"
