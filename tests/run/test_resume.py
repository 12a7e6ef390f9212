"""A run that is killed, at whatever moment, and resumed ends with the bits of a run that was not.

A run dies of SIGKILL in a forked process, at a moment that the test chooses; it is resumed in this one.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver

import pytest
import torch
from helpers.runs import argv, metrics, run, samples, weights

import train_dpo
import train_rlhf
import train_sft
from nanoroads.report.phases import Phase, run_phases
from nanoroads.run.run import Run
from nanoroads.weights import checkpoint
from nanoroads.weights import files as weight_files
from nanoroads.weights.files import read_safetensors, write_json

if sys.platform == "win32":
    pytest.skip("needs fork and SIGKILL", allow_module_level=True)

processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session", autouse=True)
def server():
    """It imports once, and never computes: its forks are as good as
    fresh processes, without their seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        # The last is imported by optimizers, at their first step.
        processes.set_forkserver_preload(["pytest", "conftest", "test_resume", "torch._dynamo"])
        forkserver.ensure_running()


# ---------------------------------------------------------------- the moments of death


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after_call(owner, name, n):
    """Die when owner.name was called for the n-th time and has done its work."""
    original = getattr(owner, name)
    calls = []

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == n:
            die()
        return result

    setattr(owner, name, call)


def after_update(n):
    """Die in the n-th optimizer step, when its weights are updated and not yet logged or saved."""
    after_call(torch.optim.AdamW, "step", n)


def while_writing(name, n, stage):
    """Die in the n-th writing of a file called `name`: half of it
    written, or all of it but not renamed."""
    calls = []
    replace, save_file = os.replace, weight_files.save_file

    def half(tensors, path, **kwargs):
        save_file(tensors, path, **kwargs)
        if path.name == name:
            calls.append(path)
        if len(calls) == n:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def unnamed(source, target):
        if str(target).endswith(f"/{name}"):
            calls.append(target)
        if len(calls) == n:
            die()
        replace(source, target)

    if stage == "half":
        weight_files.save_file = half
    else:
        os.replace = unnamed


def half_a_line(n):
    """Die while line n of metrics.jsonl is written."""
    original = Run.log

    def log(self, step, row, **options):
        if step + 1 == n:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write('{"step": 1')
                file.flush()
                die()
        original(self, step, row, **options)

    Run.log = log


def between_model_and_state():
    """Die when model.safetensors is written and resume.safetensors is still there."""

    def unlink(path, missing_ok=False):
        if path.name == "resume.safetensors":
            die()

    checkpoint.Path.unlink = unlink


MOMENTS = {
    "before the first step": (after_call, Run, "describe", 1),
    "before the first checkpoint": (after_update, 3),
    "in the first checkpoint": (while_writing, "resume.safetensors", 1, "half"),
    "right after a checkpoint": (while_writing, "resume.safetensors", 2, "unnamed"),
    "between checkpoints": (after_update, 7),
    "in the middle of a checkpoint": (while_writing, "resume.safetensors", 2, "half"),
    "in a line of the log": (half_a_line, 8),
    "in the last step": (after_update, 12),
    "in the final weights": (while_writing, "model.safetensors", 1, "half"),
    "at the very end": (between_model_and_state,),
}


def doomed(words, script, moment):
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    patch, *rest = moment
    patch(*rest)
    sys.modules[script].main(words)
    os._exit(7)  # it should have died


def kill(script, out, moment, **flags):
    child = processes.Process(target=doomed, args=(argv(script, out=out, **flags), script.__name__, moment))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, f"{moment}: exit code {child.exitcode}"


def same(one, two):
    return weights(one) == weights(two) and metrics(one) == metrics(two) and samples(one) == samples(two)


def check_killed(script, whole, tmp_path, moment, sub="", **flags):
    """Kill and resume; then the run in `sub`, and everything else, is
    as in `whole`, which was not interrupted."""
    out = tmp_path / "killed"
    kill(script, out, MOMENTS[moment], **flags)
    assert not (out / sub / "model.safetensors").exists() or moment == "at the very end"
    run(script, out, resume=True, **flags)
    folders = [path.relative_to(whole) for path in (whole, *whole.iterdir()) if path.is_dir()]
    for folder in folders:
        assert same(out / folder, whole / folder), folder
        assert not (out / folder / "resume.safetensors").exists()
    run(script, out, resume=True, **flags)  # nothing is left to do
    assert all(same(out / folder, whole / folder) for folder in folders)


# ---------------------------------------------------------------- the three stages


@pytest.fixture(scope="session")
def flags_of(sft):
    rule = {"init": sft, "reward": "helpers.runs:brevity"}
    return {
        "sft": (train_sft, {"data": sft / "demos.jsonl", "steps": 12}),
        "dpo": (train_dpo, {"init": sft}),
        "rl": (train_rlhf, rule),
        "rl-updates": (train_rlhf, rule | {"algo": "grpo", "updates": 2, "save_every": 3, "steps": 14}),
        "reward": (train_rlhf, {"init": sft, "reward_epochs": 2, "steps": 6}),
    }


