"""vLLM as a server and in this process: what is asked, what comes back, and which weights answer."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline_lib.errors import ConfigError, GeneratorError
from pipeline_lib.generation import GENERATORS, vllm_watch
from pipeline_lib.generation.handover import Handover, name_of
from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.sampling import Sample, sample
from pipeline_lib.models.settings import Ia3Settings, LoraSettings, PrefixSettings
from pipeline_lib.training.generating import mismatch_nats, policy_for
from tests.toy import sharpen
from tests.unit.generation.fake_vllm import Package, Reply, Server, TinyEngine, install, serving
from tests.unit.generation.policies import CHOSEN, END, PAD, PROMPTS, apart_from, drawn_by, fixed, move, opened, trained
from tests.unit.generation.tiny_models import write_sharp_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharp_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(directory: Path) -> Iterator[Server]:
    with serving(TinyEngine(directory)) as served:
        yield served


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    return install(monkeypatch)


def expected_of(model: Any, *, seed: int = 7, copies: int = 2) -> list[tuple[int, ...]]:
    """What the engine samples: each prompt from a seed of its own."""
    found = []
    for index, prompt in enumerate(PROMPTS):
        own = derive_seed(seed, "sample", index)
        found += sample(model, [prompt], CHOSEN, eos_id=END, pad_id=PAD, seed=own, samples_per_prompt=copies)
    return [one.ids for one in found]


# Both ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["server", "process"])
def spec(request: pytest.FixtureRequest) -> Any:
    """A generator's configuration, of a server or in this process."""
    if request.param == "server":
        return request.getfixturevalue("server").spec()
    request.getfixturevalue("package")
    return {"name": "vllm"}


def test_samples_come_in_order_as_token_ids_with_log_probabilities(directory: Path, spec: Any) -> None:
    model = load_causal_model(directory, dtype=torch.float32)
    samples = drawn_by(opened(fixed(directory), spec))
    assert [one.ids for one in samples] == expected_of(model)
    assert len(set(samples)) == len(samples)
    assert all(one.is_finished == (END in one.ids) for one in samples)
    assert apart_from(model, samples) < 1e-5


def test_the_most_likely_response_is_one_however_many_are_asked_for(directory: Path, spec: Any) -> None:
    samples = drawn_by(opened(fixed(directory), spec), temperature=0.0, copies=3)
    assert [one.ids for one in samples[:3]] == [samples[0].ids] * 3
    assert len({one.ids for one in samples}) == len(PROMPTS)


def test_an_adapter_is_handed_over_when_it_has_changed(directory: Path, spec: Any) -> None:
    policy = trained(directory, moved_by=0.02)
    generator = opened(policy_for(policy), spec)
    first = drawn_by(generator)
    assert apart_from(policy.model, first) < 1e-5
    move(policy, 0.02)
    stale = drawn_by(generator)
    assert stale == first
    assert apart_from(policy.model, stale) > 1e-3, "without an update the old weights should answer"
    generator.update(policy_for(policy))
    assert apart_from(policy.model, drawn_by(generator)) < 1e-5


def test_all_weights_are_handed_over_where_all_are_trained(directory: Path, spec: Any) -> None:
    policy = trained(directory, adapter=None, moved_by=0.002)
    generator = opened(policy_for(policy), spec)
    assert apart_from(policy.model, drawn_by(generator)) < 1e-5
    move(policy, 0.002)
    generator.update(policy_for(policy))
    assert apart_from(policy.model, drawn_by(generator)) < 1e-5


def test_the_adapter_is_the_policys_own_where_others_are_on_its_base(directory: Path, spec: Any) -> None:
    policy = trained(directory, moved_by=0.02)
    assert policy.adapter is not None
    expected = drawn_by(opened(policy_for(policy), spec))
    policy.adapter.add_adapter("another", policy.adapter.peft_config["default"])
    assert drawn_by(opened(policy_for(policy), spec)) == expected


@pytest.mark.parametrize(
    ("adapter", "named"),
    [(PrefixSettings(num_tokens=2), "VirtualTokens"), (Ia3Settings(), "IA3"), (LoraSettings(use_dora=True), "DoRA")],
)
def test_adapters_that_vllm_does_not_load_are_refused(directory: Path, spec: Any, adapter: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"whose adapter is {named}"):
        opened(policy_for(trained(directory, adapter)), spec)


