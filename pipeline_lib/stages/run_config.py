"""The whole configuration of a run: one section a stage, and what is not part of any result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.stages.base_model import BaseModelConfig
from pipeline_lib.stages.collect import CollectConfig
from pipeline_lib.stages.conditional import ConditionalConfig
from pipeline_lib.stages.evaluate import EvaluateConfig
from pipeline_lib.stages.filter import FilterConfig
from pipeline_lib.stages.gate import GateConfig
from pipeline_lib.stages.group import GrpoConfig, RlooConfig
from pipeline_lib.stages.iterate import IterateConfig
from pipeline_lib.stages.names import Name
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.promote import PromoteConfig
from pipeline_lib.stages.reward import RewardConfig
from pipeline_lib.stages.rounds_config import BestOfNConfig, IteratedDpoConfig, RaftConfig, SdfConfig
from pipeline_lib.stages.sample import SampleConfig
from pipeline_lib.stages.sft import SftConfig
from pipeline_lib.training.sharding_limits import why_not_sharded
from pipeline_lib.validation import Frozen

Candidate = Annotated[
    PreferenceConfig
    | ConditionalConfig
    | PpoConfig
    | RlooConfig
    | GrpoConfig
    | RaftConfig
    | BestOfNConfig
    | SdfConfig
    | IteratedDpoConfig,
    Field(discriminator="method"),
]
"""What trains a candidate; its `method` says which."""

RESERVED_NAMES = frozenset({"base", "sft", "champion", "dpo", "ppo"})
"""Names that further candidates cannot have."""


class RuntimeConfig(Frozen):
    """How a run is carried out. Nothing here can change a result, so nothing is in a stage key."""

    home: Path = Path(".prefline")
    """Folder of the embedded servers, the local cache and the logs."""
    checkpoint_every_s: float = Field(60.0, ge=0)
    """Seconds between checkpoints of a training stage, at most; 0 after every step."""
    max_parallel_stages: int = Field(1, ge=1)
    """Stages that may run at once; candidates are independent of each other."""
    max_memory_gib: float | None = Field(None, gt=0, title="Memory limit (GiB)")
    """Refuse a run whose estimate exceeds this; null: what the machine has."""
    threads: int | None = Field(None, ge=1, title="CPU threads")
    """CPU threads of a training stage's process; null: all cores, shared by its processes."""
    processes: int = Field(1, ge=1, le=64)
    """Processes of a training stage: it divides each step's forwards among them, with the same result."""
    sharding: Literal["none", "full"] = "none"
    """full: those processes divide every weight, gradient and moment among themselves, with the same result; not for
    PPO, RLOO and GRPO, SFT with `select_by`, virtual tokens, QLoRA, Adafactor and 8-bit AdamW."""


class RunConfig(Frozen):
    """From sources to a promoted model."""

    name: str = Field("demo", pattern="^[a-z0-9][a-z0-9._-]{0,62}$")
    """Name of the run in Prefect and of the experiment in MLflow."""
    model: BaseModelConfig = Field(BaseModelConfig(), title="Base model")
    """Which model alignment starts from."""
    collect: CollectConfig = CollectConfig()
    """Where rows come from."""
    filter: FilterConfig = FilterConfig()
    """Which rows are kept, and what each may be used for."""
    sample: SampleConfig = SampleConfig()
    """Answers of the base model, added to comparisons as rejected ones."""
    sft: SftConfig = SftConfig()
    """Supervised fine-tuning."""
    reward: RewardConfig = RewardConfig()
    """The reward model."""
    reward_models: dict[Name, RewardConfig] = Field(default_factory=dict)
    """Further reward models by name, e.g. `safe: {rows: {tags: [safe]}}` beside a helpful one in `reward`."""
    dpo: PreferenceConfig | None = Field(PreferenceConfig(), title="DPO")
    """The candidate by preference optimisation; null leaves it out."""
    ppo: PpoConfig | None = Field(PpoConfig(), title="PPO")
    """The candidate by PPO; null leaves it out."""
    candidates: dict[Name, Candidate] = Field(default_factory=dict)
    """Further candidates by name, e.g. `simpo: {method: preference, loss: {name: simpo}}`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Held-out evaluation."""
    gate: GateConfig = GateConfig()
    """What a candidate must show."""
    promote: PromoteConfig = PromoteConfig()
    """Where a passing candidate goes."""
    iterate: IterateConfig = IterateConfig()
    """Further rounds of the whole loop, where they are asked for."""
    runtime: RuntimeConfig = RuntimeConfig()
    """How the run is carried out; changes no result."""

    @model_validator(mode="after")
    def _has_candidate(self) -> Self:
        if not self.all_candidates():
            raise ValueError("dpo and ppo are both null: a run needs at least one candidate")
        taken = sorted(RESERVED_NAMES & self.candidates.keys())
        if taken:
            raise ValueError(f"candidates.{taken[0]}: the name is taken; give the candidate another")
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if self.runtime.sharding == "none":
            return self
        if self.runtime.processes == 1:
            raise ValueError(
                "runtime.sharding: full divides weights among processes; set runtime.processes to 2 or more"
            )
        further = {f"reward_models.{name}": config for name, config in self.reward_models.items()}
        trained = {"sft": self.sft, "reward": self.reward, **further, **self.all_candidates()}
        for name, config in trained.items():
            why = why_not_sharded(config)
            if why is not None:
                raise ValueError(f"{name}.{why}; change it or leave it out, or set runtime.sharding: none")
        return self

    @model_validator(mode="after")
    def _can_be_promoted(self) -> Self:
        trained = {"sft": self.sft, **self.all_candidates()}
        adapters = {name: stage.adapter for name, stage in trained.items()}
        tuned = [name for name, adapter in adapters.items() if adapter is not None and adapter.name == "prefix"]
        if tuned and self.promote.enabled:
            raise ValueError(
                f"{tuned[0]}.adapter: a prefix-tuned model is no plain model, so the registry cannot serve it; "
                "set promote.enabled: false to have it judged only, or use adapter.name: prompt"
            )
        return self

    @model_validator(mode="after")
    def _starts_are_there(self) -> Self:
        starts = {name: start_of(candidate) for name, candidate in self.all_candidates().items()}
        for name, start in starts.items():
            if start not in {"base", "sft", *starts}:
                raise ValueError(f"{name}.start_from: there is no candidate {start!r}; take sft, base or a candidate")
            passed = [name]
            while start in starts:
                if start in passed:
                    raise ValueError(f"{name}.start_from: {' -> '.join([*passed, start])} goes round in a circle")
                passed.append(start)
                start = starts[start]
        return self

    def all_candidates(self) -> dict[str, Candidate]:
        """Return every candidate of the run by name, `dpo` and `ppo` first."""
        named = {"dpo": self.dpo, "ppo": self.ppo, **self.candidates}
        return {name: config for name, config in named.items() if config is not None}


def start_of(candidate: Candidate) -> str:
    """Return what a candidate's training starts from: `sft`, `base`, or another candidate's name."""
    return str(getattr(candidate, "start_from", "sft"))  # methods without the choice start from SFT
