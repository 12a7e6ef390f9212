"""Run: the bookkeeping of a training run. A script keeps the loop; its Run keeps the folder and the record.

A Run knows nothing of losses, and calls back only the function whose result `once` keeps.
"""

import contextlib
import hashlib
import json
import math
import time
from argparse import Namespace
from array import array
from dataclasses import asdict
from pathlib import Path

import torch

import kernels
from nanoroads.errors import InputError
from nanoroads.progress import Progress
from nanoroads.randomness import seed_weights
from nanoroads.run import distributed, lora, torchrun
from nanoroads.run.folder import (
    LOCK,
    RECORD,
    SAMPLES,
    SPEED,
    check_finished,
    check_same_run,
    drop_lines_after,
    open_folder,
    plain,
    run_hash,
    temporary_folder,
    write_record,
)
from nanoroads.run.inputs import hash_inputs, say_what_differs, this_machine
from nanoroads.run.profile import profiled
from nanoroads.run.speed import Speed, words
from nanoroads.run.track import check, tracking
from nanoroads.text import tokenizer
from nanoroads.weights import checkpoint, identity
from nanoroads.weights.files import (
    append_line,
    delete_half_written,
    hash_tensors,
    read_config,
    read_safetensors,
    refuse_other_kinds,
    write_json,
    write_safetensors,
)
from nanoroads.weights.folder import TEMPLATES
from nanoroads.weights.hf import TOKENIZER_FILES, copy_tokenizer_files, save_hf
from nanoroads.weights.sharded import help_to_save, shard


