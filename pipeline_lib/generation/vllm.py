"""vLLM, in this process or as a server: weights are handed over as files, responses come back as token ids.

What it says of log-probabilities is only compared with what the trainer says: its arithmetic is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from pydantic import Field, model_validator

from pipeline_lib.generation.contract import Generator, Policy
from pipeline_lib.hashing import derive_seed
from pipeline_lib.http_json import check_url
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pipeline_lib.generation.handover import Handover, Version
    from pipeline_lib.models.sampling import Sample, SamplingSettings

SECRET_PREFIX = "PREFLINE_GENERATOR_"  # noqa: S105 - the beginning of variables' names, no secret
"""Variables that may be sent: a configuration must not get at the other keys of the environment."""


class Vllm(Frozen):
    """vLLM: a server at `url`, or in this process where it is installed.

    LoRA adapters are loaded at run time; without an adapter all weights are.
    """

    url: str | None = Field(None, pattern=r"^https?://[^\s/?#]+$")
    """The server, e.g. `http://127.0.0.1:8000`; null: vLLM runs in this process."""
    model: str | None = None
    """Name under which the server serves the policy's model; null: the first that it lists."""
    exchange: str | None = None
    """Folder for weights, at the same path here and for the server; null: among this machine's temporary files."""
    timeout_s: float = Field(600.0, gt=0, le=86_400)
    """Seconds without a word from the server after which a request has failed."""
    retries: int = Field(4, ge=0, le=20)
    """Tries after the first, where the server is busy, broken or away."""
    backoff_s: float = Field(1.0, ge=0, le=600)
    """Wait before the second try; it doubles with every further one, up to a minute."""
    auth_variable: str | None = Field(None, pattern=f"^{SECRET_PREFIX}[A-Z0-9_]+$")
    """Environment variable that holds the server's API key, e.g. `PREFLINE_GENERATOR_KEY`."""
    engine: dict[str, str | int | float | bool] = Field({"gpu_memory_utilization": 0.4})
    """Without a url: further arguments of `vllm.LLM`."""

    @model_validator(mode="after")
    def _keeps_its_secret(self) -> Self:
        check_url(self.url or "", auth_variable=self.auth_variable)
        return self

    def open(self, policy: Policy, *, eos_id: int, pad_id: int) -> Generator:  # noqa: ARG002 - nothing is padded here
        """Connect, or load the model, and hand the policy's weights over.

        Raises:
            ConfigError: vLLM is not installed, or does not load this kind of adapter.
            GeneratorError: The server does not answer.
        """
        from pipeline_lib.generation.handover import Handover, require_transferable  # noqa: PLC0415  (peft)

        require_transferable(policy)
        engine: Engine
        if self.url is not None:
            from pipeline_lib.generation.vllm_server import VllmServer  # noqa: PLC0415  (as its sibling below)

            engine = VllmServer.connect(self)
        else:
            from pipeline_lib.generation.vllm_process import VllmProcess  # noqa: PLC0415  (torch)

            engine = VllmProcess.start(self, policy)
        handover = Handover.at(self.exchange)
        # In this process a model that nobody trains is loaded from its folder already.
        loaded = handover.write(policy) if self.url is None and not policy.is_trained else None
        generator = VllmGenerator(engine, handover, eos_id, loaded)
        generator.update(policy)
        return generator


@dataclass(frozen=True)
class Request:
    """Samples that are asked for of one prompt."""

    prompt_ids: tuple[int, ...]
    num: int
    seed: int
    settings: SamplingSettings
    eos_id: int

    @property
    def arguments(self) -> dict[str, Any]:
        """What vLLM calls it, the same for a server's request and for `SamplingParams`.

        Nothing is left to the model's own sampling defaults, which both would else put in.
        """
        settings = self.settings
        is_greedy = settings.temperature == 0
        return {
            # vLLM refuses several greedy samples, which are equal.
            "n": 1 if is_greedy else self.num,
            "temperature": settings.temperature, "top_p": 1.0 if is_greedy else settings.top_p,
            "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "max_tokens": settings.max_new_tokens, "min_tokens": settings.min_new_tokens,
            # The tokenizer's end is not asked: a turn ends where ours does.
            "ignore_eos": True, "stop_token_ids": [self.eos_id] if settings.stops_at_eos else [],
            "skip_special_tokens": False, "logprobs": 1, "seed": self.seed,
        }  # fmt: skip


class Engine(Protocol):
    """vLLM, wherever it runs."""

    def answer(self, requests: Sequence[Request], on_answer: Callable[[int], None]) -> list[list[Sample]]:
        """Answer every request; tell how many are done now and then.

        Raises:
            GeneratorError: An answer does not come, or is none.
        """

    def load(self, version: Version) -> None:
        """Answer from these weights from now on; an adapter is one on the model that was served first.

        Raises:
            GeneratorError: They cannot be loaded.
        """


@dataclass
class VllmGenerator:
    """Samples from vLLM."""

    engine: Engine
    handover: Handover
    eos_id: int
    loaded: Version | None = field(default=None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Sample; see `Generator`. `settings.batch_size` requests are open at once."""
        requests = [
            Request(tuple(prompt), samples_per_prompt, derive_seed(seed, "sample", index), settings, self.eos_id)
            for index, prompt in enumerate(prompts)
        ]
        answers = self.engine.answer(requests, on_batch or (lambda _: None))
        samples = []
        for request, answer in zip(requests, answers, strict=True):
            samples += answer if len(answer) == request.num else answer * request.num
        return samples

    def update(self, policy: Policy) -> None:
        """Hand the policy's weights over, unless they are the ones that are loaded."""
        version = self.handover.write(policy)
        if self.loaded is None or version.name != self.loaded.name:
            self.engine.load(version)
            self.loaded = version
        self.handover.forget(but=version)
