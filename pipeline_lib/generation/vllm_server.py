"""vLLM's server: completions of token ids, adapters and weights loaded at run time.

It is started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` and `--enable-lora` for adapters, with
`VLLM_SERVER_DEV_MODE=1` for whole weights. docs/methods/rollouts.md has the commands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_lib.errors import GeneratorError
from pipeline_lib.generation.handover import Version
from pipeline_lib.generation.http_json import HttpJson, RefusedError
from pipeline_lib.models.sampling import Sample

if TYPE_CHECKING:
    from pipeline_lib.generation.vllm import Request, Vllm

_LOOK_EVERY_S = 2.0
"""How long a request to stop waits to be noticed where no answer comes."""


@dataclass
class VllmServer:
    """A server that speaks vLLM's HTTP interface."""

    http: HttpJson
    base_model: str
    """Name of the model that it serves."""
    answering: str
    """Name that requests ask for: the model's or its adapter's."""
    salt: str = ""
    """Sets the cached prompts of different weights apart."""

    @classmethod
    def connect(cls, settings: Vllm) -> VllmServer:
        """Ask the server what it serves.

        Raises:
            ConfigError: The variable of `auth_variable` is not set.
            GeneratorError: It does not answer, or serves no such model.
        """
        http = HttpJson.of(settings)
        served = _served(http)
        name = settings.model or next(iter(served), None)
        if name is None or name not in served:
            raise GeneratorError(
                f"{http.place} serves {', '.join(served) or 'no model'}, not {name!r}",
                next_step="set generator.model to a name that it serves",
            )
        return cls(http, name, name)

    def answer(self, requests: Sequence[Request], on_answer: Callable[[int], None]) -> list[list[Sample]]:
        """Answer every request, `batch_size` of them at once."""
        if not requests:
            return []
        pool = ThreadPoolExecutor(max_workers=requests[0].settings.batch_size, thread_name_prefix="vllm")
        is_complete = False
        try:
            asked = [pool.submit(self._complete, request) for request in requests]
            self._await(asked, on_answer)
            is_complete = True
            return [future.result() for future in asked]
        finally:
            if not is_complete:
                # Whoever gave up does not wait for what is still being written: the server stops writing, too.
                self.http.hang_up()
            pool.shutdown(wait=True, cancel_futures=True)
            self.http.pick_up()

    def _await(self, asked: Sequence[Future[list[Sample]]], on_answer: Callable[[int], None]) -> None:
        left = set(asked)
        while left:
            done, left = wait(left, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            on_answer(len(asked) - len(left))

    def load(self, version: Version) -> None:
        """Answer from these weights from now on."""
        if version.kind == "weights":
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(version.directory)}}
            self._tell("/collective_rpc", body, "start the server with VLLM_SERVER_DEV_MODE=1, "
                       "or train an adapter (adapter.name: lora)")  # fmt: skip
            self.answering, self.salt = self.base_model, version.name
            return
        # The name tells the content, so an adapter of the same name is the same adapter.
        if version.name not in _served(self.http):
            body = {"lora_name": version.name, "lora_path": str(version.directory)}
            self._tell("/v1/load_lora_adapter", body, "start the server with --enable-lora, a large enough "
                       "--max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")  # fmt: skip
        before, self.answering = self.answering, version.name
        if before not in (self.base_model, version.name) and before in _served(self.http):
            self._tell("/v1/unload_lora_adapter", {"lora_name": before}, "look at the server's log")

    def _tell(self, path: str, body: Mapping[str, Any], advice: str) -> None:
        try:
            self.http.post(path, body)
        except RefusedError as error:
            raise GeneratorError(f"{self.http.place}{path}: {error}", next_step=advice) from error

    def _complete(self, request: Request) -> list[Sample]:
        body = {
            "model": self.answering, "prompt": list(request.prompt_ids), "return_token_ids": True,
            "add_special_tokens": False, **request.arguments,
        }  # fmt: skip
        if self.salt:
            body["cache_salt"] = self.salt
        where = f"{self.http.place}/v1/completions"
        num = request.arguments["n"]
        try:
            answer = json.loads(self.http.post("/v1/completions", body))
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        except RefusedError as error:
            raise GeneratorError(
                f"{where}: {error}",
                next_step="look at the server's log; its --max-model-len must hold prompt and response",
            ) from error
        except json.JSONDecodeError as error:
            raise _unreadable(where, "no JSON") from error
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(where, "no choices") from error
        if len(choices) != num:
            raise _unreadable(where, f"not {num} choices")
        return [_sample(choice, request, where) for choice in choices]


def _served(http: HttpJson) -> list[str]:
    """Return the names of models and adapters that requests can ask for."""
    where = f"{http.place}/v1/models"
    try:
        answer = json.loads(http.get("/v1/models"))
        return [str(model["id"]) for model in answer["data"]]
    except RefusedError as error:
        raise GeneratorError(
            f"{where}: {error}", next_step="check generator.url and generator.auth_variable"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(where, "no list of models") from error


def _sample(choice: Mapping[str, Any], request: Request, where: str) -> Sample:
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids:
        raise _unreadable(where, "no token ids")
    if choice.get("finish_reason") not in ("stop", "length"):
        raise _unreadable(where, f"a response that ended by {choice.get('finish_reason')!r}")
    logps = (choice.get("logprobs") or {}).get("token_logprobs")
    if isinstance(logps, list) and len(logps) == len(ids) and None not in logps:
        return Sample(tuple(ids), request.eos_id in ids, tuple(float(logp) for logp in logps))
    return Sample(tuple(ids), request.eos_id in ids)


def _unreadable(where: str, what: str) -> GeneratorError:
    return GeneratorError(
        f"{where} answered {what}", next_step="the server must be vLLM 0.10.2 or later, which returns token ids"
    )
