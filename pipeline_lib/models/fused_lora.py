"""LoRA as one operation of a linear layer: no pass over the layer's output but the products themselves.

peft computes `y + scaling * B(A(x))` by parts: two products, a multiplication and a sum, each as
large as the layer's output, again in the backward pass; over a bf16 model it first makes an fp32
copy of every layer's input, which stays in memory until the backward pass. Here the scaling goes on
B, which is small, and products add into what is there.

Legend: N tokens, D inputs, E outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def fuse_lora(model: nn.Module) -> None:
    """Let every LoRA layer of a model take the one operation wherever it applies; results stay the same.

    Where something else is in the layer (several adapters at once, dropout, DoRA, hooks, quantised
    weights, GPT-2's transposed layers) it goes peft's way as before.
    """
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLoraLinear


class FusedLoraLinear(LoraLinear):
    """peft's layer with a faster forward; its state, merging and switching are peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `x W^T + bias + scaling * x A^T B^T`, `(…, E)` for `(…, D)`."""
        name = None if args or kwargs else self._lone_adapter()
        if name is None:
            by_parts: Tensor = super().forward(x, *args, **kwargs)
            return by_parts
        base = self.get_base_layer()
        fused: Tensor = _FusedLora.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return fused

    def _lone_adapter(self) -> str | None:
        """Return the only adapter that speaks, None where the layer is more than base plus LoRA."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or names[0] in self.lora_variant:
            return None
        name = names[0]
        dropout = self.lora_dropout[name]
        has_dropout = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        parts = (self.get_base_layer(), self.lora_A[name], self.lora_B[name])
        is_plain = all(type(part) is nn.Linear and not _has_hooks(part) for part in parts)
        is_frozen = not any(value.requires_grad for value in parts[0].parameters())
        has_bias = self.lora_B[name].bias is not None
        return name if is_plain and is_frozen and not has_dropout and not has_bias else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


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
        x_ND = x.reshape(-1, x.shape[-1])
        low_NR = x_ND @ a_RD.to(x.dtype).t()
        y_NE = nn.functional.linear(x_ND, weight_ED, bias_E)
        y_NE.addmm_(low_NR, _scaled(b_ER, scaling, x.dtype).t())
        ctx.save_for_backward(x_ND, weight_ED, a_RD, b_ER, low_NR)
        ctx.scaling, ctx.shape = scaling, x.shape  # type: ignore[attr-defined]
        return y_NE.view(*x.shape[:-1], weight_ED.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_ED, a_RD, b_ER, low_NR = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        grad_NE = grad.reshape(-1, grad.shape[-1])
        grad_low_NR = grad_NE @ _scaled(b_ER, ctx.scaling, grad.dtype)
        dx = da_RD = db_ER = None
        if wants_x:
            dx_ND = grad_NE @ weight_ED
            dx = dx_ND.addmm_(grad_low_NR, a_RD.to(grad.dtype)).view(ctx.shape)
        if wants_a:
            da_RD = (grad_low_NR.t() @ x_ND).to(a_RD.dtype)
        if wants_b:
            db_ER = (grad_NE.t() @ low_NR).to(b_ER.dtype).mul_(ctx.scaling)
        return dx, None, None, da_RD, db_ER, None


def _scaled(b_ER: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return B times the scaling, in the format of the product it goes into."""
    return (b_ER * scaling).to(dtype)
