"""What every script needs: flags, device, data order, learning rate, metrics.jsonl, progress, one-line errors.

Nothing here keeps state between steps. Data order, learning rate and sampling seeds are functions of (seed, step), so a
resumed run needs only the step, the weights and the optimizer's moments to end with the same bits.
"""

import argparse
import atexit
import contextlib
import functools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import kernels

ROOT = Path(__file__).resolve().parent.parent


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what and where."""


def run_script(main):
    """Run main(); what a user can cause becomes one line on stderr and exit code 2."""
    try:
        main()
    except BrokenPipeError:  # the reader has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        # On a CPU torch has no exception of its own for this.
        full = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not full:
            raise
        text = " ".join(str(error).split()) or "out of memory"
        print(f"error: {text}{' (try a smaller --micro-batch-size)' * full}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; a run goes on from its last checkpoint with the same command and --resume", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    pretrained = {}  # defaults of flags where a model and data of one's own are given; the usual ones suit the map's small model

    def parse_args(self, *argv):
        from nanoroads.roadmap import WORLDS  # which imports this file

        args = super().parse_args(*argv)
        if self.pretrained and args.init and args.data not in WORLDS:
            self.set_defaults(**self.pretrained)
            args = super().parse_args(*argv)
        if getattr(args, "inspect", False):  # nothing of it is kept
            args.out = Path(tempfile.mkdtemp(prefix="nanoroads-"))
            atexit.register(shutil.rmtree, args.out, ignore_errors=True)
        return args

    def error(self, message):
        print(f"error: {Path(self.prog).name}: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def positive(kind, or_zero=False, below=math.inf):
    def parse(text):
        value = kind(text)
        if not (value >= 0 if or_zero else value > 0) or not value < below:
            limit = f" below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a {'non-negative' if or_zero else 'positive'} number{limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


seed = positive(int, or_zero=True, below=2**32)  # NumPy takes no negative ones; times 1_000_003 it must fit 64 bits


def parser(doc, pretrained, **defaults):
    """An argument parser with the flags that every training script has. defaults: out, epochs, steps, lr, ...; pretrained: those
    that differ where --init and --data are the user's own."""
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in pretrained.items())
    epilog = f"With --init and --data of your own the defaults are {words}" if pretrained else None
    p = Parser(description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.pretrained = pretrained
    add = p.add_argument
    add("--out", type=Path, help="directory of the run (default: %(default)s)")
    add("--data", default="roadmap", help="roadmap[-short|-hidden], a .jsonl[.gz] or .parquet file, or hf:org/name[:split]")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--seed", type=seed, default=0, help="of weights, data order and samples")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: the fastest there is")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of activations; auto: bfloat16 on CUDA")
    add("--kernel", default="auto", choices=["auto", "torch", "triton"], help="backend of the log-prob kernels")
    add("--compile", action="store_true", help="torch.compile the trunk")
    add("--steps", type=positive(int), help="optimizer steps; overrides --epochs")
    add("--epochs", type=positive(float), help="passes over the data (default: %(default)s)")
    add("--lr", type=positive(float), help="peak learning rate (default: %(default)s)")
    add("--schedule", default="cosine", choices=["cosine", "constant"], help="after the warm-up (default: %(default)s)")
    add("--warmup", type=positive(int, or_zero=True), default=10, help="steps of linear warm-up (default: %(default)s)")
    add("--weight-decay", type=positive(float, or_zero=True), default=0.0, help="AdamW's (default: %(default)s)")
    add("--clip", type=positive(float), default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--batch-size", type=positive(int), help="prompts an optimizer step (default: %(default)s)")
    add("--micro-batch-size", type=positive(int), help="prompts a forward pass; bounds the memory (default: the batch size)")
    add("--eval-every", type=positive(int), default=100, help="steps between evaluations (default: %(default)s)")
    add("--save-every", type=positive(int), default=100, help="steps between checkpoints (default: %(default)s)")
    add("--log-every", type=positive(int), default=10, help="steps between lines of metrics.jsonl (default: %(default)s)")
    add("--max-prompt-tokens", type=positive(int), help="keep the last tokens of longer prompts (default: refuse them)")
    add("--max-response-tokens", type=positive(int), help="cut longer responses, without EOS (default: refuse them)")
    add("--export-hf", type=Path, metavar="DIR", help="also write the result as a Hugging Face folder")
    add("--skip-bad-rows", action="store_true", help="leave out rows of --data that do not fit, and count them (default: stop)")
    add("--inspect", action="store_true", help="print three examples as tokens, with what is trained, and stop")
    add("--profile", action="store_true", help="write a torch.profiler trace of a few steps to OUT/trace.json")
    p.set_defaults(**defaults)
    return p


def pick_device(args):
    """The torch.device that --device names. Raises InputError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d, ok in there.items() if ok) if args.device == "auto" else args.device
    if not there[name]:
        raise InputError(f"--device {name}: torch finds no such device here")
    return torch.device(name)


def autocast(args, device):
    """The context of every forward pass: weights stay fp32, matrix products run in --dtype."""
    low = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def set_kernel(args, device):
    """--kernel. Raises InputError if that backend cannot work on the device."""
    try:
        kernels.set_backend(args.kernel)
        kernels.pick("auto", torch.empty(0, device=device))
    except ValueError as error:
        raise InputError(f"--kernel {args.kernel}: {error}") from None


# Free of these, two runs are the same run: they say where and how often, not what.
NOT_THE_RUN = (
    "out",
    "resume",
    "device",
    "profile",
    "eval_every",
    "save_every",
    "log_every",
    "stop_after",
    "export_hf",
    "inspect",
)


def open_run(args, stage):
    """Make --out, or refuse: a directory with another run is never written to. Returns the path."""
    out, given = args.out, getattr(args, "export_hf", None)
    if given and given.resolve() == out.resolve():
        raise InputError(f"--export-hf {given}: is --out itself")
    if given and given.exists() and any(given.iterdir()) and not args.resume:
        raise InputError(f"--export-hf {given}: exists, and is not empty")
    if (out / "config.json").exists():
        theirs = read_config(out)
        if not args.resume:
            raise InputError(f"{out} already holds a run: --resume continues it, --out DIR starts another")
        if theirs.get("stage") != stage:
            raise InputError(f"{out} holds a run of stage {theirs.get('stage')!r}, not {stage!r}")
        had = theirs.get("args", {})
        for name, value in plain(args).items():
            if name not in NOT_THE_RUN and had.get(name) != value:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{out}: its run had {flag} {had.get(name)}, this one has {value}")
    elif out.exists() and (not out.is_dir() or ((out / "model.safetensors").exists())):
        raise InputError(f"{out} exists and is not a run of nanoroads")
    for folder in filter(None, (given, out)):  # what is wrong with either is said now, not after the training
        folder.mkdir(parents=True, exist_ok=True)
    for half_written in (*out.glob("*.tmp"), *out.glob(".tmp??????")):  # by a run that was killed; the second by safetensors
        half_written.unlink()
    return out


def read_object(path):
    """The JSON object in a file. Raises InputError."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object, but {type(value).__name__}")
    return value


