"""The arithmetic that a job needs at least, and the rate at which this machine multiplies."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from benchmarks.jobs import Trainable, Work
from pipeline_lib.text.encode import Tree

_SIZES = (256, 512, 1024, 2048)
_REPEATS = 5
_LONGEST_S = 0.5
"""Larger matrices are left out once a product takes this long: formats that are emulated are very slow."""


def needed_work(trees: Sequence[Tree], config: PretrainedConfig, *, trainable: Trainable, has_head: bool) -> Work:
    """Count what the updates on some rows need: the prompt once for all its responses.

    Forward 2 operations a weight and token, backward as many for the activations, and as many again
    for the weights where they are trained; the language-model head on counted tokens alone. Attention
    is counted over the positions that a token sees. Adapters are not counted.

    Args:
        trees: The rows.
        config: The model's shape (a Llama's names).
        trainable: Which weights have a gradient.
        has_head: Whether the language-model head is in the loss.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention_width = head_width * config.num_attention_heads
    key_width = head_width * config.num_key_value_heads
    per_layer = width * (2 * attention_width + 2 * key_width) + 3 * width * config.intermediate_size
    passes = 3 if trainable == "full" else 2
    tokens = sum(tree.num_tokens for tree in trees)
    counted = sum(len(ids) for tree in trees for ids in tree.response_ids)
    seen = sum(_seen(tree) for tree in trees)
    flops = 2.0 * passes * layers * per_layer * tokens + 3 * 4.0 * layers * attention_width * seen
    if has_head:
        flops += 2.0 * passes * config.vocab_size * width * counted
    return Work(
        pairs=sum(len(tree.response_ids) * (len(tree.response_ids) - 1) // 2 for tree in trees),
        tokens=sum(len(tree.prompt_ids) + len(ids) for tree in trees for ids in tree.response_ids),
        counted_tokens=counted,
        flops=flops,
    )


def _seen(tree: Tree) -> int:
    """Return the sum over a row's tokens of the positions each one attends to."""
    prompt = len(tree.prompt_ids)
    inside = prompt * (prompt + 1) // 2
    return inside + sum(len(ids) * prompt + len(ids) * (len(ids) + 1) // 2 for ids in tree.response_ids)


def matmul_rates(device: torch.device) -> dict[str, float]:
    """Return the machine's best matrix-product rate by format, operations a second."""
    return {name: _rate(dtype, device) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    for size in _SIZES:
        matrix = torch.randn(size, size, device=device).to(dtype)
        fastest_s = min(_seconds(matrix) for _ in range(_REPEATS))
        best = max(best, 2.0 * size**3 / fastest_s)
        if fastest_s > _LONGEST_S:
            break
    return best


def _seconds(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    product = matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize()
    assert product.shape == matrix.shape
    return time.perf_counter() - started


def processor_name(device: torch.device) -> str:
    """Return what does the arithmetic, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads" + (
        f", {widest.upper().replace('_', '-')}" if widest else ""
    )
