"""torchrun: on two and on four processes every script ends with one process's weights, metrics and files.

In fp64: in fp32 AdamW makes steps of the size of the learning rate of gradients that are rounding alone, such
as those of the keys' biases, whatever the number of processes."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.ranks import joined, run_on_ranks
from helpers.runs import argv, brevity, metrics, read_jsonl, run, samples, write_jsonl
from torch import distributed

import train_dpo
import train_rlhf
import train_sft
from nanoroads.progress import LINE
from nanoroads.run import optim, torchrun
from nanoroads.run.commands import ROOT, child_environment
from nanoroads.run.distributed import all_ranks
from nanoroads.run.flags import run_script
from nanoroads.run.run import Run
from nanoroads.weights import checkpoint
from nanoroads.weights.files import read_safetensors

if sys.platform == "win32":
    pytest.skip("needs fork", allow_module_level=True)

# 41 rows in batches of 8: the last batch of an epoch has one row, and leaves all ranks but one without.
FLAGS = {"steps": 20, "batch_size": 8, "micro_batch_size": 4, "lr": 1e-3, "eval_every": 20, "save_every": 5}
TORCHRUN = shutil.which("torchrun", path=str(Path(sys.executable).parent))
LOAD_MODEL = checkpoint.load_model
TAKES_BATCH_MEAN = {"kto", "reinforce"}  # so a batch is not cut


@pytest.fixture(scope="module")
def settings(sft, tmp_path_factory):
    """{name: (script, flags)} of every stage, loss, reward class and algorithm, and of less memory."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = read_jsonl(sft / "pairs.jsonl")
    unique = list({row["prompt"]: row for row in pairs}.values())
    train = write_jsonl(folder / "pairs.jsonl", unique[:41])
    held_out = write_jsonl(folder / "held_out.jsonl", unique[41:45])
    demonstrations = write_jsonl(
        folder / "demos.jsonl", read_jsonl(sft / "demos.jsonl")[:43]
    )  # 2 are held out

    flags = {**FLAGS, "init": sft}
    of_pairs = {**flags, "data": train, "eval_data": held_out}
    of_reward = {**of_pairs, "steps": None, "reward_epochs": 20 / 6, "reward_batch_size": 8}
    of_rl = {**flags, "data": train, "reward": "helpers.runs:brevity", "samples": 2, "max_new_tokens": 6}
    table = {"sft": (train_sft, {**flags, "data": demonstrations})}
    for loss in train_dpo.LOSSES:
        table[f"dpo {loss}"] = (train_dpo, {**of_pairs, "loss": loss})
    for name in train_rlhf.REWARD_CLASSES:
        table[f"reward {name}"] = (train_rlhf, {**of_reward, "reward": name, "stop_after": "reward"})
    for algorithm in train_rlhf.ALGORITHMS:
        table[f"rl {algorithm}"] = (train_rlhf, {**of_rl, "algo": algorithm})
    for name, (_, flags_of_run) in table.items():
        if name.split()[-1] in TAKES_BATCH_MEAN:
            flags_of_run["micro_batch_size"] = None
    table["rl updates"] = (train_rlhf, {**of_rl, "algo": "grpo", "updates": 2})
    on_map = {"data": "roadmap", "eval_data": None, "steps": 4, "reward_epochs": 0.2}
    table["both stages"] = (train_rlhf, {**of_reward, **on_map})
    table["dpo checkpointed"] = (train_dpo, {**of_pairs, "checkpoint_activations": True})
    table["dpo lora"] = (train_dpo, {**of_pairs, "lora": 2})
    table["both stages, lora"] = (train_rlhf, {**of_reward, **on_map, "lora": 2})
    return table


@pytest.fixture(scope="module", autouse=True)
def double():
    """All models are loaded in fp64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_model", functools.partial(checkpoint.load_model, dtype=torch.float64))
        yield


def train_all(settings, names, out, **more):
    for name in names:
        script, flags = settings[name]
        run(script, out / name, **{**flags, **more})


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """Runs of one process, and no process group."""
    out = tmp_path_factory.mktemp("alone")
    train_all(settings, settings, out)
    assert not distributed.is_initialized()
    return out


def trained(folder):
    """The folder of the model that was trained last: of a run that stops after stage 1 the reward model's."""
    return folder if (folder / "model.safetensors").exists() else folder / "reward"


def speeds(folder):
    """speed.jsonl: (step, tokens, pairs or samples) of each line, which have no rounding."""
    rows = []
    for row in read_jsonl(folder / "speed.jsonl"):
        rates = [row[name] for name in row if name.endswith("_per_second")]
        rows.append((row["step"], *(round(rate * row["seconds"]) for rate in rates)))
    return rows