def local(folder):
    """A folder's path; of `hf:org/name` the path that huggingface_hub has downloaded it to. Raises InputError."""
    if not (name := str(folder)).startswith("hf:"):
        return Path(folder)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name[3:], allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except ImportError:
        raise InputError(f"{name}: to download it, pip install huggingface_hub") from None
    except Exception as error:  # of the hub, the network or the disk: the name cannot be had
        raise InputError(f"{name}: {error}") from None


def read_config(folder):
    """config.json of a run or of a Hugging Face folder. Raises InputError."""
    path = local(folder) / "config.json"
    if not path.exists():
        raise InputError(f"{folder}: no such run (it has no config.json)")
    config = read_object(path)
    kinds = {"args": dict, "model": dict, "tokenizer": str, "reference": str, "beta": (int, float)}  # of our own
    for name in kinds if "model_type" not in config else ():
        if name in config and not isinstance(config[name], kinds[name]):
            raise InputError(f"{path}: {name} is {config[name]!r}")
    return config


def plain(args):
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}


def make_with(command, path):
    """If `path` is missing, say so and run `command` (a list that starts with a script's name), which makes it."""
    if not Path(path).exists():
        command = [str(word) for word in command]
        print(f"{path} is missing; making it:\n  python {shlex.join(command)}", flush=True)
        code = subprocess.run(python(command), env=environment()).returncode
        if code == 2:  # it has said why
            sys.exit(2)
        if code:
            raise InputError(f"{path}: the command above failed")