def test_other_weights_are_noticed(directory: Path, spec: Any) -> None:
    samples = drawn_by(opened(fixed(directory), spec))
    other = load_causal_model(directory, dtype=torch.float32)
    sharpen(other, 3.0)
    with pytest.raises(GeneratorError, match="nats a token from those of the policy"):
        apart_from(other, samples)


def test_a_sampler_that_says_nothing_is_not_compared() -> None:
    assert mismatch_nats([Sample((1, 2), False)], [torch.zeros(2)]) is None
    heard = [Sample((1, 2), False, (-1.0, -2.0)), Sample((3, 4, 5), False, (-1.0, -1.0, -9.0))]
    found = mismatch_nats(heard, [torch.tensor([-1.5, -2.0]), torch.tensor([-1.25, -1.0])])
    assert float(found) == pytest.approx(0.75 / 4)  # type: ignore[arg-type]  # the cut token does not count


# Server -------------------------------------------------------------------------------------------


def test_nothing_is_left_to_the_servers_own_defaults(directory: Path, server: Server) -> None:
    drawn_by(opened(fixed(directory), server.spec()), top_p=0.9, temperature=0.7, min_new_tokens=2)
    body = server.bodies("/v1/completions")[0]
    wanted = {
        "model": "tiny", "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 6, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [END], "return_token_ids": True, "add_special_tokens": False,
    }  # fmt: skip
    assert wanted.items() <= body.items()
    assert {tuple(body["prompt"]) for body in server.bodies("/v1/completions")} == {tuple(ids) for ids in PROMPTS}


def test_adapters_that_are_no_longer_asked_are_unloaded(directory: Path, server: Server, tmp_path: Path) -> None:
    policy = trained(directory, moved_by=0.02)
    generator = opened(policy_for(policy), server.spec(exchange=str(tmp_path)))
    for _ in range(3):
        drawn_by(generator)
        generator.update(policy_for(policy))  # unchanged: nothing is loaded
    assert len(server.engine.loads) == 1
    move(policy, 0.01)
    generator.update(policy_for(policy))
    assert len(server.engine.loads) == 2
    assert len(server.engine.adapters) == 1
    assert [folder.name for folder in tmp_path.iterdir()] == list(server.engine.adapters)
    # Another process comes to the same weights: they are there already.
    again = opened(policy_for(policy), server.spec(exchange=str(tmp_path)))
    assert len(server.engine.loads) == 2
    assert drawn_by(again) == drawn_by(generator)


def test_prompts_cached_under_old_weights_are_set_apart(directory: Path, server: Server) -> None:
    policy = trained(directory, adapter=None)
    generator = opened(policy_for(policy), server.spec())
    drawn_by(generator)
    move(policy, 0.001)
    generator.update(policy_for(policy))
    drawn_by(generator)
    salts = [body["cache_salt"] for body in server.bodies("/v1/completions")]
    assert len(set(salts[:4])) == len(set(salts[4:])) == 1
    assert salts[0] != salts[4]


def test_a_fixed_model_is_read_where_it_is_or_copied_into_the_exchange(
    directory: Path, server: Server, tmp_path: Path
) -> None:
    opened(fixed(directory), server.spec())
    assert server.engine.loads == [str(directory)]
    opened(fixed(directory), server.spec(exchange=str(tmp_path)))
    assert server.engine.loads[1] == str(tmp_path / name_of(directory))


def busy(_: str, __: Any) -> Reply:
    return 503, {"error": {"message": "try later"}}


def test_a_busy_server_is_asked_again(directory: Path, server: Server) -> None:
    generator = opened(fixed(directory), server.spec(retries=2))
    expected = drawn_by(generator)
    server.before = [busy, busy]
    assert drawn_by(generator, batch_size=1) == expected
    server.before = [busy] * 3
    with pytest.raises(GeneratorError, match=r"did not answer in 3 tries; the last: 503 .*try later"):
        drawn_by(generator, batch_size=1)


def test_a_refusal_is_told_with_the_servers_words_and_not_repeated(directory: Path, server: Server) -> None:
    generator = opened(fixed(directory), server.spec())
    before = len(server.asked)
    with pytest.raises(GeneratorError, match="400 Bad Request: This model's maximum context length is 200 tokens"):
        generator.generate(PROMPTS[:1], CHOSEN.model_copy(update={"max_new_tokens": 500}), seed=0)
    assert len(server.asked) == before + 1


