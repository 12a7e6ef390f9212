"""What the torch backend allocates, in a child process each, whose peak shows."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMORY = """
import resource, sys, torch, kernels

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def naive(hidden, weight, target):
    return torch.log_softmax(hidden @ weight.T, 1).gather(1, target[:, None])[:, 0]

def ours(hidden, weight, target):
    return kernels.linear_logp(hidden, weight, target, backend="torch", budget=eval(sys.argv[1]))

n, d, v = 1024, 768, 50257
hidden = torch.randn(n, d, requires_grad=True)
weight, target = torch.randn(v, d).mul_(0.02).requires_grad_(), torch.randint(v, (n,))
f = naive if sys.argv[1] == "naive" else ours
f(hidden[:2], weight[:99], target[:2] % 99).sum().backward()  # libraries are loaded and their buffers exist
hidden.grad = weight.grad = None
before = peak()
f(hidden, weight, target).sum().backward()
print((peak() - before) * 1024)
"""


def peak_bytes(how):
    """Beyond the inputs. how: "naive", or the budget of linear_logp."""
    command = [sys.executable, "-c", MEMORY, how]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_memory():
    """Beyond inputs and gradients, at most a quarter of what log_softmax of the logits takes.

    Gradients are alive at our peak, but not at the naive one, which is before d weight exists."""
    naive = peak_bytes("naive")
    gradient_bytes = (1024 + 50257) * 768 * 4
    assert peak_bytes("None") - gradient_bytes <= naive / 4
    assert peak_bytes("0") - gradient_bytes <= naive / 6
