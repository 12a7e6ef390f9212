"""--profile: a torch.profiler trace of a few steps."""

import contextlib

import torch

from nanoroads.errors import InputError
from nanoroads.weights.files import write_atomic


@contextlib.contextmanager
def profiled(wanted, out, device):
    """Yields a function to call after each step.

    If wanted, steps 3 to 7 go to out/trace.json and a table of the costliest operations to stdout."""
    if not wanted:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    order = "cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "cuda_time_total"
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profile:
        yield profile.step
    write_trace(out / "trace.json", profile)
    print(profile.key_averages().table(sort_by=order, row_limit=15))
    print(f"trace: {out / 'trace.json'} (open it in chrome://tracing or ui.perfetto.dev)")


def write_trace(path, profile):
    """The trace as JSON, whole or not at all. Raises InputError.

    torch does not raise when the disk is full: it leaves no file, or one without an end."""

    def write(temporary):
        profile.export_chrome_trace(str(temporary))
        if not temporary.exists() or not last_bytes(temporary, 100).rstrip().endswith(b"}"):
            raise InputError(f"{path}: could not be written to its end; is the disk full?")

    write_atomic(path, write)


def last_bytes(path, count):
    """The last `count` bytes of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read()
