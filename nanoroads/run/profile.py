"""--profile: a torch.profiler trace of a few steps."""

import contextlib

import torch


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
    profile.export_chrome_trace(str(out / "trace.json"))
    print(profile.key_averages().table(sort_by=order, row_limit=15))
    print(f"trace: {out / 'trace.json'} (open it in chrome://tracing or ui.perfetto.dev)")
