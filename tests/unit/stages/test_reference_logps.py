"""Reference figures are keyed by what they depend on: paid once for a sweep, and gone on with after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline_lib.config import stage_key
from pipeline_lib.errors import InterruptedRunError
from pipeline_lib.models import scoring
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.scoring import response_logps
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Record
from pipeline_lib.stages import reference_logps
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.reference_logps import ReferenceLogpsConfig
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.preferences import MISMATCHED
from pipeline_lib.training.trained_model import dtype_for
from tests.stage_bench import commit, context_in, write_files
from tests.toy import COMPARISONS, encoder, layout, record

pytestmark = pytest.mark.servers


class Scorings:
    """Runs of the stage over one store, and how many rows each run computed."""

    def __init__(self, store: ArtifactStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.root, self.count = store, root, 0
        self.num_scored = 0
        monkeypatch.setattr(reference_logps, "_TREES_PER_PART", 3)

        def counted(model: object, trees: list[object], *rest: object) -> dict[str, list[float]]:
            self.num_scored += len(trees)
            return response_logps(model, trees, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(scoring, "response_logps", counted)

    def put(self, kind: str, files: Mapping[str, bytes], config: dict[str, object]) -> ArtifactRef:
        self.count += 1
        return commit(self.store, write_files(self.root / f"input-{self.count}", files), kind, config=config)

    def dataset(self, rows: list[Record], *, about: str = "") -> ArtifactRef:
        text = "".join(row.model_dump_json() + "\n" for row in rows)
        return self.put("dataset", {"policy.jsonl": text.encode()}, {"about": about})

    def run(
        self, config: ReferenceLogpsConfig, model: ArtifactRef, dataset: ArtifactRef, *, stop_after: int | None = None
    ) -> dict[str, list[float]]:
        """Run the stage; `stop_after` counts the questions whether to stop that are answered with no."""
        self.num_scored, self.count = 0, self.count + 1
        asked = iter(range(10**6)) if stop_after is None else iter(range(stop_after))
        context = context_in(self.root / f"run-{self.count}", self.store, key=f"{self.count:064d}")
        context = replace(context, should_stop=lambda: next(asked, None) is None)
        inputs = {"sft_model": model, "dataset": dataset}
        output = reference_logps.run(config, inputs, context)
        ref = commit(
            self.store, output.directory, output.kind, stage="reference_logps", stage_version=reference_logps.VERSION,
            config=config.model_dump(mode="json"), inputs=inputs, metrics=output.metrics,
            stage_key=stage_key("reference_logps", reference_logps.VERSION, config, inputs),
        )  # fmt: skip
        logps: dict[str, list[float]] = self.store.read_json(ref, "logps.json")
        return logps


@pytest.fixture
def scorings(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorings:
    return Scorings(store, tmp_path, monkeypatch)


def model_files(directory: Path, *, seed: int) -> dict[str, bytes]:
    write_tiny_model(directory, seed=seed)
    return {f"model/{path.name}": path.read_bytes() for path in directory.iterdir() if path.is_file()}


CONFIG = ReferenceLogpsConfig(max_prompt_tokens=256, max_response_tokens=64, precision="fp32")


def test_figures_are_those_of_the_model_and_paid_once(scorings: Scorings, tmp_path: Path) -> None:
    files = model_files(tmp_path / "model", seed=0)
    model, data = scorings.put("model", files, {}), scorings.dataset(COMPARISONS)
    found = scorings.run(CONFIG, model, data)
    assert scorings.num_scored == len(COMPARISONS)
    plain = load_causal_model(tmp_path / "model", dtype=torch.float32)
    for row in COMPARISONS:
        alone = response_logps(plain, [encoder().tree(row)], layout())[row.id]
        assert found[row.id] == pytest.approx(alone, abs=1e-4)

    # Other artifacts of the same weights and the same texts: by another stage, in another order.
    twin, shuffled = scorings.put("model", files, {"seen": "before"}), scorings.dataset(COMPARISONS[::-1], about="twin")
    assert (twin, shuffled) != (model, data)
    assert scorings.run(CONFIG, twin, shuffled) == found
    assert scorings.num_scored == 0


def test_other_weights_and_another_format_are_computed_anew(scorings: Scorings, tmp_path: Path) -> None:
    model = scorings.put("model", model_files(tmp_path / "model", seed=0), {})
    other = scorings.put("model", model_files(tmp_path / "other", seed=1), {})
    data = scorings.dataset(COMPARISONS)
    first = scorings.run(CONFIG, model, data)
    for config, ref in ((CONFIG, other), (CONFIG.model_copy(update={"precision": "bf16"}), model)):
        assert scorings.run(config, ref, data) != first
        assert scorings.num_scored == len(COMPARISONS)
    cut = CONFIG.model_copy(update={"max_response_tokens": 4})  # other token ids: those that are cut
    scorings.run(cut, model, data)
    assert scorings.num_scored > 0


def test_a_pass_that_is_stopped_goes_on_where_it_was(scorings: Scorings, tmp_path: Path) -> None:
    model = scorings.put("model", model_files(tmp_path / "model", seed=0), {})
    data = scorings.dataset(COMPARISONS)
    with pytest.raises(InterruptedRunError, match="after 3 of 8 rows"):
        scorings.run(CONFIG, model, data, stop_after=1)
    assert scorings.num_scored == 3
    scorings.run(CONFIG, model, data)
    assert scorings.num_scored == 5


def test_a_sweep_over_beta_losses_rates_and_batches_has_one_key() -> None:
    first = PreferenceConfig().reference_logps()
    for changes in (
        {"loss": {"name": "dpo", "beta": 0.7}}, {"batch_size": 3}, {"tokens_per_batch": 4096}, {"seed": 9},
        {"optimizer": {"learning_rate": 0.5}}, {"epochs": 4}, {"ema_decay": 0.9}, {"max_rows": 2},
    ):  # fmt: skip
        assert PreferenceConfig.model_validate(changes).reference_logps() == first


@pytest.mark.parametrize(("precision", "scored_in"), [("auto", "fp32"), ("bf16", "fp32")])
def test_every_weight_is_trained_in_fp32_and_its_reference_is_scored_so(precision: str, scored_in: str) -> None:
    full = PreferenceConfig.model_validate({"adapter": None, "precision": precision})
    assert full.reference_logps().precision == scored_in
    assert dtype_for(full) == torch.float32
    assert PreferenceConfig.model_validate({"precision": precision}).reference_logps().precision == precision


def test_mismatched_rows_are_scored_for_unpaired_losses(scorings: Scorings, tmp_path: Path) -> None:
    model = scorings.put("model", model_files(tmp_path / "model", seed=0), {})
    rows = [record("one", "a", "b"), record("two", "cc", "d")]
    found = scorings.run(CONFIG.model_copy(update={"with_mismatched": True}), model, scorings.dataset(rows))
    plain = load_causal_model(tmp_path / "model", dtype=torch.float32)
    ordered = sorted(rows, key=lambda row: row.id)
    for row, other in zip(ordered, ordered[::-1], strict=True):
        tree = replace(encoder().tree(row), response_ids=encoder().tree(other).response_ids[:1])
        alone = response_logps(plain, [tree], layout())[row.id]
        assert found[MISMATCHED + row.id] == pytest.approx(alone, abs=1e-4)
