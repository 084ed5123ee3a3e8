"""vLLM's server: completions of token ids, adapters and weights loaded at run time.

It is started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` and `--enable-lora` for adapters, with
`VLLM_SERVER_DEV_MODE=1` for whole weights. docs/methods/rollouts.md has the commands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline_lib.errors import GeneratorError
from pipeline_lib.generation.handover import Version
from pipeline_lib.http_json import HttpJson, RefusedError, SilentError, json_headers
from pipeline_lib.models.sampling import Sample

if TYPE_CHECKING:
    from pipeline_lib.generation.vllm import Request, Vllm

_SILENT_STEP = "start the server, or check generator.url, generator.timeout_s and generator.retries"


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
        assert settings.url is not None
        headers = json_headers(settings.auth_variable, whose="generator", prefix="Bearer ")
        http = HttpJson(settings.url, headers, settings.timeout_s, settings.retries, settings.backoff_s)
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
        asked = [partial(self._complete, request) for request in requests]
        return self.http.together(asked, at_once=requests[0].settings.batch_size, on_answer=on_answer)

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
        # A server that cannot load what it is given says so with 500, as if it were broken.
        _asked(lambda: self.http.post(body, path), f"{self.http.place}{path}", advice, silent_step=advice)

    def _complete(self, request: Request) -> list[Sample]:
        body = {
            "model": self.answering, "prompt": list(request.prompt_ids), "return_token_ids": True,
            "add_special_tokens": False, **request.arguments,
        }  # fmt: skip
        if self.salt:
            body["cache_salt"] = self.salt
        where = f"{self.http.place}/v1/completions"
        num = request.arguments["n"]
        content = _asked(lambda: self.http.post(body, "/v1/completions"), where,
                         "look at the server's log; its --max-model-len must hold prompt and response")  # fmt: skip
        try:
            choices = sorted(json.loads(content)["choices"], key=lambda choice: int(choice["index"]))
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
    content = _asked(lambda: http.get("/v1/models"), where, "check generator.url and generator.auth_variable")
    try:
        return [str(model["id"]) for model in json.loads(content)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(where, "no list of models") from error


def _asked(request: Callable[[], bytes], where: str, advice: str, *, silent_step: str = _SILENT_STEP) -> bytes:
    """Make a request; say of one that failed where it went, and what may help where the server said no."""
    try:
        return request()
    except RefusedError as error:
        raise GeneratorError(f"{where}: {error}", next_step=advice) from error
    except SilentError as error:
        raise GeneratorError(f"{where} {error}", next_step=silent_step) from error


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
