"""What experiments/summarize.py runs: its sizes, its commands, and the files between them.

`args` is the script's command line as `args_of_seed` makes it: args.out is the folder of one seed,
OUT/seedS. What is drawn from the policies there is in summaries_of_policies.py.
"""

from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from functools import partial

from nanoroads.errors import InputError
from nanoroads.experiments.summaries_of_policies import (
    demos_file,
    measures_file,
    pairs_file,
    samples_file,
    tokens_of,
)
from nanoroads.report.ledger import Ledger, Phase
from nanoroads.report.phases import short_name
from nanoroads.report.summaries import summaries_report
from nanoroads.run.made_from import make_or_keep, policy_hash, read_state, write_made
from nanoroads.weights.files import json_bytes, local_folder, read_json_object, write_json
from nanoroads.weights.identity import of_file, of_value

SETTINGS = ("one-line", "two-word", "hidden")
SFT_OF = {"one-line": "one-line", "two-word": "two-word", "hidden": "one-line"}  # whose SFT policy
MODEL_FILES = (".json", ".safetensors", ".jinja")  # of a pretrained model; what its hash is of


@dataclass(frozen=True)
class Size:
    """How much is read, sampled and trained."""

    sft: int  # documents for SFT
    pairs: int  # documents for pairs
    draws: int  # samples of each of these, and of test; two of them become a pair
    test: int  # held-out documents
    words: int  # in the longest document
    tokens: int  # in the longest response
    two_word_tokens: int  # in the longest one of two-word, which two words and EOS need
    batch: int  # prompts per optimizer step
    micro: int  # prompts per forward pass
    samples: int  # per prompt, in RL
    sft_lr: float
    dpo_lr: dict  # {setting: rate}
    rl_lr: dict  # {setting: rate}
    rm_lr: float  # of the reward model
    kl: float  # strength of the KL term: DPO's beta, RL's --kl
    epochs: int  # of SFT, DPO and the reward model
    steps: int  # of RL
    dtype: str


# For about 1B parameters on one GPU. It has not been run.
FULL = Size(
    sft=6000, pairs=6000, draws=8, test=400, words=250, tokens=48, two_word_tokens=6,
    batch=64, micro=16, samples=8,
    sft_lr=1e-5, rm_lr=5e-6,
    dpo_lr={"one-line": 1e-6, "two-word": 1e-6, "hidden": 1e-6},
    rl_lr={"one-line": 1e-6, "two-word": 1e-6, "hidden": 1e-6},
    kl=0.1, epochs=1, steps=150, dtype="auto",
)  # fmt: skip
# For 135M parameters on two cores. How its rates were chosen: experiments/README.md.
REDUCED = Size(
    sft=400, pairs=900, draws=8, test=240, words=40, tokens=16, two_word_tokens=6,
    batch=8, micro=8, samples=4,
    sft_lr=1e-4, rm_lr=1e-4,
    dpo_lr={"one-line": 5e-5, "two-word": 5e-5, "hidden": 5e-5},
    rl_lr={"one-line": 1e-4, "two-word": 2e-4, "hidden": 1e-4},
    kl=0.1, epochs=1, steps=36, dtype="bfloat16",
)  # fmt: skip
TINY = replace(REDUCED, sft=80, pairs=24, test=8, batch=4, steps=5, sft_lr=3e-4)


def size_of(args):
    """The Size that the flags ask for."""
    size = FULL
    if args.reduced:
        size = REDUCED
    if args.tiny:
        size = TINY
    if args.dtype:
        size = replace(size, dtype=args.dtype)
    return size


# ---------------------------------------------------------------- the folder


def refuse_old_layout(out):
    """Raises InputError for an OUT of earlier versions: the runs of one seed, and no folders seedS."""
    if (out / "settings.json").exists():
        why = "the runs of one seed, as earlier versions laid them out"
        raise InputError(f"--out {out}: holds {why}; choose another --out")


def args_of_seed(args, seed):
    """The command line of one seed: args.seed, and args.out, the folder with all that is made of it."""
    return Namespace(**{**vars(args), "seed": seed, "out": args.out / f"seed{seed}"})


def check_settings(args, size, documents):
    """OUT/seedS/settings.json: what all results in that folder have in common.

    Raises InputError where they were made with another model, other documents, another seed or size."""
    settings = {"seed": args.seed, **asdict(size)}
    settings.update(model=model_hash(args.model), documents=of_value(documents))
    path = args.out / "settings.json"
    if not path.exists():
        write_json(path, settings)
    before = read_state(path, f"choose another --out, or delete {args.out} and start again")
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(f"{args.out} holds results of another {name}; choose another --out")


def hashes_of(model, documents):
    """What results of several seeds have in common beside their Size."""
    return {"model": model_hash(model), "documents": of_value(documents.all)}


def model_hash(folder):
    """A hash of the files of a Hugging Face folder."""
    paths = sorted(path for path in local_folder(folder).iterdir() if path.suffix in MODEL_FILES)
    return of_value({path.name: of_file(path) for path in paths if path.is_file()})


# ---------------------------------------------------------------- what is trained


def sft_folder(args, setting):
    """Where the SFT policy of a setting lies, which one-line and hidden share."""
    return args.out / SFT_OF[setting] / "sft"