def make_map_inputs(args):
    """On the built-in map: the reference policy --init and its labelled pairs, made if missing. Returns both files of pairs."""
    if str(args.init).startswith("hf:"):
        raise InputError(f"--init {args.init}: a policy of the map is wanted; --data gives other pairs")
    if getattr(args, "eval_data", None):
        raise InputError("--eval-data: the map has its own held-out pairs; it goes with --data FILE")
    policy = args.init / "model.safetensors"
    make_with(["train_sft.py", "--data", args.data, "--out", args.init, "--resume", "--seed", args.seed], policy)
    theirs = read_config(args.init).get("args", {}).get("data", args.data)
    if theirs != args.data:  # its pairs would be of another world
        raise InputError(f"{args.init}: a policy of --data {theirs}, not of {args.data}; --init DIR names (or makes) another")
    train, test = args.init / "pairs.jsonl", args.init / "pairs_test.jsonl"
    command = ["-m", "nanoroads.pairs", "--policy", args.init, "--seed", args.seed]
    make_with([*command, "--out", train], train)
    make_with([*command, "--split", "test", "--n", 1000, "--out", test], test)
    return train, test


def python(command):
    """["train_sft.py", ...] or ["-m", "nanoroads.pairs", ...] -> a command line that works from any directory."""
    script = [str(ROOT / command[0])] if command[0].endswith(".py") else [command[0]]
    return [sys.executable, *script, *command[1:]]


def environment():
    """The environment of a child process that finds this checkout, installed or not."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def compile_trunk(args, model):
    """--compile: the trunk's shapes change from batch to batch, so it is compiled once for all of them."""
    if args.compile:
        model.trunk = torch.compile(model.trunk, dynamic=True)


def total_steps(args, examples):
    return args.steps or max(1, round(args.epochs * math.ceil(examples / args.batch_size)))


def learning_rate(args, step, steps):
    """Linear warm-up, then constant, or half a cosine to zero. step counts from 0."""
    warm = min(1.0, (step + 1) / (args.warmup + 1))
    if args.schedule == "constant":
        return args.lr * warm
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


@functools.lru_cache(maxsize=4)
def epoch_order(examples, epoch, seed):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(examples, generator=generator).tolist()


def batch_indices(examples, batch_size, step, seed):
    """Which examples step `step` trains on: each epoch is a fresh shuffle, its last batch may be smaller."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, i = divmod(step, per_epoch)
    return epoch_order(examples, epoch, seed)[i * batch_size : (i + 1) * batch_size]


def chunks(items, size):
    """items in runs of `size` (None: one run)."""
    size = size or len(items)
    return [items[i : i + size] for i in range(0, len(items), size)]


def make_optimizer(args, model):
    """AdamW with no weight decay on vectors (norms, biases)."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def update(args, model, optimizer, step, steps):
    """Clip, step, forget the gradients. Returns the gradient norm as a tensor: nothing here waits for the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, step, steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def log_metrics(out, step, row):
    """Append one line to metrics.jsonl; tensors become floats here. A value that is not finite ends the run."""
    row = {"step": step, **{name: round(float(v), 6) for name, v in row.items()}}
    for name, value in row.items():
        if not math.isfinite(value):
            raise InputError(f"step {step}: {name} is {value}; a lower --lr may help; {out} keeps its last checkpoint")
    with open(out / "metrics.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    return row


def read_metrics(out):
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


def progress(start, steps, name):
    """range(start, steps) under a progress bar; silent where stderr is not a terminal."""
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, unit="step", disable=None, dynamic_ncols=True)


@contextlib.contextmanager
def profiled(args, device):
    """Yields a function to call after each step. With --profile, steps 3 to 7 go to OUT/trace.json and a table to stdout."""
    if not args.profile:
        yield lambda: None
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1)
    with torch.profiler.profile(activities=kinds, schedule=schedule, acc_events=True) as prof:
        yield prof.step
    prof.export_chrome_trace(str(args.out / "trace.json"))
    order = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
    print(prof.key_averages().table(sort_by=order, row_limit=15))
    print(f"trace: {args.out / 'trace.json'} (open it in chrome://tracing or ui.perfetto.dev)")


class Timer:
    """Seconds by name: `with timer("sampling"): ...`. On CUDA these are seconds until launched, not until done."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, name):
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