def check_same(folder, expected):
    """Equal weights, to 1e-9, lines of metrics.jsonl, to their last digit, and names of files. The same
    answers to the same prompts, and as many tokens: all ranks' together are one process's."""
    folder, expected = trained(folder), trained(expected)
    ours, theirs = (read_safetensors(path / "model.safetensors")[0] for path in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9, msg=f"{folder}: {name}")
    for row, expected_row in zip(metrics(folder), metrics(expected), strict=True):
        assert row == pytest.approx(expected_row, abs=2e-6), folder
    for row, expected_row in zip(samples(folder), samples(expected), strict=True):
        assert row == pytest.approx(expected_row, abs=2e-6), folder
    assert speeds(folder) == speeds(expected)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}


# ---------------------------------------------------------------- the same weights

FEW = ["sft", "dpo dpo", "reward local", "rl rloo", "rl reinforce", "both stages"]


def check_ranks(count, settings, names, alone, out, **more):
    def train():
        train_all(settings, names, out, **more)

    assert run_on_ranks(count, joined, train) == [0] * count
    for name in names:
        check_same(out / name, alone / name)


def test_two_ranks_end_as_one(settings, alone, tmp_path):
    check_ranks(2, settings, list(settings), alone, tmp_path)


def test_four_ranks_end_as_one(settings, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "BUCKET", 300)  # gradients are added up in many messages
    check_ranks(4, settings, FEW, alone, tmp_path)


@pytest.mark.slow
def test_four_ranks_end_as_one_whatever_the_loss(settings, alone, tmp_path):
    check_ranks(4, settings, [name for name in settings if name not in FEW], alone, tmp_path)


def test_a_model_that_is_spread_over_two_ranks(settings, alone, tmp_path):
    names = ["sft", "dpo checkpointed", "reward global", "rl reinforce"]  # and DPO below
    check_ranks(2, settings, names, alone, tmp_path, fsdp=True)


def test_a_spread_model_is_exported(settings, alone, tmp_path):
    train = functools.partial(train_all, settings, ["sft"], tmp_path, fsdp=True, export_hf=tmp_path / "hf")
    assert run_on_ranks(2, joined, train) == [0, 0]
    exported = checkpoint.load_model(tmp_path / "hf").state_dict()
    for name, tensor in checkpoint.load_model(alone / "sft").state_dict().items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-9)


def test_in_fp32_all_weights_but_the_biases_of_keys_are_equal(settings, tmp_path, monkeypatch):
    """To 1e-6. Such a bias changes no attention, so that its gradient is rounding alone."""
    monkeypatch.setattr(checkpoint, "load_model", LOAD_MODEL)
    names = ["sft", "dpo dpo", "rl rloo"]
    train_all(settings, names, tmp_path / "one")
    train = functools.partial(train_all, settings, names, tmp_path / "two")
    assert run_on_ranks(2, joined, train) == [0, 0]
    for name in names:
        paths = [tmp_path / count / name / "model.safetensors" for count in ("one", "two")]
        one, two = (read_safetensors(path)[0] for path in paths)
        for weight, tensor in one.items():
            gap = (two[weight] - tensor).abs()
            if weight.endswith("qkv.bias"):
                gap = gap.view(3, -1)[[0, 2]]  # of queries and of values
            assert tensor.dtype == torch.float32 and gap.max() < 1e-6, (name, weight)


def check_largest():
    """Rank 1 has the larger number, and rank 0 alone has the other one."""
    numbers = {"gap": torch.tensor(1.0 + distributed.get_rank())}
    if distributed.get_rank() == 0:
        numbers["other"] = torch.tensor(-3.0)
    assert all_ranks(numbers, "largest") == {"gap": 2.0, "other": -3.0}  # not their sum


def test_the_largest_value_of_all_ranks():
    assert run_on_ranks(2, joined, check_largest) == [0, 0]


# ---------------------------------------------------------------- going on with another number


def train_up_to(step, settings, name, out, **more):
    """Stop, as if killed, when the checkpoint at `step` is written."""
    original = Run.save

    def save(self, done, model, optimizer):
        original(self, done, model, optimizer)
        if done + 1 == step:
            os._exit(0)

    Run.save = save
    train_all(settings, [name], out, **more)


