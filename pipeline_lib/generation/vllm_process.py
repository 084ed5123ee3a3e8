"""vLLM in this process. It is no dependency: it brings a torch of its own version with it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil
from peft import LoraConfig, PeftModel
from transformers import AutoConfig

from pipeline_lib.errors import ConfigError, GeneratorError
from pipeline_lib.generation.contract import Policy
from pipeline_lib.generation.handover import Version
from pipeline_lib.models.sampling import Sample

if TYPE_CHECKING:
    from pipeline_lib.generation.vllm import Request, Vllm

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM reserves room for."""


@dataclass
class VllmProcess:
    """vLLM's offline engine."""

    llm: Any
    package: ModuleType
    lora: Any = None
    """The adapter that answers, as a `LoRARequest`; None: the model itself."""
    num_adapters: int = 0
    watch: subprocess.Popen[bytes] | None = None
    """Ends vLLM's own processes when this one is gone."""

    @classmethod
    def start(cls, settings: Vllm, policy: Policy) -> VllmProcess:
        """Load the policy's folder.

        Raises:
            ConfigError: vLLM is not installed, or the adapter's rank is above what it takes.
            GeneratorError: vLLM cannot load the model.
        """
        try:
            package = importlib.import_module("vllm")
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"generator 'vllm' without a url runs vLLM in this process, and it cannot be imported: {error}",
                next_step="install vllm, give generator.url of a server, or take generator: {name: continuous}",
            ) from error
        arguments: dict[str, Any] = {
            "model": str(policy.directory), "trust_remote_code": False, "generation_config": "vllm",
            # As the trainer's: after the temperature, over what may be drawn.
            "logprobs_mode": "processed_logprobs", "enable_prefix_caching": True,
            **_lora_arguments(policy), **settings.engine,
        }  # fmt: skip
        before = set(psutil.Process().children())
        try:
            llm = package.LLM(**arguments)
        except (RuntimeError, ValueError, OSError, TypeError) as error:
            raise GeneratorError(
                f"vLLM cannot load {policy.directory}: {_first_line(error)}",
                next_step="correct generator.engine, e.g. a lower gpu_memory_utilization or max_model_len",
            ) from error
        return cls(llm, package, watch=_watched(set(psutil.Process().children()) - before))

    def answer(self, requests: Sequence[Request], on_answer: Callable[[int], None]) -> list[list[Sample]]:
        """Answer every request; as many at once as `batch_size` says, so that a stop is noticed between."""
        found: list[list[Sample]] = []
        while len(found) < len(requests):
            chunk = requests[len(found) : len(found) + requests[0].settings.batch_size]
            found += self._answer(chunk)
            on_answer(len(found))
        return found

    def _answer(self, requests: Sequence[Request]) -> list[list[Sample]]:
        inputs = importlib.import_module("vllm.inputs")
        try:
            outputs = self.llm.generate(
                [inputs.TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests],
                [self.package.SamplingParams(detokenize=False, **request.arguments) for request in requests],
                use_tqdm=False, lora_request=self.lora,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise GeneratorError(
                f"vLLM failed: {_first_line(error)}", next_step="look at vLLM's own messages above"
            ) from error
        return [[_sample(answer, request) for answer in _in_order(output)] for output, request in
                zip(outputs, requests, strict=True)]  # fmt: skip

    def load(self, version: Version) -> None:
        """Answer from these weights from now on."""
        if version.kind == "adapter":
            self.num_adapters += 1
            request = importlib.import_module("vllm.lora.request").LoRARequest
            # Numbers are never used twice: vLLM keeps what it has loaded under one.
            self.lora = request(version.name, self.num_adapters, str(version.directory))
            return
        _require_reloadable(version)
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(version.directory)})
        except (RuntimeError, ValueError, OSError, TypeError, NotImplementedError) as error:
            raise GeneratorError(
                f"vLLM cannot load new weights: {_first_line(error)}",
                next_step="take a vLLM with `reload_weights(weights_path=...)`, or adapter.name: lora",
            ) from error
        # What is cached of prompts was computed by the weights before.
        self.llm.reset_prefix_cache()


def _watched(started: set[psutil.Process]) -> subprocess.Popen[bytes] | None:
    """Have the processes that vLLM has started ended when this one is, and be it by SIGKILL."""
    # Python's own helper, which every process of multiprocessing has, ends by itself and cleans up when it does.
    engines = [str(one.pid) for one in started if not _is_helper(one)]
    if not engines:
        return None
    script = Path(__file__).with_name("vllm_watch.py")
    return subprocess.Popen([sys.executable, str(script), *engines], stdin=subprocess.PIPE, start_new_session=True)


def _is_helper(process: psutil.Process) -> bool:
    """Tell whether a process is Python's resource tracker, or has ended."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:  # a zombie's error is one of these
        return True


def _require_reloadable(version: Version) -> None:
    """Refuse what vLLM would load in part without a word.

    Its kernels for CPUs keep a packed copy of the output matrix, and a reload leaves it out where the matrix is tied
    to the embeddings (seen with 0.32): responses would come from the new layers and the old output.
    """
    if not importlib.import_module("vllm.platforms").current_platform.is_cpu():
        return
    config = AutoConfig.from_pretrained(version.directory, local_files_only=True, trust_remote_code=False)
    if config.tie_word_embeddings:
        raise GeneratorError(
            "vLLM on a CPU would keep the old output matrix of a model that ties it to its embeddings",
            next_step="train an adapter (adapter.name: lora), or take generator: {name: continuous}",
        )


def _lora_arguments(policy: Policy) -> dict[str, Any]:
    if not isinstance(policy.adapter, PeftModel):
        return {}
    config = policy.adapter.peft_config[policy.adapter_name]
    assert isinstance(config, LoraConfig)
    ranks = [rank for rank in _RANKS if rank >= config.r]
    if not ranks:
        raise ConfigError(
            f"generator 'vllm' takes adapters of rank {_RANKS[-1]} at most, this one has {config.r}",
            next_step="lower adapter.rank, or take generator: {name: continuous}",
        )
    return {"enable_lora": True, "max_lora_rank": ranks[0], "max_loras": 1}


def _in_order(output: Any) -> list[Any]:
    return sorted(output.outputs, key=lambda answer: int(answer.index))


def _sample(answer: Any, request: Request) -> Sample:
    ids = tuple(int(token) for token in answer.token_ids)
    if not ids:
        raise GeneratorError("vLLM gave a response without a token", next_step="look at vLLM's own messages above")
    logps = None
    if answer.logprobs:
        logps = tuple(float(step[token].logprob) for step, token in zip(answer.logprobs, ids, strict=True))
    return Sample(ids, request.eos_id in ids, logps)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