def policy_folders(args, setting):
    """{policy: folder} of a setting."""
    folder = args.out / setting
    return {"sft": sft_folder(args, setting), "dpo": folder / "dpo", "rlhf": folder / "rlhf"}


def sft_phases(args, size, documents):
    """SFT on the summaries, and on their first two words, where a setting needs it: a list of phases."""
    phases = []
    for setting in dict.fromkeys(SFT_OF[setting] for setting in args.settings):
        sft = sft_folder(args, setting)
        demos = sft.with_name("demos.jsonl")
        make_or_keep(demos, {"setting": setting}, partial(demos_file, setting, documents.sft))
        init = ["--init", args.model, "--data", demos, "--lr", size.sft_lr, "--epochs", size.epochs]
        phases.append(phase(args, size, sft, ["train_sft.py"] + init, needs=[demos]))
    return phases


def road_phases(args, size, setting):
    """Both roads, from the same pairs and at the same strength of the KL term: a list of phases.

    The longer one, RLHF with its two stages, is first."""
    folders = policy_folders(args, setting)
    train_pairs, test_pairs = pairs_of(args, setting)
    road = ["--init", folders["sft"], "--data", train_pairs, "--eval-data", test_pairs]
    tokens = tokens_of(size, setting)
    road += ["--max-response-tokens", tokens]  # a sample that was cut off has no EOS here, either
    # A pair's texts may take more tokens than were sampled. If they differ only in tokens that are then cut,
    # the pair says nothing, and without this flag both commands would stop there.
    road += ["--skip-bad-rows"]
    dpo = ["--lr", size.dpo_lr[setting], "--beta", size.kl, "--epochs", size.epochs]
    rl = ["--lr", size.rl_lr[setting], "--kl", size.kl, "--samples", size.samples, "--steps", size.steps]
    rl += ["--max-new-tokens", tokens]
    stage_1 = ["--reward-lr", size.rm_lr, "--reward-epochs", size.epochs, "--reward-batch-size", size.batch]
    needs = [folders["sft"], train_pairs, test_pairs]
    return [
        phase(args, size, folders["rlhf"], ["train_rlhf.py"] + road + rl + stage_1, needs),
        phase(args, size, folders["dpo"], ["train_dpo.py"] + road + dpo, needs),
    ]


def phase(args, size, out, command, needs):
    """A training command, with --out and the flags that all three scripts share."""
    shared = ["--seed", args.seed, "--batch-size", size.batch, "--micro-batch-size", size.micro]
    shared += ["--dtype", size.dtype, "--log-every", 1]
    shared += ["--eval-every", 1000, "--save-every", 1000]  # after the last step alone: there are fewer
    shared += ["--warmup", 5]
    command = [str(part) for part in command + ["--out", out] + shared]
    return Phase(str(out), [str(need) for need in needs], command)


# ---------------------------------------------------------------- pairs and measures


def pairs_of(args, setting):
    """The files of a setting's pairs: to train on, and held out."""
    return args.out / setting / "pairs.jsonl", args.out / setting / "test.jsonl"


def make_pairs(args, size, setting, documents, reward):
    """Make the pairs of SFT's samples. Returns {what was made: seconds}."""
    sft = sft_folder(args, setting)
    seconds = {}
    for path, rows in zip(pairs_of(args, setting), (documents.pairs, documents.test), strict=True):
        samples = sft.with_name(f"samples_{path.stem}.json")
        drawn_from = {"policy": policy_hash(sft)}
        make_samples = partial(samples_file, args, size, setting, sft, rows, samples.name)
        seconds[short_name(str(samples), args.out)] = make_or_keep(samples, drawn_from, make_samples)
        labelled_from = {"samples": of_file(samples)}
        label = partial(pairs_file, args, setting, sft, rows, reward, samples, path.name)
        seconds[short_name(str(path), args.out)] = make_or_keep(path, labelled_from, label)
    return seconds


def make_measures(args, size, setting, rows, reward):
    """Measure a setting's policies on held-out documents. Returns the seconds that it took."""
    folders = policy_folders(args, setting)
    runs = Ledger(args.out).hashes([str(folder) for folder in folders.values()])
    measure_setting = partial(measures_file, args, size, setting, folders, rows, reward)
    return make_or_keep(measures_path(args, setting), runs, measure_setting)


def measures_path(args, setting):
    """Where the measures of a setting lie."""
    return args.out / setting / "measures.json"


def write_seed_results(args, size, hashes, seconds, settings, example):
    """One seed's results.json and report.md, of the settings that are measured so far.

    hashes: of `hashes_of`. seconds: {what was made: seconds}. example: a held-out row. Returns what
    results.json holds."""
    paths = [measures_path(args, setting) for setting in settings]
    measures = [read_json_object(path) for path in paths]
    peak = max(row.pop("peak_gib") for row in measures)
    results = {"seed": args.seed, "size": asdict(size), **hashes}
    results.update(total_seconds=round(sum(seconds.values()), 1), peak_gib=peak, seconds=seconds)
    results["settings"] = dict(zip(settings, measures, strict=True))

    report = summaries_report(results, args.model.name, example).encode()
    files = {"results.json": json_bytes(results), "report.md": report}
    made_from = {str(path): of_file(path) for path in paths}
    write_made(args.out / "results.json", files, made_from, results["total_seconds"])
    return results
