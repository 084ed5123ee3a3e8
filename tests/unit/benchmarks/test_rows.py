"""The rows of the benchmark: their lengths, their order, their fingerprints, and the work they need."""

from __future__ import annotations

import hashlib

from transformers import LlamaConfig

from benchmarks.digests import sequence_digest, step_digest
from benchmarks.prepare import best_fit, in_plan_order
from benchmarks.rows import PROMPT_TOKENS, RESPONSE_TOKENS, pair_records, records
from benchmarks.work import needed_work
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.settings import OfflineSettings
from tests import toy


def test_rows_have_the_promised_lengths_and_are_the_same_each_time() -> None:
    encoder = toy.encoder(max_prompt_tokens=512, max_response_tokens=512)
    rows = records(encoder, count=20, responses=2, seed=5)
    assert len({row.id for row in rows}) == 20
    for row in rows:
        tree = encoder.tree(row)
        assert PROMPT_TOKENS[0] <= len(tree.prompt_ids) <= PROMPT_TOKENS[1]
        assert all(RESPONSE_TOKENS[0] <= len(ids) <= RESPONSE_TOKENS[1] for ids in tree.response_ids)
    assert rows == records(encoder, count=20, responses=2, seed=5)


def test_a_comparison_of_four_has_six_pairs_the_better_first() -> None:
    row = toy.record("which?", "a", "b", "c", "d")
    assert [(pair.responses[0].content + pair.responses[1].content) for pair in pair_records(row)] == [
        "ab", "ac", "ad", "bc", "bd", "cd",
    ]  # fmt: skip


def test_rows_are_trained_on_in_the_wanted_order() -> None:
    wanted = [toy.record(f"prompt {number}", "yes", "no") for number in range(12)]
    trees = [toy.encoder().tree(row) for row in in_plan_order(wanted)]
    plan = DataPlan.of(trees, OfflineSettings(batch_size=4, seed=11))
    trained = [tree.record_id for step in range(plan.num_steps) for tree in plan.rows(step)]
    assert trained == [row.id for row in wanted]


def test_best_fit_decreasing() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == 2  # 6+4, 5+3+2
    assert best_fit([9, 9, 9], 10) == 3
    assert best_fit([], 10) == 0


def test_a_fingerprint_sees_ids_and_labels_but_not_the_order_of_rows() -> None:
    first, second = sequence_digest([1, 2, 3], [3]), sequence_digest([1, 2, 4], [4])
    assert step_digest([first, second]) == step_digest([second, first])
    assert sequence_digest([1, 2, 3], [2, 3]) != first
    assert sequence_digest([12, 3], [3]) != sequence_digest([1, 23], [3])
    assert first == int.from_bytes(hashlib.sha256(b"1,2,3|3").digest()[:8], "big")


def test_the_work_is_counted_by_hand() -> None:
    # Width 4, one layer: attention 4*4 + 4*2 + 4*2 + 4*4 = 48, MLP 3*4*8 = 96: 144 weights; head 10*4.
    config = LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    tree = Tree("row", (1, 2), ((3,), (4, 5)), (False, False))
    # 5 tokens; the head at 3 of them. A token sees 1, 2 (prompt), 3 (first), 3, 4 (second): 13 positions.
    work = needed_work([tree], config, trainable="lora", has_head=True)
    assert (work.pairs, work.tokens, work.counted_tokens) == (1, 7, 3)
    assert work.flops == 2 * 2 * 144 * 5 + 3 * 4 * 4 * 13 + 2 * 2 * 40 * 3
    full = needed_work([tree], config, trainable="full", has_head=False)
    assert full.flops == 3 * 2 * 144 * 5 + 3 * 4 * 4 * 13
