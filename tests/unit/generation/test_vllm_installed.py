"""The generator on vLLM itself, in this process and as a server; where vLLM is not installed, on nothing.

docs/methods/rollouts.md says how to run it. The engines take a minute, so each serves all tests of its kind.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline_lib.errors import GeneratorError
from pipeline_lib.generation.contract import Generator, Policy
from pipeline_lib.http_json import HttpJson
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.models.tiny import byte_tokenizer, tiny_config
from pipeline_lib.training.generating import policy_for
from pipeline_lib.training.trained_model import TrainedModel
from tests.toy import sharpen
from tests.unit.generation.policies import CHOSEN, END, PROMPTS, apart_from, drawn_by, fixed, move, opened, trained

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.slow, pytest.mark.timeout(900),
]  # fmt: skip

ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16,
    "kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.1,
}  # fmt: skip
"""Of a tiny model on any machine; its numbers are then the trainer's but for the order of sums."""
ROUNDING_NATS = 1e-3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads as wide as vLLM's kernels know them.

    Its output matrix is its own: one that is tied to the embeddings is not reloaded on CPUs.
    """
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), byte_tokenizer()
    config = tiny_config(len(tokenizer))
    config.head_dim, config.tie_word_embeddings = 32, False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
    sharpen(model, 6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(directory: Path) -> Any:
    return load_causal_model(directory, dtype=torch.float32)


def check_weights_follow(policy: TrainedModel, generator: Generator, *, by: float) -> None:
    """The weights that were handed over last answer, and no others."""
    first = drawn_by(generator, copies=3)
    assert apart_from(policy.model, first, copies=3) < ROUNDING_NATS
    move(policy, by)
    assert apart_from(policy.model, drawn_by(generator)) > 10 * ROUNDING_NATS, "the old weights should answer still"
    generator.update(policy_for(policy))
    assert apart_from(policy.model, drawn_by(generator)) < ROUNDING_NATS


def check_samples(directory: Path, generator: Generator) -> None:
    """What is asked for comes: so many, in order, ended as they must be, with the policy's log-probabilities."""
    model = model_of(directory)
    samples = drawn_by(generator, copies=3)
    assert len(samples) == 3 * len(PROMPTS)
    assert len({one.ids for one in samples}) > 2 * len(PROMPTS)
    assert all(one.is_finished == (one.ids[-1] == END) and END not in one.ids[:-1] for one in samples)
    assert all(one.is_finished or len(one.ids) == CHOSEN.max_new_tokens for one in samples)
    assert apart_from(model, samples, copies=3) < ROUNDING_NATS
    warm = drawn_by(generator, temperature=0.7)
    assert apart_from(model, warm, temperature=0.7) < ROUNDING_NATS
    greedy = drawn_by(generator, temperature=0.0)
    assert [one.ids for one in greedy[::2]] == [one.ids for one in greedy[1::2]]
    assert [one.ids for one in greedy[::2]] == [most_likely(model, prompt) for prompt in PROMPTS]
    endless = drawn_by(generator, stops_at_eos=False, max_new_tokens=40)
    assert {len(one.ids) for one in endless} == {40}


def most_likely(model: Any, prompt: list[int]) -> tuple[int, ...]:
    ids: list[int] = []
    while len(ids) < CHOSEN.max_new_tokens and END not in ids:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return tuple(ids)


# In this process ----------------------------------------------------------------------------------


def test_a_fixed_model_answers_in_this_process(directory: Path) -> None:
    check_samples(directory, opened(fixed(directory), {"name": "vllm", "engine": ENGINE}))


def test_all_weights_are_handed_over_in_this_process(directory: Path) -> None:
    policy = trained(directory, adapter=None, moved_by=0.002)
    check_weights_follow(policy, opened(policy_for(policy), {"name": "vllm", "engine": ENGINE}), by=0.02)


def test_adapters_are_handed_over_in_this_process(directory: Path) -> None:
    policy = trained(directory, LoraSettings(rank=12, alpha=8, use_rslora=True), moved_by=0.02)
    check_weights_follow(policy, opened(policy_for(policy), {"name": "vllm", "engine": ENGINE}), by=0.05)


def test_what_vllm_cannot_load_is_told_in_its_words(directory: Path) -> None:
    with pytest.raises(GeneratorError, match=r"vLLM cannot load .*colour"):
        opened(fixed(directory), {"name": "vllm", "engine": ENGINE | {"colour": "blue"}})


# Server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the model, with both ways of handing weights over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    switches = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-lora-rank", "16",
        "--logprobs-mode", "processed_logprobs", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
        "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 28), "--gpu-memory-utilization", "0.1",
    ]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | switches)
    place = f"http://127.0.0.1:{port}"
    try:
        HttpJson(place, {}, 60.0, 12, 0.5, should_stop=lambda: server.poll() is not None).get("/health")
        yield place
    finally:
        server.terminate()
        server.wait(timeout=60)


def spec(url: str, **parameters: Any) -> dict[str, Any]:
    return {"name": "vllm", "url": url, "retries": 1, "backoff_s": 0, **parameters}


def test_a_server_answers(directory: Path, url: str) -> None:
    check_samples(directory, opened(fixed(directory), spec(url)))


def test_all_weights_are_handed_over_to_a_server(directory: Path, url: str) -> None:
    policy = trained(directory, adapter=None, moved_by=0.002)
    check_weights_follow(policy, opened(policy_for(policy), spec(url)), by=0.02)
    # Whoever comes next gets the weights that it says, not those that were left there.
    again = opened(fixed(directory), spec(url))
    assert apart_from(model_of(directory), drawn_by(again)) < ROUNDING_NATS


def test_adapters_are_handed_over_to_a_server(directory: Path, url: str, tmp_path: Path) -> None:
    policy = trained(directory, LoraSettings(rank=12, alpha=8, use_rslora=True), moved_by=0.02)
    generator = opened(policy_for(policy), spec(url, exchange=str(tmp_path)))
    check_weights_follow(policy, generator, by=0.05)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"max_new_tokens": 500}, "400 .*max_model_len"), ({"min_new_tokens": 9}, "400 .*min_tokens")],
)
def test_a_server_says_why_it_refuses(directory: Path, url: str, changes: dict[str, Any], said: str) -> None:
    generator = opened(fixed(directory), spec(url))
    with pytest.raises(GeneratorError, match=said):
        drawn_by(generator, **changes)


def test_an_adapter_that_is_too_wide_is_refused_by_a_server(directory: Path, url: str) -> None:
    policy: Policy = policy_for(trained(directory, LoraSettings(rank=32, alpha=8), moved_by=0.02))
    with pytest.raises(GeneratorError, match=r"load_lora_adapter.*500.*rank") as caught:
        opened(policy, spec(url))
    assert "--max-lora-rank" in caught.value.next_step


def test_a_server_stops_writing_for_whoever_hangs_up(directory: Path, url: str) -> None:
    class AskedToEndError(Exception):
        pass

    def stop(_: int) -> None:
        raise AskedToEndError

    generator = opened(fixed(directory), spec(url))
    with pytest.raises(AskedToEndError):
        generator.generate(PROMPTS, CHOSEN, seed=0, on_batch=stop)
    assert len(drawn_by(generator)) == 2 * len(PROMPTS), "the line should be open again"
