"""The stages: one file each, holding its configuration class and its `run`; this is their table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from pipeline_lib.registry import Table


@dataclass(frozen=True)
class StageSpec:
    """Where a stage is, and where it runs."""

    name: str
    module: str
    """Module with `VERSION` and `run(config, inputs, context)`."""
    config_class: str
    """Name of its configuration class in that module."""
    in_child: bool
    """True where it loads a model: it then runs in a process of its own, whose memory goes with it."""
    is_training: bool
    """True where it runs the training loop, which several processes can share."""

    def load(self) -> ModuleType:
        """Import the stage's module."""
        return importlib.import_module(self.module)

    @property
    def version(self) -> int:
        """Version of the stage's code: raised whenever its result changes for equal inputs."""
        return int(self.load().VERSION)

    @property
    def run(self) -> Callable[..., object]:
        """The stage's function."""
        function: Callable[..., object] = self.load().run
        return function


def _spec(
    name: str, module: str, config_class: str, *, in_child: bool, is_training: bool = False
) -> tuple[str, StageSpec]:
    return name, StageSpec(name, f"pipeline_lib.stages.{module}", config_class, in_child, is_training)


STAGES: dict[str, StageSpec] = dict(
    [
        _spec("base_model", "base_model", "BaseModelConfig", in_child=True),
        _spec("collect", "collect", "CollectConfig", in_child=False),
        _spec("filter", "filter", "FilterConfig", in_child=False),
        _spec("sample", "sample", "SampleConfig", in_child=True),
        _spec("sft", "sft", "SftConfig", in_child=True, is_training=True),
        _spec("reward", "reward", "RewardConfig", in_child=True, is_training=True),
        _spec("reference_logps", "reference_logps", "ReferenceLogpsConfig", in_child=True),
        _spec("preference", "preference", "PreferenceConfig", in_child=True, is_training=True),
        _spec("conditional", "conditional", "ConditionalConfig", in_child=True, is_training=True),
        _spec("ppo", "ppo", "PpoConfig", in_child=True, is_training=True),
        _spec("rloo", "group", "RlooConfig", in_child=True, is_training=True),
        _spec("grpo", "group", "GrpoConfig", in_child=True, is_training=True),
        _spec("rollouts", "rollouts", "RolloutsConfig", in_child=True),
        _spec("labels", "labels", "LabelsConfig", in_child=False),
        _spec("evaluate", "evaluate", "EvaluateConfig", in_child=True),
        _spec("gate", "gate", "GateConfig", in_child=False),
        _spec("report", "report", "ReportConfig", in_child=False),
    ]
)


def plugin_tables() -> dict[str, Table]:
    """Return the tables of plug-ins by the kind's name on the command line."""
    places = {
        "sources": "pipeline_lib.data.sources:SOURCES",
        "filters": "pipeline_lib.data.filters:FILTERS",
        "losses": "pipeline_lib.losses.preference:PREFERENCE_LOSSES",
        "reward-losses": "pipeline_lib.losses.reward:REWARD_LOSSES",
        "rewards": "pipeline_lib.training.rewards:REWARD_SOURCES",
        "generators": "pipeline_lib.generation:GENERATORS",
        "gate-metrics": "pipeline_lib.evaluation.gate_metrics:GATE_METRICS",
    }
    tables: dict[str, Table] = {}
    for kind, place in places.items():
        module, _, attribute = place.partition(":")
        tables[kind] = getattr(importlib.import_module(module), attribute)
    return tables
