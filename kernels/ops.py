"""The operations as autograd and torch.compile see them; the arithmetic is in the backends.

Every operation exists twice:

- In eager mode it is an autograd.Function. A torch.library op would do there as well, but on a
  CPU it costs 0.2 ms per call: a third of a forward of 2,000 rows with a vocabulary of 98.
- Under torch.compile it is a torch.library op. The compiler cannot look into Triton launches or
  loops over tiles, so it takes the op as one node of its graph (fullgraph=True works), and a
  "fake" function tells it the shapes of the results. The backward is an op of its own.

Both run the same plain functions: `_x_forward` computes, `_x_save` keeps what the backward needs
and `_x_gradients` calls `_x_backward`, or the op made of it. segment_sum's gradient is plain
PyTorch. Each ends in a function `x_op`, which chooses between the two. A second derivative raises
RuntimeError in both.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from kernels import torch_backend, torch_rows


def _forward_module(backend):
    """The module with forward and kept."""
    if backend == "torch":
        return torch_backend
    from kernels import triton_forward  # here, because triton is optional

    return triton_forward


def _backward_module(backend):
    """The module with backward."""
    if backend == "torch":
        return torch_backend
    from kernels import triton_backward  # here, because triton is optional

    return triton_backward


def _rows_module(backend):
    """The module with logits_forward, logits_backward and segment_sum."""
    if backend == "torch":
        return torch_rows
    from kernels import triton_rows  # here, because triton is optional

    return triton_rows


def device_of(x):
    """A context in which x's GPU is the current one, since Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# What tensors hold is checked here, where torch.compile's graphs pass, too.


def check_classes(target, classes):
    """Raises ValueError, on a CPU, for a target (N,) int64 outside 0..classes-1 that is not -100."""
    if target.device.type != "cpu" or not len(target):
        return
    low, high = target.masked_fill(target == -100, 0).aminmax()
    for extreme in (int(low), int(high)):
        if not 0 <= extreme < classes:
            raise ValueError(f"target holds {extreme}, outside 0..{classes - 1}")


def _check_offsets(cu_seqlens, rows):
    """Raises ValueError, on a CPU, unless cu_seqlens (B+1,) rises from 0 to rows."""
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != rows or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {rows}, not {cu_seqlens.tolist()[:8]}...")


# --- linear_logp: hidden, weight, bias, target -> logp, entropy, lse


def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float,
    with_entropy: bool,
    budget: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logp, entropy, lse (N,), and what the backward can use: factors (N,) or (N, tiles) and store (N, V).

    softcap 0: none. budget -1: there will be no backward."""
    check_classes(target, weight.shape[0])
    module = _forward_module(backend)
    with device_of(hidden):
        return module.forward(hidden, weight, bias, target, temperature, softcap, with_entropy, budget)


def _linear_fake(hidden, weight, bias, target, temperature, softcap, with_entropy, budget, backend):
    n = hidden.shape[0]
    logp = hidden.new_empty(n, dtype=torch_backend.wide(hidden.dtype))
    entropy = logp.new_empty(n if with_entropy else 0)
    lse = logp.new_empty(n)
    factors, store = _forward_module(backend).kept(hidden, weight, budget)
    return logp, entropy, lse, factors, store


def _linear_save(ctx, inputs, output):
    hidden, weight, bias, target, temperature, softcap, _, _, backend = inputs
    logp, entropy, lse, factors, store = output
    ctx.save_for_backward(hidden, weight, bias, target, logp, entropy, lse, factors, store)
    ctx.mark_non_differentiable(factors, store)
    ctx.set_materialize_grads(False)  # an unused output gets None, not zeros
    ctx.temperature = temperature
    ctx.softcap = softcap
    ctx.backend = backend


def _linear_backward(
    g_logp: Tensor,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logp: Tensor,
    entropy: Tensor,
    lse: Tensor,
    factors: Tensor,
    store: Tensor,
    temperature: float,
    softcap: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_hidden, d_weight, d_bias; empty where need says no."""
    module = _backward_module(backend)
    with device_of(hidden):
        return module.backward(
            g_logp, g_entropy, g_lse, hidden, weight, bias, target,
            logp, entropy, lse, factors, store, temperature, softcap, need,
        )  # fmt: skip


def _linear_backward_fake(
    g_logp, g_entropy, g_lse, hidden, weight, bias, target,
    logp, entropy, lse, factors, store, temperature, softcap, need, backend,
):  # fmt: skip
    need_hidden, need_weight, need_bias = need
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    d_bias = weight.new_empty(weight.shape[0] if need_bias else 0)
    return d_hidden, d_weight, d_bias


def _linear_gradients(backward, ctx, g_logp, g_entropy, g_lse):
    """-> one gradient, or None, for each of the nine arguments of _linear_forward."""
    hidden, weight, bias, target, logp, entropy, lse, factors, store = ctx.saved_tensors
    if g_logp is None:
        g_logp = torch.zeros_like(logp)
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    d_hidden, d_weight, d_bias = backward(
        g_logp, g_entropy, g_lse, hidden, weight, bias, target, logp, entropy, lse, factors, store,
        ctx.temperature, ctx.softcap, [need_hidden, need_weight, need_bias], ctx.backend,
    )  # fmt: skip
    return (
        d_hidden if need_hidden else None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
        None,  # target
        None,  # temperature
        None,  # softcap
        None,  # with_entropy
        None,  # budget
        None,  # backend
    )


