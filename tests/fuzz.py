"""Random kills and random damage, for as long as you like.

    python tests/fuzz.py --minutes 30 --seed 1            kills and damage, in turn
    python tests/fuzz.py --minutes 30 --only damage

A killed run that is resumed must end with the weights and the metrics of one that was not killed. A
run one of whose files was damaged must end the same, or with code 2 and one line that names the file.
Whatever else comes out, a traceback, a silent difference, a run that hangs, is printed with the trial's
number, which --first repeats. pytest does not collect this file; its own tests make a few of these trials.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
os.environ["OMP_NUM_THREADS"] = "1"

import torch._dynamo  # noqa: E402, F401  or each forked child imports it at its first step
from helpers.runs import argv, make_sft, metrics  # noqa: E402

import train_dpo  # noqa: E402
import train_rlhf  # noqa: E402
import train_sft  # noqa: E402
from experiments import ppo  # noqa: E402
from nanoroads.report.phases import new_phase, run_phases  # noqa: E402
from nanoroads.run.flags import run_script  # noqa: E402

LIMIT = 120  # seconds of one command
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
# What a run that was told to stop may end with: by the signal itself, or with the shell's code for it.
STOPPED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}

# ---------------------------------------------------------------- what is run


def settings(base):
    """{name: a function of --out} of every setting, which starts the run or resumes it, to its end."""
    sft = base / "sft"
    rows = {"init": sft, "data": base / "pairs.jsonl"}
    runs = {
        "sft": (train_sft, {"data": base / "demos.jsonl"}),
        "map sft": (train_sft, {"steps": 20, "rows": 200}),
        "dpo": (train_dpo, rows),
        "map dpo": (train_dpo, {"init": sft}),
        "simpo": (train_dpo, {**rows, "loss": "simpo", "micro_batch_size": 3}),
        "rlhf": (train_rlhf, {**rows, "updates": 2}),
        "local rlhf": (train_rlhf, {"init": sft, "reward": "local", "compare": base / "dpo"}),
        "rule": (train_rlhf, {"init": sft, "reward": "helpers.runs:brevity", "algo": "grpo"}),
        "ppo": (ppo, {"init": sft, "reward": base / "rlhf/reward", "steps": 10}),
    }
    commands = {}
    for name, (script, options) in runs.items():
        commands[name] = training(script, options)
    commands["all_roads"] = roads
    return commands


def training(script, options):
    """A function of --out that runs a training script there, resuming."""

    def run(out):
        script.main(argv(script, out=out, resume=script is not ppo, **options))

    return run


def roads(out):
    """A main job of three phases."""
    flags = ["--seed", 3, "--steps", 12, "--log-every", 2, "--eval-every", 6, "--save-every", 4]
    tiny = ["--rows", 300, "--n-embd", 16, "--n-layer", 1]
    pairs = ["-m", "nanoroads.world.pairs", "--policy", out / "sft", "--n", 60]
    phases = [
        new_phase(out, "sft", ["train_sft.py", *flags, *tiny], []),
        new_phase(out, "sft/pairs.jsonl", pairs, ["sft"]),
        new_phase(out, "sft/pairs_test.jsonl", [*pairs, "--split", "test"], ["sft"]),
        new_phase(
            out,
            "dpo",
            ["train_dpo.py", *flags, "--init", out / "sft"],
            ["sft/pairs.jsonl", "sft/pairs_test.jsonl"],
        ),
    ]
    run_phases(phases, out, jobs=2)


def result(out):
    """What must not differ: {file: its bytes, or metrics without seconds} of every run in the folder."""
    found = {}
    for path in sorted(out.rglob("model.safetensors")) + sorted(out.rglob("*.jsonl")):
        name = str(path.relative_to(out))
        if path.name == "demos.jsonl":  # a finished run does not read it again
            continue
        if path.name == "metrics.jsonl":
            found[name] = metrics(path.parent)
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "no file"
    return found


# ---------------------------------------------------------------- children


def start(command, out, log):
    """Run command(out) in a forked process; what it prints goes to `log`. Returns its process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        run_script(lambda: command(out))
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # from here on this is not the run any more
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        import atexit

        atexit._run_exitfuncs()
        os._exit(code)


def wait(child, seconds):
    """The child's exit code, negative for a signal; None if it still runs after these seconds."""
    end = time.time() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.time() > end:
            return None
        time.sleep(0.005)


def finish(command, out, log):
    """Run to the end. Returns (exit code or "hangs", what it printed)."""
    child = start(command, out, log)
    code = wait(child, LIMIT)
    if code is None:
        os.killpg(child, signal.SIGKILL)
        wait(child, 10)
        code = "hangs"
    return code, log.read_text(errors="replace")


# ---------------------------------------------------------------- the two kinds of trial


