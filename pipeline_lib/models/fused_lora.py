"""LoRA as one operation of a linear layer: no pass over the layer's output but the products themselves.

peft computes `y + scaling * B(A(x))` by parts: two products, a multiplication and a sum, each as
large as the layer's output, again in the backward pass; over a bf16 model it first makes an fp32
copy of every layer's input, which stays in memory until the backward pass. Here the products scale
and add into what is there.

Legend: N tokens, D inputs, E outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from pipeline_lib.models.few_rows import linear

_FINE = (torch.float32, torch.float64)


def fuse_lora(model: nn.Module) -> None:
    """Let every LoRA layer of a model take the one operation wherever it applies; results stay the same.

    Where something else is in the layer (dropout, DoRA, hooks, quantised weights, GPT-2's transposed
    layers) it goes peft's way as before.
    """
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLoraLinear


@contextmanager
def summed_weights(model: nn.Module) -> Iterator[None]:
    """Let LoRA layers multiply by `W + scaling * B A`, summed once, while no gradient is asked for.

    A sampling step reads all weights for a few rows; its products with A and B are many small ones that
    take a quarter of its time on a CPU. The sums are copies, dropped at the end, of weights in float32
    and float64: a coarser format would round the adapter away. No adapter is switched meanwhile.

    Args:
        model: With or without fused layers; those that are more than base plus LoRA stay as they are.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FusedLoraLinear)]
    try:
        for layer in layers:
            layer.summed_ED = layer.sum_of_weights()
        yield
    finally:
        for layer in layers:
            layer.summed_ED = None


class FusedLoraLinear(LoraLinear):
    """peft's layer with a faster forward; its state, merging and switching are peft's."""

    summed_ED: Tensor | None = None
    """The weight with the adapters in it, while `summed_weights` says so."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `x W^T + bias + scaling * x A^T B^T`, `(…, E)` for `(…, D)`."""
        if self.summed_ED is not None and not torch.is_grad_enabled():
            return linear(x, self.summed_ED, self._linear().bias)
        names = () if args or kwargs else self._plain_adapters()
        if not names:
            by_parts: Tensor = super().forward(x, *args, **kwargs)
            return by_parts
        base = self._linear()
        parts = (x, base.weight, base.bias, *self._joined(names))
        if not torch.is_grad_enabled():
            return _product(*parts)[0]
        fused: Tensor = _FusedLora.apply(*parts)  # type: ignore[no-untyped-call]
        return fused

    @torch.no_grad()
    def sum_of_weights(self) -> Tensor | None:
        """Return `W + scaling * B A`, `(E, D)`; None where two products are as good or something else is in it."""
        names, weight_ED = self._plain_adapters(), self._linear().weight
        # A sharded weight is of another type.
        is_whole = type(weight_ED) is nn.Parameter and weight_ED.device.type == "cpu"
        if not names or not is_whole or weight_ED.dtype not in _FINE:
            return None
        a_RD, b_ER, scaling = self._joined(names)
        return torch.addmm(weight_ED, b_ER.to(weight_ED.dtype), a_RD.to(weight_ED.dtype), alpha=scaling)

    def _linear(self) -> nn.Linear:
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        return base

    def _joined(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor, float]:
        """Return A, B and the scaling of one adapter that says what all of these say together."""
        if len(names) == 1:
            return *self._matrices(names[0]), self.scaling[names[0]]
        each = {name: self._matrices(name) for name in names}
        a_RD = torch.cat([down for down, _ in each.values()])
        return a_RD, torch.cat([up * self.scaling[name] for name, (_, up) in each.items()], 1), 1.0

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(down, Tensor)
        assert isinstance(up, Tensor)
        return down, up

    def _plain_adapters(self) -> tuple[str, ...]:
        """Return the adapters that speak, none where the layer is more than base plus LoRA."""
        if self.disable_adapters or self.merged:
            return ()
        names = tuple(name for name in self.active_adapters if name in self.lora_A)
        base = self.get_base_layer()
        is_plain = _is_plain(base) and not any(value.requires_grad for value in base.parameters())
        return names if is_plain and all(map(self._is_plain_adapter, names)) else ()

    def _is_plain_adapter(self, name: str) -> bool:
        dropout, down, up = self.lora_dropout[name], self.lora_A[name], self.lora_B[name]
        has_dropout = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        return (
            name not in self.lora_variant and not has_dropout and up.bias is None and _is_plain(down) and _is_plain(up)
        )


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and not any(hooks)


def _product(
    x: Tensor, weight_ED: Tensor, bias_E: Tensor | None, a_RD: Tensor, b_ER: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return `x W^T + bias + (x A^T)(s B)^T` in the shape of `x`, and `x A^T`, `(N, R)`."""
    low_NR = x.reshape(-1, x.shape[-1]) @ a_RD.to(x.dtype).t()
    y = linear(x, weight_ED, bias_E)
    y.view(-1, y.shape[-1]).addmm_(low_NR, b_ER.to(x.dtype).t(), alpha=scaling)
    return y, low_NR


class _FusedLora(torch.autograd.Function):
    """Forward `y = x W^T + bias + (x A^T)(s B)^T`; backward with the frozen weight, so no gradient of it.

    dx = g W + (g sB) A, dA = (g sB)^T x, dB = s g^T (x A^T). Adapters in a finer format than the
    model's are rounded to it for the products, as autocast does; their gradients come back in theirs.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight_ED: Tensor, bias_E: Tensor | None, a_RD: Tensor, b_ER: Tensor,
        scaling: float,
    ) -> Tensor:  # fmt: skip
        y, low_NR = _product(x, weight_ED, bias_E, a_RD, b_ER, scaling)
        ctx.save_for_backward(x.reshape(-1, x.shape[-1]), weight_ED, a_RD, b_ER, low_NR)
        ctx.scaling, ctx.shape = scaling, x.shape  # type: ignore[attr-defined]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_ED, a_RD, b_ER, low_NR = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        grad_NE = grad.reshape(-1, grad.shape[-1])
        grad_low_NR = (grad_NE @ b_ER.to(grad.dtype)).mul_(ctx.scaling)
        dx = da_RD = db_ER = None
        if wants_x:
            dx_ND = grad_NE @ weight_ED
            dx = dx_ND.addmm_(grad_low_NR, a_RD.to(grad.dtype)).view(ctx.shape)
        if wants_a:
            da_RD = (grad_low_NR.t() @ x_ND).to(a_RD.dtype)
        if wants_b:
            db_ER = (grad_NE.t() @ low_NR).to(b_ER.dtype).mul_(ctx.scaling)
        return dx, None, None, da_RD, db_ER, None
