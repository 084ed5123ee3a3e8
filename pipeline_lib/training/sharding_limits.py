"""Which training stages can divide their weights among processes. Light: imports no torch."""

from __future__ import annotations

from pipeline_lib.training.settings import OfflineSettings, TrainingSettings

_WHOLE_ADAPTERS = ("qlora", "prefix", "prompt")
"""They stand outside of the layers, or in a format that cannot be cut."""
_WHOLE_OPTIMIZERS = ("adafactor", "adamw_8bit")
"""What they keep of a weight follows from all of it."""


def why_not_sharded(settings: TrainingSettings) -> str | None:
    """Say which key keeps a training stage's weights from being divided among processes; None: none does."""
    if not isinstance(settings, OfflineSettings):
        return f"method = {getattr(settings, 'method', '')!r} samples from the model that it trains"
    if getattr(settings, "select_by", None) is not None:
        return "select_by samples from the model that is trained"
    if settings.adapter is not None and settings.adapter.name in _WHOLE_ADAPTERS:
        return f"adapter.name = {settings.adapter.name!r} is not in the layers that are divided"
    if settings.optimizer.name in _WHOLE_OPTIMIZERS:
        return f"optimizer.name = {settings.optimizer.name!r} needs every weight whole"
    return None