class Run:
    """One run of a training script, in the folder --out: config.json, metrics.jsonl, checkpoints.

    With torchrun each rank has a Run of the same folder, and rank 0's alone checks it and writes to it.

    args: the script's flags, as training_parser makes them. stage: "sft", "dpo", "reward",
    "rlhf" or an experiment's name. known: hashes of inputs, see `hash_inputs`. Raises InputError:
    --out holds another run or is being written to, its run was made from something else, or
    --device or --kernel is not available."""

    def __init__(self, args: Namespace, stage: str, known=None):
        self.args = args
        self.stage = stage
        self.device = pick_device(args.device)
        self.compute_dtype = pick_dtype(args.dtype, self.device)
        lora.check(args)
        self.frozen_dtype = lora.frozen_dtype(args)  # of matrices that are not trained; None: fp32
        pick_kernel(args.kernel, self.device, self.compute_dtype)
        check(args.track)
        if args.compile and args.checkpoint_activations:
            raise InputError("--checkpoint-activations: does not go with --compile; leave out one of the two")
        torchrun.check(args, self.device)
        self.writes = torchrun.rank() == 0
        self.out = temporary_folder() if args.inspect else args.out
        # Before: config.json, if the run began earlier. The folder is ours while the locks are open.
        self.before, self.locks, self.inputs = None, [], {}
        if self.writes:
            self.before, self.locks = open_folder(self.out, args, stage)
            self.inputs = hash_inputs(args, known or {})
        if self.before:
            check_same_run(self.out, self.before, args, self.inputs)
            if "inputs" not in self.before:
                print(f"{self.out}: of an older version; its data and models are not compared")
        self.finished = torchrun.rank_0_says(checkpoint.is_finished(self.out))
        self.total = 0  # optimizer steps of the whole run
        self.saved = 0  # steps that the last checkpoint holds
        self.made_from = ""  # a hash of what decides the result, once it is described
        self.progress = None  # of the loop, while it runs
        self.speed = None  # the same
        self.track = None  # the same: a function, see track.py
        self.seconds = {}  # {"seconds_<name>": s} of each `timed` part, since the last line of speed.jsonl
        self.last_row = {}  # the last line of metrics.jsonl
        seed_weights(stage, args.seed)
        if self.finished and self.writes:
            check_finished(self.out)
            print(f"{self.out} is finished")

    def inside(self, name: str, without=(), **changed) -> "Run":
        """A run in the folder OUT/name, of stage `name`.

        Its flags are this run's, less those named in `without`, with those in `changed` over them."""
        changed.update(out=self.out / name, export_hf=None, profile=False)
        hidden = {*without, *changed}
        flags = {flag: value for flag, value in vars(self.args).items() if flag not in hidden}
        # Added at the end: check_same_run names the first flag that differs, which must be --reward-lr and
        # not its copy, --lr.
        flags.update(changed)
        # What a flag names that this run does not have, it was not made from.
        inputs = {flag: parts for flag, parts in self.inputs.items() if flag in flags}
        return Run(Namespace(**flags), name, inputs)

    # ------------------------------------------------------------ before the loop

    def place(self, model):
        """The model on this rank's device, as a whole or, with --fsdp, this rank's part of it."""
        if self.args.fsdp:
            return shard(model, self.device, torchrun.ranks())
        return model.to(self.device)

    def describe(self, model, tokenizer_name: str, **more):
        """Write config.json: the model's shape, its tokenizer's name, the flags, and `more`.

        And what the run is made from, and on which machine. Raises InputError where it began with
        something else."""
        if not self.writes:
            return
        self.inputs = hash_inputs(self.args, self.inputs, download=True)  # what was missing before is there
        self.made_from = run_hash(self.args, self.stage, self.inputs)
        machine = this_machine(self.device)
        if self.before:
            check_same_run(self.out, self.before, self.args, self.inputs)
            say_what_differs(self.out, self.before, machine)
        shape = asdict(model.config)
        # "nanoroads" tells a run's folder from a Hugging Face one.
        fields = {"nanoroads": self.stage, "stage": self.stage, "model": shape, "tokenizer": tokenizer_name}
        fields.update(more)
        fields.update(lora.description(self.args, self.inputs))
        named = {what: fields[what] for what in ("tokenizer", "reference", "base") if what in fields}
        folders = {what: name for what, name in named.items() if Path(name).is_dir()}
        fields["places"] = {what: identity.places(self.out, name) for what, name in folders.items()}
        fields.update(args=plain(self.args), inputs=self.inputs, machine=machine)
        write_json(self.out / "config.json", fields)

    def once(self, name: str, compute, of, count: int | None = None) -> torch.Tensor:
        """The tensor compute(), kept in OUT/name.safetensors for a resumed run.

        count: it has so many rows, and compute(indices) gives some; with torchrun each rank computes a part.
        of: what it is computed from, a list of models, data Rows and plain values. Raises InputError
        where the file is damaged, or was computed from something else."""
        path = self.out / f"{name}.safetensors"
        refuse_other_kinds(path)
        made_from = fingerprint(of)
        if torchrun.rank_0_says(not path.exists()):
            value = compute() if count is None else distributed.in_parts(count, compute)
            if self.writes:
                write_safetensors(path, {"value": value}, {"made_from": made_from})
            torchrun.wait_for_rank_0()
        try:
            tensors, metadata = read_safetensors(path)
        except InputError as error:
            raise InputError(f"{error}; delete it, and --resume computes it again") from None
        if metadata.get("made_from") != made_from or "value" not in tensors:
            raise InputError(
                f"{path}: was computed from other data or another model; delete it, or choose another --out"
            )
        return tensors["value"]

    # ------------------------------------------------------------ the loop

    def steps(self, model, optimizer, total: int):
        """Yields the steps that are left, and shows how far they are.

        Fills model and optimizer from the last checkpoint, drops later lines of metrics.jsonl and its
        like, and with --profile traces a few steps."""
        self.total = total
        keeps_log = self.writes
        self.saved = checkpoint.load_state(self.out, model, optimizer, total, self.made_from, keeps_log)
        if self.writes:
            # load_state has put the file back, but not from an older version's checkpoint, nor without one.
            for name in ("metrics.jsonl", SAMPLES, SPEED):
                drop_lines_after(self.out / name, self.saved)
        if self.args.checkpoint_activations:
            model.checkpoint_activations = True
        if self.args.compile:
            model.compile_trunk()
        tracker = self.args.track if self.writes else None
        with (
            profiled(self.args.profile and self.writes, self.out, self.device) as profile_step,
            Progress(self.stage, "step", total, done=self.saved) as self.progress,
            tracking(tracker, self.out, plain(self.args), self.made_from, self.saved) as self.track,
        ):
            self.speed = Speed(model, self.device, self.stage)
            for step in range(self.saved, total):
                yield step
                profile_step()
                self.progress.advance(now=self.will_log(step))

    def counted(self, batch):
        """The same batch. Its tokens and responses are counted, for their number a second."""
        self.speed.count(batch.group_lengths)
        return batch

    def evaluates(self, step: int) -> bool:
        """Whether held-out measures are due. If so, the time until `log` does not count as training."""
        due = self.evaluation_is_due(step)
        if due:
            self.speed.stop()
        return due

    def evaluation_is_due(self, step: int) -> bool:
        """It is every --eval-every steps, and after the last one."""
        return (step + 1) % self.args.eval_every == 0 or step + 1 == self.total

    def will_log(self, step: int) -> bool:
        """Whether the step gets a line of metrics.jsonl: every --log-every steps, and evaluations."""
        return (step + 1) % self.args.log_every == 0 or self.evaluation_is_due(step)

    def log(self, step: int, row: dict, show=("loss",)):
        """Append {name: number or tensor} to metrics.jsonl, if the step gets a line.

        And the speed since the last such step to speed.jsonl, and both to --track. show: the names to
        show while the loop runs. Here alone tensors become numbers, which waits for the device. Raises
        InputError for a value that is not finite."""
        if not self.will_log(step):
            return
        self.speed.stop()
        self.last_row = {"step": step + 1}
        for name, value in row.items():
            self.last_row[name] = round(float(value), 6)
        for name, value in self.last_row.items():
            if not math.isfinite(value):
                hint = f"a lower --lr may help; {self.out} keeps its last checkpoint"
                raise InputError(f"step {step + 1}: {name} is {value}; {hint}")
        speed = self.speed.take_row()
        for name, seconds in self.seconds.items():
            speed[name] = round(seconds, 6)
        self.seconds = {}
        if self.writes:
            append_line(self.out / "metrics.jsonl", json.dumps(self.last_row))
            if speed:
                append_line(self.out / SPEED, json.dumps({"step": step + 1, **speed}))
            self.track(step + 1, {**self.last_row, **speed})
        shown = [f"{name} {self.last_row[name]:.4g}" for name in show]
        self.progress.set_text(", ".join([*shown, *words(speed)]))
        self.speed.start()

    def save(self, step: int, model, optimizer):
        """A checkpoint to resume from, if --save-every steps have passed since the last one."""
        done = step + 1
        if done - self.saved >= self.args.save_every and done < self.total:
            self.speed.stop()
            if self.writes:
                checkpoint.save_state(self.out, model, optimizer, done, self.made_from)
            else:
                help_to_save(model, optimizer)
            self.saved = done
            self.speed.start()

    @contextlib.contextmanager
    def timed(self, name: str):
        """Adds the seconds of a `with` block to `seconds`. On CUDA: until launched, not done."""
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self.seconds[f"seconds_{name}"] = self.seconds.get(f"seconds_{name}", 0.0) + took

    # ------------------------------------------------------------ after the loop

    def finish(self, model):
        """Write model.safetensors and delete the checkpoint: the run is finished. Then --export-hf."""
        if self.writes:
            (self.out / RECORD).unlink(missing_ok=True)  # of a model that was deleted to train it again
            checkpoint.save_model(self.out, model, self.args.init if self.args.lora else None)
            write_record(self.out)
            checkpoint.drop_state(self.out)
        else:
            help_to_save(model)
        torchrun.wait_for_rank_0()
        self.finished = True
        self.export()

    def export(self):
        """Write --export-hf, if given, as a Hugging Face folder. Then release the run's locks."""
        if self.args.export_hf is not None and self.writes:
            self.write_export(self.args.export_hf)
        for lock in self.locks:
            lock.release()

    def write_export(self, folder: Path):
        """The run as a Hugging Face folder, with the tokenizer files of the model that training began with.

        A killed export is written again; a complete one stays. Raises InputError for a folder that
        holds something else."""
        if (folder / "config.json").exists():  # the last file of an export
            print(f"{folder} holds a model already and is left as it is")
            return
        delete_half_written(folder)  # what a killed export left; the folder is locked
        left_by_an_export = ("model.safetensors", *TOKENIZER_FILES, TEMPLATES, LOCK)
        for path in folder.glob("*"):
            leads_elsewhere = path.is_symlink() and path.is_dir()
            if leads_elsewhere or not path.name.startswith(left_by_an_export):
                raise InputError(f"--export-hf {folder}: exists, and is not empty")
        name = identity.find(self.out, read_config(self.out), "tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        if Path(name).is_dir():
            copy_tokenizer_files(name, folder)
        save_hf(folder, checkpoint.load_model(self.out), tokenizer.stop_ids(tokenizer.get(name)))
        print(f"{folder}: {self.out} for transformers, vLLM and others")


# ---------------------------------------------------------------- the machine


def pick_device(name: str) -> torch.device:
    """--device; "auto" is the fastest there is. Raises InputError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in available.items() if is_there)
    if not available[name]:
        raise InputError(f"--device {name}: torch finds no such device here")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """--dtype, of matrix products while weights stay fp32: "auto" is bfloat16 on CUDA. None: fp32."""
    if name == "bfloat16" or (name == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None


def pick_kernel(name: str, device: torch.device, compute_dtype: torch.dtype | None = None):
    """--kernel. Raises InputError if that backend cannot work on the device, or in --dtype."""
    try:
        kernels.set_backend(name)
        kernels.pick("auto", torch.empty(0, device=device, dtype=compute_dtype))  # raises if it cannot
    except ValueError as error:
        raise InputError(f"--kernel {name}: {error}") from None


# ---------------------------------------------------------------- what a tensor was computed from


def fingerprint(things):
    """A hash of models (their weights), data Rows (their tokens) and plain values, in this order."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.nn.Module):
            digest.update(repr(thing.config).encode())  # whatever it computes in: --device may change
            hash_tensors(digest, thing.state_dict())
        elif hasattr(thing, "responses"):
            for prompt, group in zip(thing.prompts, thing.responses, strict=True):
                for tokens in (prompt, *group):
                    digest.update(len(tokens).to_bytes(4, "little") + array("i", tokens).tobytes())
        else:
            digest.update(repr(thing).encode())
    return digest.hexdigest()
