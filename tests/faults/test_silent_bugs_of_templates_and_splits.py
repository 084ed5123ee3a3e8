"""Two more faults that hide in a green log: another chat template than in training, and held-out rows trained on.

As in the other files of their kind, each check runs on the code as it is and on the code with the
fault in it; here the product itself stops, with its own message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline_lib.data.split import SplitConfig, SplitKeys, split_of
from pipeline_lib.errors import DataError, IntegrityError
from pipeline_lib.models.publish import log_and_verify
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import Split
from pipeline_lib.stages import filter as filter_stage
from pipeline_lib.stages import training_stage
from pipeline_lib.text.chat_template import PLAIN_TEMPLATE, ChatTokenizer
from tests.unit.stages.test_collect_and_filter import (
    FolderStore,
    funnel,
    pairs,
    rejections,
    run_collect,
    run_filter,
    write_rows,
)

# 8 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, and the facts of its training beside it."""
    write_tiny_model(tmp_path / "model", seed=0)
    facts = {"template_sha256": ChatTokenizer.load(tmp_path / "model").template_sha256}
    training_stage.write_facts(tmp_path, facts)
    return tmp_path / "model"


def lose_the_template(folder: Path) -> None:
    """The planted fault: what saved the model did not write its chat template."""
    (folder / "chat_template.jinja").unlink()


def test_08_a_template_that_was_not_saved_is_noticed_before_anything_is_measured(folder: Path) -> None:
    training_stage.require_template(folder, ChatTokenizer.load(folder))
    lose_the_template(folder)
    served = ChatTokenizer.load(folder)
    assert served.tokenizer.chat_template == PLAIN_TEMPLATE
    with pytest.raises(IntegrityError, match=r"chat template in model/ has sha256 \w{12}, the model was trained with"):
        training_stage.require_template(folder, served)


def test_08_a_model_from_elsewhere_has_no_facts_to_compare_with(folder: Path) -> None:
    (folder.parent / "training.json").unlink()
    training_stage.require_template(folder, ChatTokenizer.load(folder))


@pytest.mark.parametrize("template", [None, "{{ messages[-1]['content'] }}"])
def test_08_what_is_served_renders_as_in_training_byte_for_byte(
    folder: Path, tmp_path: Path, template: str | None
) -> None:
    def log_model(parts: dict[str, Any], **_: Any) -> SimpleNamespace:
        parts["model"].save_pretrained(tmp_path / "served")
        kept = parts["tokenizer"].chat_template
        parts["tokenizer"].chat_template = template or kept  # the planted fault, where there is another one
        parts["tokenizer"].save_pretrained(tmp_path / "served")
        parts["tokenizer"].chat_template = kept
        return SimpleNamespace(model_uri=str(tmp_path / "served"))

    def load_model(uri: str, *, return_type: str) -> dict[str, Any]:
        return {"model": AutoModelForCausalLM.from_pretrained(uri), "tokenizer": AutoTokenizer.from_pretrained(uri)}

    if template is None:
        assert log_and_verify(folder, log_model, load_model) == str(tmp_path / "served")
        return
    with pytest.raises(IntegrityError, match="chat template that MLflow loads back is not the one of training"):
        log_and_verify(folder, log_model, load_model)


# 14 --------------------------------------------------------------------------------------------------


def by_row(rows: Sequence[SplitKeys], config: SplitConfig) -> list[Split]:
    """The planted fault: a split by row, so that a prompt's rows land on both sides."""
    return [split_of(str(number), config) for number, _ in enumerate(rows)]


def test_14_a_prompt_is_not_in_training_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [*pairs(60), *({**row, "chosen": f"{row['chosen']} Yes."} for row in pairs(60))]
    same_but_for_its_looks = [{**row, "prompt": row["prompt"].upper() + "  ", "chosen": "Seven."} for row in pairs(60)]
    rows = write_rows(tmp_path / "rows.jsonl", [*twice, *same_but_for_its_looks])
    store = FolderStore(tmp_path)
    collected = run_collect(store, sources=[{"name": "jsonl", "path": rows}])
    fractions = {"sft": 0.0, "reward": 0.4, "policy": 0.2, "reward_test": 0.2, "gate": 0.2}
    run_filter(store, collected, name="good", split={"fractions": fractions})
    monkeypatch.setattr(filter_stage, "assign_splits", by_row)
    with pytest.raises(DataError, match=r"one prompt is in two splits: .*:\d+ in \w+, .*:\d+ in \w+"):
        run_filter(store, collected, name="bad", split={"fractions": fractions})


SAYING = "the quick brown fox jumps over the lazy dog while nobody in town looks"


def quoting() -> list[dict[str, str]]:
    """Rows of different prompts that all end with one saying of fourteen words, and rows that do not."""
    quoted = [{**row, "chosen": f"{row['chosen']} {SAYING}, {n}"} for n, row in enumerate(pairs(12))]
    return [*quoted, *pairs(60, start=12)]


def test_14_training_rows_that_quote_held_out_ones_are_refused(tmp_path: Path) -> None:
    """Each side of the split has the saying: without the step it is trained on and measured with."""
    rows = write_rows(tmp_path / "rows.jsonl", quoting())
    store = FolderStore(tmp_path)
    collected = run_collect(store, sources=[{"name": "jsonl", "path": rows}])
    fractions = {"sft": 0.0, "reward": 0.4, "policy": 0.2, "reward_test": 0.2, "gate": 0.2}

    def with_saying(folder: Path) -> dict[str, int]:
        files = {split.value: folder / f"{split.value}.jsonl" for split in Split}
        return {name: file.read_text().count(SAYING) for name, file in files.items()}

    leaky = with_saying(run_filter(store, collected, name="leaky", split={"fractions": fractions}))
    assert leaky["reward"] + leaky["policy"] > 0
    assert leaky["reward_test"] + leaky["gate"] > 0
    clean = run_filter(store, collected, name="clean", split={"fractions": fractions}, decontaminate={"words": 13})
    found = with_saying(clean)
    assert (found["reward"], found["policy"]) == (0, 0)
    assert (found["reward_test"], found["gate"]) == (leaky["reward_test"], leaky["gate"])
    refused = [row for row in rejections(clean) if row.code == "E_CONTAMINATED"]
    assert len(refused) == leaky["reward"] + leaky["policy"]
    assert f"it shares 13 words with a held-out row: {' '.join(SAYING.split()[:13])}" == refused[0].reason
    last = funnel(clean)[-1]
    assert (last.name, last.rows_in - last.rows_kept) == ("decontaminate", len(refused))


def test_14_what_many_held_out_rows_say_is_a_common_phrase(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", quoting())
    collected = run_collect(store, sources=[{"name": "jsonl", "path": rows}])
    fractions = {"sft": 0.0, "reward": 0.4, "policy": 0.2, "reward_test": 0.2, "gate": 0.2}
    folder = run_filter(store, collected, split={"fractions": fractions}, decontaminate={"words": 13, "common_rows": 1})
    held_out = sum((folder / f"{name}.jsonl").read_text().count(SAYING) for name in ("reward_test", "gate"))
    assert held_out > 1
    assert rejections(folder) == []
