"""The processes that torchrun has started: how they find one another, and how they end together.

Each is a rank, from 0 on. Rank 0 alone prints and writes; distributed.py has what they do in between. Without
torchrun there is one rank, and torch.distributed is not started.
"""

import json
import os
import sys
import traceback
from datetime import timedelta

import torch
from torch import distributed as dist

from nanoroads.errors import InputError

# Rank 0 may draw pairs for hours while the others wait. A rank that has ended is noticed at once.
PATIENCE = timedelta(days=7)
MESSAGE = 2**12  # bytes of what rank 0 says to the others
STORES = []  # torchrun's store, which outlives every rank; none where there is one rank
# What torchrun tells a process of itself. A command that the process runs is no rank.
VARIABLES = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def ranks():
    """How many processes share the run."""
    return dist.get_world_size() if STORES else 1


def rank():
    """Which of them this one is."""
    return dist.get_rank() if STORES else 0


def local_rank():
    """Which of the processes on this machine this one is."""
    return int(os.environ["LOCAL_RANK"])


def start():
    """Join the other ranks, if torchrun has started this process."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return
    store, own_rank, world_size = next(dist.rendezvous("env://"))
    backend = "gloo"
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())  # from here on "cuda" is this one
        backend = "cpu:gloo,cuda:nccl"
    own_keys = dist.PrefixStore("nanoroads", store)
    dist.init_process_group(backend, store=own_keys, rank=own_rank, world_size=world_size, timeout=PATIENCE)
    STORES.append(store)
    sys.excepthook = say_traceback
    if own_rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def rank_0_says(value):
    """Rank 0's value, on all ranks; one that JSON has. The others wait here until it has one."""
    if ranks() == 1:
        return value
    said = json.dumps(value if rank() == 0 else None).encode()
    if len(said) > MESSAGE:
        raise ValueError(f"rank 0 says {len(said)} bytes, more than {MESSAGE}")
    text = said.ljust(MESSAGE)  # of a size that all ranks know
    data = torch.tensor(list(text), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.tolist()))


def wait_for_rank_0():
    """The other ranks wait until rank 0 comes here, too."""
    rank_0_says(None)


def check(args, device):
    """Raises InputError for what does not go with several ranks, or goes with them alone."""
    if args.fsdp and ranks() == 1:
        raise InputError("--fsdp: spreads a model over processes; start them with torchrun --nproc-per-node")
    if args.fsdp and args.compile:
        raise InputError("--fsdp: does not go with --compile; leave out one of the two")
    if ranks() > 1 and device.type == "mps":
        raise InputError("--device mps: the processes of torchrun share cuda or cpu")
    if ranks() > 1 and device.type == "cuda" and local_rank() >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"--nproc-per-node: each process takes a GPU of its own, this machine has {gpus}")


def say(text):
    """Print to stderr what ends the run; None: it has been printed. Of several ranks the first does so."""
    if not STORES:
        if text is not None:
            print(text, file=sys.stderr)
        return
    try:
        if STORES[0].add("ended", 1) == 1:
            if text is not None:
                print(text, file=sys.__stderr__, flush=True)
            STORES[0].set("said", "")
        # Once one rank has ended torchrun ends all, so nobody goes before it is said.
        STORES[0].wait(["said"], timedelta(seconds=10))
    except RuntimeError:  # the store has gone, and torchrun with it
        return


def say_traceback(kind, error, trace):
    """In place of Python's own hook, or each rank would print the same traceback."""
    say("".join(traceback.format_exception(kind, error, trace)))


def is_of_lost_rank(error):
    """Whether torch has raised this because another rank has ended."""
    if not STORES or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def end():
    """Leave the other ranks, at the end of a script."""
    if STORES:
        dist.destroy_process_group()
        STORES.clear()
