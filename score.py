"""Score a file of pairs with any number of models: accuracy by subset and by length.

python score.py --data out/sft/pairs_test.jsonl --policy out/dpo --reward out/rlhf/reward
python score.py --data pairs.jsonl --policy FOLDER --reference FOLDER --rule my_rules:is_short
python score.py --data hf:allenai/reward-bench:filtered --chat --policy FOLDER --out scores.jsonl

A policy gives the log-prob of each answer, in all and per token, and with its reference the
implicit reward beta log pi/pi_ref (2305.18290). A scalar reward model and a rule give explicit
ones.
"""

from pathlib import Path

import torch

from nanoroads.report.pairwise import Column, table
from nanoroads.report.scorers import (
    Scorer,
    model_measures,
    names_of,
    policy_scorer,
    read_for,
    reward_scorer,
    rule_measures,
)
from nanoroads.run.flags import Parser, add_machine_flags, positive, run_script
from nanoroads.run.run import pick_device, pick_dtype, pick_kernel
from nanoroads.score import RuleJudge
from nanoroads.text import layouts
from nanoroads.text.pairs import read_pairs, rows_of, subsets_of, without_errors
from nanoroads.text.rows import write_rows


def flags(argv):
    """The command line -> args."""
    parser = Parser("--data FILE --policy DIR", description=__doc__)
    add = parser.add_argument_group("the pairs").add_argument
    add("--data", required=True, help="rows {prompt, chosen, rejected}: .jsonl[.gz], .parquet or hf:org/name")
    add("--by", help="column whose values get a line of the table each (default: subset, if there)")
    add("--chat", action="store_true", help="texts are messages, for a model with a chat template")
    prompt_help = "keep a prompt's last tokens (default: refuse longer)"
    add("--max-prompt-tokens", type=positive(int), help=prompt_help)
    add("--max-response-tokens", type=positive(int), help="cut, without EOS (default: refuse longer)")
    add("--skip-bad-rows", action="store_true", help="skip rows that do not fit, and say how many")

    add = parser.add_argument_group("the models, each flag as often as you like").add_argument
    reference_help = "of --policy: one for all, or one for each (default: that in the run's config.json)"
    add("--policy", action="append", help="run directory or Hugging Face folder (default: none)")
    add("--reference", action="append", help=reference_help)
    add("--reward", action="append", help="a reward model's folder, of either class (default: none)")
    add("--rule", action="append", help="module:function(prompt, answer) -> number (default: none)")

    add = parser.add_argument_group("the result").add_argument
    add("--out", type=Path, help="write each row's numbers to this .jsonl file (default: none)")
    machine = parser.add_argument_group("the machine")
    batch_help = "pairs per forward pass, which bounds the memory (default: 8)"
    machine.add_argument("--micro-batch-size", type=positive(int), default=8, help=batch_help)
    add_machine_flags(machine)
    args = parser.parse_args(argv)

    for name in ("policy", "reference", "reward", "rule"):
        setattr(args, name, getattr(args, name) or [])  # argparse has None where a flag was not given
    if not args.policy + args.reward + args.rule:
        parser.error("one of --policy, --reward and --rule is needed")
    if len(args.reference) not in (0, 1, len(args.policy)) or (args.reference and not args.policy):
        parser.error(f"{len(args.reference)} of --reference for {len(args.policy)} of --policy")
    if args.out and args.out.exists():
        parser.error(f"--out {args.out}: exists, and is not overwritten")
    return args


def scorers(args):
    """--policy, --reward and --rule -> a list of Scorers. Raises InputError for a wrong reference."""
    references = args.reference
    if len(references) < 2:  # one for all, or None: each its own
        references = (references or [None]) * len(args.policy)
    found = []
    for folder, reference in zip(args.policy, references, strict=True):
        found.append(policy_scorer(folder, reference))
    for folder in args.reward:
        found.append(reward_scorer(folder))
    for name in args.rule:
        found.append(Scorer("rule", name))
    return found