def test_a_server_that_is_not_there_is_named(directory: Path) -> None:
    spec = {"name": "vllm", "url": "http://127.0.0.1:9", "retries": 1, "backoff_s": 0}
    with pytest.raises(GeneratorError, match=r"127\.0\.0\.1:9/v1/models did not answer in 2 tries") as caught:
        opened(fixed(directory), spec)
    assert caught.value.is_transient


def test_silence_is_a_failure_after_the_timeout(directory: Path, server: Server) -> None:
    generator = opened(fixed(directory), server.spec(timeout_s=0.2, retries=0))
    server.before = [lambda *_: (0, None)]
    with pytest.raises(GeneratorError, match="timed out"):
        drawn_by(generator, batch_size=1)


def test_whoever_is_asked_to_end_does_not_wait_for_answers(directory: Path, server: Server) -> None:
    class AskedToEndError(Exception):
        pass

    def stop(_: int) -> None:
        raise AskedToEndError

    generator = opened(fixed(directory), server.spec(timeout_s=3600))
    server.before = [lambda *_: None, lambda *_: (0, None), lambda *_: (0, None)]
    done = threading.Event()

    def run() -> None:
        with pytest.raises(AskedToEndError):
            generator.generate(PROMPTS, CHOSEN, seed=0, on_batch=stop)
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert done.wait(timeout=60)
    server.released.set()
    assert len(drawn_by(generator)) == 8, "the line should be open again"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("no json", "no JSON"),
        ({"choices": []}, "not 2 choices"),
        ({"choices": [{"index": 0}, {"index": 1}]}, "no token ids"),
        ({"choices": [{"index": n, "token_ids": [5], "finish_reason": "abort"} for n in (0, 1)]}, "ended by 'abort'"),
    ],
)
def test_an_answer_that_is_none_is_named(directory: Path, server: Server, answer: Any, said: str) -> None:
    generator = opened(fixed(directory), server.spec())
    server.before = [lambda *_: (200, answer)]
    with pytest.raises(GeneratorError, match=said):
        drawn_by(generator, batch_size=1)


def test_a_server_without_the_means_is_told_what_to_do(directory: Path, server: Server) -> None:
    server.has_development_mode = False
    with pytest.raises(GeneratorError, match="collective_rpc: 404") as caught:
        opened(fixed(directory), server.spec())
    assert "VLLM_SERVER_DEV_MODE=1" in caught.value.next_step
    server.engine.max_lora_rank = 2
    with pytest.raises(GeneratorError, match="greater than max_lora_rank 2") as caught:
        opened(policy_for(trained(directory)), server.spec())
    assert "--max-lora-rank" in caught.value.next_step
    with pytest.raises(GeneratorError, match="serves tiny, not 'large'"):
        opened(fixed(directory), server.spec(model="large"))


def test_the_key_goes_with_every_request_and_into_no_message(
    directory: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "very secret"
    spec = server.spec(auth_variable="PREFLINE_GENERATOR_KEY")
    monkeypatch.delenv("PREFLINE_GENERATOR_KEY", raising=False)
    with pytest.raises(ConfigError, match="PREFLINE_GENERATOR_KEY of the generator is not set"):
        opened(fixed(directory), spec)
    monkeypatch.setenv("PREFLINE_GENERATOR_KEY", "wrong")
    with pytest.raises(GeneratorError, match="401 Unauthorized") as caught:
        opened(fixed(directory), spec)
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("PREFLINE_GENERATOR_KEY", "very secret")
    assert len(drawn_by(opened(fixed(directory), spec))) == 8


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"url": "http://far.example", "auth_variable": "PREFLINE_GENERATOR_KEY"}, "it must be https"),
        ({"url": "http://user:word@far.example"}, "use auth_variable"),
        ({"url": "http://far.example/v1"}, "url"),
        ({"auth_variable": "HOME"}, "auth_variable"),
        ({"retrys": 3}, "did you mean"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=said):
        GENERATORS.build({"name": "vllm", **parameters})


# In this process ----------------------------------------------------------------------------------


