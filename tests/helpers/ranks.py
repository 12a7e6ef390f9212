"""Processes that believe torchrun has started them: forks of this one, so that nothing is imported again."""

import multiprocessing
import os
import sys

import torch
from torch import distributed

from nanoroads.run import torchrun


def run_on_ranks(count, function, *arguments, log=os.devnull):
    """function(*arguments) on so many ranks -> their exit codes. What they print goes to the file `log`."""
    # As torchrun has it: the store lives in the parent.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": store.port}
        process = multiprocessing.get_context("fork").Process(
            target=in_rank, args=(variables, log, function, arguments), daemon=True
        )
        process.start()
        processes.append(process)
    for process in processes:
        process.join(200)
    return [process.exitcode for process in processes]


def in_rank(variables, log, function, arguments):
    torch.set_num_threads(1)
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(
        MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True"
    )
    function(*arguments)


def joined(function, *arguments):
    """What a rank runs that goes through no run_script."""
    torchrun.start()
    function(*arguments)
    torchrun.end()
