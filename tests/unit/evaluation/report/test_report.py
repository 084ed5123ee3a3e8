"""The report over a synthetic run: complete, escaped, self-contained, well-formed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline_lib.evaluation.report import build_report
from pipeline_lib.evaluation.report.lineage import walk
from pipeline_lib.schema import ArtifactRef, Verdict
from pipeline_lib.stages.report import ReportConfig, run

VOID = {"meta", "br", "hr", "img", "input", "link"}


def page_of(store: Any, inputs: dict[str, ArtifactRef]) -> str:
    return build_report(store, verdict=inputs["verdict"], dataset=inputs["dataset"], name="demo", sampled_prompts=10)


class Outline(HTMLParser):
    """Checks that elements close in order, and notes ids, classes, texts and addresses."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")
            assert not name.startswith("on"), f"{tag} has the handler {name}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()} is out of order"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return outline


@pytest.fixture(scope="module")
def page(synthetic: SimpleNamespace) -> str:
    store = synthetic.store()
    return page_of(store, synthetic.run(store))


def test_every_section_stands_on_the_page_in_the_order_of_importance(page: str) -> None:
    sections = ["verdict", "rows", "training", "rollouts", "candidates", "reward-model", "prompts", "lineage"]
    outline = outline_of(page)
    assert [name for name in outline.ids if name in sections] == sections
    assert [address for address in outline.addresses if address.startswith("#")] == [f"#{name}" for name in sections]


def test_the_page_is_well_formed_and_asks_for_nothing_else(page: str) -> None:
    outline = outline_of(page)
    assert page.startswith("<!doctype html>")
    assert outline.tags.count("h1") == 1
    assert len(set(outline.ids)) == len(outline.ids)
    assert all(address.startswith("#") for address in outline.addresses)
    assert {"script", "link", "iframe", "object", "img"}.isdisjoint(outline.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page, re.IGNORECASE)


def test_text_of_models_and_rows_is_escaped_wherever_it_stands(page: str, synthetic: SimpleNamespace) -> None:
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    # 2 of the drawn prompts x 4 models, 6 rollouts of PPO's first iteration, 1 quarantined row
    assert outline_of(page).text.count(synthetic.hostile) == 2 * 4 + 6 + 1


def test_the_verdict_comes_with_each_rule_its_figure_interval_threshold_and_reason(page: str) -> None:
    text = outline_of(page).text
    assert "Promoted: dpo" in text
    assert "dpo passed all 4 rules that apply; ppo did not pass. It is the first champion." in text
    assert "win_rate against base: lower bound at least 0.5 pass 0.680 0.510 … 0.800 0.5" in text
    assert "win_rate against base: lower bound at least 0.5 fail 0.640 0.430 … 0.760 0.5" in text
    assert "win_rate against champion: lower bound at least 0.45 not applicable – – 0.45" in text
    assert "there is no champion to compare with" in text
    assert "ranked by win rate against base: 0.680" in text


def test_the_funnel_tells_rows_codes_places_and_splits(page: str) -> None:
    text = outline_of(page).text
    assert "2,722 in → 2,702 kept (99.3 %)" in text
    assert "2,702 in → 2,021 kept (74.8 %)" in text
    assert "duplicates 2,407 2,030 377 E_DUPLICATES 377" in text
    assert "data/pairs.jsonl:17" in text
    assert "response has 1,430 tokens, the limit is 1,024" in text
    assert "What does function 7 do? → answer 7.0" in text
    assert "reward_test 10 0 10" in text


def test_the_reward_model_has_its_report_card(page: str) -> None:
    text = outline_of(page).text
    for title in ("AUC", "Brier score", "Calibration error", "Accuracy where the longer is worse", "Calibration",
                  "Accuracy by margin", "Accuracy by strength"):  # fmt: skip
        assert f" {title} " in text
    assert re.search(r"Accuracy by strength significantly 16 \d+(\.\d)? % 0\.\d+ … [01]\.\d+", text)
    assert "Raw scores: mean " in text
    assert "Accuracy over confidence, by bin" in page


