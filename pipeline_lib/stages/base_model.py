"""Stage `base_model`: bring the base model into the store as plain safetensors and JSON."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipeline_lib.errors import ModelNotFoundError
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

VERSION = 1


class BaseModelConfig(Frozen):
    """Which model alignment starts from."""

    source: str = "smollm2-135m-instruct"
    """`smollm2-135m-instruct`, `tiny-random`, a local folder, an `s3://` prefix, or a hub name."""
    revision: str | None = None
    """Commit of a hub model; without one the hub's default branch is taken at the first run."""
    chat_template: str | None = Field(None, title="Chat template")
    """Path of a Jinja file that replaces the tokenizer's own template."""
    seed: int = Field(0, ge=0)
    """Seed of the tiny random model."""


def run(config: BaseModelConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Import the base model; output kind `model`, its files under `model/`."""
    from pipeline_lib.models.base import import_base_model  # noqa: PLC0415  (torch)

    assert not inputs
    context.progress(0.0, f"importing {config.source}")
    source = config.source
    if source.startswith("s3://"):
        source = str(context.store.download_prefix(source, context.workdir.parent / "download"))
    import_base_model(
        source, context.workdir / "model", revision=config.revision,
        chat_template=_template_text(config.chat_template), seed=config.seed,
    )  # fmt: skip
    return StageOutput("model", context.workdir)


def _template_text(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise ModelNotFoundError(
            f"no chat template at {path!r}", next_step="give the path of a Jinja file as model.chat_template"
        )
    return file.read_text(encoding="utf-8")