@pytest.mark.parametrize("name", ["dpo dpo", pytest.param("rl updates", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(name, settings, alone, tmp_path):
    """One, then two with --fsdp, then two, then one again."""
    for count, step, fsdp in ((1, 6, False), (2, 12, True), (2, 18, False)):
        up_to = functools.partial(train_up_to, step, settings, name, tmp_path)
        flags = {"resume": True, "save_every": 6, "fsdp": fsdp}
        assert run_on_ranks(count, joined, functools.partial(up_to, **flags)) == [0] * count
        assert read_safetensors(tmp_path / name / "resume.safetensors")[1]["step"] == str(step)
    train_all(settings, [name], tmp_path, resume=True)
    check_same(tmp_path / name, alone / name)


# ---------------------------------------------------------------- how it ends


def script_on_ranks(count, tmp_path, main):
    """main under run_script -> exit codes, and the lines that are printed but for those of progress."""
    log = tmp_path / "log"

    def in_script():
        run_script(main, many_ranks=True)

    codes = run_on_ranks(count, in_script, log=log)
    return codes, [line for line in log.read_text().splitlines() if not LINE.match(line) and line]


@pytest.mark.parametrize("killed, codes_of_both", [(1, [2, -signal.SIGKILL]), (0, [-signal.SIGKILL, 2])])
def test_a_killed_rank_ends_the_run_with_one_line(killed, codes_of_both, settings, alone, tmp_path):
    """And the run goes on from its checkpoint."""
    script, flags = settings["dpo dpo"]
    out = tmp_path / "dpo dpo"

    def main():
        original = torch.optim.AdamW.step
        steps = []

        def step(self, *arguments):
            steps.append(self)
            if len(steps) == 9 and distributed.get_rank() == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments)

        torch.optim.AdamW.step = step
        script.main(argv(script, out=out, **flags))

    codes, lines = script_on_ranks(2, tmp_path, main)
    assert codes == codes_of_both
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "has ended" in lines[-1] and "--resume" in lines[-1] and "Traceback" not in " ".join(lines)
    train_all(settings, ["dpo dpo"], tmp_path, resume=True)
    check_same(out, alone / "dpo dpo")


@pytest.mark.skipif(TORCHRUN is None, reason="this Python has no torchrun beside it")
def test_torchrun_itself_starts_two_ranks(settings, alone, tmp_path):
    """In fp32, so it is the log that is compared; rank 0 alone prints."""
    script, flags = settings["sft"]
    command = [TORCHRUN, "--standalone", "--nproc-per-node", "2", "train_sft.py"]
    command += argv(script, out=tmp_path / "sft", **flags)
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters, 41 rows, 20 steps") == 1
    for row, expected in zip(metrics(tmp_path / "sft"), metrics(alone / "sft"), strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def a_bug(*_):
    raise ValueError("a bug")


def of_rank_1(prompt, response):
    """A rule that fails on one rank."""
    return brevity(prompt, response) if distributed.get_rank() == 0 else 1 / 0


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"data": "missing.jsonl"}, "error: missing.jsonl"),  # on all ranks
        ({"algo": "no"}, "--algo: invalid choice"),
        ({"reward": "test_distributed:of_rank_1"}, "error: --reward test_distributed:of_rank_1 raised Zero"),
        ({"compile": True, "fsdp": True}, "error: --fsdp: does not go with --compile"),
        ({"lora": 2, "fsdp": True}, "error: --lora 2: does not go with --fsdp"),
    ],
)
def test_a_mistake_ends_all_ranks_with_one_line(flags, words, settings, tmp_path):
    _, own = settings["rl rloo"]

    def main():
        train_rlhf.main(argv(train_rlhf, **{**own, "out": tmp_path / "out", **flags}))

    codes, lines = script_on_ranks(2, tmp_path, main)
    errors = [line for line in lines if not line.startswith(("using: ", "rloo: "))]
    assert codes == [2, 2] and len(errors) == 1 and words in errors[0], lines


def test_a_bug_leaves_one_traceback(tmp_path):
    codes, lines = script_on_ranks(2, tmp_path, a_bug)
    assert codes == [1, 1] and lines.count("ValueError: a bug") == 1


def test_a_script_that_is_not_for_torchrun_says_so(tmp_path):
    log = tmp_path / "log"
    assert run_on_ranks(2, functools.partial(run_script, a_bug), log=log) == [2, 2]
    assert log.read_text().startswith("error: torchrun: goes with") and log.read_text().count("\n") == 1


def test_one_process_has_no_part_of_a_model(settings, refuses, tmp_path):
    script, flags = settings["dpo dpo"]
    refuses(script, "--fsdp", "torchrun", **{**flags, "out": tmp_path / "out", "fsdp": True})


def test_a_command_of_a_rank_is_no_rank(monkeypatch):
    for name in torchrun.VARIABLES:
        monkeypatch.setenv(name, "1")
    assert not set(torchrun.VARIABLES) & set(child_environment())
