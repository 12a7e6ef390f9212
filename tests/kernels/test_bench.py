"""The benchmark, the search for tiles and the trace run on tiny shapes, and say what is true."""

import gzip
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import bench, measuring, tiles, trace

ROOT = Path(__file__).parents[2]
TINY = ["--shape", "9", "16", "70", "--shape", "100", "8", "33"]


def run(module, *arguments):
    """module's main in this process -> what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(bench, "MOST_ROUNDS", 5)
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
    return printed.getvalue()


def refusal(capsys, module, *arguments):
    """module's main, which exits with 2 -> the line that it prints to stderr."""
    with pytest.raises(SystemExit) as left:
        run(module, *arguments)
    message = capsys.readouterr().err
    assert left.value.code == 2 and message.count("\n") == 1 and message.startswith(f"{module.__name__}: ")
    return message


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of --json."""
    folder = tmp_path_factory.mktemp("bench")
    printed = run(bench, *TINY, "--json", folder / "bench.json", "--figure", folder / "bench.png")
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "bench.json").read_text()) | {"printed": printed}


def test_columns(results):
    assert {"date", "device", "torch", "dtype"} <= results.keys()
    assert [(r["N"], r["D"], r["V"]) for r in results["results"]] == [(9, 16, 70), (100, 8, 33)]
    for shape in results["results"]:
        assert shape["ceiling_tflops"] > 0
        ours = {"nanoroads torch", "nanoroads torch recompute", "nanoroads torch frozen head"}
        assert ours | {"naive logits"} <= shape["rows"].keys()
        for name, row in shape["rows"].items():
            assert list(row) == bench.COLUMNS
            assert 0 < row["forward_ms"] < row["total_ms"] and row["of_ceiling"] > 0
            products = 2 if name.endswith("frozen head") else 3
            work = 2 * products * shape["N"] * shape["D"] * shape["V"]
            assert row["tflops"] == pytest.approx(work / (row["total_ms"] / 1e3) / 1e12)


def test_our_errors_are_small(results):
    for shape in results["results"]:
        for name, row in shape["rows"].items():
            if name.startswith("nanoroads"):
                tolerance = 1e-2 if results["dtype"] == "bf16" else 1e-5  # the gradients are rounded to bf16
                assert row["logp_error"] < 2e-5 and row["d_hidden_error"] < tolerance
                if name.endswith("frozen head"):
                    assert row["d_weight_error"] is None
                else:
                    assert row["d_weight_error"] < tolerance


def test_the_reference():
    """The fp64 reference, against autograd through fp64 logits; targets repeat."""
    x, w, t = measuring.problem(90, 6, 11, torch.float32, "cpu")
    logp, d_hidden, d_weight = measuring.reference(x, w, t)
    x, w = (y.detach().double().requires_grad_() for y in (x, w))
    expected = torch.log_softmax(x @ w.T, 1).gather(1, t[:, None])[:, 0]
    expected.sum().backward()
    for a, b in ((logp, expected), (d_hidden, x.grad[:64]), (d_weight, w.grad[t[:64]])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_memory(results):
    """The logits of a larger problem show; ours is of the size of the gradients, 1.3 MiB.

    It is less where pages are reused."""
    if torch.cuda.is_available():
        pytest.skip("of the resident set")
    found = {name: bench.implementation(name) for name in ("naive logits", "nanoroads torch recompute")}
    _, rows = bench.measure((1000, 16, 20000), torch.float32, "cpu", found, 1)
    naive, ours = (row["extra_mib"] for row in rows.values())
    assert naive > 2 * 1000 * 20000 * 4 / 2**20 * 0.9 and 0 <= ours < naive / 5


def test_tiles_keep_their_layout():
    pytest.importorskip("triton")
    from kernels import tune

    text = tiles.PATH.read_text()
    assert tune.one_tile_per_line(json.loads(text)) == text


def test_a_wrong_gradient_shows():
    x, w, t = measuring.problem(90, 6, 11, torch.float32, "cpu")
    out = bench.implementation("naive logits")(x, w, t)
    out.sum().backward()
    w.grad.mul_(1.01)
    errors = bench.errors(out.detach() + 0.01, x, w, t, measuring.reference(x, w, t))
    assert errors["logp_error"] == pytest.approx(0.01, rel=1e-3)
    assert errors["d_hidden_error"] < 1e-6
    assert errors["d_weight_error"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu(results, capsys):
    for name in ("liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "nanoroads triton"):
        assert f"{name}: left out, needs a CUDA device\n" in results["printed"]
    pytest.importorskip("triton")
    from kernels import tune

    assert "no CUDA device" in refusal(capsys, tune)


WRONG = (
    "--dtype int8, --shape 1 2 0, --shape 99999999999 8 8, --shape 99999999 8 99999999, --shape 8 8 1e9, "
    "--json no/such.json, --json ., --figure x.gif, --figure out.png --json out.png, --fast"
).split(", ")


@pytest.mark.parametrize("arguments", [wrong.split() for wrong in WRONG])
def test_bad_arguments(arguments, capsys):
    message = refusal(capsys, bench, *arguments)
    assert arguments[0] in message or arguments[-1] in message


@pytest.mark.slow
def test_trace(tmp_path):
    command = [
        sys.executable,
        "-m",
        "kernels.trace",
        "--shape",
        "9",
        "16",
        "70",
        "--out",
        tmp_path / "trace.json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stdout and "ncu " in done.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_trace_refuses(tmp_path, capsys):
    assert "no such folder" in refusal(capsys, trace, "--out", tmp_path / "no" / "trace.json")
    assert "--shape" in refusal(capsys, trace, "--shape", 9, 0, 70)
    message = refusal(capsys, trace, "--shape", 99999999999, 8, 8)
    assert "--shape 99999999999 8 8: takes 3352 GiB" in message


@pytest.mark.parametrize("module", [bench, trace])
def test_out_is_a_file(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("a user's")
    assert "out: is a file" in refusal(capsys, module, "--shape", 9, 16, 70)
    assert Path("out").read_text() == "a user's"


# ---------------------------------------------------------------- a full disk


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_for_the_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CONTENDERS", ["naive logits"])
    for flag, name in (("--json", "bench.json"), ("--figure", "bench.png")):
        (tmp_path / name).symlink_to("/dev/full")
        other = {"--json": "--figure", "--figure": "--json"}[flag], tmp_path / "other.png"
        message = refusal(capsys, bench, "--shape", 9, 16, 70, flag, tmp_path / name, *other)
        assert "No space left on device" in message and "/dev/full" in message
    assert Path("/dev/full").is_char_device()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "results.json", tmp_path / "link.json"
    path.write_text("earlier results")
    link.symlink_to(path)

    def half(part, content):
        part.open("wb").write(content[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: .*results"):
        patch.setattr(Path, "write_bytes", half)
        measuring.write(path, b"later results")
    assert path.read_text() == "earlier results"
    measuring.write(link, b"later results")
    assert path.read_text() == "later results" and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]


class FullDisk:
    """A profiler that says nothing of it: no file but half of the one that it would rename, or one
    without an end."""

    def __init__(self, name, content):
        self.name = name
        self.content = content

    def export_chrome_trace(self, path):
        Path(path).with_name(self.name).write_bytes(self.content)


@pytest.mark.parametrize(
    "left, content",
    [("trace.json.tmp", b"{}"), ("trace.json", b'{"a": '), ("trace.json", b""),
     ("trace.json.gz", gzip.compress(b"", mtime=0)), ("trace.json.gz", gzip.compress(b"{}", mtime=0)[:-8])],
)  # fmt: skip
@pytest.mark.parametrize("free, message", [(0, "No space left on device"), (1 << 40, "Input/output error")])
def test_a_trace_that_does_not_appear(free, message, left, content, tmp_path, monkeypatch):
    """An earlier trace stays, and does not pass for this one."""
    path = tmp_path / left.removesuffix(".tmp")
    path.write_text("an earlier trace")
    monkeypatch.setattr(measuring.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=f"{message}: .*{path}"):
        measuring.write_trace(path, FullDisk(left, content))
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "an earlier trace"


@pytest.mark.parametrize("name", ["results.json.part", "part-trace.json", "part-trace.json.tmp"])
def test_a_users_file_beside_the_results_stays(name, tmp_path):
    (tmp_path / name).write_text("mine")
    measuring.write(tmp_path / "results.json", b"{}")
    measuring.write_trace(tmp_path / "trace.json", FullDisk("trace.json", b"{}"))
    assert (tmp_path / name).read_text() == "mine" and (tmp_path / "trace.json").read_text() == "{}"


FULL = """
import resource, signal, sys
from kernels import measuring, trace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # a trace is larger
measuring.shutil.disk_usage = lambda path: type("", (), {"free": 0})
sys.argv = ["trace", "--shape", "9", "16", "70", "--out", sys.argv[1]]
trace.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_for_the_trace(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("an earlier trace")
    command = [sys.executable, "-c", FULL, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"kernels.trace: [Errno 28] No space left on device: '{path}'" in done.stderr
    assert "the trace is in" not in done.stdout and "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    assert path.read_text() == "an earlier trace"


def test_only_what_the_machine_lacks_is_told_in_a_line(capsys):
    parser = measuring.Parser("kernels.bench", "")
    out_of_memory = RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
    for error in (MemoryError(), out_of_memory, OSError(28, "full")):
        with pytest.raises(SystemExit), parser.refusing():
            raise error
    assert capsys.readouterr().err.count("try a smaller --shape") == 2
    bug = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"), parser.refusing():
        raise RuntimeError(bug)
