"""What bench, tune and trace share: a problem to measure, a clock, peak memory, an exact reference, a
parser, and files that are written whole or not at all."""

import argparse
import contextlib
import ctypes
import errno
import gzip
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED_ROWS = 64  # of each gradient that are compared with the reference


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and exits with 2."""

    def __init__(self, program, description):
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.program = program

    def error(self, message):
        print(f"{self.program}: {message}", file=sys.stderr)
        sys.exit(2)

    def check_shape(self, shape, device, multiplies):
        """Refuses a shape N, D, V whose inputs, in fp32, are larger than the device's memory.

        multiplies: whether the (N, V) logits have to fit as well."""
        n, d, v = shape
        if min(shape) < 1:
            self.error("--shape takes positive numbers")
        needed = 4 * (n * d + v * d + n + (n * v if multiplies else 0))
        there_is = memory_of(device)
        if needed > there_is:
            least = f"takes {needed >> 30} GiB at the least"
            self.error(f"--shape {n} {d} {v}: {least}, of {there_is >> 30} GiB on this device")

    def check_file(self, flag, path):
        """Refuses a file that cannot be written; makes the folder out/, which the defaults name."""
        folder = path.absolute().parent
        if path.parent == Path("out") and not folder.exists():
            folder.mkdir()
        if path.is_dir():
            self.error(f"{flag} {path}: is a folder")
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "no such folder"
            self.error(f"{flag} {path}: {path.parent}: {what}")
        if not os.access(folder, os.W_OK):
            self.error(f"{flag} {path}: no permission to write there")

    @contextlib.contextmanager
    def refusing(self):
        """Says in one line what the machine lacks: room on a disk, memory, permission."""
        try:
            yield
        except (OSError, MemoryError, RuntimeError) as error:
            text = str(error)  # not "illegal memory access", which is a bug
            ran_out = "out of memory" in text or "can't allocate memory" in text
            is_memory = isinstance(error, MemoryError) or ran_out
            if isinstance(error, RuntimeError) and not is_memory:  # a bug
                raise
            hint = "; try a smaller --shape" if is_memory else ""
            self.error(one_line(error) + hint)


def memory_of(device):
    """In bytes, of "cuda" or of the machine; an exbibyte where it does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    if not hasattr(os, "sysconf"):  # Windows
        return 1 << 60
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def one_line(error):
    """The first line of an exception's message, or its type."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:200]


# --- files


def write(path, content):
    """Writes bytes: path holds all of them, or what it held before. Raises OSError that names path."""
    path = Path(os.path.realpath(path))  # a link keeps pointing to its file
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout, which nothing may replace
            path.write_bytes(content)
            return
        with half_written(path) as part:
            part.write_bytes(content)
            part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def half_written(path):
    """Within the block a path of the same name, on the same disk, in a folder that is then removed."""
    with tempfile.TemporaryDirectory(prefix=".kernels-half-written-", dir=path.absolute().parent) as folder:
        yield Path(folder) / path.name


def write_trace(path, profile):
    """The trace of a torch.profiler.profile, whole or not at all. Raises OSError that names path.

    The profiler says nothing when it cannot write: its file does not appear, or has no end."""
    try:
        with half_written(path) as part:  # the suffix stays: the profiler compresses for .gz
            profile.export_chrome_trace(str(part))
            if part.exists() and ends_as_json(part):
                part.replace(path)
                return
            free = shutil.disk_usage(part.parent).free
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    code = errno.ENOSPC if free < 1 << 20 else errno.EIO
    raise OSError(code, os.strerror(code), str(path))


def ends_as_json(path):
    """Whether the last character of a file, gzip for .gz, closes an object."""
    open_it = gzip.open if path.suffix == ".gz" else open
    last = b""
    try:
        with open_it(path, "rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                last = (last + block)[-100:]
    except EOFError:  # gzip's own end is missing
        return False
    return last.rstrip().endswith(b"}")


# --- a problem, a clock, memory


class Clock:
    """Times on the device's own time line, from start() to each mark()."""

    def __init__(self, device):
        self.on_cuda = device == "cuda"
        self.l2_filler = torch.empty(256 << 20 if self.on_cuda else 0, dtype=torch.int8, device=device)
        self.marks = []

    def start(self):
        self.l2_filler.zero_()  # evicts everything else from the L2 cache
        self.marks = []
        self.mark()

    def mark(self):
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def ms(self):
        """-> milliseconds from the start to each mark."""
        start = self.marks[0]
        if not self.on_cuda:
            return [1e3 * (mark - start) for mark in self.marks[1:]]
        torch.cuda.synchronize()
        return [start.elapsed_time(mark) for mark in self.marks[1:]]


def process_memory(field):
    """In bytes: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) << 10


def peak_memory(run, on_cuda):
    """Peak bytes while run() runs, beyond those before it: of the device, or resident in this process.

    None where they cannot be measured."""
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return max(0, torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier runs have left
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        before = process_memory("VmRSS")
    except (OSError, AttributeError, StopIteration):  # not on Linux
        return None
    run()
    return max(0, process_memory("VmHWM") - before)


def problem(n, d, v, dtype, device):
    """-> hidden (N, D), weight (V, D), target (N,), whose logits have standard deviation 2."""
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    weight = torch.randn(v, d, device=device).mul_(2 / d**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), device=device)


def reference(hidden, weight, target):
    """In fp64 -> logp (N,), and of its sum d_hidden[:CHECKED_ROWS] and
    d_weight[target[:CHECKED_ROWS]]."""
    hidden, weight = hidden.detach(), weight.detach()
    lses, target_logits = [], []
    for rows, targets in zip(hidden.split(4096), target.split(4096), strict=True):
        slice_lses = [(rows.double() @ part.double().T).logsumexp(1) for part in weight.split(8192)]
        lses.append(torch.stack(slice_lses).logsumexp(0))
        target_logits.append((rows.double() * weight[targets].double()).sum(1))
    lse = torch.cat(lses)
    logp = torch.cat(target_logits) - lse

    checked = slice(CHECKED_ROWS)
    target_weight = weight[target[checked]].double()
    d_hidden = target_weight.clone()
    for part in weight.split(8192):
        part = part.double()
        d_hidden -= (hidden[checked].double() @ part.T - lse[checked, None]).exp() @ part
    p = (hidden.double() @ target_weight.T - lse[:, None]).exp()  # (N, CHECKED_ROWS)
    is_target = target[:, None] == target[checked]
    return logp, d_hidden, (is_target.double() - p).T @ hidden.double()
