"""Both roads on a pretrained language model: one-line summaries, and two settings without a gap.

    python experiments/summarize.py --model FOLDER --data FILE --reduced --jobs 2    two CPU cores
    python experiments/summarize.py --model FOLDER --data FILE                       a GPU

FOLDER: a Hugging Face model. FILE: rows {"document", "summary"}, as .jsonl, .jsonl.gz or .parquet.

What runs in each setting
    1. SFT on the summaries.
    2. Four samples of the SFT policy for each document. The two whose rewards differ most are a
       pair, labelled by Bradley-Terry on the setting's reward r.
    3. DPO on the pairs; a global reward model and RLOO on them, with a KL term as strong as DPO's.
    4. Held-out documents: reward, win rates (RLHF's against DPO, too), KL(policy || SFT).

Rewards of a summary y of the document x
    one-line    r(x, y) = 10 c min(1, m/n). c: the share of the document's K = 5 salient words that
                y names. n: the words of y. m: those of a median summary of FILE's short documents.
                Salient are, of the document's words of four letters or more, the five of largest
                (count in x) log(documents / documents with the word). A count and two look-ups
                verify it; a summary has to find what the document is about, and say it in a line.
    two-word    the same with K = m = 2, after SFT on only the first two words: a short horizon.
    hidden      r(x, y) = 10 ROUGE-L(y, the document's own summary). Neither x nor the reward model
                shows that summary, so verifying is no easier than writing. The SFT policy and its
                samples are those of one-line.

Started again, it uses what is there, and makes again what was made from something that has changed.
What somebody has changed, and results of another model, data, seed or size, it refuses by name.

r is in nats of Bradley-Terry: P(a beats b) = sigmoid(r(a) - r(b)). The paper (2503.01067, section
4) says that RLHF is ahead in the first setting and is not in the other two.
"""

import json
import resource
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch

from nanoroads import randomness
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.losses import kl_k1
from nanoroads.progress import tracked
from nanoroads.report.ledger import Ledger, Phase
from nanoroads.report.phases import claim_folder, run_phases, short_name
from nanoroads.report.summaries import comparison, rewards_of, summaries_report, win_rates
from nanoroads.run.flags import SEED, Parser, positive, run_script
from nanoroads.run.folder import read_metrics
from nanoroads.run.made_from import make_or_keep, policy_hash, read_state, write_made
from nanoroads.run.optim import chunks
from nanoroads.run.run import pick_device, pick_dtype
from nanoroads.score import mean_se, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.text.documents import read_documents, reward_function
from nanoroads.text.rouge import words
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import json_bytes, jsonl_bytes, local_folder, read_json_object, write_json
from nanoroads.weights.identity import of_file, of_value

SETTINGS = ("one-line", "two-word", "hidden")
MODEL_FILES = (".json", ".safetensors", ".jinja")
PROMPT = "{document}\n\nIn one line:"


@dataclass(frozen=True)
class Size:
    """How much is read, sampled and trained."""

    sft: int  # documents for SFT
    pairs: int  # documents for pairs
    draws: int  # samples of such a document, of which two become a pair
    test: int  # held-out documents
    words: int  # in the longest document
    tokens: int  # in the longest response
    batch: int  # prompts per optimizer step
    micro: int  # prompts per forward pass
    samples: int  # per prompt, in RL
    sft_lr: float
    lr: float  # of DPO
    rl_lr: float  # of RL
    rm_lr: float  # of the reward model
    kl: float  # strength of the KL term: DPO's beta, RL's --kl
    epochs: int  # of SFT, DPO and the reward model
    steps: int  # of RL
    dtype: str


FULL = Size(
    sft=6000, pairs=6000, draws=4, test=400, words=250, tokens=48,
    batch=64, micro=16, samples=8,
    sft_lr=1e-5, lr=1e-6, rl_lr=1e-6, rm_lr=5e-6, kl=0.1, epochs=1, steps=150, dtype="auto",
)  # fmt: skip
REDUCED = Size(
    sft=400, pairs=900, draws=4, test=360, words=40, tokens=16,
    batch=8, micro=8, samples=4,
    sft_lr=1e-4, lr=5e-5, rl_lr=5e-5, rm_lr=1e-4, kl=0.1, epochs=1, steps=36, dtype="bfloat16",
)  # fmt: skip
TINY = replace(REDUCED, sft=80, pairs=24, test=8, batch=4, steps=5, sft_lr=3e-4)


