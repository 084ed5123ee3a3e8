"""Every generator of ours samples from weights that are summed with their adapters once, and leaves none behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from pipeline_lib.generation.contract import Policy
from pipeline_lib.models.fused_lora import FusedLoraLinear
from tests.unit.generation.policies import drawn_by, opened, trained
from tests.unit.generation.tiny_models import write_sharp_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharp_model(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("name", ["batched", "continuous"])
def test_weights_are_summed_once_for_all_batches(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = trained(directory, moved_by=0.05).model
    layers = [layer for layer in policy.modules() if isinstance(layer, FusedLoraLinear)]
    assert layers
    generator = opened(Policy(directory, lambda: policy), {"name": name})

    with monkeypatch.context() as patched:
        patched.setattr(FusedLoraLinear, "sum_of_weights", lambda self: None)
        by_parts = drawn_by(generator)

    asked: list[FusedLoraLinear] = []
    sum_of_weights = FusedLoraLinear.sum_of_weights

    def counted(layer: FusedLoraLinear) -> Tensor | None:
        asked.append(layer)
        return sum_of_weights(layer)

    monkeypatch.setattr(FusedLoraLinear, "sum_of_weights", counted)
    assert drawn_by(generator) == by_parts
    assert asked == layers, "once each, though there are more samples than fit into a batch"
    assert all(layer.summed_ED is None for layer in layers)
