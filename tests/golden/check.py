"""Compares a module with golden numbers; the module may be a mutant of the one in the file."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.losses.preference.contract import PairLogps, RankedLogps, UnpairedLogps

DIRECTORY = Path(__file__).parent
LOSS_INPUTS: dict[str, Any] = {"per_pair": PairLogps, "of_list": RankedLogps, "per_response": UnpairedLogps}
CHUNKS = (1, 2, 100)
"""Results must not depend on how tokens are cut into chunks."""


@dataclass(frozen=True)
class Golden:
    """One file of golden numbers."""

    topic: str
    provenance: str
    module: str
    cases: tuple[dict[str, Any], ...]


def load(topic: str) -> Golden:
    content = json.loads((DIRECTORY / f"{topic}.json").read_text(encoding="utf-8"))
    return Golden(topic, content["provenance"], content["module"], tuple(content["cases"]))


def topics() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.json") if path.stem != "gate_by_hand")


def check(module_name: str, case: dict[str, Any], module: ModuleType | None = None) -> None:
    """Call what a case names and compare value and gradient at 1e-9.

    Raises:
        AssertionError: A figure or a gradient is another one.
    """
    module = module or importlib.import_module(module_name)
    of_head = case["call"] == "token_logps_from_hidden"
    for chunk, is_head_learned in product(CHUNKS, (True, False)) if of_head else ((None, True),):
        learned = [name for name in case.get("gradient", {}) if is_head_learned or name == "hidden_ND"]
        given = {key: _argument(key, value, module_name) for key, value in case["given"].items()}
        if chunk is not None:
            given |= {"chunk_tokens": chunk, "with_entropy": True}
        for name in learned:
            given[name].requires_grad_()
        result = _call(module, case["call"], given, case.get("class", "Dpo"))
        for field, expected in case["expected"].items():
            _compare(_field(result, field), expected, f"{case['name']}: {field}")
        if "gradient" in case:
            _total(result, case.get("weights")).backward()
        for name in learned:
            _compare(given[name].grad, case["gradient"][name], f"{case['name']}: gradient of {name}")


def _argument(name: str, value: Any, module_name: str) -> Any:
    if name == "target_kl":
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, list):
        return value
    if "evaluation" in module_name:
        return np.array(value)[:, None, :] if name == "columns" else value
    flat = value[0][0] if isinstance(value[0], list) else value[0]
    kinds = {bool: torch.bool, int: torch.long, float: torch.float64}
    return torch.tensor(value, dtype=kinds[type(flat)])


def loss(module: ModuleType, cls: str, given: dict[str, Any]) -> Any:
    return getattr(module, cls)(**given["parameters"])


def _call(module: ModuleType, name: str, given: dict[str, Any], cls: str) -> Any:
    if name in LOSS_INPUTS:
        if name == "per_pair":
            counts = torch.ones(len(given["chosen_B"]), dtype=torch.long)
            given = {"chosen_tokens_B": counts, "rejected_tokens_B": counts, **given}
        logps = {key: value for key, value in given.items() if key != "parameters"}
        return getattr(loss(module, cls, given), name)(LOSS_INPUTS[name](**logps))
    if name == "of_prompt":
        scores_K, rank_K = given["scores_K"], given["rank_K"]
        details = {key: value for key, value in given.items() if key in ("strength", "weight")}
        return loss(module, cls, given).of_prompt(scores_K, rank_K, **details)
    if name == "update":
        return module.KlController(**given["parameters"]).update(given["kl_nats"], num_steps=given["num_steps"])
    if name == "measure":
        figures = {"test_accuracy_frac": given["accuracy"], "test_pairs": float(given["pairs"])}
        bootstrap = Bootstrap(confidence_frac=given["confidence_frac"])
        return module.RewardModelAccuracy().measure(Evidence({}, figures), "any", bootstrap=bootstrap)
    return getattr(module, name)(**given)


def _field(result: Any, field: str) -> Any:
    if field == "value" and not hasattr(result, "value"):
        return result
    return result[int(field)] if field.isdigit() else getattr(result, field)


def _total(result: Any, weights: list[float] | None) -> Tensor:
    value = result.loss_sum if hasattr(result, "loss_sum") else result[0] if isinstance(result, tuple) else result
    assert isinstance(value, Tensor)
    return value if weights is None else (value * torch.tensor(weights, dtype=value.dtype)).sum()


def _compare(found: Any, expected: Any, what: str) -> None:
    if expected is None or found is None:
        assert found is expected, f"{what}: {found}, not {expected}"
        return
    found = found.detach() if isinstance(found, Tensor) else torch.tensor(np.array(found).squeeze())
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, not {tuple(wanted.shape)}"
    torch.testing.assert_close(
        found.to(torch.float64), wanted, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}"
    )
