"""Stage `report`: one self-contained HTML page over everything that led to a verdict."""

from __future__ import annotations

from pydantic import Field

from pipeline_lib.evaluation.report import build_report
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

VERSION = 1


class ReportConfig(Frozen):
    """What the page is called and how much it shows."""

    name: str
    """Name of the run."""
    promotes: bool = True
    """Whether the run promotes its winner."""
    sampled_prompts: int = Field(10, ge=0)
    """Held-out prompts shown with the answers of all models."""


def run(config: ReportConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Write `report.html`; inputs `verdict` and `dataset`, output kind `report`."""
    page = build_report(
        context.store, verdict=inputs["verdict"], dataset=inputs["dataset"], name=config.name,
        sampled_prompts=config.sampled_prompts, promotes=config.promotes,
    )  # fmt: skip
    (context.workdir / "report.html").write_text(page, encoding="utf-8", newline="\n")
    return StageOutput("report", context.workdir, {"size_bytes": float(len(page.encode("utf-8")))})
