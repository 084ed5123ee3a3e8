"""ROUGE-L against the package rouge-score, on random and on real texts; distinct-n."""

from __future__ import annotations

import argparse
import asyncio
import collections
import decimal
import inspect
import json
import logging
import random
import textwrap

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pipeline_lib.evaluation.text_metrics import distinct_n, rouge_l, words

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
ODD = [
    "", " ", "?!", "a", "A", "Grüße aus Köln", "naïve café", "日本語の文", "x_y-z 3.14", "1,000 don't", "K\u212a İI ﬁ",
    "tab\tnew\nline\u2028end", "😀 ok 👍", "e\u0301", "ＡＢＣ", "\u00b2 ½",
]  # fmt: skip


def theirs(response: str, reference: str) -> float:
    return float(SCORER.score(reference, response)["rougeL"].fmeasure)


def docstrings() -> list[str]:
    texts = []
    for module in (argparse, asyncio, collections, decimal, json, logging, textwrap):
        members = (member for _, member in inspect.getmembers(module, callable))
        texts += [text for member in members if (text := inspect.getdoc(member))]
    return [text[:600] for text in texts]


def test_rouge_l_is_the_packages_on_random_texts() -> None:
    draw = random.Random(0)
    alphabet = ["a", "b", "c", "the", "The", "x-y", "é", "1", ",", "\n"]
    for _ in range(1500):
        response, reference = (" ".join(draw.choices(alphabet, k=draw.randrange(0, 15))) for _ in range(2))
        assert rouge_l(response, reference) == pytest.approx(theirs(response, reference), abs=1e-12)


def test_rouge_l_is_the_packages_on_real_texts() -> None:
    texts = docstrings()
    assert len(texts) > 100
    draw = random.Random(1)
    for _ in range(150):
        response, reference = draw.choice(texts), draw.choice(texts)
        assert rouge_l(response, reference) == pytest.approx(theirs(response, reference), abs=1e-12)


def test_rouge_l_is_the_packages_on_odd_texts() -> None:
    for response in ODD:
        for reference in ODD:
            assert rouge_l(response, reference) == pytest.approx(theirs(response, reference), abs=1e-12)


def test_rouge_l_of_a_text_with_itself_is_1() -> None:
    assert {rouge_l(text, text) for text in docstrings() if words(text)} == {1.0}


def test_distinct_n_is_a_share_that_falls_with_repetition() -> None:
    texts = docstrings()[:40]
    once = distinct_n(texts, 2)
    assert once is not None
    assert 0 < once < 1
    assert distinct_n(texts * 2, 2) == once / 2
    assert distinct_n(iter(texts), 2) == once
    assert distinct_n([], 2) is None
    assert distinct_n(["one", "two"], 2) is None
