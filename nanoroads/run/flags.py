"""What the scripts' command lines share: number types, common flags, defaults, errors in one line."""

import argparse
import errno
import io
import math
import os
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from kernels.api import LEAST_DIVISOR, MOST_DIVISOR
from nanoroads.errors import InputError, nearest_first, printable
from nanoroads.progress import close_all
from nanoroads.run import signals, torchrun
from nanoroads.run.track import TRACKERS
from nanoroads.text.data import Limits
from nanoroads.weights.files import read_config

LONGEST_ERROR = 500  # characters
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # of writing: full, too large, over the quota
SMALL_MODEL = 10_000_000  # parameters; the map's model has 117,000, the smallest pretrained ones 14 million

# A default learning rate times this is that of --lora (Schulman et al., "LoRA Without Regret", 2025).
LORA_LR = 10

HELP_WIDTH = 100  # columns

# ---------------------------------------------------------------- running a script


# How a training script goes on after Ctrl-C.
WITH_RESUME = "a run goes on from its last checkpoint with the same command and --resume"


def run_script(main, resumes=WITH_RESUME, less_memory="a smaller --micro-batch-size", many_ranks=False):
    """Run main(); what a user can cause becomes one line on stderr and exit code 2.

    resumes: how to go on after Ctrl-C or SIGTERM; False: not at all. less_memory: what to try where
    a model's tensors do not fit, by flags that the script has; None: there is none. many_ranks: whether
    torchrun may start the script."""
    write_any_text()
    try:
        with signals.stopping():
            torchrun.start()
            if torchrun.ranks() > 1 and not many_ranks:
                raise InputError("torchrun: goes with train_sft.py, train_dpo.py and train_rlhf.py alone")
            main()
            torchrun.end()
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk is noticed here, and not when Python ends
    except SystemExit:  # it has been said why
        torchrun.say(None)
        raise
    except BrokenPipeError:  # the reader has gone, as `| head` does
        discard_output()
        sys.exit(1)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = is_out_of_memory(error)
        is_lost = torchrun.is_of_lost_rank(error)
        if isinstance(error, RuntimeError) and not out_of_memory and not is_lost:
            raise
        close_all()
        text = message_of(error) or "out of memory"
        if is_lost:
            text = f"another process of torchrun has ended; {resumes}"
        if getattr(error, "errno", None) in DISK_ERRORS and error.filename is None:
            text = f"standard output: {error.strerror}"  # every file of ours is named
            discard_output()
        # A MemoryError is Python's or NumPy's. No forward pass raises one, so a smaller one is no help.
        if out_of_memory and less_memory and not isinstance(error, MemoryError):
            text += f" (try {less_memory})"
        print_error(text)
        sys.exit(2)
    except (KeyboardInterrupt, signals.Stopped) as stopped:
        close_all()
        number = getattr(stopped, "number", signal.SIGINT)
        hint = f"; {resumes}" if resumes else ""
        torchrun.say(f"\nstopped{hint}")
        sys.exit(128 + number)  # as a shell has it: 130 for Ctrl-C, 143 for SIGTERM


def discard_output():
    """From now on standard output goes nowhere, or Python would try to write the rest when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_any_text():
    r"""Let stdout write what its encoding cannot, half a character or an é in ASCII, as \udc80 or \xe9.

    stderr does so anyway. And line by line, as stderr does: a log of both has them in their order."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may also be None, or what a notebook puts there
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


def print_error(message):
    """Print one line to stderr, whatever the message holds: a name or a value of a file may be long."""
    line = " ".join(printable(message).split())
    if len(line) > LONGEST_ERROR:
        line = f"{line[: LONGEST_ERROR - 200]} ... {line[-195:]}"  # what to do next is said at the end
    torchrun.say(f"error: {line}")


def message_of(error):
    """What an exception says; of an OSError: the file, then what happened to it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def is_out_of_memory(error):
    """Whether memory ran out; on a CPU torch raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help is at most HELP_WIDTH columns wide.

    required: the flags that the usage line names, as a user would type them."""

    def __init__(self, required="", **options):
        width = min(HELP_WIDTH, shutil.get_terminal_size().columns - 2)
        formatter = partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=30)
        usage = " ".join(f"%(prog)s {required} [flags]".split())
        super().__init__(formatter_class=formatter, usage=usage, **options)
        # Of all flags without a number type. An empty path, as an unset shell variable leaves it, would be
        # the directory that the script was started in.
        self.register("type", None, not_empty)
        self.register("type", Path, path)

    def parse_args(self, args=None, namespace=None):
        """As argparse does it. A flag that there is not is refused with the nearest ones that there are."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)", self.format_help(), re.MULTILINE)
            nearest = nearest_first(unknown[0].partition("=")[0], flags, most=3)
            self.error(f"unrecognized arguments: {' '.join(unknown)}; the nearest flags are {nearest}")
        return known

    def error(self, message):
        print_error(f"{Path(self.prog).name}: {message} (--help lists the flags)")
        raise SystemExit(2)


