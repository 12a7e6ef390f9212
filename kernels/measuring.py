"""What bench, tune and trace share: a problem to measure, a clock, an exact reference, a parser."""

import argparse
import sys
import time

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
        fail(self.program, message)


def fail(program, message):
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(error):
    """The first line of an exception's message, or its type."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:100]


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
