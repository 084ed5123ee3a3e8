"""Promotion against a real S3 server and a real MLflow registry."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline_lib.errors import ConflictError
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, CandidateVerdict, Interval, RuleResult, Verdict
from pipeline_lib.stages.promote import (
    PromoteConfig,
    Promotion,
    champion_pointer,
    incumbent,
    mirror_champion,
    promote,
    read_champion,
    roll_back,
)
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.tracking import ModelRegistry, TrackingSettings, load_pipeline
from tests.stage_bench import commit

pytestmark = pytest.mark.servers

CONFIG = PromoteConfig(model_name="tiny")


class Bench:
    """A store, a registry, and models and verdicts made on the spot."""

    def __init__(self, store: ArtifactStore, tmp_path: Path) -> None:
        self.store, self.tmp_path = store, tmp_path
        self.tracking = TrackingSettings(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        self.registry = ModelRegistry(self.tracking)

    def model(self, seed: int) -> ArtifactRef:
        directory = self.tmp_path / f"model-{seed}"
        write_tiny_model(directory / "model", seed=seed)
        return commit(self.store, directory, "model")

    def verdict(
        self, candidates: dict[str, tuple[ArtifactRef, bool]], *, winner: str | None, champion: ArtifactRef | None
    ) -> ArtifactRef:
        interval = Interval(value=0.6, low=0.55, high=0.7, confidence_frac=0.95, num_examples=50)
        verdicts = tuple(
            CandidateVerdict(
                name=name, model=model, is_passed=is_passed, rank_value=1.0,
                rules=(
                    RuleResult(
                        rule="win_rate: at least 0.5", metric="win_rate", estimate=interval, threshold=0.5,
                        status="pass" if is_passed else "fail", reason="0.55 against 0.5",
                    ),
                ),
            )
            for name, (model, is_passed) in candidates.items()
        )  # fmt: skip
        verdict = Verdict(candidates=verdicts, winner=winner, champion=champion, policy={})
        directory = self.tmp_path / f"verdict-{len(list(self.tmp_path.iterdir()))}"
        directory.mkdir()
        (directory / "verdict.json").write_text(verdict.model_dump_json())
        return commit(self.store, directory, "verdict")

    def promote(self, verdict: ArtifactRef, config: PromoteConfig = CONFIG) -> Promotion:
        return promote(
            config, verdict, store=self.store, registry=self.registry, cache=self.tmp_path / "cache-models",
            run_id=None, tags={"prefline.run": "test"},
        )  # fmt: skip

    def alias(self) -> str | None:
        found = self.registry.version_of_alias("tiny", "champion")
        return None if found is None else found[0]


@pytest.fixture
def bench(store: ArtifactStore, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(mlflow_database, tmp_path / "mlflow.db")
    return Bench(store, tmp_path)


@pytest.mark.timeout(300)
def test_a_winner_is_registered_promoted_and_answers(bench: Bench) -> None:
    good, bad = bench.model(1), bench.model(2)
    verdict = bench.verdict({"dpo": (good, True), "ppo": (bad, False)}, winner="dpo", champion=None)

    first = bench.promote(verdict)

    assert (first.status, first.version, bench.alias()) == ("promoted", "1", "1")
    tags = dict(bench.registry.versions("tiny"))
    assert tags["1"]["prefline.gate"] == "promoted"
    assert tags["2"]["prefline.gate"] == "rejected"
    assert tags["2"]["prefline.gate_reason"] == "win_rate: at least 0.5: 0.55 against 0.5"
    answer = load_pipeline(bench.tracking, "models:/tiny@champion")("hello", max_new_tokens=3)
    assert answer[0]["generated_text"].startswith("hello")

    again = bench.promote(verdict)
    assert (again.status, again.versions) == ("already_champion", first.versions)
    assert len(bench.registry.versions("tiny")) == 2, "promoted once however often it is run"


@pytest.mark.timeout(300)
def test_with_promotion_off_nothing_is_registered(bench: Bench) -> None:
    model = bench.model(0)
    verdict = bench.verdict({"dpo": (model, True)}, winner="dpo", champion=None)
    promotion = bench.promote(verdict, config=CONFIG.model_copy(update={"enabled": False}))
    assert (promotion.status, promotion.version, promotion.versions) == ("not_asked", None, {})
    assert promotion.reason == "promotion is off; the gate's choice is dpo"
    assert read_champion(bench.store, "tiny") is None


def test_the_incumbent_of_a_repeated_run_is_the_model_it_replaced(bench: Bench) -> None:
    old, new = bench.model(1), bench.model(2)
    assert incumbent(bench.store, "tiny", [new]) is None
    bench.promote(bench.verdict({"dpo": (old, True)}, winner="dpo", champion=None))
    assert incumbent(bench.store, "tiny", [new]) == old
    bench.promote(bench.verdict({"dpo": (new, True)}, winner="dpo", champion=old))
    assert incumbent(bench.store, "tiny", [new]) == old
    assert incumbent(bench.store, "tiny", [bench.model(3)]) == new


@pytest.mark.timeout(300)
def test_evidence_against_a_former_champion_promotes_nobody(bench: Bench) -> None:
    one, two, three = bench.model(1), bench.model(2), bench.model(3)
    stale = bench.verdict({"dpo": (three, True)}, winner="dpo", champion=one)
    bench.promote(bench.verdict({"dpo": (one, True)}, winner="dpo", champion=None))
    bench.promote(bench.verdict({"dpo": (two, True)}, winner="dpo", champion=one))
    with pytest.raises(ConflictError, match="the champion of tiny is now"):
        bench.promote(stale)
    champion = read_champion(bench.store, "tiny")
    assert champion is not None
    assert champion.model == two


@pytest.mark.timeout(300)
def test_a_rolled_back_model_is_not_promoted_again(bench: Bench) -> None:
    old, new = bench.model(1), bench.model(2)
    bench.promote(bench.verdict({"dpo": (old, True)}, winner="dpo", champion=None))
    verdict = bench.verdict({"dpo": (new, True)}, winner="dpo", champion=old)
    version = bench.promote(verdict).version
    roll_back(CONFIG, store=bench.store, registry=bench.registry)
    assert bench.alias() == "1" != version
    assert bench.promote(verdict).status == "revoked"
    assert bench.alias() == "1"


def test_the_alias_follows_a_pointer_that_moved_before_a_crash(bench: Bench) -> None:
    model = bench.model(1)
    verdict = bench.verdict({"dpo": (model, True)}, winner="dpo", champion=None)
    bench.promote(verdict)
    bench.registry._client.delete_registered_model_alias("tiny", "champion")
    assert mirror_champion(CONFIG, store=bench.store, registry=bench.registry) == "1"
    assert bench.alias() == "1"


def test_of_eight_racing_promoters_one_wins(bench: Bench) -> None:
    pointer = champion_pointer(bench.store, "tiny")

    def race(number: int) -> bool:
        try:
            pointer.swap(None, {"number": number})
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(race, range(8))) == 1
