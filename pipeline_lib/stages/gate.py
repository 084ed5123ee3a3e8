"""Stage `gate`: weigh the evaluations by a policy; output kind `verdict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline_lib.config import PRESETS, read_yaml
from pipeline_lib.errors import ConfigError
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate import CHAMPION, GatePolicy, decide
from pipeline_lib.schema import ExampleResult
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen, did_you_mean, validate

VERSION = 2

_PREFIX = "evaluation:"


def _resolve(value: Any) -> Any:
    """Read a policy's file, so that its content and not its name is in the stage key."""
    if not isinstance(value, str):
        return value
    named = {path.stem: path for path in (PRESETS / "gates").glob("*.yaml")}
    path = named.get(value, Path(value))
    if not path.is_file():
        raise ConfigError(
            f"gate.policy = {value!r} is no file and no policy of that name{did_you_mean(value, list(named))}",
            next_step=f"use one of: {', '.join(sorted(named))}; or give the path of a YAML file",
        )
    return validate(GatePolicy, read_yaml(path), where=str(path))


class GateConfig(Frozen):
    """What a candidate must show."""

    policy: Annotated[GatePolicy, BeforeValidator(_resolve, json_schema_input_type=str | GatePolicy)] = Field(
        default_factory=lambda: _resolve("default"), validate_default=False
    )
    """A policy, or the name of one in `configs/gates`, or the path of a YAML file."""
    candidates: tuple[str, ...] = ("dpo", "ppo")
    """Names of the models that may be promoted; set by the flow."""


def run(config: GateConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Decide; inputs `evaluation:<name>` and `reward_model`.

    Raises:
        ConfigError: A candidate was not evaluated.
        DataError: Two models were evaluated on different prompts.
    """
    names = [role.removeprefix(_PREFIX) for role in inputs if role.startswith(_PREFIX)]
    unknown = [name for name in config.candidates if name not in names]
    if unknown:
        raise ConfigError(
            f"gate.candidates names {unknown}, which were not evaluated",
            next_step=f"name only models of the run: {', '.join(sorted(names))}",
        )
    evaluations = {name: inputs[_PREFIX + name] for name in names}
    models = {name: context.store.manifest(ref).inputs["model"] for name, ref in evaluations.items()}
    evidence = Evidence(
        models={
            name: tuple(
                ExampleResult.model_validate_json(line) for line in context.store.read_lines(ref, "examples.jsonl")
            )
            for name, ref in evaluations.items()
        },
        reward_model=context.store.manifest(inputs["reward_model"]).metrics,
    )
    candidates = {name: models[name] for name in config.candidates}
    verdict = decide(config.policy, evidence, candidates, models.get(CHAMPION))
    (context.workdir / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
    return StageOutput("verdict", context.workdir, {"passed": float(sum(c.is_passed for c in verdict.candidates))})