def columns_of(name, scorer, measures):
    """The Columns of the table for one Scorer, called `name`."""
    descriptions = {}
    if scorer.kind == "policy":
        descriptions = {"logp": "log-prob", "logp_per_token": "log-prob per token"}
    if scorer.reference:
        descriptions["reward"] = f"implicit reward {scorer.beta:g} log pi/pi_ref, pi_ref {scorer.reference}"
    elif "reward" in measures:
        descriptions["reward"] = "explicit reward"
    columns = []
    for measure, description in descriptions.items():
        chosen, rejected = measures[measure].unbind(1)  # (N,) each
        columns.append(Column(name, description, chosen - rejected))
    return columns


def score_rows(pairs, subsets, lengths, measures_of):
    """Yields the lines of --out. measures_of: {name of a model or rule: {measure: (N, 2)}}."""
    for i, pair in enumerate(pairs):
        row = {"row": pair.number}
        if "id" in pair.row:
            row["id"] = pair.row["id"]
        if subsets is not None:
            row["subset"] = subsets[i]
        # From here on always two numbers: of the chosen answer and of the rejected one.
        row["characters"] = lengths[i].tolist()
        row["scores"] = {}
        for name, measures in measures_of.items():
            row["scores"][name] = {measure: values[i].tolist() for measure, values in measures.items()}
        yield row


# ---------------------------------------------------------------- the command


def main(argv=None):
    """Pairs and models -> a table, and a line of --out for each pair."""
    args = flags(argv)
    device = pick_device(args.device)
    compute_dtype = pick_dtype(args.dtype, device)
    pick_kernel(args.kernel, device, compute_dtype)
    machine = (device, compute_dtype)

    # 1. What cannot be used is refused before the first pair is scored. All models are compared on the
    # same pairs, those that each of them can read.
    all_scorers = scorers(args)
    judges = {name: RuleJudge(name, encoding=None, flag="--rule") for name in args.rule}
    # A row that cannot be read stops here, before a model is loaded; below, one that a model cannot read.
    pairs, errors = read_pairs(args.data, layouts.chat_texts if args.chat else layouts.preference_texts)
    if not args.skip_bad_rows:
        without_errors(args.data, pairs, errors, skip_bad_rows=False)
    # Each model is loaded here to be checked, and again to score: memory holds one and its reference.
    encoded = []  # of each Scorer: {row's number: EncodedRow}, None for a rule
    for scorer in all_scorers:
        if scorer.kind == "rule":
            encoded.append(None)
            continue
        encoded_rows, model_errors = read_for(scorer, pairs, args, machine)
        encoded.append(encoded_rows)
        errors.update(model_errors)
    pairs = without_errors(args.data, pairs, errors, args.skip_bad_rows)
    subsets = subsets_of(pairs, args.by)
    lengths = torch.tensor([[len(answer) for answer in pair.answers] for pair in pairs])  # (N, 2) characters

    # 2. Score them, with one model in memory after another.
    print(f"{args.data}: {len(pairs):,} pairs, {device}")
    all_measures = []  # of each Scorer: {measure: (N, 2)}, chosen first
    known = {}  # log-probs of policies that were scored already
    for scorer, encoded_rows in zip(all_scorers, encoded, strict=True):
        if scorer.kind == "rule":
            measures = rule_measures(judges[scorer.place], pairs)
        else:
            rows = rows_of(pairs, encoded_rows)
            measures = model_measures(scorer, rows, machine, args.micro_batch_size, known)
        all_measures.append(measures)

    # 3. Write every number, and print the table.
    names = names_of(all_scorers)
    columns = []
    for name, scorer, measures in zip(names, all_scorers, all_measures, strict=True):
        columns += columns_of(name, scorer, measures)
    if args.out:
        write_rows(args.out, score_rows(pairs, subsets, lengths, dict(zip(names, all_measures, strict=True))))
        print(f"{args.out}: the numbers of each row")
    for line in table(columns, subsets, lengths):
        print(line)


if __name__ == "__main__":
    run_script(main, resumes=False)