class _EagerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _linear_forward(*inputs)
        _linear_save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy, g_lse, _factors, _store):
        return _linear_gradients(_linear_backward, ctx, g_logp, g_entropy, g_lse)


def _compiled_linear_backward(ctx, g_logp, g_entropy, g_lse, _factors, _store):
    return _linear_gradients(_linear_backward_custom_op, ctx, g_logp, g_entropy, g_lse)


_linear_custom_op = custom_op("nanoroads::linear_logp", _linear_forward, mutates_args=())
_linear_custom_op.register_fake(_linear_fake)
_linear_backward_custom_op = custom_op("nanoroads::linear_logp_backward", _linear_backward, mutates_args=())
_linear_backward_custom_op.register_fake(_linear_backward_fake)
_linear_custom_op.register_autograd(_compiled_linear_backward, setup_context=_linear_save)


def linear_op(*inputs):
    """_linear_forward, differentiable in hidden, weight and bias."""
    if torch.compiler.is_compiling():
        return _linear_custom_op(*inputs)
    return _EagerLinear.apply(*inputs)


# --- logp_from_logits: logits, target -> logp


def _logits_forward(logits: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """-> logp, and lse (N,) for the backward."""
    check_classes(target, logits.shape[1])
    module = _rows_module(backend)
    with device_of(logits):
        return module.logits_forward(logits, target)


def _logits_fake(logits, target, backend):
    logp = logits.new_empty(logits.shape[0], dtype=torch_backend.wide(logits.dtype))
    return logp, torch.empty_like(logp)


def _logits_save(ctx, inputs, output):
    logits, target, backend = inputs
    logp, lse = output
    ctx.save_for_backward(logits, target, logp, lse)
    ctx.mark_non_differentiable(lse)
    ctx.backend = backend


def _logits_backward(
    g_logp: Tensor, logits: Tensor, target: Tensor, logp: Tensor, lse: Tensor, backend: str
) -> Tensor:
    module = _rows_module(backend)
    with device_of(logits):
        return module.logits_backward(g_logp, logits, target, logp, lse)


def _logits_backward_fake(g_logp, logits, target, logp, lse, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _logits_gradients(backward, ctx, g_logp):
    """-> one gradient, or None, for each of the three arguments of _logits_forward."""
    logits, target, logp, lse = ctx.saved_tensors
    return backward(g_logp, logits, target, logp, lse, ctx.backend), None, None


class _EagerLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _logits_forward(*inputs)
        _logits_save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, _lse):
        return _logits_gradients(_logits_backward, ctx, g_logp)


def _compiled_logits_backward(ctx, g_logp, _lse):
    return _logits_gradients(_logits_backward_custom_op, ctx, g_logp)


_logits_custom_op = custom_op("nanoroads::logp_from_logits", _logits_forward, mutates_args=())
_logits_custom_op.register_fake(_logits_fake)
_logits_backward_custom_op = custom_op(
    "nanoroads::logp_from_logits_backward", _logits_backward, mutates_args=()
)
_logits_backward_custom_op.register_fake(_logits_backward_fake)
_logits_custom_op.register_autograd(_compiled_logits_backward, setup_context=_logits_save)


def logits_op(*inputs):
    """_logits_forward, differentiable in logits."""
    if torch.compiler.is_compiling():
        return _logits_custom_op(*inputs)
    return _EagerLogits.apply(*inputs)


# --- segment_sum: x, cu_seqlens -> sums. Its gradient is PyTorch, which torch.compile looks into.


def _segments_forward(x: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    _check_offsets(cu_seqlens, x.shape[0])
    module = _rows_module(backend)
    with device_of(x):
        return module.segment_sum(x, cu_seqlens)


def _segments_fake(x, cu_seqlens, backend):
    return x.new_empty(cu_seqlens.shape[0] - 1, dtype=torch_backend.wide(x.dtype))


def _segments_save(ctx, inputs, output):
    x, cu_seqlens, _ = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.rows = x.shape[0]
    ctx.dtype = x.dtype


def _segments_gradients(ctx, g_sums):
    """Each element's gradient is that of its sequence's sum."""
    (cu_seqlens,) = ctx.saved_tensors
    position = torch.arange(ctx.rows, device=g_sums.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return g_sums[sequence].to(ctx.dtype), None, None


class _EagerSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _segments_forward(*inputs)
        _segments_save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, g_sums):
        return _segments_gradients(ctx, g_sums)


_segments_custom_op = custom_op("nanoroads::segment_sum", _segments_forward, mutates_args=())
_segments_custom_op.register_fake(_segments_fake)
_segments_custom_op.register_autograd(_segments_gradients, setup_context=_segments_save)


def segments_op(*inputs):
    """_segments_forward, differentiable in x."""
    if torch.compiler.is_compiling():
        return _segments_custom_op(*inputs)
    return _EagerSegments.apply(*inputs)
