"""Runs the cases of helpers/ in a child process, where Triton's interpreter executes the kernels."""

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy
import pytest
import torch

import kernels
from kernels import api
from nanoroads.errors import InputError
from nanoroads.run.run import pick_kernel

triton = pytest.importorskip("triton")
TRITON, NUMPY = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy))
ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests/helpers"
CASES = [HELPERS / f"{name}_cases.py" for name in ("triton", "kept", "extreme", "promise")]


@pytest.mark.skipif(
    TRITON < (3, 7) and NUMPY >= (2, 4), reason="the interpreter of Triton 3.6 needs numpy < 2.4"
)
@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(selection):
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--noconftest", "-m", selection]
    command = [sys.executable, "-m", "pytest", *options, *map(str, CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_backend_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, cu = torch.ones(3), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="backend.*CUDA"):
        kernels.segment_sum(x, cu, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        kernels.segment_sum(x, cu, backend="cuda")
    assert kernels.segment_sum(x, cu) == 3  # "auto" never is triton on a CPU
    monkeypatch.setattr(api, "HAS_TRITON", False)
    for call in (lambda: kernels.set_backend("triton"), lambda: kernels.segment_sum(x, cu, backend="triton")):
        with pytest.raises(ValueError, match="triton is not installed"):
            call()


def test_a_run_refuses_bf16_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        pick_kernel("triton", torch.device("cpu"), None)
        with pytest.raises(InputError, match="^--kernel triton: .*interpreter.*bf16"):
            pick_kernel("triton", torch.device("cpu"), torch.bfloat16)
    finally:
        kernels.set_backend("auto")


def test_import_without_triton():
    """backend="torch" needs no triton, and never imports it. The search for tiles says that it does."""
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, kernels
kernels.linear_logp(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 1]), backend="torch").sum()
assert "kernels.triton_forward" not in sys.modules
from kernels import tune
tune.main()
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 2 and child.stderr.startswith("kernels.tune: triton is not installed")
    assert child.stderr.count("\n") == 1


def test_a_folder_named_triton_is_not_triton(tmp_path, monkeypatch):
    """Such as a clone of its repository, where Triton is not installed: find_spec finds the folder."""
    (tmp_path / "triton").mkdir()
    folder = PathFinder.find_spec("triton", [str(tmp_path)])
    assert folder is not None
    monkeypatch.setattr(api, "find_spec", lambda name: folder)
    assert not api._finds_triton()
    monkeypatch.undo()
    assert api._finds_triton()