# ---------------------------------------------------------------- types of flags


def not_empty(text):
    """A flag's type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def path(text):
    """A flag's type: a path, whose text is not empty."""
    return Path(not_empty(text))


def positive(number_type):
    """A flag's type: an int or a float above zero."""
    return number(number_type, "a positive number", lambda value: value > 0)


def non_negative(number_type, below=math.inf):
    """A flag's type: an int or a float from zero on, below `below`."""
    limit = f" below {below}" if below < math.inf else ""
    return number(number_type, f"a non-negative number{limit}", lambda value: 0 <= value < below)


def number(number_type, description, is_right):
    """number_type: int or float. is_right: a condition on the value, which `description` words."""

    def parse(text):
        value = number_type(text)
        if not is_right(value) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value

    parse.__name__ = number_type.__name__  # argparse names it when the text is no number at all
    return parse


# The range that NumPy and others take, too, so that a seed can be used anywhere.
SEED = non_negative(int, below=2**32)

# What fp32 can divide logits by.
TEMPERATURE = number(
    float, f"between {LEAST_DIVISOR} and {MOST_DIVISOR}", lambda value: LEAST_DIVISOR <= value <= MOST_DIVISOR
)

# ---------------------------------------------------------------- the flags of every training script


def training_parser(doc, out, defaults):
    """A parser with the flags that every training script has.

    doc: the script's docstring. out: where its run goes. defaults: its DEFAULTS, see `use_defaults`."""
    large = f"a model of more than {SMALL_MODEL // 1_000_000} million parameters"
    epilog = f"A default after `pretrained` is for a Hugging Face folder, or\n{large}."
    parser = Parser(description=doc, epilog=epilog)

    add = parser.add_argument_group("the run").add_argument
    add("--out", type=Path, default=out, help="directory of the run (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--seed", type=SEED, default=0, help="seed of weights, data order and samples (default: 0)")
    add("--log-every", type=positive(int), default=10, help="steps per line of metrics.jsonl (default: 10)")
    add("--eval-every", type=positive(int), default=100, help="steps between evaluations (default: 100)")
    add("--save-every", type=positive(int), default=100, help="steps between checkpoints (default: 100)")
    track = "also log to Weights & Biases or TensorBoard (default: none)"
    add("--track", choices=TRACKERS, help=track)
    export = "also write the result as a Hugging Face folder (default: none)"
    add("--export-hf", type=Path, metavar="DIR", help=export)

    worlds = "roadmap[-short|-2|-3|-5|-8|-11|-hidden]"
    files = f"{worlds}, or a .jsonl[.gz] or .parquet file, or hf:org/name[:split]"
    add = parser.add_argument_group("the data").add_argument
    add("--data", default="roadmap", help=f"{files} (default: roadmap, the built-in map)")
    add(
        "--max-prompt-tokens", type=positive(int), help="keep a prompt's last tokens (default: refuse longer)"
    )
    add("--max-response-tokens", type=positive(int), help="cut, without EOS (default: refuse longer)")
    add("--skip-bad-rows", action="store_true", help="skip rows that do not fit, and say how many")
    add(
        "--inspect",
        action="store_true",
        help="print three examples as tokens, count what is wrong in the whole file, and stop",
    )

    add = parser.add_argument_group("the optimizer").add_argument
    shapes = ["cosine", "constant"]
    steps = f"number of optimizer steps, in place of --epochs {default_text(defaults, 'steps')}"
    add("--steps", type=positive(int), help=steps)
    add("--epochs", type=positive(float), help=f"passes over the data {default_text(defaults, 'epochs')}")
    add("--lr", type=positive(float), help=f"peak learning rate of AdamW {default_text(defaults, 'lr')}")
    add("--schedule", default="cosine", choices=shapes, help="after the warm-up (default: cosine)")
    add("--warmup", type=non_negative(int), default=10, help="steps of linear warm-up (default: 10)")
    add("--weight-decay", type=non_negative(float), default=0.0, help="of AdamW, on matrices (default: 0)")
    lora = "train adapters of this rank alone, at ten times the default --lr; with --dtype bfloat16 all else"
    lora += " is held in that (default: train all)"
    add("--lora", type=positive(int), metavar="RANK", help=lora)
    add("--clip", type=positive(float), default=1.0, help="largest gradient norm (default: 1)")
    add("--batch-size", type=positive(int), help=f"prompts per step {default_text(defaults, 'batch_size')}")
    micro = "prompts per forward pass, which bounds the memory"
    add(
        "--micro-batch-size", type=positive(int), help=f"{micro} {default_text(defaults, 'micro_batch_size')}"
    )

    machine = parser.add_argument_group("the machine")
    add_machine_flags(machine)
    machine.add_argument("--compile", action="store_true", help="torch.compile the trunk")
    spread = "with torchrun: spread a large model over the processes"
    machine.add_argument("--fsdp", action="store_true", help=spread)
    trace = "write a torch.profiler trace of a few steps to OUT/trace.json"
    recompute = "keep each block's input alone, and compute the block again in the backward pass"
    machine.add_argument("--checkpoint-activations", action="store_true", help=recompute)
    machine.add_argument("--profile", action="store_true", help=trace)
    return parser


