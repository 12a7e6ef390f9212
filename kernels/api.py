"""The public functions: they check their arguments by name, choose a backend and leave the arithmetic to it.

Each is a torch.library custom op with a fake implementation, so torch.compile(fullgraph=True) passes over it, and a
backward op. On CUDA a target outside 0..V-1 cannot raise without waiting for the device: its log-prob is NaN instead.
"""

import os
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import torch_backend

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = find_spec("triton") is not None
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IGNORE = -100  # a target that counts for nothing
_default = "auto"


def set_backend(name):
    """What backend="auto" means from now on: one of BACKENDS. Raises ValueError."""
    global _default
    _default = pick(name)


def pick(name, x=None):
    """The backend for tensor x: "auto" is triton on an NVIDIA GPU from sm_80 on, except for fp64, and torch elsewhere."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, not one of {', '.join(BACKENDS)}")
    name = _default if x is not None and name == "auto" else name
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend is 'triton', but triton is not installed")
    if x is None or name == "torch":
        return name
    if name == "auto":
        nvidia = HAS_TRITON and x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 8
        return "triton" if nvidia and x.dtype != torch.float64 else "torch"
    if x.dtype == torch.float64:
        raise ValueError("backend is 'triton', which takes fp32, fp16 and bf16, not fp64")
    if not x.is_cuda and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"backend is 'triton', which needs CUDA tensors (or TRITON_INTERPRET=1), not {x.device}")
    return name


def linear_logp(
    hidden, weight, target, *, bias=None, temperature=1.0, softcap=None, return_entropy=False, backend="auto", budget=None
):
    """log softmax(z)[target] with z = softcap tanh((hidden weight^T + bias) / softcap) / temperature (no softcap if None).

    hidden (N, D), weight (V, D), bias (V,): one of fp32, fp16, bf16, fp64, or autocast's; target (N,) int -> logp (N,) fp32
    [, entropy (N,) fp32 in nats]; fp64 for fp64 inputs. target -100: 0 and no gradient. Differentiable in hidden, weight
    and bias. budget: bytes the backward may keep of the probabilities instead of computing them again (default: 4 GiB or
    a quarter of the free memory, whichever is less). Raises ValueError naming the argument."""
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (None if x is None else x.to(low) for x in (hidden, weight, bias))
    _check_linear(hidden, weight, target, bias, temperature, softcap)
    backend = pick(backend, hidden)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    room = torch_backend.default_budget(hidden.device) if budget is None and grad else int(budget or 0)
    logp, entropy, *_ = linear_op(
        hidden, weight, bias, target, float(temperature), float(softcap or 0.0), return_entropy, room if grad else -1, backend
    )
    return (logp, entropy) if return_entropy else logp


def sequence_logp(hidden, weight, target, cu_seqlens, *, return_entropy=False, backend="auto", **options):
    """linear_logp of packed rows and its sums -> (sequence (B,), token (N,)) [, entropy (N,)].

    cu_seqlens (B+1,) int32: sequence b is rows cu_seqlens[b] .. cu_seqlens[b+1]-1. The rest as in linear_logp."""
    token = linear_logp(hidden, weight, target, return_entropy=return_entropy, backend=backend, **options)
    token, *entropy = token if return_entropy else (token,)
    return segment_sum(token, cu_seqlens, backend=backend), token, *entropy


def logp_from_logits(logits, target, *, backend="auto"):
    """log softmax(logits)[target] in one pass: logits (N, V), target (N,) int -> logp (N,) fp32 (fp64 for fp64 logits).

    target -100: 0 and no gradient. Differentiable in logits. Raises ValueError naming the argument."""
    if logits.ndim != 2 or not logits.shape[1] or logits.dtype not in FLOATS:
        raise ValueError(f"logits must be (N, V) floats, V > 0, not {tuple(logits.shape)} {logits.dtype}")
    _check_target(target, logits, logits.shape[1], "logits")
    return logits_op(logits, target, pick(backend, logits))[0]


def segment_sum(x, cu_seqlens, *, backend="auto"):
    """x (N,) float, cu_seqlens (B+1,) int32 rising from 0 to N -> sums (B,) fp32 (fp64 for fp64 x).

    Each sum is taken in an order that depends on the sequence's length alone. Raises ValueError naming the argument."""
    if x.ndim != 1 or x.dtype not in FLOATS:
        raise ValueError(f"x must be (N,) floats, not {tuple(x.shape)} {x.dtype}")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (B+1,) int32, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, x on {x.device}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(x) or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to {len(x)}, not {cu_seqlens.tolist()[:8]}...")
    return segments_op(x, cu_seqlens, pick(backend, x))