def test_the_engine_gets_the_folder_and_what_the_trainer_needs(directory: Path, package: Package) -> None:
    policy = trained(directory, LoraSettings(rank=20, alpha=8))
    opened(policy_for(policy), {"name": "vllm", "engine": {"gpu_memory_utilization": 0.3, "enforce_eager": True}})
    (engine,) = package.engines
    assert engine.engine.directory == directory
    assert engine.arguments == {
        "trust_remote_code": False, "generation_config": "vllm", "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True, "enable_lora": True, "max_lora_rank": 32, "max_loras": 1,
        "gpu_memory_utilization": 0.3, "enforce_eager": True,
    }  # fmt: skip


def test_a_fixed_model_is_loaded_once_and_asked_in_portions(directory: Path, package: Package) -> None:
    told: list[int] = []
    opened(fixed(directory), {"name": "vllm"}).generate(PROMPTS, CHOSEN, seed=0, on_batch=told.append)
    (engine,) = package.engines
    assert engine.engine.loads == []
    assert engine.calls == [3, 1]
    assert told == [3, 4]


def test_cached_prompts_are_dropped_with_the_weights(directory: Path, package: Package) -> None:
    policy = trained(directory, adapter=None)
    generator = opened(policy_for(policy), {"name": "vllm"})
    (engine,) = package.engines
    before = engine.num_resets
    move(policy, 0.001)
    generator.update(policy_for(policy))
    assert engine.num_resets == before + 1


def test_weights_that_vllm_would_load_in_part_are_refused(directory: Path, package: Package) -> None:
    package.is_on_cpu = True
    opened(policy_for(trained(directory)), {"name": "vllm"})
    with pytest.raises(GeneratorError, match="would keep the old output matrix"):
        opened(policy_for(trained(directory, adapter=None)), {"name": "vllm"})


def test_engines_end_with_whoever_started_them() -> None:
    engine = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    watch = subprocess.Popen([sys.executable, vllm_watch.__file__, str(engine.pid)], stdin=subprocess.PIPE)
    assert watch.stdin is not None
    watch.stdin.close()  # as the system does for a process that is gone
    assert engine.wait(timeout=60) == -signal.SIGKILL
    assert watch.wait(timeout=60) == 0


def test_what_vllm_says_of_its_arguments_is_told(directory: Path, package: Package) -> None:
    with pytest.raises(GeneratorError, match="unexpected keyword argument 'colour'"):
        opened(fixed(directory), {"name": "vllm", "engine": {"colour": "blue"}})
    with pytest.raises(GeneratorError, match="memory utilization must be"):
        opened(fixed(directory), {"name": "vllm", "engine": {"gpu_memory_utilization": 2.0}})
    with pytest.raises(ConfigError, match="rank 512 at most, this one has 600"):
        opened(policy_for(trained(directory, LoraSettings(rank=600, alpha=8))), {"name": "vllm"})


def test_vllm_that_is_not_installed_is_named(directory: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be imported: No module named 'vllm'") as caught:
        opened(fixed(directory), {"name": "vllm"})
    assert "generator.url" in caught.value.next_step


# Files --------------------------------------------------------------------------------------------


def test_a_version_is_named_by_its_content_and_appears_whole(directory: Path, tmp_path: Path) -> None:
    handover = Handover.at(str(tmp_path))
    policy = trained(directory)
    first = handover.write(policy_for(policy))
    assert handover.write(policy_for(policy)) == first
    move(policy, 0.01)
    second = handover.write(policy_for(policy))
    assert first.name != second.name
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}
    handover.forget(but=second)
    assert [path.name for path in tmp_path.iterdir()] == [second.name]
    assert second.directory.stat().st_mode & 0o755 == 0o755


def test_nothing_is_left_where_a_disk_is_full(directory: Path, tmp_path: Path) -> None:
    policy = policy_for(trained(directory, adapter=None))

    def fail() -> Any:
        class Model:
            def save_pretrained(self, folder: Path) -> None:
                (Path(folder) / "model.safetensors").write_bytes(b"half")
                raise OSError("No space left on device")

        return Model()

    with pytest.raises(OSError, match="No space left"):
        Handover.at(str(tmp_path)).write(replace(policy, load=fail))
    assert list(tmp_path.iterdir()) == []


def test_a_place_of_its_own_goes_with_the_handover(directory: Path) -> None:
    handover = Handover.at(None)
    place, version = handover.place, handover.write(policy_for(trained(directory)))
    assert version.directory.parent == place
    assert version.directory.is_dir()
    del handover
    gc.collect()
    assert not place.exists()
