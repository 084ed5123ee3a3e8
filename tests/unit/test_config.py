"""Configuration files: what an extended file hands on."""

from __future__ import annotations

from pathlib import Path

from pipeline_lib.config import PRESETS, load
from pipeline_lib.stages.run_config import RunConfig


def test_a_file_with_a_name_of_its_own_keeps_what_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: one\nmodel: {source: tiny-random, seed: 3}\nsft: {epochs: 2}\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nname: two\nsft: {batch_size: 4}\n")
    found = load(tmp_path / "own.yaml", RunConfig).value
    assert (found.name, found.model.source, found.model.seed) == ("two", "tiny-random", 3)
    assert (found.sft.epochs, found.sft.batch_size) == (2, 4)


def test_a_plug_in_of_another_name_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("dpo: {loss: {name: dpo, label_smoothing: 0.1}, epochs: 2}\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\ndpo: {loss: {name: ipo}}\n")
    dpo = load(tmp_path / "own.yaml", RunConfig).value.dpo
    assert dpo is not None
    assert dpo.epochs == 2
    assert dpo.loss["name"] == "ipo"
    assert "label_smoothing" not in dpo.loss


def test_every_method_s_preset_trains_on_what_it_extends() -> None:
    files = sorted((PRESETS / "methods").glob("*.yaml"))
    presets = [
        file for file in files if "extends: ../hh-rlhf.yaml" in file.read_text() and "sources:" not in file.read_text()
    ]
    assert len(presets) > 20
    for preset in presets:
        sources = load(preset, RunConfig).value.collect.sources
        assert [source["name"] for source in sources] == ["hugging_face"], preset.name
