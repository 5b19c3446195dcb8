"""Muon, the optimiser of the demo's weight matrices, in fp32.

torch's own orthogonalises in bfloat16, which processors without bfloat16 arithmetic emulate slowly.
Source: Keller Jordan's Muon, with the step length of Moonlight (that of Adam's usual update).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """matrix (..., M, N) with its singular values brought to 0.7 to 1.2 (quintic Newton-Schulz)."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(rounds):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is an orthogonal matrix.

    Convolutions count as (out, in * height * width); a fused q, k, v of shape (3 D, D) as three matrices.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, float]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        rows, columns = update.shape
        matrices = update.unflatten(0, (3, columns)) if rows == 3 * columns else update[None]
        length = 0.2 * max(matrices.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["decay"])
        update = orthogonalised(matrices).reshape(parameter.shape)
        parameter.add_(update, alpha=-group["lr"] * length)
