"""The public functions.

They check their arguments by name, choose a backend and leave the arithmetic to it. All are
differentiable and pass torch.compile(fullgraph=True); ops.py says how. What target and cu_seqlens
hold is checked on a CPU only: on CUDA a target outside 0..V-1 cannot raise without waiting for the
device. Its log-prob is NaN instead.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels import ops, torch_backend
from kernels.frozen_head import frozen_op

BACKENDS = ("auto", "torch", "triton")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8)
IGNORE = -100  # a target that counts for nothing
LEAST_DIVISOR, MOST_DIVISOR = 1e-20, 1e30  # of logits in fp32: a temperature or softcap
_default = "auto"


def _finds_triton():
    """Whether it can be imported. A folder without __init__.py, such as a clone's, is not enough."""
    spec = find_spec("triton")
    return spec is not None and spec.origin is not None


HAS_TRITON = _finds_triton()


def set_backend(name: str) -> None:
    """What backend="auto" means from now on: one of BACKENDS. Raises ValueError."""
    global _default
    _default = pick(name)


def pick(name: str, x: Tensor | None = None) -> str:
    """The backend for tensor x; without x, name itself, if it is installed. Raises ValueError.

    "auto" is what set_backend chose; by default triton on an NVIDIA GPU from sm_80 on, except for
    fp64, and torch elsewhere."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, not one of {', '.join(BACKENDS)}")
    if name == "auto" and x is not None:
        name = _default
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend is 'triton', but triton is not installed")
    if x is None or name == "torch":
        return name
    if name == "auto":
        return "triton" if _suits_triton(x) else "torch"
    if x.dtype == torch.float64:
        raise ValueError("backend is 'triton', which takes fp32, fp16 and bf16, not fp64")
    if not x.is_cuda and not (x.device.type == "cpu" and _interprets()):
        raise ValueError(
            f"backend is 'triton', which needs CUDA tensors (or TRITON_INTERPRET=1), not {x.device}"
        )
    if x.dtype == torch.bfloat16 and _interprets():
        raise ValueError(
            "backend is 'triton', whose interpreter (TRITON_INTERPRET=1) multiplies the bits of bf16 as "
            "integers: take fp32, fp16 or the torch backend"
        )
    return name


def _interprets():
    """Whether Triton's interpreter executes the kernels."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _suits_triton(x):
    if not HAS_TRITON or not x.is_cuda or torch.version.hip is not None:
        return False
    if x.dtype == torch.bfloat16 and _interprets():
        return False
    major, _ = torch.cuda.get_device_capability(x.device)
    return major >= 8 and x.dtype != torch.float64


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    budget: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """log softmax(z)[target], z = softcap tanh((hidden weight^T + bias) / softcap) / temperature.

    Without softcap, z is (hidden weight^T + bias) / temperature. hidden (N, D), weight (V, D) and
    bias (V,) are fp32, fp16, bf16 or fp64, all three alike, or, but for fp64, are cast to autocast's
    dtype; target (N,) int -> logp [, entropy] [, lse = log sum exp z], all (N,) fp32 in nats; fp64
    for fp64 inputs.
    A target of -100 gives 0 in each and no gradient, whatever its row holds. Without softcap, a bias
    of -inf bans a class: its log-prob is -inf, its gradient finite. A row whose every class is banned
    gives NaN in each. temperature and softcap: 1e-20 to 1e30.
    Differentiable in hidden, weight and bias, through each of the three.
    budget: bytes of probabilities that the forward may keep for the backward, which otherwise
    computes them again (default: 4 GiB; in eager mode on CUDA at most a quarter of the memory that was
    free at the first call; 0 under torch.compile where N is not known before the run, as in
    hidden[mask]). The log-probs do not depend on it. Where hidden alone takes a
    gradient, another way is taken: see frozen_head.py.
    Raises ValueError naming the argument."""
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    _check_linear(hidden, weight, target, bias, temperature, softcap)
    backend = pick(backend, hidden)
    target = target.long()  # before any comparison: in uint8, -100 is 156
    hidden = _without_ignored(hidden, target)
    if budget is not None and budget < 0:
        raise ValueError(f"budget must be None or a number of bytes, not {budget}")
    if not _takes_gradients(hidden, weight, bias):
        budget = -1  # no backward: nothing is kept
    elif budget is None:
        budget = torch_backend.default_budget(hidden.device)
    if torch.compiler.is_compiling() and _has_unknown_size(hidden):
        budget = min(budget, 0)  # the compiler must know the shape of what is kept
    if not _keeps(backend, temperature, softcap, return_entropy or return_lse):
        budget = min(budget, 0)
    if budget >= 0 and _suits_frozen_op(hidden, weight, bias, softcap, return_entropy, backend):
        logp, lse, _ = frozen_op(hidden, weight, bias, target, float(temperature), backend)
    else:
        logp, entropy, lse, _, _ = ops.linear_op(
            hidden, weight, bias, target,
            float(temperature), float(softcap or 0.0), return_entropy, int(budget), backend,
        )  # fmt: skip
    results = [logp]
    if return_entropy:
        results.append(entropy)
    if return_lse:
        results.append(lse.masked_fill(target == IGNORE, 0.0))
    return tuple(results) if len(results) > 1 else logp