def test_a_report_card_without_tables_shows_its_tiles_alone(synthetic: SimpleNamespace) -> None:
    """Runs from before the report card had tables are still shown."""
    store = synthetic.store()
    inputs = synthetic.run(store)
    plain = {"test_accuracy_frac": 0.75, "test_pairs": 8.0, "test_margin": 1.0}
    for key in [key for key in store.contents if key[1] == "report_card.json"]:
        store.contents[key] = json.dumps(plain).encode()
    text = outline_of(page_of(store, inputs)).text
    assert "Held-out accuracy 75 %" in text
    assert "Calibration" not in text


def test_every_training_stage_has_its_curves(page: str) -> None:
    text = outline_of(page).text
    for title in ("Supervised fine-tuning", "Reward model", "Preference optimisation (dpo)", "PPO"):
        assert title in text
    assert "120 steps on 60 rows" in text
    labels = re.findall(r'<svg class="chart" [^>]*aria-label="([^"]*)"', page)
    assert sum(label.startswith("Loss") for label in labels) == 4
    assert "Score over KL from the reference, by iteration" in labels
    for name in ("kl coef", "response (tokens)", "finished", "entropy (nats)"):
        assert any(f"over iterations ({name})" in label for label in labels), name
    assert "nan" not in page.lower().replace("nanny", "")


def test_ppo_samples_are_of_the_first_the_middle_and_the_last_iteration(page: str) -> None:
    assert re.findall(r"<h4>Iteration (\d+)</h4>", page) == ["1", "9", "18"]
    assert re.findall(r"<summary>3 more of iteration (\d+)</summary>", page) == ["1", "9", "18"]
    assert page.count('<div class="sample">') == 18


def test_own_samples_are_drawn_as_reward_against_kl_and_as_proxy_against_held_out(page: str) -> None:
    section = page[page.index('<section id="rollouts">') : page.index('<section id="candidates">')]
    text = outline_of(section).text
    assert "Reward against KL from iteration 1 to 18" in text
    assert (
        "Proxy and held-out reward apart where the policy has learned the proxy's faults trained against only" in text
    )
    assert "KL from the reference nats a response, by every estimator k1 k2 k3 " in text
    assert "Parts of the score each with its weight length reward_model" in text
    # Every iteration is a dot that tells its place, the first and the last one are named.
    path = re.search(r'<svg[^>]*aria-label="Score over KL from the reference, by iteration">(.*?)</svg>', section)
    assert path is not None
    assert len(re.findall(r"<title>iteration \d+: ", path[1])) == 18
    assert re.findall(r'class="label"[^>]*>(\d+)<', path[1]) == ["1", "18"]
    held_out = re.search(r'aria-label="Proxy and held-out reward, over iterations">(.*?)</svg>', section)
    assert held_out is not None
    assert held_out[1].count('<polyline class="own"') == 2


def test_breaches_of_limits_are_told_with_their_outcome(page: str) -> None:
    assert (
        "Circuit breaker. iteration 7: <KL> too far; iteration 18: too far. The training ended there; "
        "the result is the best state, before iteration 16." in outline_of(page).text
    )


def test_the_frontier_shows_every_trained_model_at_its_kl_and_score(page: str) -> None:
    drawing = re.search(r'aria-label="Held-out reward over KL of every model">(.*?)</svg>', page)
    assert drawing is not None
    # By hand: (-40 + quality) - (-40 - 2 quality) nats, the same for all rows of a model.
    places = dict(re.findall(r"<title>(\w+): \S+ at (\S+)</title>", drawing[1]))
    assert places == {"dpo": "2.40", "ppo": "1.95"}, "sft has a missing score, base is not trained"


