"""How fast are rollouts? Tokens a second of our generators beside `model.generate`, on the same prompts.

`python -m benchmarks.rollouts` samples answers of SmolLM2-135M to questions about docstrings of the standard
library: prompts of uneven lengths, answers that end when the model ends them. Every run does all sides one after
the other, in turn the first, so that a machine's ups and downs meet all of them. A token counts up to and with the
end of its response: what is written behind it is nobody's. Minutes on a CPU, no network.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.rollouts_report import Result, Run, write_section
from benchmarks.same import SEED
from benchmarks.work import processor_name
from pipeline_lib.generation import open_generator
from pipeline_lib.generation.contract import Policy
from pipeline_lib.models.base import SMOLLM2, import_base_model, load_causal_model
from pipeline_lib.models.precision import default_device, resolve_dtype
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.schema import Message
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder

PLAIN = "generate"
OURS = ("batched", "continuous")
GOAL = 1.3
"""What the faster of ours must reach, times the tokens a second of `model.generate`."""
_MODULES = (
    "argparse", "asyncio", "calendar", "collections", "contextlib", "copy", "csv", "datetime", "decimal", "difflib",
    "fractions", "functools", "heapq", "inspect", "itertools", "json", "logging", "os", "pathlib", "random", "re",
    "shutil", "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "tokenize", "zipfile",
)  # fmt: skip
_ASK = "Say in one short sentence what this does.\n\n"
_LONGEST_PROMPT = 192
_FIRST = 2
"""Prompts that every side is warmed up on."""

Side = Callable[[int], list[int]]
"""Samples from a seed; returns the tokens of each response."""


def main() -> None:
    """Measure, write the result and the section; exit with 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32, help="rows at once, the same on all sides")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/rollouts"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), chosen)
    chosen.results.mkdir(parents=True, exist_ok=True)
    name = f"{result.model}-{result.prompts}-prompts-{result.batch}-rows.json"
    (chosen.results / name).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    write_section(chosen.results, chosen.page)
    best = max(result.speedup(side) for side in OURS)
    print(f"{best:.2f} times model.generate, goal {GOAL}")
    sys.exit(0 if best >= GOAL else 1)


def measure(folder: Path, chosen: argparse.Namespace) -> Result:
    """Sample with every side in every run."""
    directory = folder / "model"
    import_base_model(chosen.model, directory, revision=None, chat_template=None, seed=SEED)
    chat = ChatTokenizer.load(directory)
    dtype = resolve_dtype("auto")
    model = load_causal_model(directory, dtype=dtype).to(default_device()).eval()
    prompts = make_prompts(Encoder(chat, _LONGEST_PROMPT, max_response_tokens=1), count=chosen.prompts)
    sides = make_sides(model, directory, chat, prompts, batch=chosen.batch, max_new_tokens=chosen.max_new_tokens)
    for side in sides.values():  # what is made at first use is not measured
        side(-1)
    runs = []
    for number in range(chosen.runs):
        names = list(sides)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started, started_cpu = time.perf_counter(), time.process_time()
            lengths = sides[name](number)
            _finish(model)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
            run = Run(side=name, number=number, seconds=seconds, cpu_seconds=cpu_seconds, lengths=lengths)
            runs.append(run)
            print(
                f"run {number}, {name}: {sum(lengths)} tokens in {seconds:.1f} s, {cpu_seconds:.1f} s of processors",
                flush=True,
            )
    return Result(
        model=chosen.model, prompts=len(prompts), batch=chosen.batch, max_new_tokens=chosen.max_new_tokens,
        prompt_tokens=[len(prompt) for prompt in prompts], dtype=str(dtype).removeprefix("torch."),
        processor=processor_name(model.device), goal=GOAL, runs=runs,
        versions={"python": platform.python_version(), "torch": torch.__version__,
                  "transformers": version("transformers")},
    )  # fmt: skip


def make_prompts(encoder: Encoder, *, count: int, at_least: int = 0, below: int = _LONGEST_PROMPT) -> list[list[int]]:
    """Return questions about different functions, as token ids in the model's chat template, in a shuffled order."""
    texts = set()
    for name in _MODULES:
        for _, member in inspect.getmembers(importlib.import_module(name), inspect.isroutine):
            text = inspect.getdoc(member)
            if text:
                texts.add(text)
    encoded = [
        encoder.prompt((Message(role="user", content=_ASK + text),), where="benchmark")[0]
        for text in random.Random(SEED).sample(sorted(texts), len(texts) if at_least else min(len(texts), 4 * count))
    ]
    fitting = [ids for ids in encoded if at_least <= len(ids) < below]
    assert len(fitting) >= count, "too few docstrings"
    return fitting[:count]


def make_sides(
    model: PreTrainedModel,
    directory: Path,
    chat: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    max_new_tokens: int,
) -> dict[str, Side]:
    """Return what is compared, each sampling from the whole distribution at temperature 1.

    The seed -1 stands for a run on the first few prompts.
    """
    policy = Policy(directory, lambda: model)

    def with_generator(name: str) -> Side:
        generator = open_generator({"name": name}, policy, eos_id=chat.eos_id, pad_id=chat.pad_id)

        def run(seed: int) -> list[int]:
            settings = SamplingSettings(max_new_tokens=max_new_tokens, batch_size=batch)
            asked = prompts[:_FIRST] if seed < 0 else prompts
            return [len(one.ids) for one in generator.generate(asked, settings, seed=seed + 1)]

        return run

    def plain(seed: int) -> list[int]:
        lengths = []
        torch.manual_seed(seed + 1)
        asked = prompts[:_FIRST] if seed < 0 else prompts
        for start in range(0, len(asked), batch):
            lengths += _generate(model, asked[start : start + batch], chat, max_new_tokens=max_new_tokens)
        return lengths

    return {PLAIN: plain, **{name: with_generator(name) for name in OURS}}


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], chat: ChatTokenizer, *, max_new_tokens: int
) -> list[int]:
    """Sample a batch as the documentation of transformers does; return the tokens of each response."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[chat.pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    found = model.generate(
        input_ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=max_new_tokens, eos_token_id=chat.eos_id, pad_token_id=chat.pad_id,
    )  # fmt: skip
    rows = found[:, width:].tolist()
    return [row.index(chat.eos_id) + 1 if chat.eos_id in row else len(row) for row in rows]


def _finish(model: PreTrainedModel) -> None:
    """Wait for what a GPU has not done yet."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