def sequence_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, cu_seqlens: Tensor, *, backend: str = "auto", **options
) -> tuple[Tensor, ...]:
    """linear_logp of packed rows and its sums -> sequence (B,), token (N,) [, entropy] [, lse].

    cu_seqlens (B+1,) int32 or int64: sequence b is rows cu_seqlens[b] .. cu_seqlens[b+1]-1.
    The rest: see linear_logp."""
    results = linear_logp(hidden, weight, target, backend=backend, **options)
    if isinstance(results, Tensor):
        results = (results,)
    return segment_sum(results[0], cu_seqlens, backend=backend), *results


def logp_from_logits(logits: Tensor, target: Tensor, *, backend: str = "auto") -> Tensor:
    """log softmax(logits)[target] in one pass: logits (N, V), target (N,) int -> logp (N,) fp32.

    fp64 for fp64 logits. A target of -100 gives 0 and no gradient. Differentiable in logits.
    Raises ValueError naming the argument."""
    _refuse_dtensors(logits=logits, target=target)
    if logits.ndim != 2 or not logits.shape[1] or logits.dtype not in FLOATS:
        raise ValueError(f"logits must be (N, V) floats, V > 0, not {tuple(logits.shape)} {logits.dtype}")
    check_target(target, logits, "logits")
    logp, _ = ops.logits_op(logits, target.long(), pick(backend, logits))
    return logp


def segment_sum(x: Tensor, cu_seqlens: Tensor, *, backend: str = "auto") -> Tensor:
    """x (N,) float -> sums (B,) of its sequences, fp32 (fp64 for fp64 x).

    cu_seqlens (B+1,) int32 or int64 rises from 0 to N, as in sequence_logp. Each sum's order depends
    on its length alone. Raises ValueError naming the argument."""
    _refuse_dtensors(x=x, cu_seqlens=cu_seqlens)
    if x.ndim != 1 or x.dtype not in FLOATS:
        raise ValueError(f"x must be (N,) floats, not {tuple(x.shape)} {x.dtype}")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be (B+1,) int32 or int64, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, x on {x.device}")
    return ops.segments_op(x, cu_seqlens, pick(backend, x))


def _autocast(x):
    """x in autocast's dtype, as F.linear takes it; fp64 stays."""
    if x is None or x.dtype not in FLOATS or x.dtype == torch.float64:
        return x
    if not torch.amp.is_autocast_available(x.device.type) or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _without_ignored(hidden, target):
    """hidden (N, D) with zeros in the rows of ignored targets.

    These may hold NaN or inf, and 0 times NaN is NaN, which would reach d weight and d bias."""
    ignored = target == IGNORE
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and not ignored.any():
        return hidden  # not asked elsewhere, because the device would have to be waited for
    return hidden.masked_fill(ignored[:, None], 0.0)


def _refuse_dtensors(**tensors):
    """Told by the name of its class, because importing torch.distributed.tensor takes half a second."""
    for name, x in tensors.items():
        if type(x).__name__ == "DTensor":
            raise ValueError(f"{name} is a DTensor, whose memory holds a part: pass {name}.full_tensor()")


def _has_unknown_size(x):
    """Whether the compiler will not know the size of x before the run, as of hidden[mask]."""
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols  # here: it takes 0.3 s

    return has_free_unbacked_symbols(x)


def _suits_frozen_op(hidden, weight, bias, softcap, return_entropy, backend):
    """Whether d hidden alone is wanted, of log-probs and their log-sum-exp, of logits without softcap."""
    if _takes_gradients(weight, bias) or softcap is not None or return_entropy:
        return False
    return backend == "torch" or hidden.dtype != torch.float16  # whose range is too small for Triton's


def _keeps(backend, temperature, softcap, more_than_logp):
    """Whether the backward could use kept probabilities."""
    if backend == "triton":  # it keeps the gradient of logp itself, but for a factor of each row
        return softcap is None and not more_than_logp
    # The backward reads tanh off the kept probabilities, whose log-probs are off by 2^-9.
    return softcap is None or softcap >= 2 * temperature


def _takes_gradients(*tensors):
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def _check_linear(hidden, weight, target, bias, temperature, softcap):
    _refuse_dtensors(hidden=hidden, weight=weight, bias=bias, target=target)
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
    check_target(target, hidden, "hidden")
    limits = f"between {LEAST_DIVISOR} and {MOST_DIVISOR}"
    if not LEAST_DIVISOR <= temperature <= MOST_DIVISOR:
        raise ValueError(f"temperature must be {limits}, not {temperature}")
    if softcap is not None and not LEAST_DIVISOR <= softcap <= MOST_DIVISOR:
        raise ValueError(f"softcap must be None or {limits}, not {softcap}")


def check_target(target, rows, name):
    """target against the rows (N, ...) that it belongs to; name: what the caller calls these."""
    if target.shape != rows.shape[:1] or target.dtype not in INTEGERS:
        raise ValueError(
            f"target must be ({rows.shape[0]},) integers that int64 holds, "
            f"not {tuple(target.shape)} {target.dtype}"
        )
    if target.device != rows.device:
        raise ValueError(f"target is on {target.device}, {name} on {rows.device}")
