"""A wrong argument raises a ValueError that begins with the argument's name."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import kernels

T = torch.zeros(11, dtype=torch.int64)


def wrong(**change):
    """What test_errors passes, with one argument changed."""
    hidden, weight, bias = torch.zeros(11, 20), torch.zeros(37, 20), torch.zeros(37)
    return {"hidden": hidden, "weight": weight, "target": T, "bias": bias, "backend": "torch"} | change


ERRORS = {
    "hidden: shape": ("hidden", {"hidden": torch.zeros(11)}),
    "hidden: dtype": ("hidden", {"hidden": torch.zeros(11, 20, dtype=torch.int64)}),
    "weight: shape": ("weight", {"weight": torch.zeros(37, 21)}),
    "weight: one axis": ("weight", {"weight": torch.zeros(37)}),
    "weight: no classes": ("weight", {"weight": torch.zeros(0, 20)}),
    "weight: dtype": ("weight", {"weight": torch.zeros(37, 20, dtype=torch.float16)}),
    "weight: device": ("weight", {"weight": torch.zeros(37, 20, device="meta")}),
    "bias: shape": ("bias", {"bias": torch.zeros(36)}),
    "bias: dtype": ("bias", {"bias": torch.zeros(37, dtype=torch.float64)}),
    "bias: device": ("bias", {"bias": torch.zeros(37, device="meta")}),
    "target: shape": ("target", {"target": T[1:]}),
    "target: dtype": ("target", {"target": T.float()}),
    "target: uint64": ("target", {"target": T.to(torch.uint64)}),
    "target: 156 is not -100": ("target holds 156", {"target": (T + 156).to(torch.uint8)}),
    "target: beyond 32 bits": (f"target holds {2**32}", {"target": T + 2**32}),
    "target: bool": ("target", {"target": T.bool()}),
    "target: device": ("target", {"target": T.to("meta")}),
    "target: too large": ("target holds 37", {"target": T + 37}),
    "target: negative": ("target holds -1", {"target": T - 1}),
    "temperature: 0": ("temperature", {"temperature": 0.0}),
    "temperature: too small": ("temperature", {"temperature": 1e-38}),
    "temperature: infinite": ("temperature", {"temperature": float("inf")}),
    "softcap: too small": ("softcap", {"softcap": 1e-40}),
    "softcap: too large": ("softcap", {"softcap": 1e39}),
    "temperature: nan": ("temperature", {"temperature": float("nan")}),
    "softcap: negative": ("softcap", {"softcap": -1.0}),
    "softcap: 0": ("softcap", {"softcap": 0.0}),
    "budget": ("budget", {"budget": -1}),
    "backend": ("backend", {"backend": "cuda"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    message, change = ERRORS[name]
    arguments = wrong(**change)
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        kernels.linear_logp(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("target"), **arguments
        )
    assert "\n" not in str(raised.value)


def test_a_dtensor_is_refused():
    """Its memory holds one rank's part, which would pass for the whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("hidden", "weight", "target", "bias"):
            arguments = wrong()
            arguments[name] = distribute_tensor(arguments[name], mesh)
            with pytest.raises(ValueError, match=rf"^{name} is a DTensor.*pass {name}\.full_tensor\(\)"):
                kernels.linear_logp(**arguments)
        logits = distribute_tensor(torch.zeros(11, 20), mesh)
        with pytest.raises(ValueError, match="^logits is a DTensor"):
            kernels.logp_from_logits(logits, T, backend="torch")
        with pytest.raises(ValueError, match="^x is a DTensor"):
            kernels.segment_sum(logits[:, 0], torch.tensor([0, 11]), backend="torch")
    finally:
        dist.destroy_process_group()


def test_errors_of_the_rest():
    x = torch.zeros(4)
    for cu in ([1, 4], [0, 3], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match="^cu_seqlens"):
            kernels.segment_sum(x, torch.tensor(cu, dtype=torch.int32), backend="torch")
    for cu in (
        torch.zeros(2, 2, dtype=torch.int32),
        torch.tensor([0.0, 4.0]),
        torch.zeros(2, dtype=torch.int32, device="meta"),
    ):
        with pytest.raises(ValueError, match="^cu_seqlens"):
            kernels.segment_sum(x, cu, backend="torch")
    for bad in (x[None], x.long()):
        with pytest.raises(ValueError, match="^x must"):
            kernels.segment_sum(bad, torch.tensor([0, 4]), backend="torch")
    for logits, target, name in (
        (x, T[:4], "logits"),
        (torch.zeros(4, 5).long(), T[:4], "logits"),
        (torch.zeros(4, 5), T, "target"),
        (torch.zeros(4, 5), T[:4] + 5, "target holds 5"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            kernels.logp_from_logits(logits, target, backend="torch")
    with pytest.raises(ValueError, match="^backend"):
        kernels.set_backend("fast")


def test_compiled_code_refuses_as_well():
    """What tensors hold is checked when the compiled function runs, where it knows them."""

    def function(hidden, target, cu_seqlens):
        sums, token = kernels.sequence_logp(hidden, torch.ones(37, 20), target, cu_seqlens, backend="torch")
        return sums, token, kernels.logp_from_logits(hidden, target, backend="torch")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    hidden, cu_seqlens = torch.zeros(11, 20), torch.tensor([0, 4, 11])
    compiled(hidden, T, cu_seqlens)
    for wrong_class in (37, -1, -101, 2**32 + 5):
        with pytest.raises(ValueError, match=f"^target holds {wrong_class}"):
            compiled(hidden, T + wrong_class, cu_seqlens)
    with pytest.raises(ValueError, match=r"^target holds 20, outside 0\.\.19"):
        compiled(hidden, T + 20, cu_seqlens)  # in the vocabulary of the first, not of the second
    for offsets in ([0, 4, 99], [1, 4, 11], [-5, 4, 11], [0, 12, 11]):
        with pytest.raises(ValueError, match="^cu_seqlens must rise from 0 to 11"):
            compiled(hidden, T, torch.tensor(offsets))