def test_other_methods_and_further_reward_models_have_their_own_parts(synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    inputs = synthetic.run(store)
    manifest = store.manifest(inputs["verdict"])
    grpo = store.add("grpo", "model", {"sft_model": manifest.inputs["reward_model"]}, synthetic.grpo_files())
    judged = store.add("evaluate", "evaluation", {"model": grpo}, {"examples.jsonl": synthetic.examples("g", 0.7)})
    verdict = store.add(
        "gate", "verdict", {**manifest.inputs, "evaluation:small": judged},
        {"verdict.json": store.contents[inputs["verdict"], "verdict.json"]},
    )  # fmt: skip
    card = json.dumps({"test_accuracy_frac": 0.625, "test_pairs": 16.0}).encode()
    safe = store.add("reward", "reward_model", {"dataset": inputs["dataset"]}, {"report_card.json": card})
    page = build_report(
        store, verdict=verdict, dataset=inputs["dataset"], name="demo", sampled_prompts=0,
        reward_models={"safe": safe},
    )  # fmt: skip
    text = outline_of(page).text
    assert re.findall(r"<h3>(PPO|GRPO[^<]*?) <span", page) == ["PPO", "GRPO (small)"] * 2
    assert "Proxy and held-out" in text[text.index("PPO model/") : text.index("GRPO (small) model/")]
    assert "Proxy and held-out" not in text[text.index("GRPO (small) model/") :]
    assert text.index("84.4 %") < text.index("safe further reward model Held-out accuracy 62.5 %")
    assert "small: " in page, "the frontier has it"
    assert safe.id in page, "and so has the lineage"


def test_rounds_that_a_judge_or_people_labelled_are_told_with_their_agreement(synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    inputs = synthetic.run(store)
    manifest = store.manifest(inputs["verdict"])
    agreed = {"pairs": 40, "agree_frac": 0.725, "kappa": 0.44}
    of_judge = {
        "labels": "judge", "prompts_labelled": 16, "with_reward_model": agreed, "read_frac": 0.95,
        "between_orders": {"agree_frac": 0.8}, "first_shown_frac": 0.55, "longer_frac": None,
    }  # fmt: skip
    of_people = {"labels": "people", "prompts_labelled": 1234, "with_reward_model": {**agreed, "kappa": None}}
    trained = manifest.inputs["reward_model"]
    for figures in (of_judge, of_people):
        rows = store.add("rollouts", "dataset", {"model": trained}, {"samples.jsonl": b""})
        labelled = store.add("labels", "dataset", {"rollouts": rows}, {"agreement.json": json.dumps(figures).encode()})
        trained = store.add("preference", "model", {"sft_model": trained, "dataset": labelled}, {})
    judged = store.add("evaluate", "evaluation", {"model": trained}, {"examples.jsonl": synthetic.examples("i", 0.7)})
    verdict = store.add(
        "gate", "verdict", {**manifest.inputs, "evaluation:iterated": judged},
        {"verdict.json": store.contents[inputs["verdict"], "verdict.json"]},
    )  # fmt: skip
    page = page_of(store, {"verdict": verdict, "dataset": inputs["dataset"]})
    assert "labels" in outline_of(page).ids
    rows = re.findall(r'<tr><th scope="row">iterated <span.*?</tr>', page)
    cells = [re.findall(r"<td[^>]*>(?:<b>)?([^<]*)", row) for row in rows]
    assert cells == [
        ["judge", "16", "40", "72.5\u00a0%", "0.440", "–", "80\u00a0%", "55\u00a0%", "–", "95\u00a0%"],
        ["people", "1,234", "40", "72.5\u00a0%", "–", "–", "–", "–", "–", "–"],
    ]


def test_figures_that_are_missing_are_a_dash(page: str) -> None:
    text = outline_of(page).text
    assert "kl: at most 12 nats a response pass – – 12" in text
    assert "Length bias –" in text
    assert "Reward-model score higher is better" in text
    row = re.search(r'"row">Reward-model score<span.*?</tr>', page, re.DOTALL)
    assert row is not None
    cells = re.findall(r"<b>(.*?)</b>", row.group())
    assert len(cells) == 4
    assert cells[1] == "–"  # one sft answer has no score


def test_models_stand_side_by_side_with_intervals(page: str) -> None:
    row = re.search(r'"row">Response length<span.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert re.findall(r"<b>(.*?)</b>", row.group()) == ["45.5"] * 4  # mean of 40 … 51
    text = outline_of(page).text
    assert "All models answered the same 12 held-out prompts" in text
    assert "84.4 %" in text
    assert "64 held-out pairs, interval 0.7" in text


def test_sampled_prompts_are_as_many_as_asked_for_with_all_answers(page: str) -> None:
    assert page.count('<article class="asked">') == 10
    assert page.count('<div class="answer reference">') == 10
    assert page.count("is-winner") - page.count(".is-winner") == 10
    assert "cut at the limit" in page


def test_the_lineage_lists_every_artifact_once_with_time_and_memory(page: str, synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    inputs = synthetic.run(store)
    table = page[page.index('<table class="lineage">') :]
    for ref in store.manifests:
        assert table.count(f'title="{ref.id}"') == 1
    text = outline_of(page).text
    assert "1 min 23 s" in text
    assert "1.5 GiB" in text
    lineage = walk(store, inputs["verdict"], inputs["dataset"])
    depths = {node.title: node.depth for node in lineage.nodes}
    assert depths["collect"] == depths["base_model"] == 0
    assert [depths[name] for name in ("filter", "sft", "reward", "ppo", "eval · ppo", "gate")] == [1, 2, 3, 4, 5, 6]


def test_a_run_in_which_nobody_passed_says_so_and_why(synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    text = outline_of(page_of(store, synthetic.run(store, winner=None, with_ppo=False))).text
    assert "Not promoted" in text
    assert "No candidate passed the gate: dpo failed kl. There is no champion yet." in text


def test_a_winner_that_is_the_champion_already_is_not_called_promoted(synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    inputs = synthetic.run(store)
    verdict = Verdict.model_validate_json(store.contents[inputs["verdict"], "verdict.json"])
    same = verdict.model_copy(update={"champion": verdict.candidate("dpo").model})
    store.contents[inputs["verdict"], "verdict.json"] = same.model_dump_json().encode()
    text = outline_of(page_of(store, inputs)).text
    assert "dpo stays champion" in text
    assert "Promoted" not in text


def test_parts_that_a_run_does_not_have_are_left_out(synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    verdict = store.add("gate", "verdict", {}, {"verdict.json": Verdict(
        candidates=(), winner=None, champion=None, policy={}).model_dump_json().encode()})  # fmt: skip
    dataset = store.add("mix", "dataset", {}, {})
    outline = outline_of(page_of(store, {"verdict": verdict, "dataset": dataset}))
    assert outline.ids == ["verdict", "lineage"]
    assert "there was no candidate" in outline.text


def test_artifacts_of_an_earlier_champion_are_in_the_lineage_but_not_in_the_curves(synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    inputs = synthetic.run(store)
    old = store.add("sft", "model", {}, {"metrics.jsonl": synthetic.metrics("old", 7, 2.0, 1.0)}, config={"seed": 9})
    of_old = store.add("evaluate", "evaluation", {"model": old}, {"examples.jsonl": synthetic.examples("old", 0.6)})
    manifest = store.manifest(inputs["verdict"])
    verdict = store.add(
        "gate", "verdict", {**manifest.inputs, "evaluation:champion": of_old},
        {"verdict.json": store.contents[inputs["verdict"], "verdict.json"]},
    )  # fmt: skip
    page = page_of(store, {"verdict": verdict, "dataset": inputs["dataset"]})
    assert old.id in page
    assert "7 steps" not in outline_of(page).text
    assert page.count('<tr class="inherited">') == 2
    assert page.count("m-champion") > 10


def test_equal_artifacts_give_equal_bytes(page: str, synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    assert page_of(store, synthetic.run(store)) == page


def test_the_stage_writes_the_page(tmp_path: Path, page: str, synthetic: SimpleNamespace) -> None:
    store = synthetic.store()
    context = SimpleNamespace(store=store, workdir=tmp_path)
    output = run(ReportConfig(name="demo"), synthetic.run(store), context)
    assert output.kind == "report"
    assert (output.directory / "report.html").read_text(encoding="utf-8") == page