def flags(argv):
    """The command line -> (args, Size)."""
    parser = Parser("--model DIR --data FILE", description=__doc__)
    add = parser.add_argument_group("the experiment").add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder of the pretrained model")
    add("--data", type=Path, required=True, help='file of rows {"document", "summary"}')
    add("--out", type=Path, default="out/summarize", help="folder of the results (default: %(default)s)")
    add("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="(default: all)")
    add("--seed", type=SEED, default=0, help="seed of data order and samples (default: 0)")
    dtype = "of activations (default: bfloat16 with --reduced or --tiny, else on a GPU only)"
    add("--dtype", choices=["float32", "bfloat16"], help=dtype)
    add("--reduced", action="store_true", help="sizes for a 135M model on two CPU cores")
    add(
        "--jobs",
        type=positive(int),
        default=1,
        help="commands at a time; a CPU with two cores runs 2 (default: 1)",
    )
    add("--tiny", action="store_true", help="a few steps of everything: does it run here?")
    args = parser.parse_args(argv)

    size = FULL
    if args.reduced:
        size = REDUCED
    if args.tiny:
        size = TINY
    if args.dtype:
        size = replace(size, dtype=args.dtype)
    return args, size


def main(argv=None):
    """Run the settings. OUT/results.json and OUT/report.md hold what is known after each one is measured.

    What is there already is not made again, unless it was made from something that has changed since."""
    args, size = flags(argv)
    documents = read_documents(args.data, size, args.seed)
    lock = claim_folder(args.out)  # held to the end
    check_settings(args, size, documents)
    rewards = {setting: reward_function(setting, documents.all) for setting in args.settings}

    # Train both roads in all settings, as commands that a user would type.
    phases = sft_phases(args, size, documents)
    run_phases(phases, args.out, args.jobs, lock)
    seconds = {}
    for setting, reward in rewards.items():
        seconds.update(make_pairs(args, size, setting, documents, reward))
        phases += road_phases(args, size, setting)
    seconds.update(run_phases(phases, args.out, args.jobs, lock))  # SFT again, only for its seconds

    # Measure them, and write down what is known so far.
    results = {"seed": args.seed, "size": asdict(size)}
    results.update(total_seconds=0.0, peak_gib=0.0, seconds={}, settings={})
    made_from = {}
    for setting, reward in rewards.items():
        folders = policy_folders(args, setting)
        path = args.out / setting / "measures.json"
        runs = Ledger(args.out).hashes([str(folder) for folder in folders.values()])
        made_from[str(path)] = runs
        measure_setting = partial(measures_file, args, size, folders, documents.test, reward)
        seconds[f"{setting}/measures"] = make_or_keep(path, runs, measure_setting)
        measures = read_json_object(path)
        results["peak_gib"] = max(results["peak_gib"], measures.pop("peak_gib"))
        results["settings"][setting] = measures
        results["seconds"] = seconds
        results["total_seconds"] = round(sum(seconds.values()), 1)
        report = summaries_report(results, args.model.name, documents.test[0]).encode()
        files = {"results.json": json_bytes(results), "report.md": report}
        write_made(args.out / "results.json", files, made_from, results["total_seconds"])
        print(f"{setting}: {comparison(measures['rlhf_against_dpo'])}", flush=True)
    print(f"{args.out}/report.md")


def check_settings(args, size, documents):
    """OUT/settings.json: what all results in OUT have in common.

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


def model_hash(folder):
    """A hash of the files of a Hugging Face folder."""
    paths = sorted(path for path in local_folder(folder).iterdir() if path.suffix in MODEL_FILES)
    return of_value({path.name: of_file(path) for path in paths if path.is_file()})


def peak_gib():
    """The most memory that this process or one of its children has held, in GiB."""
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(process).ru_maxrss for process in processes) / 2**20  # KiB


# ---------------------------------------------------------------- the stages


def sft_folder(args, setting):
    """Where the SFT policy of a setting lies, which one-line and hidden share."""
    return args.out / ("two-word" if setting == "two-word" else "one-line") / "sft"


def policy_folders(args, setting):
    """{policy: folder} of a setting."""
    folder = args.out / setting
    return {"sft": sft_folder(args, setting), "dpo": folder / "dpo", "rlhf": folder / "rlhf"}


def sft_phases(args, size, documents):
    """SFT on the summaries, and on their first two words, where a setting needs it: a list of phases."""
    phases = []
    for sft in dict.fromkeys(sft_folder(args, setting) for setting in args.settings):
        demos = sft.with_name("demos.jsonl")
        kind = sft.parent.name
        make_or_keep(demos, {"setting": kind}, partial(demos_file, kind, documents.sft))
        init = ["--init", args.model, "--data", demos, "--lr", size.sft_lr, "--epochs", size.epochs]
        phases.append(phase(args, size, sft, ["train_sft.py", *init], needs=[demos]))
    return phases


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
        make_samples = partial(samples_file, args, size, sft, rows, samples.name)
        seconds[short_name(str(samples), args.out)] = make_or_keep(samples, drawn_from, make_samples)
        labelled_from = {"samples": of_file(samples)}
        label = partial(pairs_file, args, size, sft, rows, reward, samples, path.name)
        seconds[short_name(str(path), args.out)] = make_or_keep(path, labelled_from, label)
    return seconds


def road_phases(args, size, setting):
    """Both roads, from the same pairs and at the same strength of the KL term: a list of phases."""
    folders = policy_folders(args, setting)
    train_pairs, test_pairs = pairs_of(args, setting)
    road = ["--init", folders["sft"], "--data", train_pairs, "--eval-data", test_pairs]
    dpo = ["--lr", size.lr, "--beta", size.kl, "--epochs", size.epochs]
    rl = ["--lr", size.rl_lr, "--kl", size.kl, "--samples", size.samples, "--steps", size.steps]
    rl += ["--max-new-tokens", size.tokens]
    stage_1 = ["--reward-lr", size.rm_lr, "--reward-epochs", size.epochs, "--reward-batch-size", size.batch]
    needs = [folders["sft"], train_pairs, test_pairs]
    return [
        phase(args, size, folders["rlhf"], ["train_rlhf.py", *road, *rl, *stage_1], needs),
        phase(args, size, folders["dpo"], ["train_dpo.py", *road, *dpo], needs),
    ]


def phase(args, size, out, command, needs):
    """A training command, with --out and the flags that all three scripts share."""
    shared = ["--seed", args.seed, "--batch-size", size.batch, "--micro-batch-size", size.micro]
    shared += ["--dtype", size.dtype, "--log-every", 1, "--eval-every", 1000, "--save-every", 1000]
    shared += ["--warmup", 5]
    command = [str(part) for part in [*command, "--out", out, *shared]]
    return Phase(str(out), [str(need) for need in needs], command)


def demos_file(setting, rows):
    """What SFT imitates, rows {"prompt", "response"}: the summaries, or their first two words."""
    demos = []
    for row in rows:
        summary = row["summary"]
        if setting == "two-word":
            summary = " ".join(summary.split()[:2])
        demos.append({"prompt": PROMPT.format(**row), "response": f" {summary}"})
    return {"demos.jsonl": jsonl_bytes(demos)}


class Samples(NamedTuple):
    """k responses to the prompt of each document."""

    prompts: list  # as tokens
    responses: list  # for each prompt k token lists
    texts: list  # for each prompt k strings


def load(size, folder):
    """The policy in a folder, on the fastest device there is."""
    device = pick_device("auto")
    return load_policy(folder, device, pick_dtype(size.dtype, device))


def sample(args, size, policy, rows, k, temperature=1.0, seed=0):
    """k responses of a policy to the prompt of each row: Samples."""
    encoding = tokenizer.get(str(args.model))
    eos = tokenizer.stop_ids(encoding)
    prompts = [tokenizer.encode(encoding, PROMPT.format(**row)) for row in rows]
    responses = []
    for chunk in tracked(chunks(prompts, 64), "sampling", "batch"):
        responses += generate(policy, chunk, k, size.tokens, temperature, eos=eos, seed=seed)
    return Samples(prompts, responses, [tokenizer.decode_all(encoding, group) for group in responses])


def samples_file(args, size, sft, rows, name):
    """The texts of size.draws samples for each row, less those that are empty or did not end within
    size.tokens. They lie beside the SFT policy: one-line and hidden label the same samples."""
    stop = tokenizer.stop_ids(tokenizer.get(str(args.model)))
    seed = randomness.stream_key("pair samples", name, args.seed)
    samples = sample(args, size, load(size, sft), rows, size.draws, seed=seed)
    drawn = []
    for group, texts in zip(samples.responses, samples.texts, strict=True):
        whole = []
        for response, text in zip(group, texts, strict=True):
            if len(response) > 1 and response[-1] in stop:  # more than the EOS alone
                whole.append(text)
        drawn.append(whole)
    return {name: json_bytes(drawn)}


def pairs_file(args, size, sft, rows, reward, samples, name):
    """A pair for each row that has two different samples, labelled by Bradley-Terry on the reward.

    Of a row's samples it takes the two whose rewards differ most: a label says more of them. samples:
    a file of `samples_file`."""
    rng = randomness.generator("labels", args.seed, Path(name).stem)
    pairs = []
    for row, texts in zip(rows, json.loads(samples.read_text()), strict=True):
        rewards = {text: reward(row, text) for text in texts}
        if len(rewards) < 2:
            continue
        two = combinations(rewards, 2)
        first, second = max(two, key=lambda pair: abs(rewards[pair[0]] - rewards[pair[1]]))
        first_wins = torch.sigmoid(torch.tensor(rewards[first] - rewards[second]))
        pair = {"prompt": PROMPT.format(**row), "chosen": first, "rejected": second}
        if rng.random() >= first_wins:
            pair.update(chosen=second, rejected=first)
        pairs.append(pair)
    if not pairs:
        why = f"no two of its samples differ and both end within {size.tokens} tokens"
        raise InputError(f"{sft}: {why}; more SFT would help")
    return {name: jsonl_bytes(pairs)}


# ---------------------------------------------------------------- the measures


def measures_file(args, size, folders, rows, reward):
    """The measures of a setting as its file measures.json, with this process's memory."""
    measures = measure(args, size, folders, rows, reward)
    return {"measures.json": json_bytes({**measures, "peak_gib": round(peak_gib(), 2)})}


def measure(args, size, folders, rows, reward):
    """Each policy on held-out documents, two samples of each at temperature 1 and the greedy one,
    and the reward model on held-out pairs, as results.json has it. folders: {policy: folder}."""
    sft = load(size, folders["sft"])
    policies = {}
    rewards = {}  # {policy: (N, 2) fp64}
    for name, folder in folders.items():  # sft first: the others are compared with its rewards
        policy = load(size, folder)
        samples = sample(args, size, policy, rows, 2, seed=randomness.stream_key("measures"))
        greedy = [texts[0] for texts in sample(args, size, policy, rows, 1, temperature=0).texts]
        logp = sequence_logps(policy, samples.prompts, samples.responses, size.micro)  # (N, 2)
        ref_logp = sequence_logps(sft, samples.prompts, samples.responses, size.micro)  # (N, 2)
        rewards[name] = rewards_of(samples.texts, rows, reward)
        greedy_rewards = [reward(row, text) for row, text in zip(rows, greedy, strict=True)]
        mean_words = [statistics.mean(len(words(text)) for text in texts) for texts in samples.texts]
        policies[name] = {
            "reward": mean_se(rewards[name].mean(1)),
            "greedy_reward": mean_se(greedy_rewards),
            "win_rate": mean_se(win_rates(rewards[name], rewards["sft"])),
            "kl_to_ref": mean_se(kl_k1(logp, ref_logp).mean(1)),
            "words": mean_se(mean_words),
            "example": greedy[0],
        }

    last = read_metrics(folders["rlhf"] / "reward")[-1]
    pair_count = (folders["dpo"].parent / "test.jsonl").read_text().count("\n")
    return {
        "policies": policies,
        # Document by document, which removes what the two policies' rewards share.
        "rlhf_minus_dpo": mean_se(rewards["rlhf"].mean(1) - rewards["dpo"].mean(1)),
        "rlhf_against_dpo": mean_se(win_rates(rewards["rlhf"], rewards["dpo"])),
        # Not the reference policy: the documents' own summaries.
        "reference": mean_se([reward(row, row["summary"]) for row in rows]),
        "reward_model": {"nll": last["eval_loss"], "accuracy": last["eval_accuracy"], "pairs": pair_count},
    }


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
