"""The public functions: they check their arguments by name, choose a backend, and leave the arithmetic to it."""

import torch

from kernels import torch_backend

BACKENDS = ("auto", "torch")
_default = "auto"
IGNORE = -100


def set_backend(name):
    """What backend="auto" means from now on: "auto" (the fastest that works there) or one of BACKENDS. Raises ValueError."""
    global _default
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, not one of {', '.join(BACKENDS)}")
    _default = name


def linear_logp(hidden, weight, target, *, bias=None, temperature=1.0, softcap=None, return_entropy=False, backend="auto"):
    """log softmax(z)[target], z = softcap tanh((hidden weight^T + bias) / softcap) / temperature, the softcap if given.

    hidden (N, D), weight (V, D), bias (V,) of one float dtype (or autocast's), target (N,) int -> logp (N,) fp32 (fp64 for
    fp64 inputs) [, entropy (N,) in nats if return_entropy]. target -100: 0 and no gradient. Differentiable in hidden,
    weight and bias. Raises ValueError naming the argument: shape, dtype, device, a target outside 0..V-1."""
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    check(hidden, weight, target, bias, temperature, softcap)
    return torch_backend.linear_logp(hidden, weight, target, bias, float(temperature), softcap, return_entropy)


def sequence_logp(hidden, weight, target, cu_seqlens, **same):
    """linear_logp of packed rows and its sums: (sequence (B,), token (N,)) [, entropy (N,)]. cu_seqlens (B+1,) int32."""
    token, *entropy = _tuple(linear_logp(hidden, weight, target, **same))
    return segment_sum(token, cu_seqlens), token, *entropy


def logp_from_logits(logits, target, *, backend="auto"):
    """log softmax(logits)[target]: logits (N, V), target (N,) int -> (N,) fp32. target -100: 0 and no gradient."""
    keep = target != IGNORE
    index = target.where(keep, 0).long().unsqueeze(1)
    z = logits if logits.dtype == torch.float64 else logits.float()
    return (z.gather(1, index).squeeze(1) - z.logsumexp(1)).where(keep, 0.0)


def segment_sum(x, cu_seqlens, *, backend="auto"):
    """x (N,), cu_seqlens (B+1,) int32, from 0 to N -> (B,): the sum of each run, in a fixed order."""
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.to(torch.int64), axis=0)


def check(hidden, weight, target, bias, temperature, softcap):
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be (N, D), not {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be (V, {hidden.shape[1]}), not {tuple(weight.shape)}")
    if target.shape != hidden.shape[:1] or target.dtype.is_floating_point:
        raise ValueError(f"target must be ({hidden.shape[0]},) integers, not {tuple(target.shape)} {target.dtype}")
    if weight.dtype != hidden.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(f"weight must have hidden's dtype {hidden.dtype}, not {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != hidden.dtype):
        raise ValueError(f"bias must be ({weight.shape[0]},) {hidden.dtype}, not {tuple(bias.shape)} {bias.dtype}")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, not {softcap}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and target.numel():
        low, high = target.where(target != IGNORE, 0).aminmax()
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"target holds {low if low < 0 else high}, outside 0..{weight.shape[0] - 1}")


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)
