"""The command line as a user runs it: killed, interrupted, gone on with, cached, explained."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_lib.stages.faults import FLOW_VARIABLE, KILL_VARIABLE

pytestmark = [pytest.mark.servers, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--set", "ppo.iterations=1"]


def start(home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments, "--home", str(home)], cwd=home.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**keep, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def cached_stages(err: str) -> list[str]:
    return re.findall(r"^(\S+)\s+cached$", err, re.MULTILINE)


@pytest.mark.timeout(900)
def test_a_run_survives_kill_and_interrupt_and_a_second_run_is_cached(tmp_path: Path) -> None:
    home = tmp_path / "home"

    # The machine goes down inside PPO: the flow dies first, then the child.
    killer = start(home, "run", "smoke", *SMALL, "--set", "runtime.checkpoint_every_s=0", **{
        KILL_VARIABLE: "ppo:step-1", FLOW_VARIABLE: "flow",
    })  # fmt: skip
    code, _, _ = finish(killer)
    assert code == -signal.SIGKILL

    # The same command goes on: everything before PPO is cached, PPO resumes.
    again = start(home, "run", "smoke", *SMALL)
    code, out, err = finish(again)
    assert code == 0, err
    assert {"base_model", "collect", "filter", "sample", "sft", "reward", "reference_logps", "dpo"} <= set(
        cached_stages(err)
    )
    assert "ppo" not in cached_stages(err)
    assert "Gate: promoted" in out
    promoted = re.search(r"prefline-smoke version (\d), alias champion", out)
    assert promoted is not None
    report = Path(re.search(r"Report:\s+(.*)", out)[1])  # type: ignore[index]
    assert "<html" in report.read_text(encoding="utf-8")[:200]

    # Nothing changed: every stage is answered from the store, and nobody is promoted twice.
    code, out, err = finish(start(home, "run", "smoke", *SMALL))
    assert code == 0, err
    stages = re.findall(r"^(\S+)\s+(?:cached|done in .*|already champion)$", err, re.MULTILINE)
    assert len(stages) == 16
    assert len(cached_stages(err)) == 15
    assert "already champion" in out
    assert promoted[0] in out

    code, out, err = finish(start(home, "explain", "models:/prefline-smoke@champion"))
    assert code == 0, err
    assert "made by base_model" in out
    assert re.search(r"[0-9a-f]{12}  pydoc  \S+", out), "the lineage ends at rows and their places"

    code, out, err = finish(start(home, "fsck"))
    assert code == 0, out + err


@pytest.mark.timeout(300)
def test_sigterm_ends_a_run_with_a_message_and_its_exit_code(tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = start(home, "run", "smoke", "--set", "sft.epochs=2000", "--set", "runtime.checkpoint_every_s=3600")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("sft"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "checkpoint" in err
    assert "run the same command again" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "smok"], 10, "did you mean 'smoke'?"),
        (["run", "smoke", "--set", "sft.batch_sise=3"], 10, "did you mean 'sft.batch_size'|did you mean 'batch_size'"),
        (["run", "smoke", "--set", "sft.batch_size=0"], 10, "sft.batch_size"),
        (["show-config", "smoke", "--set", "dpo.loss={name: dop}"], 10, "did you mean 'dpo'"),
        (["explain", "models:/nobody@champion"], 41, "nobody@champion"),
    ],
)
def test_errors_name_cause_and_next_step(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    keep_home = arguments[0] != "show-config"
    process = start(tmp_path / "home", *arguments) if keep_home else subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    returned, _, err = finish(process)
    assert returned == code, err
    assert re.search(words, err)
    assert "next:" in err
    assert "Traceback" not in err