@pytest.fixture(scope="session")
def uninterrupted(flags_of, tmp_path_factory):
    made = {}

    def get(stage):
        if stage not in made:
            script, flags = flags_of[stage]
            made[stage] = run(script, tmp_path_factory.mktemp("whole") / stage, **flags)
        return made[stage]

    return get


FEW = [
    "before the first step",
    "in the first checkpoint",
    "between checkpoints",
    "in a line of the log",
    "at the very end",
]


def quick_or_slow(stage, moment):
    """A case of the quick tests, which cover each moment once and each stage; the others are slow."""
    quick = {"sft": moment not in FEW, "dpo": moment in FEW, "rl": moment == "between checkpoints"}
    return pytest.param(stage, moment, marks=() if quick[stage] else pytest.mark.slow)


CASES = [quick_or_slow("sft", moment) for moment in MOMENTS]
CASES += [quick_or_slow(stage, moment) for stage in ("dpo", "rl") for moment in FEW]


@pytest.mark.parametrize("stage, moment", CASES)
def test_killed_and_resumed(stage, moment, flags_of, uninterrupted, tmp_path):
    script, flags = flags_of[stage]
    check_killed(script, uninterrupted(stage), tmp_path, moment, **flags)


@pytest.mark.parametrize(
    "moment", ["before the first checkpoint", "between checkpoints", "in the middle of a checkpoint"]
)
def test_killed_between_two_updates_of_one_batch(moment, flags_of, uninterrupted, tmp_path):
    script, flags = flags_of["rl-updates"]
    check_killed(script, uninterrupted("rl-updates"), tmp_path, moment, **flags)


REWARD_CASES = [
    pytest.param(moment, marks=() if moment == "in the middle of a checkpoint" else pytest.mark.slow)
    for moment in MOMENTS
    if moment != "before the first step"
]


@pytest.mark.parametrize("moment", REWARD_CASES)
def test_killed_in_the_reward_model(moment, flags_of, uninterrupted, tmp_path):
    script, flags = flags_of["reward"]
    check_killed(script, uninterrupted("reward"), tmp_path, moment, sub="reward", **flags)


def test_killed_after_the_reward_model(flags_of, uninterrupted, tmp_path):
    """Stage 1 has 14 steps; die in step 4 of stage 2. The reward model is not trained again."""
    script, flags = flags_of["reward"]
    out = tmp_path / "killed"
    kill(script, out, (after_update, 18), **flags)
    before = (out / "reward/model.safetensors").stat().st_mtime_ns
    run(script, out, resume=True, **flags)
    assert (
        same(out, uninterrupted("reward")) and (out / "reward/model.safetensors").stat().st_mtime_ns == before
    )


def test_killed_many_times(flags_of, uninterrupted, tmp_path):
    script, flags = flags_of["dpo"]
    for n, resume in ((2, False), (6, True), (1, True), (6, True), (1, True)):
        kill(script, tmp_path / "killed", (after_update, n), resume=resume, **flags)
    run(script, tmp_path / "killed", resume=True, **flags)
    assert same(tmp_path / "killed", uninterrupted("dpo"))


def test_a_resumed_run_does_not_start_over(flags_of, tmp_path, monkeypatch):
    script, flags = flags_of["sft"]
    kill(script, tmp_path / "killed", MOMENTS["between checkpoints"], **flags)
    assert read_safetensors(tmp_path / "killed/resume.safetensors")[1]["step"] == "5"
    steps, original = [], Run.save

    def save(self, step, model, optimizer):
        steps.append(step)
        original(self, step, model, optimizer)

    monkeypatch.setattr(Run, "save", save)
    run(script, tmp_path / "killed", resume=True, **flags)
    assert steps == list(range(5, 12))


def test_resume_with_nothing_there_starts(flags_of, uninterrupted, tmp_path):
    """So that one command line serves the first start and every other one."""
    script, flags = flags_of["sft"]
    assert same(run(script, tmp_path / "new", resume=True, **flags), uninterrupted("sft"))


# ---------------------------------------------------------------- the old file is whole


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(flags_of, tmp_path):
    script, flags = flags_of["sft"]
    kill(script, tmp_path / "a", (after_call, Run, "save", 5), **flags)
    old = (tmp_path / "a/resume.safetensors").read_bytes()
    for i, stage in enumerate(("half", "unnamed")):
        kill(script, tmp_path / f"b{i}", (while_writing, "resume.safetensors", 2, stage), **flags)
        assert (tmp_path / f"b{i}/resume.safetensors").read_bytes() == old


# ---------------------------------------------------------------- all_roads


@pytest.mark.slow
def test_a_killed_phase_goes_on_from_its_checkpoint(flags_of, uninterrupted, tmp_path):
    """The commands of all_roads.py always say --resume: a phase
    whose process was killed is not lost."""
    script, flags = flags_of["sft"]
    out = tmp_path / "sft"
    kill(script, out, MOMENTS["between checkpoints"], **flags)
    write_json(tmp_path / "phases.json", {})
    phase = Phase("sft", [], ["train_sft.py", *argv(script, out=out, **flags)])
    run_phases([phase], tmp_path, jobs=os.cpu_count() or 1)  # one thread for each job, as in this process
    assert same(out, uninterrupted("sft"))
    assert (tmp_path / "logs/sft.txt").read_text().count("held-out loss") == 1
