"""vLLM in miniature for the tests: the engine, its server's HTTP interface, and the package's names.

Requests are checked as vLLM checks them: a name that it does not know is an error here. What answers is
a tiny real model, with real adapters and real reloads, so that weights handed over wrongly are noticed.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.text.pack import pad
from tests.toy import short_tree

SAMPLING_PARAMETERS = frozenset({
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
})  # fmt: skip
ENGINE_ARGUMENTS = frozenset({
    "tokenizer", "trust_remote_code", "dtype", "seed", "gpu_memory_utilization", "enforce_eager", "max_model_len",
    "generation_config", "logprobs_mode", "enable_prefix_caching", "enable_lora", "max_lora_rank", "max_loras",
})  # fmt: skip
COMPLETION_FIELDS = (SAMPLING_PARAMETERS - {"detokenize"}) | {
    "model", "prompt", "return_token_ids", "add_special_tokens", "cache_salt",
}  # fmt: skip


@dataclass
class Answer:
    """One response, as vLLM gives it out."""

    index: int
    token_ids: list[int]
    logps: list[float]
    finish_reason: str


class TinyEngine:
    """A model of a folder, with adapters by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = load(directory)
        self.adapters: dict[str, PreTrainedModel] = {}
        self.loads: list[str] = []
        self.max_lora_rank = 16

    def load_adapter(self, name: str, place: str) -> None:
        config = json.loads((Path(place) / "adapter_config.json").read_text())
        if config["r"] > self.max_lora_rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        wrapped = PeftModel.from_pretrained(load(self.directory), place)
        self.adapters[name] = wrapped.get_base_model().eval()
        self.loads.append(place)

    def reload_weights(self, weights_path: str) -> None:
        weights = load_file(Path(weights_path) / "model.safetensors")
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied
        self.loads.append(weights_path)

    def answer(self, prompt_ids: Sequence[int], parameters: dict[str, Any], adapter: str | None) -> list[Answer]:
        if parameters["temperature"] == 0 and parameters["n"] > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {parameters['n']}.")
        model = self.model if adapter is None else self.adapters[adapter]
        stops = parameters["stop_token_ids"]
        settings = SamplingSettings(
            max_new_tokens=parameters["max_tokens"], min_new_tokens=parameters["min_tokens"],
            temperature=parameters["temperature"], top_p=parameters["top_p"], stops_at_eos=bool(stops),
        )  # fmt: skip
        drawn = sample(
            model, [prompt_ids], settings, eos_id=stops[0] if stops else 2, pad_id=0, seed=parameters["seed"],
            samples_per_prompt=parameters["n"],
        )  # fmt: skip
        found = []
        for index, one in enumerate(drawn):
            batch = pad([short_tree("row", list(prompt_ids), list(one.ids))], pad_id=0)
            with torch.no_grad():
                logps = token_logps(model, batch, temperature=parameters["temperature"] or 1.0).token_logp_N
            is_stopped = bool(stops) and one.is_finished
            found.append(Answer(index, list(one.ids), logps.tolist(), "stop" if is_stopped else "length"))
        return found


def load(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


Reply = tuple[int, Any]


@dataclass
class Server:
    """What a test sees of the server, and sets beforehand."""

    engine: TinyEngine
    url: str = ""
    key: str | None = None
    asked: list[tuple[str, Any]] = field(default_factory=list)
    before: list[Callable[[str, Any], Reply | None]] = field(default_factory=list)
    """Each answers one request in the server's place, unless it returns None."""
    has_development_mode: bool = True
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spec(self, **parameters: Any) -> dict[str, Any]:
        return {"name": "vllm", "url": self.url, "backoff_s": 0, **parameters}

    def bodies(self, path: str) -> list[Any]:
        return [body for where, body in self.asked if where == path]

    def reply(self, path: str, body: Any, key: str | None) -> Reply:
        self.asked.append((path, body))
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if self.before:
            given = self.before.pop(0)(path, body)
            if given is not None:
                return given
        routes: dict[str, Callable[[Any], Reply]] = {
            "/v1/models": self._models, "/v1/completions": self._completions, "/collective_rpc": self._rpc,
            "/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload,
        }  # fmt: skip
        if path not in routes or (path == "/collective_rpc" and not self.has_development_mode):
            return 404, {"detail": "Not Found"}
        try:
            return routes[path](body)
        except (ValueError, KeyError) as error:
            return 400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}

    def _models(self, _: Any) -> Reply:
        return 200, {"object": "list", "data": [{"id": name} for name in ("tiny", *self.engine.adapters)]}

    def _completions(self, body: dict[str, Any]) -> Reply:
        unknown = set(body) - COMPLETION_FIELDS
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        if len(body["prompt"]) + body["max_tokens"] > 200:
            raise ValueError("This model's maximum context length is 200 tokens.")
        adapter = None if body["model"] == "tiny" else body["model"]
        answers = self.engine.answer(body["prompt"], body, adapter)
        return 200, {
            "object": "text_completion", "model": body["model"],
            "choices": [
                {"index": answer.index, "text": "", "finish_reason": answer.finish_reason, "stop_reason": None,
                 "token_ids": answer.token_ids if body.get("return_token_ids") else None,
                 "logprobs": {"token_logprobs": answer.logps, "tokens": [], "top_logprobs": [], "text_offset": []}}
                for answer in reversed(answers)
            ],
        }  # fmt: skip

    def _load(self, body: dict[str, str]) -> Reply:
        if body["lora_name"] in self.engine.adapters:
            raise ValueError(f"The lora adapter '{body['lora_name']}' has already been loaded.")
        try:
            self.engine.load_adapter(body["lora_name"], body["lora_path"])
        except ValueError as error:  # what the engine says comes as if the server were broken
            return 500, {"error": {"message": str(error), "type": "InternalServerError", "code": 500}}
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def _unload(self, body: dict[str, str]) -> Reply:
        del self.engine.adapters[body["lora_name"]]
        return 200, "Success"

    def _rpc(self, body: dict[str, Any]) -> Reply:
        assert body["method"] == "reload_weights"
        self.engine.reload_weights(**body["kwargs"])
        return 200, {"results": [None]}


