"""What a judge is asked, and what of its answer is a verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_lib.errors import ConfigError
from pipeline_lib.feedback.questions import Asking, Form, NoVerdictError, Question, Scale
from pipeline_lib.schema import Message

ASKED = (
    Message(role="system", content="Be kind."), Message(role="user", content="Why {answers}?"),
)  # fmt: skip


def asking(form: Form, scale: Scale = "1-10") -> Asking:
    return Asking.of(form, scale, None)


def test_every_pair_is_asked_about_in_both_orders() -> None:
    found = asking("pair").questions(ASKED, ["alpha", "beta", "gamma"])
    assert [question.order for question in found] == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    assert len({question.key for question in found}) == 6
    first, second = found[0].text, found[1].text
    assert first.index("alpha") < first.index("beta")
    assert second.index("beta") < second.index("alpha")
    assert "System: Be kind.\n\nUser: Why {answers}?" in first, "braces in the texts stay what they are"
    assert "[The answer of assistant A]\nalpha\n[The end of the answer of assistant A]" in first
    assert '"[[A]]"' in first


@pytest.mark.parametrize("form", ["rank", "rate"])
def test_all_responses_are_asked_about_at_once_in_both_orders(form: Form) -> None:
    found = asking(form).questions(ASKED, ["alpha", "beta", "gamma"])
    assert [question.order for question in found] == [(0, 1, 2), (2, 1, 0)]
    assert "3 assistants" in found[0].text
    assert "[The answer of assistant 3]\nalpha\n" in found[1].text


def test_what_the_question_shows_as_an_example_can_be_read() -> None:
    for form in ("pair", "rank", "rate"):
        for scale in ("1-5", "1-7", "1-10", "1-100", "A-D"):
            chosen = asking(form, scale)  # type: ignore[arg-type]
            question = chosen.questions(ASKED, ["alpha", "beta", "gamma"])[0]
            example = question.text.split('"[[')[1].split("]]")[0]
            assert len(chosen.standing(question, f"[[{example}]]")) == len(question.order)


def test_one_response_is_rated_and_compared_with_nothing() -> None:
    assert asking("pair").questions(ASKED, ["one"]) == asking("rank").questions(ASKED, ["one"]) == []
    assert [question.order for question in asking("rate").questions(ASKED, ["one"])] == [(0,)]


@pytest.mark.parametrize(
    ("form", "scale", "order", "answer", "standing"),
    [
        ("pair", "1-10", (2, 0), "A is right. [[A]]", {2: 1.0, 0: 0.0}),
        ("pair", "1-10", (2, 0), "[[B]], once more: [[ B ]]", {2: 0.0, 0: 1.0}),
        ("pair", "1-10", (0, 1), "[[C]]", {0: 0.5, 1: 0.5}),
        ("rank", "1-10", (0, 1, 2), "[[2 > 3 > 1]]", {1: 0.0, 2: -1.0, 0: -2.0}),
        ("rank", "1-10", (2, 1, 0), "[[1>2=3]]", {2: 0.0, 1: -1.0, 0: -1.0}),
        ("rate", "1-10", (1, 0), "[[10, 1]]", {1: 1.0, 0: 0.0}),
        ("rate", "1-5", (1, 0), "[[4, 1.5]]", {1: 0.75, 0: 0.125}),
        ("rate", "A-D", (0, 1, 2), "[[A, B, D]]", {0: 1.0, 1: 2 / 3, 2: 0.0}),
    ],
)
def test_a_verdict_is_read(
    form: Form, scale: Scale, order: tuple[int, ...], answer: str, standing: dict[int, float]
) -> None:
    assert asking(form, scale).standing(Question(order, ""), answer) == pytest.approx(standing)


@pytest.mark.parametrize(
    ("form", "answer", "kind"),
    [
        ("pair", "A is better.", "missing"),
        ("pair", "", "missing"),
        ("pair", "[A]", "missing"),
        ("pair", "[[A]] or [[B]]", "contradicting"),
        ("pair", "[[a]]", "unfitting"),
        ("pair", "[[D]]", "unfitting"),
        ("pair", "[[A or B]]", "unfitting"),
        ("rank", "[[2 > 1]]", "unfitting"),
        ("rank", "[[1 > 2 > 2]]", "unfitting"),
        ("rank", "[[1 > 2 > 4]]", "unfitting"),
        ("rank", "[[1 < 2 < 3]]", "unfitting"),
        ("rank", "[[1 > > 2 = 3]]", "unfitting"),
        ("rate", "[[7, 3]]", "unfitting"),
        ("rate", "[[7, 3, 11]]", "unfitting"),
        ("rate", "[[7, 3, 0]]", "unfitting"),
        ("rate", "[[7, 3, nan]]", "unfitting"),
        ("rate", "[[7, 3, 1e1]]", "unfitting"),
        ("rate", "[[7; 3; 1]]", "unfitting"),
        ("rate", "[[A, B, C]]", "unfitting"),
    ],
)
def test_what_is_no_verdict_is_not_guessed(form: Form, answer: str, kind: str) -> None:
    order = (0, 1) if form == "pair" else (0, 1, 2)
    with pytest.raises(NoVerdictError) as caught:
        asking(form).standing(Question(order, ""), answer)
    assert caught.value.kind == kind


def test_other_words_come_out_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "question.txt"
    path.write_text("{count} answers: {answers} Which? [[{example}]] {other}")
    (first, _) = Asking.of("rank", "1-10", str(path)).questions(ASKED, ["x", "y"])
    assert first.text.startswith("2 answers: [The answer of assistant 1]\nx\n")
    assert first.text.endswith("Which? [[2 > 1]] {other}")
    path.write_text("Which?")
    with pytest.raises(ConfigError, match=r"never sees the {answers}"):
        Asking.of("rank", "1-10", str(path))
    with pytest.raises(ConfigError, match="no question for the judge at"):
        Asking.of("rank", "1-10", str(tmp_path / "nothing.txt"))
