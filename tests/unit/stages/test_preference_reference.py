"""The reference of a preference stage is the model that it trains, by the sha256 of its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline_lib.errors import IntegrityError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages import preference
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers


def put(store: ArtifactStore, folder: Path, kind: str, files: dict[str, str], **inputs: ArtifactRef) -> ArtifactRef:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    about: dict[str, Any] = {"config": {"folder": folder.name}, "metrics": {}, "measurements": {}}
    return store.commit(folder, kind=kind, stage="test", stage_version=1, inputs=inputs, stage_key=None, **about)


def test_figures_of_another_model_are_refused(store: ArtifactStore, tmp_path: Path) -> None:
    files = {"model/model.safetensors": "weights", "model/config.json": "{}", "metrics.jsonl": "1"}
    sft = put(store, tmp_path / "sft", "model", files)
    same = put(store, tmp_path / "same", "model", {**files, "metrics.jsonl": "2"})
    base = put(store, tmp_path / "base", "model", {**files, "model/model.safetensors": "others"})
    context = cast(StageContext, SimpleNamespace(store=store))
    found = {}
    for name, scored in (("sft", sft), ("same", same), ("base", base)):
        figures = {"logps.json": json.dumps({"row": [-1.0, -2.0]})}
        found[name] = put(store, tmp_path / f"logps-{name}", "reference_logps", figures, sft_model=scored)
    for name in ("sft", "same"):  # another run, the same weights
        inputs = {"sft_model": sft, "reference_logps": found[name]}
        assert preference._reference(inputs, context) == {"row": (-1.0, -2.0)}
    with pytest.raises(IntegrityError, match="is not the model that the policy starts from: model/model"):
        preference._reference({"sft_model": sft, "reference_logps": found["base"]}, context)
