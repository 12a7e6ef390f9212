"""Runs that are killed at random moments, again and again, and resumed until they are done.

NANOROADS_FUZZ_SECONDS=1800 pytest tests/run/test_random_kills.py     half an hour of it
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback

import pytest
from helpers.runs import argv, metrics, run, weights

import train_dpo
import train_rlhf
import train_sft
from nanoroads.run.flags import run_script

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

SECONDS = float(os.environ.get("NANOROADS_FUZZ_SECONDS", 15))


def train(script, words, errors):
    """What the child process does. It ends with the exit code of the script, 9 for a traceback."""
    os.setpgrp()  # so that a signal to pytest's own group does not reach it
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout = open(os.devnull, "w")
    code = 0
    try:
        run_script(lambda: script.main(words))
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        code = 9
    os._exit(code)


def killed_at_random(script, words, errors, rng):
    """Start the script, kill it after a while. Returns whether it had come to its end before."""
    child = os.fork()
    if child == 0:
        train(script, words, errors)
    time.sleep(4 * rng.random() ** 3)
    os.kill(child, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    code = os.WEXITSTATUS(status)
    assert code in (0, 128 + signal.SIGTERM), errors.read_text()
    return code == 0


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 300)
def test_killed_at_random_moments(sft, tmp_path):
    rng = random.Random(os.environ.get("NANOROADS_FUZZ_SEED", "0"))
    rl = {"init": sft, "reward": "helpers.runs:brevity", "samples": 2, "batch_size": 8, "algo": "grpo"}
    stages = [
        (train_sft, {"data": "roadmap-2", "rows": 300, "steps": 40, "save_every": 3}),
        (train_dpo, {"init": sft, "steps": 30, "save_every": 2}),
        (train_rlhf, {"init": sft, "reward_epochs": 3, "steps": 6, "save_every": 2}),
        (train_rlhf, {**rl, "steps": 30, "save_every": 1, "updates": 2}),
    ]
    whole = [run(script, tmp_path / f"whole {i}", **flags) for i, (script, flags) in enumerate(stages)]
    out, kills, runs, begin = tmp_path / "out", 0, 0, time.monotonic()
    while time.monotonic() - begin < SECONDS:
        i = rng.randrange(len(stages))
        script, flags = stages[i]
        words = argv(script, out=out, resume=True, **flags)
        while not killed_at_random(script, words, tmp_path / "errors", rng):
            kills += 1
        for folder in [whole[i], *(path for path in whole[i].iterdir() if path.is_dir())]:
            mine = out / folder.relative_to(whole[i])
            assert weights(mine) == weights(folder) and metrics(mine) == metrics(folder)
            assert {path.name for path in mine.iterdir()} == {path.name for path in folder.iterdir()}
        shutil.rmtree(out)
        runs += 1
    print(
        f"{runs} runs, {kills} kills, {time.monotonic() - begin:.0f} s: all ended as if nothing had happened"
    )
