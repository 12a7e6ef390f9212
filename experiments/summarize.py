"""Both roads on a pretrained language model: one-line summaries, and the two settings with which the paper closes the gap.

    python experiments/summarize.py --model FOLDER --data FILE --reduced     SmolLM2-135M on two CPU cores: 28 minutes, 5.7 GiB
    python experiments/summarize.py --model FOLDER --data FILE               a model of about 1B parameters on one GPU: 40 GB for
                                                                             three fp32 models and AdamW; not measured yet, by its
                                                                             count of 400 PFLOP half an hour on an H100

FOLDER: a Hugging Face model. FILE: rows {"document", "summary"}, .jsonl or .jsonl.gz. In each setting: SFT on the summaries;
pairs of the SFT policy's own samples, labelled by Bradley-Terry on the stated reward; DPO; a global reward model and RLOO, at
the same KL strength. Then held-out documents: reward, win rate against the SFT policy's summary, KL, with standard errors.

    one-line    r(x, y) = 10 c min(1, m/n) with c the share of the document's K = 5 salient words that y names, n the words of y
                and m the median length of the summaries of FILE, in words. Salient: of the document's words of four letters and
                more, the five of largest (count in x) log(documents / documents with the word). A count and two look-ups verify
                it; a summary has to find what the document is about, and say it in a line.
    two-word    the same with K = m = 2, after SFT on the first two words of the summaries: a horizon of two words.
    hidden      r = 10 ROUGE-L(y, the document's own summary), which neither x nor the reward model shows: verifying is no
                easier than writing. SFT policy and samples are those of one-line.

r is in nats of Bradley-Terry: P(a beats b) = sigmoid(r(a) - r(b)). The paper (2503.01067, section 4) says: RLHF is ahead in the
first setting, and in the other two it is not. --reduced shows that the pipeline runs and what moves: three hundred pairs
and two dozen RL steps are too few to say which road is better.
"""

import argparse
import collections
import gzip
import json
import math
import resource
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from all_roads import run_phases  # noqa: E402
from nanoroads import common, data, evaluate, tokenizer  # noqa: E402
from nanoroads.checkpoint import load_model, write_atomic, write_json  # noqa: E402
from nanoroads.generate import generate  # noqa: E402
from nanoroads.report import table  # noqa: E402
from nanoroads.rouge import rouge_l, words  # noqa: E402

SETTINGS = {"one-line": 5, "two-word": 2, "hidden": 5}  # salient words
SCALE, PROMPT = 10.0, "{document}\n\nIn one line:"
# documents: for SFT, for pairs, held out. words: of the longest document. tokens: of the longest response.
FULL = {"sft": 6000, "pairs": 6000, "test": 400, "words": 250, "tokens": 48, "batch": 64, "micro": 16, "samples": 8}
FULL |= {"sft_lr": 1e-5, "lr": 1e-6, "rm_lr": 5e-6, "kl": 0.1, "epochs": 1, "steps": 150, "dtype": "auto"}
REDUCED = {"sft": 320, "pairs": 448, "test": 80, "words": 36, "tokens": 16, "batch": 8, "micro": 8, "samples": 4}
REDUCED |= {"sft_lr": 1e-4, "lr": 2e-5, "rm_lr": 5e-5, "kl": 0.1, "epochs": 1, "steps": 24, "dtype": "bfloat16"}


def flags(argv):
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the pretrained model")
    p.add_argument("--data", type=Path, required=True, help='rows {"document", "summary"}, .jsonl or .jsonl.gz')
    p.add_argument("--out", type=Path, default=Path("out/summarize"), help="(default: %(default)s)")
    p.add_argument("--reduced", action="store_true", help="sizes for a 135M model on two CPU cores")
    p.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="(default: all)")
    p.add_argument("--seed", type=common.seed, default=0)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16; float32 suits older CPUs)")
    p.add_argument("--tiny", action="store_true", help="five steps of everything: does it run here?")
    args = p.parse_args(argv)
    args.size = Namespace(**(REDUCED if args.reduced or args.tiny else FULL))
    args.size.dtype = args.dtype or args.size.dtype
    if args.tiny:
        vars(args.size).update(sft=80, pairs=24, test=8, batch=4, steps=5, sft_lr=3e-4)
    return args


