"""What happens to reference log-probabilities in a sweep: TRL scores anew, or keeps wrong figures; ours do neither."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.stages.preference import PreferenceConfig

ROOT = Path(__file__).resolve().parents[3]
PEER_PYTHON = Path(os.environ.get("PREFLINE_PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What TRL did."""
    if not PEER_PYTHON.exists():
        pytest.skip("TRL's environment is not there: make bench makes it")
    folder = tmp_path_factory.mktemp("peer")
    write_tiny_model(folder / "model", seed=0)
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [PEER_PYTHON, "-m", "benchmarks.peer_reference_cache", folder / "model", folder / "found.json"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, check=True)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_trl_finds_its_figures_only_when_nothing_at_all_changed(found: dict[str, list[dict[str, Any]]]) -> None:
    assert [run["scored_rows"] for run in found["same_again"]] == [8, 0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["betas", "output_dirs", "adapter_seeds"])
def test_trl_scores_anew_what_cannot_have_changed(found: dict[str, list[dict[str, Any]]], what: str) -> None:
    later = found[what][1:]
    assert all(run["scored_rows"] == 8 for run in later)
    for run in later:
        assert run["chosen"] == pytest.approx(found[what][0]["chosen"], abs=1e-4)


@pytest.mark.slow
def test_trl_reuses_figures_that_are_wrong(found: dict[str, list[dict[str, Any]]]) -> None:
    plain, reused = found["ld_alpha"]
    (right,) = found["ld_alpha_alone"]
    assert reused["scored_rows"] == 0
    assert reused["chosen"] == plain["chosen"]  # the figures of the run before, with another ld_alpha
    assert right["chosen"] != pytest.approx(plain["chosen"], abs=1.0)


def test_our_pass_depends_on_nothing_that_a_sweep_changes() -> None:
    plain = PreferenceConfig().reference_logps()
    for changed in (
        {"loss": {"name": "dpo", "beta": 0.5}},
        {"loss": {"name": "ipo"}},
        {"optimizer": {"learning_rate": 1e-3}},
        {"seed": 5},
        {"batch_size": 3},
        {"tokens_per_batch": 64},
    ):
        assert PreferenceConfig.model_validate(changed).reference_logps() == plain
    assert PreferenceConfig(max_response_tokens=9).reference_logps() != plain
    assert PreferenceConfig(precision="bf16").reference_logps() != PreferenceConfig(precision="fp32").reference_logps()
