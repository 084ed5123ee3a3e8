"""Stage `labels` on a real store: what a judge behind HTTP and people make of a round's samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import ConfigError, DataError, InterruptedRunError, JudgeError, LabelsWantedError
from pipeline_lib.schema import Author, Record, Split
from pipeline_lib.stages import labels
from pipeline_lib.stages.labels import LabelsConfig, Shown, pin_labels
from pipeline_lib.stages.rollout_rows import SampledPrompt, ScoredResponse
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit, context_in, write_files
from tests.toy import record
from tests.unit.training.judge_server import endpoint, longer, ordering, saying
from tests.unit.training.reward_server import Scorer, scorer, status

__all__ = ["scorer"]
pytestmark = pytest.mark.servers

# Prompt, and each response with the reward model's score.
ROUND = {
    "one": {"aaa": 3.0, "aa": 2.0, "a": 1.0},  # the longer, the better
    "two": {"bbb": -1.0, "bb": 0.0},  # the shorter, the better
    "alone": {"c": 0.5},
    "mute": {"": 9.0},
}


def sampled(text: str, responses: Mapping[str, float]) -> SampledPrompt:
    prompt = record(text).model_copy(update={"responses": (), "ranks": (), "split": Split.POLICY})
    author = Author(kind="model", name="tiny")
    return SampledPrompt(
        prompt=prompt,
        responses=tuple(
            ScoredResponse(
                content=content, author=author, score=score, num_tokens=1, is_finished=True, is_usable=bool(content)
            )
            for content, score in responses.items()
        ),
    )


class Bench:
    """A round's samples in a store, and runs of the stage over them."""

    def __init__(self, store: ArtifactStore, root: Path) -> None:
        self.store, self.root, self.num_runs, self.told = store, root, 0, Told()
        self.sampled = [sampled(text, responses) for text, responses in ROUND.items()]
        others = (Split.REWARD, Split.REWARD_TEST, Split.GATE)
        files = {f"{split.value}.jsonl": f"{split.value}\n".encode() for split in others}
        files["samples.jsonl"] = "".join(each.model_dump_json() + "\n" for each in self.sampled).encode()
        self.rollouts = commit(store, write_files(root / "rollouts", files), "dataset")

    @property
    def lines(self) -> list[str]:
        """What the last run told, line by line."""
        return self.told.lines

    def run(
        self, config: LabelsConfig, should_stop: Callable[[], bool] = lambda: False
    ) -> tuple[Path, dict[str, float | None]]:
        self.num_runs += 1
        self.told = Told()
        context = context_in(self.root / f"run-{self.num_runs}", self.store, told=self.told)
        context = replace(context, should_stop=should_stop)
        output = labels.run(pin_labels(config), {"rollouts": self.rollouts}, context)
        assert output.kind == "dataset"
        return output.directory, output.metrics


@pytest.fixture
def bench(store: ArtifactStore, tmp_path: Path) -> Bench:
    return Bench(store, tmp_path)


def judging(**how: Any) -> LabelsConfig:
    own = {key: how.pop(key) for key in ("compared", "select", "top_frac") if key in how}
    return validate(LabelsConfig, {"labels": {"name": "judge", **how}, **own}, where="labels")


def records(directory: Path, split: Split) -> dict[str, Record]:
    lines = (directory / f"{split.value}.jsonl").read_text().splitlines()
    rows = [Record.model_validate_json(line) for line in lines]
    return {row.messages[0].content: row for row in rows}


def order_of(row: Record) -> list[tuple[int, str]]:
    return [(rank, response.content) for rank, response in zip(row.ranks, row.responses, strict=True)]


def agreement_in(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "agreement.json").read_text())
    return found


