"""The exact minimum of a small smooth loss, for misspecified.py and theorem_3_1.py of experiments/."""

from collections.abc import Callable

import torch


def minimise(
    loss_of: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, gradient_below: float
) -> torch.Tensor:
    """The parameters (D,), fp64, where loss_of(parameters) is least, by LBFGS from `start` (D,).

    Where there is no least value, since ever larger parameters do ever better, it is the point where the
    gradient is below `gradient_below`."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=500,
        tolerance_grad=gradient_below,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(parameters)
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()
