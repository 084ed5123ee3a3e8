"""Stage `report`: one self-contained HTML page over everything that led to a verdict."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from pipeline_lib.evaluation.report import build_report
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

VERSION = 2

REWARD_PREFIX = "reward_model:"
"""Before the name of a further reward model among the inputs."""


class ReportConfig(Frozen):
    """What the page is called and how much it shows."""

    name: str
    """Name of the run."""
    promotes: bool = True
    """Whether the run promotes its winner."""
    sampled_prompts: int = Field(10, ge=0)
    """Held-out prompts shown with the answers of all models."""


def run(config: ReportConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Write `report.html`; inputs `verdict`, `dataset`, `reward_model:<name>` for each further one; kind `report`."""
    further = {
        name.removeprefix(REWARD_PREFIX): ref for name, ref in sorted(inputs.items()) if name.startswith(REWARD_PREFIX)
    }
    page = build_report(
        context.store, verdict=inputs["verdict"], dataset=inputs["dataset"], name=config.name,
        sampled_prompts=config.sampled_prompts, promotes=config.promotes, reward_models=further,
    )  # fmt: skip
    (context.workdir / "report.html").write_text(page, encoding="utf-8", newline="\n")
    return StageOutput("report", context.workdir, {"size_bytes": float(len(page.encode("utf-8")))})


def further_inputs(reward_models: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """Return a run's further reward models as inputs of the stage: no verdict need depend on them."""
    return {REWARD_PREFIX + name: ref for name, ref in reward_models.items()}