# ---------------------------------------------------------------- documents and rewards


def read_documents(args):
    """Rows {"document", "summary"} that are short enough and have two words at least, shuffled: {"sft", "pairs", "test"}."""
    opened = gzip.open if args.data.suffix == ".gz" else open
    try:
        with opened(args.data, "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        short = [row for row in rows if len(words(row["document"])) <= args.size.words and len(words(row["summary"])) > 1]
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise common.InputError(f"{args.data}: not JSON rows with document and summary ({error!r})") from None
    size, parts = args.size, {}
    if len(short) < size.sft + size.pairs + size.test:
        raise common.InputError(f"{args.data}: {len(short)} short documents, {size.sft + size.pairs + size.test} are needed")
    order = iter(torch.randperm(len(short), generator=torch.Generator().manual_seed(args.seed)).tolist())
    for name in ("sft", "pairs", "test"):
        parts[name] = [short[next(order)] for _ in range(vars(size)[name])]
    return parts, short


def salient_words(document, frequency, documents, k):
    counts = collections.Counter(w for w in words(document) if len(w) > 3)
    weight = {w: n * math.log(documents / frequency[w]) for w, n in counts.items()}
    return sorted(weight, key=lambda w: (-weight[w], w))[:k]


def rewards(setting, rows):
    """{setting} -> function(row, summary) -> r(x, y)."""
    if setting == "hidden":
        return lambda row, text: SCALE * rouge_l(row["summary"], text)
    k = SETTINGS[setting]
    length = 2 if setting == "two-word" else statistics.median(len(words(row["summary"])) for row in rows)
    frequency = collections.Counter(w for row in rows for w in set(words(row["document"])))

    def coverage(row, text):
        said, wanted = words(text), salient_words(row["document"], frequency, len(rows), k)
        share = sum(w in said for w in wanted) / max(1, len(wanted))
        return SCALE * share * min(1.0, length / max(1, len(said)))

    return coverage


# ---------------------------------------------------------------- the stages


def sample(folder, args, rows, k, temperature=1.0, seed=0):
    """k responses for each row: token lists, and the prompts' tokens, and the tokenizer."""
    device = common.pick_device(Namespace(device="auto"))
    model, encoding = load_model(folder, device=device), tokenizer.get(str(args.model))
    prompts, responses = [tokenizer.encode(encoding, PROMPT.format(**row)) for row in rows], []
    with common.autocast(args.size, device):
        for some in common.chunks(prompts, 64):
            settings = {"temperature": temperature, "eos": tokenizer.eos_id(encoding), "seed": seed + len(responses)}
            responses += generate(model, some, k, args.size.tokens, **settings)
    return encoding, prompts, responses


def make_pairs(folder, args, rows, reward, path):
    """Two samples of each document, where they end and differ, labelled by Bradley-Terry on the reward."""
    cache = folder / f"samples_{path.stem}.json"  # one-line and hidden label the same samples
    if not cache.exists():
        encoding, _, groups = sample(folder, args, rows, 2, seed=args.seed)
        whole = [all(g[-1] == tokenizer.eos_id(encoding) and len(g) > 1 for g in group) for group in groups]
        write_json(cache, [evaluate.texts(encoding, g) if ends else [] for g, ends in zip(groups, whole, strict=True)])
    generator, pairs = torch.Generator().manual_seed(args.seed), []
    for row, texts in zip(rows, json.loads(cache.read_text()), strict=True):
        if len(set(texts)) == 2:
            first = torch.sigmoid(torch.tensor(reward(row, texts[0]) - reward(row, texts[1])))
            chosen = int(torch.rand((), generator=generator) >= first)
            pairs.append({"prompt": PROMPT.format(**row), "chosen": texts[chosen], "rejected": texts[1 - chosen]})
    if not pairs:
        raise common.InputError(f"{folder}: its samples never end within {args.size.tokens} tokens; more SFT would help")
    data.write_rows(path, pairs)


def train(setting, args, parts, reward):
    """Run one setting's stages. Returns {policy: folder} and the seconds of each phase."""
    size, at = args.size, args.out / setting
    sft = args.out / ("two-word" if setting == "two-word" else "one-line") / "sft"
    common_ = ["--seed", args.seed, "--batch-size", size.batch, "--micro-batch-size", size.micro, "--dtype", size.dtype]
    common_ += ["--log-every", 1, "--eval-every", 1000, "--save-every", 1000, "--warmup", 5]
    phases = []

    def add(name, *command):
        phases.append((str(args.out / name), [], [str(word) for word in (*command, "--out", args.out / name, *common_)]))

    demos = sft.parent / "demos.jsonl"
    if not demos.exists():
        short = lambda text: " ".join(text.split()[:2]) if setting == "two-word" else text  # noqa: E731
        data.write_rows(demos, [{"prompt": PROMPT.format(**r), "response": f" {short(r['summary'])}"} for r in parts["sft"]])
    init = ["--init", args.model, "--data", demos, "--lr", size.sft_lr, "--epochs", size.epochs]
    add(sft.relative_to(args.out), "train_sft.py", *init)
    run_phases(phases, args.out, 1)
    begun, pairs = time.time(), {name: at / f"{name}.jsonl" for name in ("pairs", "test")}
    for name, path in pairs.items():
        if not path.exists():
            make_pairs(sft, args, parts[name], reward, path)
    seconds = {f"{setting}/pairs": round(time.time() - begun, 1)}
    road = ["--init", sft, "--data", pairs["pairs"], "--eval-data", pairs["test"], "--lr", size.lr]
    add(f"{setting}/dpo", "train_dpo.py", *road, "--beta", size.kl, "--epochs", size.epochs)
    rl = ["--kl", size.kl, "--samples", size.samples, "--steps", size.steps, "--max-new-tokens", size.tokens]
    rm = ["--reward-lr", size.rm_lr, "--reward-epochs", size.epochs, "--reward-batch-size", size.batch]
    add(f"{setting}/rlhf", "train_rlhf.py", *road, *rl, *rm)
    seconds |= run_phases(phases, args.out, 1)
    return {"sft": sft, "dpo": at / "dpo", "rlhf": at / "rlhf"}, seconds


def measure(folders, args, rows, reward):
    """{policy: measures}, over held-out documents, four samples each at temperature 1, and one greedy."""
    device, results, found = common.pick_device(Namespace(device="auto")), {}, {}
    sizes = Namespace(micro_batch_size=args.size.micro, batch_size=None, dtype=args.size.dtype)
    for name, folder in folders.items():
        row = results[name] = {}
        encoding, prompts, groups = sample(folder, args, rows, 4, seed=12345)
        texts = [evaluate.texts(encoding, group) for group in groups]
        found[name] = torch.tensor([[reward(r, t) for t in ts] for r, ts in zip(rows, texts, strict=True)]).double()
        row["reward"] = evaluate.mean_se(found[name].mean(1))
        greedy = [evaluate.texts(encoding, group)[0] for group in sample(folder, args, rows, 1, temperature=0)[2]]
        row["greedy_reward"] = evaluate.mean_se([reward(r, t) for r, t in zip(rows, greedy, strict=True)])
        beaten = (found[name][:, :, None] > found["sft"][:, None, :]) * 1.0  # each sample against each of the SFT policy's
        tied = (found[name][:, :, None] == found["sft"][:, None, :]) * 0.5
        row["win_rate"] = evaluate.mean_se((beaten + tied).mean((1, 2)))
        both = (load_model(f, device=device) for f in (folder, folders["sft"]))
        logp, ref = (evaluate.score(model, prompts, groups, sizes, device) for model in both)
        row["kl_to_ref"] = evaluate.mean_se((logp - ref).mean(1))
        row["words"] = evaluate.mean_se([statistics.mean(len(words(t)) for t in ts) for ts in texts])
        row["example"] = greedy[0]
    gap = evaluate.mean_se(found["rlhf"].mean(1) - found["dpo"].mean(1))  # of the same documents
    reference = evaluate.mean_se([reward(row, row["summary"]) for row in rows])
    seen, pairs = common.read_metrics(folders["rlhf"] / "reward")[-1], (folders["dpo"].parent / "test.jsonl").read_text()
    model = {"nll": seen["eval_loss"], "accuracy": seen["eval_accuracy"], "pairs": pairs.count("\n")}
    return {"policies": results, "rlhf_minus_dpo": gap, "reference": reference, "reward_model": model}


# ---------------------------------------------------------------- the report


def show(value):
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


def report(results, args, parts):
    lines = ["# Summaries: both roads on a pretrained model\n", f"`{args.model.name}`, {vars(args.size)}\n"]
    columns = {"reward": "reward (T = 1)", "greedy_reward": "greedy", "win_rate": "win rate", "kl_to_ref": "KL to SFT"}
    for setting, found in results["settings"].items():
        rows = [[n.upper(), *(show(row[c]) for c in columns), show(row["words"])] for n, row in found["policies"].items()]
        gap = found["rlhf_minus_dpo"]
        lines += [f"\n## {setting}\n", table(["policy", *columns.values(), "words"], rows)]
        lines += [f"The documents' own summaries: {show(found['reference'])}. RLHF - DPO, document by document: {show(gap)}."]
        model = found["reward_model"]
        lines += ["Reward model: {nll:.3f} nats a pair, accuracy {accuracy:.2f}, {pairs} held-out pairs.\n".format(**model)]
        says = "RLHF is ahead" if setting == "one-line" else "there is no gap"
        seen = "RLHF is ahead" if gap["mean"] > 0 else "DPO is ahead"
        seen = "there is no gap beyond two standard errors" if abs(gap["mean"]) < 2 * gap["se"] else seen
        lines += [f"The paper: {says}. Here: {seen}.\n"]
        example = parts["test"][0]
        lines += [f"> {' '.join(example['document'].split())}\n", f"- its own: {example['summary']}"]
        lines += [f"- {n.upper()}: {row['example'].strip()}" for n, row in found["policies"].items()]
    lines += [f"\n## Seconds\n\n{results['total_seconds']:.0f} in all; at most {results['peak_gib']} GiB in a process.\n"]
    lines += [table(["phase", "seconds"], [[k, str(v)] for k, v in results["seconds"].items()])]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args, begun = flags(argv), time.time()
    parts, rows = read_documents(args)
    args.out.mkdir(parents=True, exist_ok=True)
    seconds, settings = {}, {}
    for setting in args.settings:
        reward = rewards(setting, rows)
        folders, took = train(setting, args, parts, reward)
        start = time.time()
        settings[setting] = measure(folders, args, parts["test"], reward)
        seconds |= took | {f"{setting}/measures": round(time.time() - start, 1)}
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
        results = {"seed": args.seed, "size": vars(args.size), "total_seconds": round(time.time() - begun, 1)}
        results |= {"peak_gib": round(peak, 2), "seconds": seconds, "settings": settings}
        write_json(args.out / "results.json", results)
        write_atomic(args.out / "report.md", lambda p, r=results: p.write_text(report(r, args, parts)))
        gap, total = show(settings[setting]["rlhf_minus_dpo"]), results["total_seconds"]
        print(f"{setting}: RLHF - DPO {gap} ({total:.0f} s so far)", flush=True)
    print(f"{args.out}/report.md")


if __name__ == "__main__":
    common.run_script(main)