def add_machine_flags(parser):
    """--device, --dtype and --kernel, which sampling has too."""
    add = parser.add_argument
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", default="auto", choices=devices, help="auto is the fastest there is (default: auto)")
    dtypes = ["auto", "float32", "bfloat16"]
    add(
        "--dtype",
        default="auto",
        choices=dtypes,
        help="of the factors of matrix products; their sums, weights, gradients and log-probs are fp32; "
        "auto: bfloat16 on CUDA (default: auto)",
    )
    backends = ["auto", "torch", "triton"]
    add(
        "--kernel",
        default="auto",
        choices=backends,
        help="of log-probs; auto: triton on CUDA (default: auto)",
    )


def row_limits(args, model):
    """--max-prompt-tokens and the like as data.load takes them, with the model's context."""
    context = model.config.block_size
    hint = " (--max-prompt-tokens and --max-response-tokens cut)"
    row_hint = " (--skip-bad-rows leaves such rows out, --inspect counts them)"
    cuts = (args.max_prompt_tokens, args.max_response_tokens)
    return Limits(context, *cuts, args.skip_bad_rows, hint, row_hint)


# ---------------------------------------------------------------- defaults by model


def model_kind(folder):
    """Which column of a script's DEFAULTS suits the model in `folder`, "small" or "pretrained".

    "small": one that was trained from scratch, as the map's is. folder None, or not there yet: a new
    model of the map's size."""
    if folder is None:
        return "small"
    if str(folder).startswith("hf:"):  # nothing is downloaded before all flags are checked
        return "pretrained"
    if not (Path(folder) / "config.json").exists():
        return "small"
    config = read_config(folder)
    if "model_type" in config or parameters(config.get("model", {})) > SMALL_MODEL:
        return "pretrained"
    return "small"


def parameters(model_config):
    """About how many parameters a model of one of our runs has; its config.json's "model" as a dict."""
    vocab, width = model_config.get("vocab_size", 0), model_config.get("n_embd", 0)
    layers, d_ff = model_config.get("n_layer", 0), model_config.get("d_ff", 0)
    try:
        return vocab * width + layers * (4 * width * width + 2 * width * d_ff)
    except TypeError:  # load_model says what is wrong with it
        return 0


def use_defaults(args, defaults, kind, unused=()):
    """Fill in the flags that were not given, and print those that have a value, and whence.

    defaults: the column `kind` of a script's DEFAULTS. unused: flags that this run does not read, which
    config.json has but nobody needs to see."""
    words = []
    for name, default in defaults.items():
        source = "given"
        if getattr(args, name) is None:
            source = kind
            if name in ("lr", "reward_lr") and args.lora:
                default = float(f"{default * LORA_LR:g}")  # 0.003, and not 0.0029999999999999996
                source += f" x {LORA_LR}, for --lora"
            setattr(args, name, default)
        if getattr(args, name) is not None and name not in unused:
            words.append(f"{name.replace('_', '-')} {getattr(args, name)} ({source})")
    print(f"using: {', '.join(words)}")


def names_of_flags(add_flags):
    """The names under which args has the flags that a script's function adds to a parser."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args([])).keys()


# What holds where a flag has no default.
NO_DEFAULT = {"steps": "as --epochs says", "epochs": "as --steps says", "micro_batch_size": "all"}


def default_text(defaults, name):
    """The two defaults of a flag, for its help text."""
    words = []
    for kind in ("small", "pretrained"):
        value = defaults[kind].get(name)
        words.append(NO_DEFAULT.get(name, "none") if value is None else f"{value:g}")
    if words[0] == words[1]:
        return f"(default: {words[0]})"
    return f"(default: {words[0]}; pretrained {words[1]})"