def test_a_judge_orders_the_responses_in_the_reward_models_place(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(longer)
    directory, metrics = bench.run(judging(endpoint=endpoint(scorer)))
    rows = records(directory, Split.POLICY)
    assert order_of(rows["one"]) == [(1, "aaa"), (2, "aa"), (3, "a")]
    assert order_of(rows["two"]) == [(1, "bbb"), (2, "bb")], "the reward model has it the other way"
    assert [response.score for response in rows["one"].responses] == [1.0, 0.5, 0.0]
    assert rows["alone"].kind == "prompt"
    assert set(rows) == {"one", "two", "alone"}
    best = {prompt: row.responses[0].content for prompt, row in records(directory, Split.SFT).items()}
    assert best == {"one": "aaa", "two": "bbb", "alone": "c"}
    assert (directory / "gate.jsonl").read_text() == "gate\n"

    assert len(scorer.asked) == 8, "four pairs, each in both orders"
    assert scorer.asked[0][1] | {"messages": 0} == {
        "model": "judge", "temperature": 0.0, "max_tokens": 512, "messages": 0,
    }  # fmt: skip
    found = agreement_in(directory)
    assert (found["questions"], found["read_frac"], found["unread"]) == (8, 1.0, {})
    assert found["between_orders"]["agree_frac"] == 1.0
    assert (found["first_shown_frac"], found["longer_frac"]) == (0.5, 1.0)
    # Three pairs of `one` agree with the reward model, the one of `two` does not.
    assert found["with_reward_model"]["agree_frac"] == 0.75
    assert metrics["with_reward_model_agree_frac"] == 0.75
    assert metrics["comparisons"] == 2.0


def test_a_judge_that_favours_what_it_reads_first_says_nothing_but_that(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(lambda shown: "[[A]]")
    directory, _ = bench.run(judging(endpoint=endpoint(scorer)))
    found = agreement_in(directory)
    assert found["between_orders"]["agree_frac"] == 0.0
    assert found["first_shown_frac"] == 1.0
    assert {row.kind for row in records(directory, Split.POLICY).values()} == {"prompt"}, "ties are no comparisons"


def test_a_ranking_takes_two_questions_a_prompt(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(ordering(len))
    directory, _ = bench.run(judging(endpoint=endpoint(scorer), form="rank", compared="best_and_worst"))
    assert len(scorer.asked) == 4
    assert order_of(records(directory, Split.POLICY)["one"]) == [(1, "aaa"), (2, "a")]


def test_ratings_compare_across_prompts(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(lambda shown: f"[[{', '.join(str(20 * len(text)) for text in shown)}]]")
    directory, _ = bench.run(
        judging(endpoint=endpoint(scorer), form="rate", scale="1-100", select="top_share", top_frac=0.3)
    )
    # int(0.3 * 6) of the six responses that have a mark; of the two with the best one, the first sampled.
    rows = records(directory, Split.SFT)
    assert {prompt: row.responses[0].content for prompt, row in rows.items()} == {"one": "aaa"}
    scores = [response.score for response in records(directory, Split.POLICY)["two"].responses]
    assert scores == pytest.approx([59 / 99, 39 / 99])


def test_answers_without_a_verdict_are_named_and_nothing_is_made_of_them(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(lambda shown: "I cannot say." if "bb" in shown else longer(shown))
    directory, _ = bench.run(judging(endpoint=endpoint(scorer)))
    row = bench.sampled[1].prompt.id[:12]
    assert re.match(
        rf"2 of 8 answers hold no verdict: row {row}: no verdict: 'I cannot say.'; row {row}", bench.lines[0]
    )
    assert set(records(directory, Split.POLICY)) == {"one", "alone"}, "a prompt without a verdict is left out"
    found = agreement_in(directory)
    assert (found["unread"], found["read_frac"]) == ({"missing": 2}, 0.75)
    kept = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in kept if line["unread"]] == ["I cannot say."] * 2

    with pytest.raises(JudgeError, match="2 of 8 answers hold no verdict") as caught:
        bench.run(judging(endpoint=endpoint(scorer), min_read_frac=0.8))
    assert "min_read_frac" in caught.value.next_step


def test_nothing_is_asked_twice_where_a_judge_breaks_down_in_the_middle(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(longer)
    whole, _ = bench.run(judging(endpoint=endpoint(scorer, version="0")))
    scorer.asked.clear()
    scorer.answers = [saying(longer)] * 3 + [status(401)]
    config = judging(endpoint=endpoint(scorer, at_once=1))
    with pytest.raises(JudgeError, match=r"did not judge row \w{12}: http.*/score answered 401 Unauthorized") as caught:
        bench.run(config)
    assert "3 of 8 answers are kept" in caught.value.next_step
    assert len(scorer.asked) == 4, "after the failure no further question is begun"
    again, _ = bench.run(config)
    assert bench.lines == ["3 of 8 answers were there already"]
    assert len(scorer.asked) == 4 + 5
    questions = [body["messages"][0]["content"] for _, body in scorer.asked]
    assert len(set(questions)) == 8
    assert (again / "policy.jsonl").read_bytes() == (whole / "policy.jsonl").read_bytes()

    # What is made of the answers is no part of a question: nothing is asked anew.
    bench.run(judging(endpoint=endpoint(scorer, at_once=1, timeout_s=7.0), compared="best_and_worst"))
    assert len(scorer.asked) == 9
    bench.run(judging(endpoint=endpoint(scorer, version="2")))
    assert len(scorer.asked) == 9 + 8


def test_a_stop_in_the_middle_keeps_what_was_answered(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(longer)
    config = judging(endpoint=endpoint(scorer, at_once=1))
    with pytest.raises(InterruptedRunError, match=r"stopped as asked after \d of 8 answers"):
        bench.run(config, should_stop=lambda: len(scorer.asked) >= 3)
    num_asked = len(scorer.asked)
    assert num_asked < 8
    bench.run(config)
    (line,) = bench.lines
    kept = int(line.split()[0])
    assert kept >= 3 - 1
    assert len(scorer.asked) == num_asked + 8 - kept


def test_questions_without_an_answer_may_be_left_out(bench: Bench, scorer: Scorer) -> None:
    scorer.otherwise = saying(longer)
    scorer.answers = [status(400)]
    directory, _ = bench.run(judging(endpoint=endpoint(scorer, at_once=1), on_error="skip"))
    assert agreement_in(directory)["unread"] == {"unanswered": 1}


def test_the_secret_is_sent_and_never_kept(
    bench: Bench, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, store: ArtifactStore
) -> None:
    scorer.otherwise = saying(longer)
    config = judging(endpoint=endpoint(scorer, auth_variable="PREFLINE_JUDGE_KEY"))
    monkeypatch.delenv("PREFLINE_JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="PREFLINE_JUDGE_KEY of the judge is not set"):
        bench.run(config)
    monkeypatch.setenv("PREFLINE_JUDGE_KEY", "open sesame")
    directory, _ = bench.run(config)
    assert scorer.asked[0][0]["Authorization"] == "Bearer open sesame"
    assert all(b"sesame" not in path.read_bytes() for path in directory.iterdir())
    assert "sesame" not in config.model_dump_json()


def test_recorded_answers_judge_without_a_line(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    scorer.otherwise = saying(longer)
    asked, _ = bench.run(judging(endpoint=endpoint(scorer)))
    recorded = tmp_path / "answers.jsonl"
    recorded.write_bytes((asked / "answers.jsonl").read_bytes())
    directory, _ = bench.run(judging(recorded=str(recorded)))
    assert (directory / "policy.jsonl").read_bytes() == (asked / "policy.jsonl").read_bytes()
    assert pin_labels(judging(recorded=str(recorded))).fingerprints[str(recorded)]
    recorded.write_text("\n".join(recorded.read_text().splitlines()[2:]))
    directory, _ = bench.run(judging(recorded=str(recorded)))
    assert agreement_in(directory)["unread"] == {"unanswered": 2}


def test_other_words_are_another_judgement(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "question.txt"
    with pytest.raises(ConfigError, match="no question for the judge at"):
        pin_labels(judging(endpoint=endpoint(scorer), question=str(path)))
    path.write_text("Which is better?\n{answers}")
    config = judging(endpoint=endpoint(scorer), question=str(path))
    before = pin_labels(config)
    scorer.otherwise = saying(longer)
    directory, _ = bench.run(config)
    assert (directory / "question.txt").read_text() == path.read_text()
    assert scorer.asked[0][1]["messages"][0]["content"].startswith("Which is better?\n[The answer of assistant A]\n")
    path.write_text("Which is better now?\n{answers}")
    assert pin_labels(config) != before
    bench.run(config)
    assert len(scorer.asked) == 16
    of_program = [pin_labels(judging(endpoint=endpoint(scorer), form=form)) for form in ("pair", "rank")]
    assert len({pinned.fingerprints["question"] for pinned in of_program}) == 2


def write_ranks(path: Path, ranks: Mapping[str, Sequence[int] | None]) -> None:
    """Label the rows of a file, by prompt."""
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    for row in rows:
        places = dict(zip(sorted(row["responses"]), ranks[row["prompt"][0]["content"]] or (), strict=False))
        row |= {"ranks": [places[text] for text in row["responses"]]} if places else {"skip": True}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def people(path: Path) -> LabelsConfig:
    return validate(LabelsConfig, {"labels": {"name": "people"}, "file": str(path)}, where="labels")


def test_people_are_waited_for_and_then_decide(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "labels" / "round.jsonl"
    with pytest.raises(
        LabelsWantedError, match=r"2 of 2 rows of .*round.jsonl wait for labels; the first: .*:1"
    ) as caught:
        bench.run(people(path))
    assert "run the same command" in caught.value.next_step
    assert caught.value.exit_code == 36
    with pytest.raises(LabelsWantedError):
        bench.run(people(path))

    write_ranks(path, {"one": (2, 1, 1), "two": (1, 2)})  # by text: a, aa, aaa and b, bb
    directory, metrics = bench.run(people(path))
    rows = records(directory, Split.POLICY)
    assert sorted(order_of(rows["one"])) == [(1, "aa"), (1, "aaa"), (3, "a")]
    assert order_of(rows["two"]) == [(1, "bb"), (2, "bbb")]
    assert rows["alone"].kind == "prompt"
    # a-aa, a-aaa and b-bb as the reward model has it; aa-aaa a tie for people.
    assert metrics["with_reward_model_agree_frac"] == 0.75
    assert metrics["with_reward_model_decided_agree_frac"] == 1.0


def test_rows_that_people_skip_are_left_out(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "round.jsonl"
    with pytest.raises(LabelsWantedError):
        bench.run(people(path))
    write_ranks(path, {"one": None, "two": (2, 1)})
    directory, _ = bench.run(people(path))
    assert set(records(directory, Split.POLICY)) == {"two", "alone"}


def test_a_judge_is_compared_with_people(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "round.jsonl"
    with pytest.raises(LabelsWantedError):
        bench.run(people(path))
    write_ranks(path, {"one": (1, 2, 3), "two": (2, 1)})  # the shorter first, then the longer first
    scorer.otherwise = saying(longer)
    directory, metrics = bench.run(judging(endpoint=endpoint(scorer), gold=str(path)))
    assert agreement_in(directory)["with_gold"]["agree_frac"] == 0.25
    assert metrics["with_gold_pairs"] == 4.0


def test_a_file_that_changes_under_the_stage_is_noticed(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "round.jsonl"
    pinned = pin_labels(people(path))
    assert pinned.fingerprints == {str(path): ""}
    path.write_text("{}\n")
    context = context_in(tmp_path / "run", bench.store)
    with pytest.raises(DataError, match="not what they were when the stage was planned"):
        labels.run(pinned, {"rollouts": bench.rollouts}, context)


def test_the_order_of_showing_follows_from_the_texts_alone() -> None:
    one = sampled("p", {"x": 1.0, "y": 2.0, "z": 3.0})
    other = sampled("p", {"z": -3.0, "x": 5.0, "y": 0.0})
    assert Shown.of(one).texts == Shown.of(other).texts
    assert set(Shown.of(one).texts) == {"x", "y", "z"}
    orders = {Shown.of(sampled(str(n), {"x": 1.0, "y": 2.0})).texts for n in range(20)}
    assert len(orders) == 2, "neither the better nor the first one is always shown first"
