"""Configuration of pretraining text that is mixed into a training. Light: imports no torch."""

from __future__ import annotations

from pydantic import Field

from pipeline_lib.validation import Frozen


class PretrainingSettings(Frozen):
    """Plain text whose language-model loss is added to each step's, so that the model unlearns less."""

    path: str | tuple[str, ...] = Field(min_length=1)
    """JSONL files of rows `{"text": ...}`, plain or gzip: a path, folder, glob or `s3://` place, or a list."""
    field: str = Field("text", min_length=1)
    """The field that holds the text."""
    coef: float = Field(1.0, gt=0)
    """Weight of the pretraining loss; Chain of Hindsight takes 0.01, InstructGPT's PPO-ptx 27.8."""
    rows_per_step: int = Field(4, ge=1)
    """Pieces of text in every optimizer step."""
    max_tokens: int = Field(256, ge=8)
    """Longer texts are cut into pieces of this many tokens."""
    max_texts: int | None = Field(None, ge=1)
    """Read at most so many texts; null reads everything."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """What the files held when the run was planned; filled in by the program."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The configured places as a list."""
        return (self.path,) if isinstance(self.path, str) else self.path
