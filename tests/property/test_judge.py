"""Whatever a judge answers, a verdict is read as it stands or not at all."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.feedback.questions import Asking, Form, NoVerdictError, Question
from pipeline_lib.feedback.verdicts import judged

FORMS: tuple[Form, ...] = ("pair", "rank", "rate")
ASKING = {form: Asking.of(form, "1-10", None) for form in FORMS}
# Mostly what verdicts are made of, so that many are nearly right.
NEARLY = st.lists(st.sampled_from([*"[]ABC123>=,. ", "[[", "]]", "x", "[[A]]", "[[1 > 2]]", "[[3, 4]]"]), max_size=12)


def outcome(form: Form, order: tuple[int, ...], answer: str) -> dict[int, float] | str:
    try:
        return ASKING[form].standing(Question(order, ""), answer)
    except NoVerdictError as error:
        return error.kind


@given(st.sampled_from(FORMS), NEARLY.map("".join) | st.text(max_size=40))
def test_an_answer_is_a_verdict_on_all_that_was_shown_or_none(form: Form, answer: str) -> None:
    found = outcome(form, (1, 0), answer)
    if isinstance(found, str):
        assert found in ("missing", "contradicting", "unfitting")
    else:
        assert set(found) == {0, 1}
        assert all(math.isfinite(value) for value in found.values())
        assert answer.count("[[") >= 1


@given(st.permutations(range(5)), st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 99))
def test_a_ranking_is_read_as_it_was_written(order: list[int], is_tie: list[bool], seed: int) -> None:
    text, place, places = str(order[0] + 1), 0, {order[0]: 0}
    for number, tie in zip(order[1:], is_tie, strict=True):
        place += not tie
        text += f"{' = ' if tie else ' > '}{number + 1}"
        places[number] = place
    shown = random.Random(seed).sample(range(5), 5)
    found = outcome("rank", tuple(shown), f"Well. [[{text}]]")
    assert found == {shown[number]: -float(place) for number, place in places.items()}


@given(st.lists(st.sampled_from(["[[A]]", "[[B]]", "[[C]]"]), min_size=1, max_size=4))
def test_verdicts_that_differ_are_none(marks: list[str]) -> None:
    found = outcome("pair", (0, 1), " and ".join(marks))
    assert (found == "contradicting") == (len(set(marks)) > 1)


@given(st.sampled_from(FORMS), st.integers(2, 5), st.randoms(use_true_random=False))
def test_a_judge_that_knows_the_truth_gives_its_order(form: Form, num: int, rng: random.Random) -> None:
    truth = [rng.randrange(1, 11) for _ in range(num)]
    read = []
    for question in ASKING[form].questions((), [str(place) for place in range(num)]):
        if form == "rate":
            mark = ", ".join(str(truth[place]) for place in question.order)
        elif form == "pair":
            first, second = (truth[place] for place in question.order)
            mark = "C" if first == second else "A" if first > second else "B"
        else:
            levels = sorted(set(truth), reverse=True)
            groups = [[str(n + 1) for n, k in enumerate(question.order) if truth[k] == level] for level in levels]
            mark = " > ".join(" = ".join(group) for group in groups)
        read.append((question, ASKING[form].standing(question, f"[[{mark}]]")))
    found = judged(form, num, read)
    for pair in found.pairs:
        assert pair.in_order == pair.swapped, "the truth has no order of showing"
        first, second = found.scores[pair.first], found.scores[pair.second]
        assert first is not None
        assert second is not None
        assert (first > second) == (truth[pair.first] > truth[pair.second])