def kill_trial(rng, name, command, out, log, seconds, wanted):
    """Kill it at random moments, then let it end. Returns what is wrong, or None."""
    for _ in range(rng.randint(1, 4)):
        child = start(command, out, log)
        code = wait(child, rng.uniform(0, 1.1 * seconds))
        if code is None:
            # The whole process group, as when a terminal closes, or the script alone.
            with contextlib.suppress(ProcessLookupError):  # too early: it has no group yet, and goes on
                (os.killpg if rng.random() < 0.5 else os.kill)(child, rng.choice(SIGNALS))
            code = wait(child, LIMIT)
            if code is None:
                os.kill(child, signal.SIGKILL)
                wait(child, 10)
                return "does not stop"
            if code not in STOPPED and code != 0:
                return f"stopped with code {code}: {log.read_text(errors='replace')[-2000:]}"
        elif code:
            return f"ended with code {code}: {log.read_text(errors='replace')[-2000:]}"
        if "Traceback" in log.read_text(errors="replace"):
            return f"a traceback: {log.read_text(errors='replace')[-3000:]}"
    code, printed = finish(command, out, log)
    if code != 0:
        return f"resumed, it ended with code {code}: {printed[-2000:]}"
    return difference(result(out), wanted)


def difference(found, wanted):
    """The first file that is not as wanted, or None."""
    for name in sorted({*found, *wanted}):
        if name not in found or name not in wanted:
            return f"{name} is there only once"
        if found[name] != wanted[name]:
            return f"{name} differs"
    return None


def damage(rng, path):
    """Damage one file at random. Returns what was done to it, in words."""
    content = path.read_bytes()
    how = rng.choice(["truncate", "flip", "flip", "empty", "noise", "append", "delete", "folder", "fifo"])
    if how == "truncate":
        path.write_bytes(content[: rng.randrange(len(content) or 1)])
    elif how == "flip" and content:
        place = rng.randrange(len(content))
        changed = bytes([content[place] ^ (1 << rng.randrange(8))])
        path.write_bytes(content[:place] + changed + content[place + 1 :])
        how = f"flip {place}"
    elif how == "append":
        path.write_bytes(content + rng.randbytes(rng.randint(1, 40)))
    elif how == "noise":
        path.write_bytes(rng.randbytes(rng.randint(1, 4000)))
    else:
        path.unlink()
        if how == "empty" or how == "flip":
            path.write_bytes(b"")
        if how == "folder":
            path.mkdir()
        if how == "fifo":
            os.mkfifo(path)
    return how


def damage_trial(rng, name, command, out, log, seconds, wanted):
    """Kill it once or let it end, damage one file, run it again. Returns what is wrong, or None."""
    child = start(command, out, log)
    if wait(child, rng.uniform(0.2, 1.3) * seconds) is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        wait(child, 10)
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    if not paths:
        return None
    path = rng.choice(paths)
    relative = path.relative_to(out)
    how = damage(rng, path)
    code, printed = finish(command, out, log)
    where = f"{relative}: {how}: "
    if code == 0:
        wrong = difference(result(out), wanted)
        return where + wrong if wrong else None
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if code != 2 or "Traceback" in printed or len(errors) != 1:
        return f"{where}code {code}: {printed[-3000:]}"
    # It must name the file, or the one whose hash it is, and say what to do.
    if path.name not in errors[0] and str(path.parent) not in errors[0]:
        return f"{where}the line names another file: {errors[0]}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--only", choices=["kill", "damage"])
    parser.add_argument("--setting", help="only this one, e.g. dpo")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    log = base / "log.txt"

    # What the trials start from, and the result of each setting without a trial.
    def make_base(base):
        make_sft(base / "sft", "roadmap")
        for name in ("demos.jsonl", "pairs.jsonl"):
            lines = (base / "sft" / name).read_text().splitlines(keepends=True)
            # With other prompts than the map's: a file of a user's own.
            kept = [line.replace('"prompt": "', '"prompt": "WA>', 1) for line in lines[:120]]
            (base / name).write_text("".join(kept))
        for script, out in ((train_dpo, base / "dpo"), (train_rlhf, base / "rlhf")):
            script.main(argv(script, out=out, init=base / "sft"))

    assert finish(make_base, base, log)[0] == 0, log.read_text()
    commands = settings(base)
    if args.setting:
        commands = {args.setting: commands[args.setting]}
    seconds = {}
    wanted = {}
    for name, command in commands.items():
        begin = time.time()
        code, printed = finish(command, base / f"wanted {name}", log)
        assert code == 0, f"{name}: {printed}"
        seconds[name] = time.time() - begin
        wanted[name] = result(base / f"wanted {name}")
        print(f"{name}: {seconds[name]:.1f} s, {len(wanted[name])} files", flush=True)

    counts = collections.Counter()
    wrong = 0
    end = time.time() + 60 * args.minutes
    number = args.first
    while time.time() < end:
        rng = random.Random(f"{args.seed}/{number}")
        name = rng.choice(sorted(commands))
        if name == "all_roads" and rng.random() < 0.5:  # it takes as long as all others together
            name = rng.choice(sorted(commands))
        kind = args.only or rng.choice(["kill", "damage"])
        if name == "ppo":  # it does not resume, so it is only damaged, even with --only kill
            kind = "damage"
        out = base / f"trial {number}"
        trial = {"kill": kill_trial, "damage": damage_trial}[kind]
        problem = trial(rng, name, commands[name], out, log, seconds[name], wanted[name])
        counts[f"{kind} {name}"] += 1
        if problem:
            wrong += 1
            print(f"trial {number}, {kind} {name}: {problem}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        number += 1
        if number % 50 == 0:
            print(f"{number} trials, {wrong} wrong", flush=True)
    print(f"{sum(counts.values())} trials in {args.minutes:.0f} minutes, {wrong} wrong: {dict(counts)}")
    shutil.rmtree(base, ignore_errors=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
