"""Every weight cut among the processes of a stage (`runtime.sharding: full`; torch's fully_shard, "FSDP2").

A process holds its part of each weight, of its gradient and of the optimizer's moments. A layer is put
together while it computes; gradients are summed, each process keeping its part of the sum. Optimizer,
averages and early stopping run on the parts as on whole weights, since they treat every number by
itself; the norm of a gradient is that of all parts, and checkpoints hold whole tensors.

Putting a layer together takes all processes, so all must run the same layers in the same order: one
that has no forward left in a round runs another's again, with weight 0.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline_lib.errors import ConfigError
from pipeline_lib.models.adapters import Adapter
from pipeline_lib.models.virtual_tokens import virtual_tokens_of
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.group import ProcessGroup
from pipeline_lib.training.pretraining import is_pretraining
from pipeline_lib.training.recipe import ParameterGroup, Recipe
from pipeline_lib.training.recipes.offline import OfflineRows
from pipeline_lib.training.settings import TrainingSettings
from pipeline_lib.training.sharding_limits import why_not_sharded
from pipeline_lib.training.trained_model import TrainedModel

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class ShardedWeights:
    """Every process holds its part of each weight of the one model that a recipe trains (see `training.weights`)."""

    is_cut = True

    def __init__(self, recipe: Recipe, processes: ProcessGroup, settings: TrainingSettings) -> None:
        """Cut the recipe's model, which is whole in every process until then.

        Args:
            recipe: Trains one model on fixed rows.
            processes: Two or more.
            settings: What the recipe trains with.

        Raises:
            ConfigError: The weights of such a training cannot be cut; the error names the key.
        """
        self._recipe, self._processes = _shardable(recipe, settings), processes
        self._trained = self._recipe.trained
        model = self._trained.model
        self._plain = _without_weights(self._trained)
        num_weights = sum(weight.numel() for weight in model.parameters())
        mesh = init_device_mesh(model.device.type, (processes.size,))
        for layer in _layers(model):
            _cut(layer, mesh)
        self.root = _Root(model)
        _cut(self.root, mesh)
        self._weights: dict[str, DTensor] = {}
        """The trained weights as the model has them, by group and name."""
        self.groups = [self._parts_of(group) for group in self._recipe.parameter_groups()]
        num_held = sum(_part(weight).numel() for weight in model.parameters())
        logger.info("holds %d of the model's %d weights", num_held, num_weights)

    def _parts_of(self, group: ParameterGroup) -> ParameterGroup:
        """Return a group's parts as plain parameters, in the same memory as the model's."""
        self._weights |= {f"{group.name}/{name}": cast(DTensor, weight) for name, weight in group.parameters.items()}
        parts = {name: nn.Parameter(_part(weight)) for name, weight in group.parameters.items()}
        return ParameterGroup(group.name, parts, group.learning_rate)

    def forward(self, compute: Callable[[], ResultT]) -> ResultT:
        """Run it with every layer put together in its turn; backward does the same and takes the rest apart."""
        result: ResultT = self.root(compute)
        return result

    def measure(self, compute: Callable[[], ResultT]) -> ResultT:
        """Run it with every layer put together in its turn, and take the rest apart again."""
        with torch.no_grad():
            result: ResultT = self.root(compute)
        cast(FSDPModule, self.root).reshard()
        return result

    def share(self, batches: Sequence[TreeBatch]) -> list[tuple[TreeBatch, bool]]:
        """Return as many forwards for every process; those that do not count repeat another's."""
        size, rank = self._processes.size, self._processes.rank
        forwards: list[tuple[TreeBatch, bool]] = []
        # Pretraining text may run other layers than a step's rows, so the two never share a round.
        for kind in (False, True):
            of_kind = [batch for batch in batches if is_pretraining(batch) is kind]
            for first in range(0, len(of_kind), size):
                place = first + rank
                forwards.append((of_kind[place], True) if place < len(of_kind) else (of_kind[-1], False))
        return forwards

    def sum_gradients(self) -> None:
        """Move the sums, which backward left in the model's weights, to the parts."""
        for group in self.groups:
            for name, part in group.parameters.items():
                weight = self._weights[f"{group.name}/{name}"]
                part.grad = None if weight.grad is None else _part(weight.grad)
                weight.grad = None

    def clip(self, group: ParameterGroup, max_norm: float) -> float:
        """Clip by the norm of all parts."""
        parts = list(group.parameters.values())
        own = nn.utils.get_total_norm([part.grad for part in parts if part.grad is not None])
        squared = own.to(parts[0].device, torch.float64) ** 2
        distributed.all_reduce(squared)
        norm = squared.sqrt().to(own.dtype)
        nn.utils.clip_grads_with_norm_(parts, max_norm, norm)
        return float(norm)

    @torch.no_grad()
    def whole(self, key: str, part: Tensor) -> Tensor:
        """Gather a tensor in the first process, and nothing in the others; a single number is the same in all."""
        whole = part
        if part.ndim > 0:
            like = self._weights[key]
            whole = DTensor.from_local(
                part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            ).full_tensor()
        return whole if self._processes.is_first else whole.new_empty(0)

    @torch.no_grad()
    def part(self, key: str, whole: Tensor) -> Tensor:
        """Cut this process's part out of a tensor that all have."""
        if whole.ndim == 0:
            return whole
        like = self._weights[key]
        cut = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return cut.to_local().clone()  # else it would keep the whole alive

    @torch.no_grad()
    def finish(self) -> None:
        """Put the model together in every process, as plain as it was: it is merged, measured and saved as ever."""
        model, adapter = self._plain
        plain = dict(model.named_parameters())
        for name, weight in self._trained.model.named_parameters():
            plain[name].data = cast(DTensor, weight).full_tensor()
        self._trained.model, self._trained.adapter = model, adapter
        self.groups = list(self._recipe.parameter_groups())


class _Root(nn.Module):
    """Inside its forward, the weights that are in no layer (embeddings, last norm, head) are whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], ResultT]) -> ResultT:
        return compute()


def _shardable(recipe: Recipe, settings: TrainingSettings) -> OfflineRows:
    why = why_not_sharded(settings)
    if why is None and isinstance(recipe, OfflineRows):
        why = _why_not_cut(recipe.trained.model)
        if why is None:
            return recipe
    raise ConfigError(
        f"runtime.sharding = 'full' cannot divide these weights: {why or 'the stage trains more than one model'}",
        next_step="set runtime.sharding: none",
    )


def _why_not_cut(model: PreTrainedModel) -> str | None:
    if virtual_tokens_of(model) is not None:
        return "the model has virtual tokens in front of every prompt"
    if not _layers(model):
        return f"the layers of a {model.config.model_type!r} model are not known"
    return None


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _without_weights(trained: TrainedModel) -> tuple[PreTrainedModel, Adapter | None]:
    """Copy a model's structure; empty weights stand for its own, one for each, so that tied ones stay tied."""
    instead: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().new_empty(0), requires_grad=weight.requires_grad)
        for weight in trained.model.parameters()
    }
    return copy.deepcopy((trained.model, trained.adapter), instead)


def _cut(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut what a module holds and no module in it was cut for; gradients are summed, not averaged."""
    fully_shard(module, mesh=mesh)
    sharded = cast(FSDPModule, module)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(enable=True)  # gloo has no scaled sum


def _part(weight: Tensor) -> Tensor:
    """Return what this process holds of a cut tensor, in the same memory."""
    with torch.no_grad():
        return cast(DTensor, weight).to_local()
