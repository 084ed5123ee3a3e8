"""Imports go one way: the contracts of `.importlinter` hold, and each of them can be broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A file to add, its text, and the contract that must then be broken.
VIOLATIONS = [
    ("tasks/bad.py", "import flows.align", "Flows use tasks"),
    ("pipeline_lib/data/bad.py", "import pipeline_lib.models.heads", "one order"),
    ("pipeline_lib/losses/bad.py", "import pipeline_lib.training.loop", "one order"),
    ("pipeline_lib/utils.py", "", "every module a place"),
    ("pipeline_lib/stages/bad.py", "import prefect", "nothing of Prefect"),
    ("pipeline_lib/stages/bad.py", "import mlflow", "MLflow is in tracking alone"),
    ("pipeline_lib/stages/bad.py", "import boto3", "boto3 is in storage alone"),
    ("pipeline_lib/data/bad.py", "import torch", "where there is no torch"),
    ("pipeline_lib/models/bad.py", "import datasets", "torch, transformers, peft and accelerate alone"),
    ("tasks/bad.py", "import pipeline_lib.losses.tokens", "never the rooms behind"),
    ("pipeline_lib/losses/preference/bad.py", "import pipeline_lib.losses.preference.dpo", "A preference loss"),
    ("pipeline_lib/data/sources/bad.py", "import pipeline_lib.data.sources.jsonl", "A source"),
    ("pipeline_lib/data/filters/bad.py", "import pipeline_lib.data.filters.empty", "A filter rule"),
    ("pipeline_lib/evaluation/gate_metrics/bad.py", "import pipeline_lib.evaluation.gate_metrics.kl", "A gate metric"),
    ("pipeline_lib/losses/reward/bad.py", "import pipeline_lib.losses.reward.kwise", "A reward loss knows no other"),
    ("pipeline_lib/training/rewards/bad.py", "import pipeline_lib.training.rewards.length", "A reward source"),
]  # fmt: skip


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages that lie in a folder."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    return subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(directory)},
    )  # fmt: skip


def test_contracts_hold(root: Path) -> None:
    done = lint_imports(root)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 14 kept, 0 broken." in done.stdout


@pytest.mark.slow
def test_each_contract_can_be_broken(root: Path, tmp_path: Path) -> None:
    for package in ("flows", "tasks", "pipeline_lib"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / ".importlinter", tmp_path)
    for name, text, contract in VIOLATIONS:
        bad = tmp_path / name
        bad.write_text(f'"""A seeded violation."""\n{text}\n')
        done = lint_imports(tmp_path)
        bad.unlink()
        broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
        assert done.returncode == 1, f"{name}: {text!r} was not noticed"
        assert any(contract in line for line in broken), f"{name}: {text!r} broke {broken}"
