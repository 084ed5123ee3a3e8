"""How candidates are wired: which stage gets which artifact, in which order. The stages are recorded, not run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from flows.candidates import Material, train_candidates
from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.run_config import RunConfig


class Recorder:
    """Stands for the stages of a flow run: every call is kept, and its artifact is named after it."""

    def __init__(self) -> None:
        self.services = SimpleNamespace(store=SimpleNamespace(client=None, settings=None))
        self.calls: dict[str, tuple[str, Any, dict[str, str]]] = {}

    def named(self, name: str, stage: str, config: Any, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
        assert name not in self.calls
        self.calls[name] = (stage, config, {role: ref.kind for role, ref in inputs.items()})
        return made(name)

    def together(self, jobs: dict[str, tuple[str, Any, dict[str, ArtifactRef]]]) -> dict[str, ArtifactRef]:
        return {name: self.named(name, *job) for name, job in jobs.items()}


def made(name: str) -> ArtifactRef:
    return ArtifactRef(kind=name, id=sha256_json(name))


def wire(candidates: dict[str, Any], *reward_models: str) -> tuple[Recorder, dict[str, str]]:
    config = RunConfig.model_validate({"dpo": None, "ppo": None, "candidates": candidates})
    recorder = Recorder()
    material = Material(
        base=made("base"), sft=made("sft"), reward=made("reward"), dataset=made("dataset"),
        reward_models={name: made(name) for name in reward_models},
    )  # fmt: skip
    trained = train_candidates(config, recorder, material)  # type: ignore[arg-type]
    return recorder, {name: ref.kind for name, ref in trained.items()}


def inputs(recorder: Recorder) -> dict[str, dict[str, str]]:
    return {name: call[2] for name, call in recorder.calls.items()}


def test_raft_samples_and_trains_round_after_round() -> None:
    recorder, trained = wire({"raft": {"method": "raft", "rounds": 2, "temperatures": [1.0, 1.2]}})
    first, second = "raft:round-1", "raft:round-2"
    shared = {"reward_model": "reward", "dataset": "dataset"}
    assert inputs(recorder) == {
        f"{first}:rollouts": {"model": "sft", **shared},
        f"{first}:sft": {"base_model": "sft", "dataset": f"{first}:rollouts"},
        f"{second}:rollouts": {"model": f"{first}:sft", **shared},
        f"{second}:sft": {"base_model": f"{first}:sft", "dataset": f"{second}:rollouts"},
    }
    assert trained == {"raft": f"{second}:sft"}
    assert recorder.calls[f"{second}:rollouts"][1].temperature == 1.2
    assert {call[0] for call in recorder.calls.values()} == {"rollouts", "sft"}


def test_the_best_over_all_rounds_may_train_the_first_model_anew() -> None:
    recorder, _ = wire({"raft": {"method": "raft", "rounds": 3, "keep": "all", "train_from": "start"}})
    found = inputs(recorder)
    assert "earlier" not in found["raft:round-1:rollouts"]
    assert found["raft:round-3:rollouts"]["earlier"] == "raft:round-2:rollouts"
    assert found["raft:round-3:rollouts"]["model"] == "raft:round-2:sft"
    assert {found[f"raft:round-{n}:sft"]["base_model"] for n in (1, 2, 3)} == {"sft"}


def test_iterated_dpo_has_the_rounds_own_reference() -> None:
    recorder, trained = wire({"it": {"method": "iterated_dpo", "rounds": 2}})
    found = inputs(recorder)
    assert found["it:round-2:reference_logps"] == {
        "sft_model": "it:round-1:preference", "dataset": "it:round-2:rollouts",
    }  # fmt: skip
    assert found["it:round-2:preference"] == {
        "sft_model": "it:round-1:preference", "dataset": "it:round-2:rollouts",
        "reference_logps": "it:round-2:reference_logps",
    }  # fmt: skip
    assert trained == {"it": "it:round-2:preference"}

    recorder, _ = wire({"it": {"method": "iterated_dpo", "rounds": 1, "loss": {"name": "simpo"}}})
    assert list(recorder.calls) == ["it:round-1:rollouts", "it:round-1:preference"]


def test_a_judge_stands_between_sampling_and_training() -> None:
    judge = {"name": "judge", "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}
    recorder, _ = wire({"raft": {"method": "raft", "rounds": 2, "keep": "all", "labels": judge}})
    found = inputs(recorder)
    assert found["raft:round-2:labels"] == {"rollouts": "raft:round-2:rollouts"}
    assert found["raft:round-2:sft"] == {"base_model": "raft:round-1:sft", "dataset": "raft:round-2:labels"}
    # Samples of earlier rounds come unlabelled: the judge sees all of them, and answers what it has not answered.
    assert found["raft:round-2:rollouts"]["earlier"] == "raft:round-1:rollouts"


def test_people_label_each_round_in_a_file_of_its_own() -> None:
    recorder, _ = wire({"it": {"method": "iterated_dpo", "rounds": 2, "labels": {"name": "people"}}})
    found = inputs(recorder)
    assert found["it:round-1:reference_logps"] == {"sft_model": "sft", "dataset": "it:round-1:labels"}
    assert found["it:round-1:preference"]["dataset"] == "it:round-1:labels"
    files = [recorder.calls[f"it:round-{number}:labels"][1].file for number in (1, 2)]
    samples = [made(f"it:round-{number}:rollouts").id[:12] for number in (1, 2)]
    assert files == [f"labels/it-round-{number}-{samples[number - 1]}.jsonl" for number in (1, 2)]


def test_ppo_goes_on_from_rejection_sampling_whatever_the_order_in_the_file() -> None:
    recorder, trained = wire(
        {"llama2": {"method": "ppo", "start_from": "rejection"}, "rejection": {"method": "raft", "rounds": 1}}
    )
    assert list(recorder.calls) == ["rejection:round-1:rollouts", "rejection:round-1:sft", "llama2"]
    assert inputs(recorder)["llama2"] == {
        "sft_model": "rejection:round-1:sft", "dataset": "dataset", "reward_model": "reward",
    }  # fmt: skip
    assert list(trained) == ["llama2", "rejection"]


def test_a_preference_candidate_starts_where_it_says() -> None:
    recorder, _ = wire({
        "orpo": {"method": "preference", "loss": {"name": "orpo"}, "start_from": "base"},
        "dpo2": {"method": "preference", "start_from": "orpo"},
    })  # fmt: skip
    assert inputs(recorder)["orpo"] == {"sft_model": "base", "dataset": "dataset"}
    assert inputs(recorder)["reference_logps:dpo2"]["sft_model"] == "orpo"
    assert inputs(recorder)["dpo2"]["sft_model"] == "orpo"


def test_a_held_out_reward_model_is_an_input_of_its_own() -> None:
    rewards = {"parts": [{"name": "reward_model"}, {"name": "reward_model", "model": "safe", "label": "safe"}]}
    methods = ("ppo", "rloo", "grpo")
    recorder, _ = wire(
        {f"my-{name}": {"method": name, "heldout_reward_model": "other", "rewards": rewards} for name in methods},
        "safe", "other",
    )  # fmt: skip
    expected = {
        "sft_model": "sft", "dataset": "dataset", "reward_model": "reward", "reward_model:safe": "safe",
        "heldout_reward_model": "other",
    }  # fmt: skip
    assert inputs(recorder) == {f"my-{name}": expected for name in methods}
