"""The exact minimum of a small smooth loss, for misspecified.py and theorem_3_1.py of experiments/."""

from collections.abc import Callable

import torch

FLAT = 1e-6  # of a gradient's entries: 2e-8 is the steepest end of all fits of the two scripts


def minimise(
    loss_of: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, gradient_below: float
) -> torch.Tensor:
    """The parameters (D,), fp64, where loss_of(parameters) is least, by LBFGS from `start` (D,).

    The search ends where the gradient is below `gradient_below`, or before, where in fp64 no step lowers the
    loss any more. Where there is no least value, since ever larger parameters do ever better, it is such a
    point, too. Raises RuntimeError where the gradient is not below FLAT at the end."""
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
    (gradient,) = torch.autograd.grad(loss_of(parameters), parameters)
    steepest = gradient.abs().max().item()
    if not steepest < FLAT:
        raise RuntimeError(f"LBFGS has stopped where the gradient is {steepest:.1e}, not below {FLAT:.0e}")
    return parameters.detach()
