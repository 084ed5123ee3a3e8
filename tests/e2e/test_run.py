"""The command line as a user runs it: killed, interrupted, gone on with, cached, in rounds, explained.

All tests run in one home, as a user's commands do: what one has computed, the next ones find there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.cli import main
from pipeline_lib.processes import free_port
from pipeline_lib.stages.faults import FLOW_VARIABLE, KILL_VARIABLE
from pipeline_lib.storage.embedded import EmbeddedS3
from pipeline_lib.storage.store import ArtifactStore

pytestmark = [pytest.mark.servers, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["--set", "runtime.threads=1"]  # models this small only lose by more
SMALL = [*QUIET, "--set", "ppo.iterations=1"]
# Rounds whose candidate samples its own responses, the cheapest there is; no PPO, no baseline candidate.
CANDIDATE = (
    "{method: iterated_dpo, rounds: 1, batch_size: 8, max_prompt_tokens: 192, optimizer: {learning_rate: 1.0e-3}, "
    "sampling: {prompts: 8, samples_per_prompt: 2, max_new_tokens: 8, missing_eos: keep}}"
)
ROUNDS = [
    *QUIET, "--set", "ppo=null", "--set", "dpo=null", "--set", "iterate.start_from=last_candidate",
    "--set", "iterate.retrain=[]", "--set", "promote.model_name=prefline-rounds",
    "--set", f"candidates={{idpo: {CANDIDATE}}}",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the embedded servers."""
    return tmp_path_factory.mktemp("user") / "home"


def start(home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments, "--home", str(home)], cwd=home.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**keep, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], *, timeout_s: float = 600) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()  # one that hangs must not disturb the tests that follow in its home
    return process.returncode, out, err


def cached_stages(err: str) -> list[str]:
    return re.findall(r"^(\S+)\s+cached$", err, re.MULTILINE)


@pytest.mark.timeout(1200)
def test_a_run_survives_kill_and_interrupt_and_a_second_run_is_cached(home: Path) -> None:
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


@pytest.mark.timeout(1200)
def test_two_rounds_and_a_third_that_finds_them_done(home: Path) -> None:
    code, out, err = finish(start(home, "iterate", "smoke", "--rounds", "2", *ROUNDS))
    assert code == 0, err
    rounds = re.findall(r"idpo:round-1:preference\s+done in", err)
    assert len(rounds) == 2, "each round trains a candidate of its own"
    for stage in ("sft", "reward"):
        asked_for = re.findall(rf"^{stage}\s+(?:done in|cached)", err, re.MULTILINE)
        assert len(asked_for) == 1, "the second round starts from a model"
    reports = {path.parent.name for path in (home / "reports").glob("*/report.html")}
    assert reports - {"smoke"} == {"smoke-round-1", "smoke-round-2"}

    code, again, err = finish(start(home, "iterate", "smoke", "--rounds", "2", *ROUNDS))
    assert code == 0, err
    assert again == out
    assert cached_stages(err) == [], "finished rounds are not even looked up stage by stage"


@pytest.mark.timeout(600)
def test_sigterm_ends_a_run_with_a_message_and_its_exit_code(home: Path) -> None:
    process = start(
        home, "run", "smoke", *QUIET, "--set", "sft.epochs=2000", "--set", "runtime.checkpoint_every_s=3600"
    )
    told = read_until_sft(process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process, timeout_s=280)
    assert code == 143, told + err
    assert "checkpoint" in err
    assert "run the same command again" in err


@pytest.mark.timeout(600)
def test_a_flow_that_is_killed_takes_all_it_started_with_it_and_leaves_a_checkpoint(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoints(home, monkeypatch)
    process = start(
        home, "run", "smoke", *QUIET, "--set", "sft.epochs=3000", "--set", "runtime.checkpoint_every_s=3600"
    )
    told = read_until_sft(process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    finish(process)
    _, left = psutil.wait_procs(started, timeout=240)
    assert not left, told
    # Nothing was due for an hour: the child heard that its flow is gone, and committed where it was.
    assert checkpoints(home, monkeypatch) - before, told


def checkpoints(home: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the files of all checkpoints in the store."""
    home.mkdir(exist_ok=True)
    server = EmbeddedS3(home)
    for name in server.environment():
        monkeypatch.setenv(name, "")  # so that what was there before comes back afterwards
    settings = server.start()
    try:
        return {found.path for found in ArtifactStore(settings).objects.list("checkpoints/")}
    finally:
        server.stop()


def read_until_sft(process: subprocess.Popen[str]) -> str:
    """Read what a run tells up to the first line of the stage `sft`."""
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if line.startswith("sft"):
            return told
    raise AssertionError(told)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_up_takes_all_it_started_with_it(home: Path, number: signal.Signals) -> None:
    process = start(home, "up", "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if "Ctrl-C ends them" in line:
            break
    started = psutil.Process(process.pid).children(recursive=True)
    commands = [" ".join(one.cmdline()) for one in started]
    for part in ("prefect server start", "mlflow server", "flows.served", "weed"):
        assert any(part in command for command in commands), (part, told)
    process.send_signal(number)
    code, _, err = finish(process, timeout_s=120)
    assert code == (0 if number is signal.SIGTERM else -number), told + err
    _, left = psutil.wait_procs(started, timeout=120)
    assert not left, [" ".join(one.cmdline()) for one in left]


def test_an_error_of_a_process_names_cause_and_next_step(home: Path) -> None:
    code, _, err = finish(start(home, "explain", "models:/nobody@champion"))
    assert code == 41, err
    assert_helps(err, "nobody@champion")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "smok"], 10, "did you mean 'smoke'?"),
        (["run", "smoke", "--set", "sft.batch_sise=3"], 10, "did you mean 'sft.batch_size'|did you mean 'batch_size'"),
        (["run", "smoke", "--set", "sft.batch_size=0"], 10, "sft.batch_size"),
        (["show-config", "smoke", "--set", "dpo.loss={name: dop}"], 10, "did you mean 'dpo'"),
    ],
)
def test_errors_name_cause_and_next_step(
    arguments: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # `main` sets it too: put back what was there
    monkeypatch.setattr(sys, "argv", ["prefline", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert_helps(capsys.readouterr().err, words)


def assert_helps(err: str, words: str) -> None:
    assert re.search(words, err)
    assert "next:" in err
    assert "Traceback" not in err