def _check_linear(hidden, weight, target, bias, temperature, softcap):
    if hidden.ndim != 2 or not hidden.shape[1] or hidden.dtype not in FLOATS:
        raise ValueError(f"hidden must be (N, D) floats, D > 0, not {tuple(hidden.shape)} {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"weight must be (V, {hidden.shape[1]}), V > 0, not {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(f"{name} must have hidden's dtype {hidden.dtype}, not {x.dtype}")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}")
    _check_target(target, hidden, weight.shape[0], "hidden")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, not {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive or None, not {softcap}")


def _check_target(target, rows, v, name):
    if target.shape != rows.shape[:1] or target.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"target must be ({rows.shape[0]},) integers, not {tuple(target.shape)} {target.dtype}")
    if target.device != rows.device:
        raise ValueError(f"target is on {target.device}, {name} on {rows.device}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and len(target):
        low, high = (int(x) for x in target.masked_fill(target == IGNORE, 0).aminmax())
        if low < 0 or high >= v:
            raise ValueError(f"target holds {low if low < 0 else high}, outside 0..{v - 1}")


# --- the ops: each is a plain function, run by an autograd.Function in eager mode (a custom op costs 0.2 ms a call on a CPU)
# and as a torch.library op under torch.compile


def _module(backend):
    if backend == "torch":
        return torch_backend
    from kernels import backward as triton_backend  # here, so that the rest works without triton

    return triton_backend


def _on(x):
    """Makes x's GPU the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _linear(
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
    """-> logp, entropy, and what the backward needs: lse (N,), peak and store. softcap 0: none. budget -1: no backward."""
    with _on(hidden):
        return _module(backend).forward(hidden, weight, bias, target, temperature, softcap, with_entropy, budget)


def _linear_backward(
    g_logp: Tensor,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logp: Tensor,
    entropy: Tensor,
    lse: Tensor,
    peak: Tensor,
    store: Tensor,
    temperature: float,
    softcap: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_hidden, d_weight, d_bias; empty where need says no. Overwrites store, whose storage remembers it: a second pass over
    the same graph, compiled or not, computes the probabilities again."""
    storage = store.untyped_storage()
    store = store.new_empty(0) if hasattr(storage, "spent") else store
    storage.spent = True
    return _module(backend).backward(
        g_logp, g_entropy, hidden, weight, bias, target, logp, entropy, lse, peak, store, temperature, softcap, need
    )


def _logits(logits: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with _on(logits):
        return _module(backend).logits_forward(logits, target)


def _logits_backward(g: Tensor, logits: Tensor, target: Tensor, logp: Tensor, lse: Tensor, backend: str) -> Tensor:
    return _module(backend).logits_backward(g, logits, target, logp, lse)


def _segments(x: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    with _on(x):
        return _module(backend).segment_sum(x, cu_seqlens)


def _linear_fake(hidden, weight, bias, target, temperature, softcap, with_entropy, budget, backend):
    n = hidden.shape[0]
    row = hidden.new_empty(n, dtype=torch_backend.wide(hidden.dtype))
    return row, row.new_empty(n if with_entropy else 0), row.new_empty(n), *_module(backend).kept(hidden, weight, budget)


def _linear_backward_fake(g_logp, g_entropy, hidden, weight, bias, *rest):
    like = (hidden, weight, weight[:, 0])
    return tuple(x.new_empty(x.shape if wanted else 0) for x, wanted in zip(like, rest[-2], strict=True))


def _logits_fake(logits, target, backend):
    row = logits.new_empty(logits.shape[0], dtype=torch_backend.wide(logits.dtype))
    return row, torch.empty_like(row)


def _linear_save(ctx, inputs, output):
    hidden, weight, bias, target, ctx.temperature, ctx.softcap, _, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, bias, target, *output)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _linear_grad(run, ctx, g_logp, g_entropy, *_):
    saved = ctx.saved_tensors
    g_logp = torch.zeros_like(saved[4]) if g_logp is None else g_logp
    need = list(ctx.needs_input_grad[:3])
    grads = run(g_logp, g_entropy, *saved, ctx.temperature, ctx.softcap, need, ctx.backend)
    return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *[None] * 6


def _logits_save(ctx, inputs, output):
    logits, target, ctx.backend = inputs
    ctx.save_for_backward(logits, target, *output)
    ctx.mark_non_differentiable(output[1])


def _logits_grad(run, ctx, g, _):
    return run(g, *ctx.saved_tensors, ctx.backend), None, None


def _segments_save(ctx, inputs, output):
    x, cu_seqlens, _ = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.rows, ctx.dtype = x.shape[0], x.dtype


def _segments_grad(run, ctx, g):
    (cu_seqlens,) = ctx.saved_tensors
    position = torch.arange(ctx.rows, device=g.device, dtype=cu_seqlens.dtype)
    return g[torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)].to(ctx.dtype), None, None


def _differentiable(name, forward, forward_fake, save, grad, backward=None, backward_fake=None):
    """The function to call in eager mode or under torch.compile. A second derivative raises RuntimeError in both."""
    op = torch.library.custom_op(f"nanoroads::{name}", forward, mutates_args=())
    op.register_fake(forward_fake)
    backward_op = None
    if backward is not None:
        backward_op = torch.library.custom_op(f"nanoroads::{name}_backward", backward, mutates_args=())
        backward_op.register_fake(backward_fake)
    op.register_autograd(partial(grad, backward_op), setup_context=save)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = forward(*args)
            save(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *g):
            return grad(backward, ctx, *g)

    return lambda *args: op(*args) if torch.compiler.is_compiling() else Eager.apply(*args)


linear_op = _differentiable(
    "linear_logp", _linear, _linear_fake, _linear_save, _linear_grad, _linear_backward, _linear_backward_fake
)
logits_op = _differentiable(
    "logp_from_logits",
    _logits,
    _logits_fake,
    _logits_save,
    _logits_grad,
    _logits_backward,
    lambda g, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
segments_op = _differentiable(
    "segment_sum",
    _segments,
    lambda x, cu_seqlens, _: x.new_empty(cu_seqlens.shape[0] - 1, dtype=torch_backend.wide(x.dtype)),
    _segments_save,
    _segments_grad,
)
