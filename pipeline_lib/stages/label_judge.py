"""The judge of stage `labels`: questions are asked once, answers are kept one by one, verdicts are counted."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline_lib.errors import ConflictError, InterruptedRunError, JudgeError
from pipeline_lib.feedback.agreement import agreement, leanings, preferred
from pipeline_lib.feedback.annotation import read_labels
from pipeline_lib.feedback.answers import Chat, ChatEndpoint, read_recorded, recorded_file
from pipeline_lib.feedback.questions import Asking, NoVerdict, NoVerdictError, Question
from pipeline_lib.feedback.verdicts import Judged, judged
from pipeline_lib.hashing import canonical_json, sha256_json
from pipeline_lib.http_json import NoAnswerError
from pipeline_lib.stages.contract import StageContext

if TYPE_CHECKING:
    from pipeline_lib.stages.labels import JudgeLabels, Scores, Shown

VERSION = 1

_ANSWER = "judge_answer"
_SHOWN_ROWS = 5


@dataclass
class _Answers:
    """What the judge said, by the questions' keys."""

    found: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Why there is no answer."""


def ask_judge(
    labels: JudgeLabels, shown: Sequence[Shown], context: StageContext
) -> tuple[list[Scores], dict[str, Any]]:
    """Return the judge's score of every response, and figures of how far to believe it.

    Raises:
        JudgeError: The judge cannot be asked, or too few of its answers can be read.
        InterruptedRunError: The process was asked to end; the answers so far are kept.
    """
    asking = labels.asking
    asked = [asking.questions(each.sampled.prompt.messages, each.texts) for each in shown]
    owner = {question.key: each for each, own in zip(shown, asked, strict=True) for question in own}
    questions = {question.key: question for own in asked for question in own}
    answers = _answers(labels, list(questions.values()), owner, context)
    unread: dict[str, _Unread] = {}
    results: list[Judged] = []
    with (context.workdir / "answers.jsonl").open("wb") as file:
        for each, own in zip(shown, asked, strict=True):
            read = []
            for question in own:
                standing, why = _read(asking, question, answers)
                if why is not None:
                    unread[question.key] = why
                read.append((question, standing))
                file.write(_answer_line(each, question, answers, why))
            results.append(judged(labels.form, len(each.responses), read))
    (context.workdir / "question.txt").write_text(asking.template, encoding="utf-8")
    _tell_unread(labels, unread, owner, len(questions), context)
    figures = {
        "questions": len(questions), "read_frac": 1 - len(unread) / len(questions) if questions else 1.0,
        "unread": dict(sorted(Counter(each.kind for each in unread.values()).items())),
        **_leanings(shown, results),
    }  # fmt: skip
    if labels.gold is not None:
        figures["with_gold"] = _with_gold(Path(labels.gold).expanduser(), shown, results)
    return [result.scores for result in results], figures


def _answers(
    labels: JudgeLabels, questions: Sequence[Question], owner: Mapping[str, Shown], context: StageContext
) -> _Answers:
    if labels.endpoint is not None:
        return _asked(labels.endpoint, questions, owner, context, stops=labels.on_error == "stop")
    assert labels.recorded is not None
    recorded = read_recorded(recorded_file(labels.recorded))
    answers = _Answers({each.key: recorded[each.key] for each in questions if each.key in recorded})
    reason = "the recorded answers have none for its key"
    answers.failed |= {each.key: reason for each in questions if each.key not in recorded}
    return answers


def _asked(
    endpoint: ChatEndpoint,
    questions: Sequence[Question],
    owner: Mapping[str, Shown],
    context: StageContext,
    *,
    stops: bool,
) -> _Answers:
    """Ask what was not asked before; each answer is kept when it comes."""
    answers, left = _Answers(), []
    for question in questions:
        kept = _kept_answer(endpoint, question, context)
        if kept is None:
            left.append(question)
        else:
            answers.found[question.key] = kept
    if answers.found:
        context.log(f"{len(answers.found)} of {len(questions)} answers were there already")
    num_kept = len(answers.found)

    def on_answer(done: int) -> None:
        context.progress((num_kept + done) / len(questions), f"asked {num_kept + done}/{len(questions)} questions")
        if context.should_stop():
            raise InterruptedRunError(
                f"stopped as asked after {len(answers.found)} of {len(questions)} answers",
                next_step="run the same command again: it goes on from there",
            )

    chat = endpoint.open(context.should_stop)
    requests = [partial(_ask, chat, question, answers, context, stops=stops) for question in left]
    chat.service.together(requests, at_once=endpoint.at_once, on_answer=on_answer)
    if answers.failed and stops:
        key, reason = next(iter(answers.failed.items()))
        raise JudgeError(
            f"the judge did not judge row {owner[key].sampled.prompt.id[:12]}: {reason}",
            next_step=f"check labels.endpoint, then run the same command: {len(answers.found)} of {len(questions)} "
            "answers are kept; or go on without such verdicts: labels.on_error: skip",
        )
    return answers


def _ask(chat: Chat, question: Question, answers: _Answers, context: StageContext, *, stops: bool) -> None:
    """Ask one question and keep its answer; after a failure that stops the stage no further one is begun."""
    if stops and answers.failed:
        return
    try:
        answer = chat.ask(question.text)
    except NoAnswerError as error:
        answers.failed[question.key] = chat.failure(error)
        return
    answers.found[question.key] = _keep(chat.endpoint, question, answer, context)


def _answer_key(endpoint: ChatEndpoint, question: Question) -> str:
    return sha256_json({"stage": _ANSWER, "version": VERSION, "judge": endpoint.identity(), "question": question.key})


def _kept_answer(endpoint: ChatEndpoint, question: Question, context: StageContext) -> str | None:
    kept = context.store.find(_answer_key(endpoint, question))
    return None if kept is None else str(context.store.read_json(kept, "answer.json")["answer"])


def _keep(endpoint: ChatEndpoint, question: Question, answer: str, context: StageContext) -> str:
    """Commit an answer; where somebody else asked the same at the same time, the first answer counts."""
    key = _answer_key(endpoint, question)
    with tempfile.TemporaryDirectory(dir=context.workdir.parent, prefix="answer-") as folder:
        (Path(folder) / "answer.json").write_bytes(canonical_json({"answer": answer}))
        try:
            context.store.commit(
                Path(folder), kind=_ANSWER, stage=_ANSWER, stage_version=VERSION, config={"key": key}, inputs={},
                metrics={}, measurements={}, stage_key=key,
            )  # fmt: skip
        except ConflictError:
            return _kept_answer(endpoint, question, context) or answer
    return answer


class _Unread(NamedTuple):
    """Why nothing can be read of an answer."""

    kind: NoVerdict
    reason: str


def _read(asking: Asking, question: Question, answers: _Answers) -> tuple[dict[int, float] | None, _Unread | None]:
    """Return what an answer says, or why nothing can be read of it."""
    if question.key not in answers.found:
        return None, _Unread("unanswered", answers.failed[question.key])
    try:
        return asking.standing(question, answers.found[question.key]), None
    except NoVerdictError as error:
        return None, _Unread(error.kind, str(error))


def _answer_line(each: Shown, question: Question, answers: _Answers, unread: _Unread | None) -> bytes:
    row = {
        "key": question.key, "row": each.sampled.prompt.id, "answer": answers.found.get(question.key),
        "responses": [each.texts[place] for place in question.order], "unread": unread.reason if unread else None,
    }  # fmt: skip
    return canonical_json(row) + b"\n"


def _tell_unread(
    labels: JudgeLabels, unread: Mapping[str, _Unread], owner: Mapping[str, Shown], total: int, context: StageContext
) -> None:
    """Name the answers without a verdict; stop where there are too many.

    Raises:
        JudgeError: Fewer of them than `min_read_frac` could be read.
    """
    if not unread:
        return
    first = list(unread.items())[:_SHOWN_ROWS]
    named = [f"row {owner[key].sampled.prompt.id[:12]}: {why.reason}" for key, why in first]
    more = f"; and {len(unread) - _SHOWN_ROWS} more" if len(unread) > _SHOWN_ROWS else ""
    told = f"{len(unread)} of {total} answers hold no verdict: {'; '.join(named)}{more}"
    if 1 - len(unread) / total < labels.min_read_frac:
        raise JudgeError(
            told, next_step="raise labels.endpoint.max_new_tokens, take another judge, or lower labels.min_read_frac"
        )
    context.log(told)


def _leanings(shown: Sequence[Shown], results: Sequence[Judged]) -> dict[str, Any]:
    found = leanings(
        (pair, len(each.texts[pair.first]), len(each.texts[pair.second]))
        for each, result in zip(shown, results, strict=True)
        for pair in result.pairs
    )
    return {
        "between_orders": found.between_orders.figures(), "first_shown_frac": found.first_shown_frac,
        "longer_frac": found.longer_frac,
    }  # fmt: skip


def _with_gold(path: Path, shown: Sequence[Shown], results: Sequence[Judged]) -> dict[str, Any]:
    """Compare the judge's verdicts with the labels of people, pair by pair."""
    items = [each.item for each in shown]
    gold = read_labels(path, items, is_partial=True).ranks
    both: list[tuple[float, float]] = []
    for item, result in zip(items, results, strict=True):
        ranks = gold.get(item.key)
        if ranks is None:
            continue
        for pair in result.pairs:
            if pair.outcome is not None:
                both.append((pair.outcome, preferred(-ranks[pair.first], -ranks[pair.second])))
    return agreement(both).figures()