@contextmanager
def serving(engine: TinyEngine) -> Iterator[Server]:
    """Run a server on a free port."""
    served = Server(engine)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Any) -> None:
            with served.lock:
                status, answer = served.reply(self.path, body, self.headers.get("Authorization"))
            if status == 0:  # says nothing until the test is over
                served.released.wait()
                return
            content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        served.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Package:
    """What a test sees of the package that stands for vLLM."""

    engines: list[Any] = field(default_factory=list)
    is_on_cpu: bool = False


def install(patch: pytest.MonkeyPatch) -> Package:
    """Put a package `vllm` among the modules, with the classes that vLLM has under these names."""
    package = Package()

    class SamplingParams:
        def __init__(self, **parameters: Any) -> None:
            unknown = set(parameters) - SAMPLING_PARAMETERS
            if unknown:
                raise TypeError(f"Unexpected keyword argument {sorted(unknown)[0]!r}")
            self.parameters = parameters

    class LoRARequest:
        def __init__(self, lora_name: str, lora_int_id: int, lora_path: str = "") -> None:
            assert lora_int_id > 0
            self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path

    class LLM:
        def __init__(self, model: str, **arguments: Any) -> None:
            unknown = set(arguments) - ENGINE_ARGUMENTS
            if unknown:
                raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {sorted(unknown)[0]!r}")
            if arguments.get("gpu_memory_utilization", 0.9) > 1:
                raise ValueError("GPU memory utilization must be in (0, 1].")
            self.arguments, self.engine, self.num_resets = arguments, TinyEngine(Path(model)), 0
            self.engine.max_lora_rank = arguments.get("max_lora_rank", 16)
            self.calls: list[int] = []
            self.by_number: dict[int, str] = {}
            package.engines.append(self)

        def generate(
            self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, lora_request: Any = None
        ) -> list[Any]:
            assert not use_tqdm
            self.calls.append(len(prompts))
            return [
                self._one(prompt, params, lora_request) for prompt, params in zip(prompts, sampling_params, strict=True)
            ]

        def _one(self, prompt: Any, params: Any, lora: Any) -> Any:
            if lora is not None:
                assert self.arguments["enable_lora"]
                # A number that is known is not read again, whatever the path says.
                if lora.lora_int_id not in self.by_number:
                    self.engine.load_adapter(lora.lora_name, lora.lora_path)
                    self.by_number[lora.lora_int_id] = lora.lora_name
            name = None if lora is None else self.by_number[lora.lora_int_id]
            answers = self.engine.answer(prompt["prompt_token_ids"], params.parameters, name)
            outputs = [
                types.SimpleNamespace(
                    index=answer.index, token_ids=answer.token_ids, finish_reason=answer.finish_reason,
                    logprobs=[
                        {0: types.SimpleNamespace(logprob=-99.0), token: types.SimpleNamespace(logprob=logp)}
                        for token, logp in zip(answer.token_ids, answer.logps, strict=True)
                    ],
                )
                for answer in reversed(answers)
            ]  # fmt: skip
            return types.SimpleNamespace(outputs=outputs)

        def collective_rpc(
            self, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
        ) -> list[Any]:
            assert method == "reload_weights"
            self.engine.reload_weights(**kwargs)
            return [None]

        def reset_prefix_cache(self) -> bool:
            self.num_resets += 1
            return True

    modules = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.inputs": {"TokensPrompt": dict},
        "vllm.platforms": {"current_platform": types.SimpleNamespace(is_cpu=lambda: package.is_on_cpu)},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        for member, value in members.items():
            setattr(module, member, value)
        patch.setitem(sys.modules, name, module)
    return package
