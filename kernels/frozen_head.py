"""linear_logp where the head is frozen, as with LoRA on the trunk, and only d hidden is wanted.

With p = softmax(z) and upstream gradients g of the log-prob and l of the log-sum-exp,

    d hidden_i = (g (1 - p_t) + l p_t) W_t - (g - l) sum over j other than t of p_j W_j, over the temperature

which is linear in g and l. So the forward can do all the work before it knows them: it keeps the sum,
N D numbers in fp32, and the backward is a line of PyTorch. That takes 4 N D V operations for both and
no second pass over the vocabulary, where 2 N V bytes of kept probabilities, or 6 N D V operations,
would be needed. The target's own W_t is apart because 1 - p_t is known without cancellation.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from kernels import ops, torch_backend


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> logp, lse (N,), sums (N, D)."""
    ops.check_classes(target, weight.shape[0])
    sums = hidden.new_empty(hidden.shape, dtype=torch_backend.wide(hidden.dtype))
    if backend == "torch":
        logp, _, lse, _, _ = torch_backend.forward(
            hidden, weight, bias, target, temperature, 0.0, False, -1, sums
        )
        return logp, lse, sums
    from kernels import triton_frozen  # here, because triton is optional

    with ops.device_of(hidden):
        logp, lse = triton_frozen.forward(hidden, weight, bias, target, temperature, sums)
    return logp, lse, sums


def _fake(hidden, weight, bias, target, temperature, backend):
    sums = hidden.new_empty(hidden.shape, dtype=torch_backend.wide(hidden.dtype))
    logp = sums.new_empty(hidden.shape[0])
    return logp, torch.empty_like(logp), sums


def _save(ctx, inputs, output):
    _, weight, _, target, temperature, _ = inputs
    logp, _, sums = output
    ctx.save_for_backward(weight, target, logp, sums)
    ctx.mark_non_differentiable(sums)
    ctx.set_materialize_grads(False)  # an unused output gets None, not zeros
    ctx.temperature = temperature


def _gradients(ctx, g_logp, g_lse, _sums):
    weight, target, logp, sums = ctx.saved_tensors
    if g_logp is None:
        g_logp = torch.zeros_like(logp)
    ignored, index = torch_backend.usable(target, weight.shape[0])
    of_p, of_target = torch_backend.gradient_parts(g_logp, g_lse, ignored, logp, ctx.temperature)
    d_hidden = sums * of_p + weight[index].to(sums.dtype) * of_target
    return d_hidden.to(weight.dtype), None, None, None, None, None


class _EagerFrozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        return _gradients(ctx, *upstream)


_custom_op = custom_op("nanoroads::frozen_linear_logp", _forward, mutates_args=())
_custom_op.register_fake(_fake)
_custom_op.register_autograd(_gradients, setup_context=_save)


def frozen_op(*inputs):
    """hidden, weight, bias, target, temperature, backend -> logp, lse (N,), differentiable in hidden
    alone; and sums (N, D), which the backward needs."""
    if torch.compiler.is_compiling():
        return _custom_op(*inputs)
    return _EagerFrozen.apply(*inputs)
