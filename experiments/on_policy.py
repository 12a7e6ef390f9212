"""The same 5,000 labels, spent on other pairs: DPO gains by pairs of its own samples, at a small beta.

    python experiments/on_policy.py --seeds 0 1 2    about 170 seconds a seed on two CPU cores

Tajwar et al., 2404.14367: on-policy pairs help. Tang et al., 2405.08448: the very same pairs, shuffled
and used offline, help less; offline policies classify better, online ones generate better. Lanchantin et
al., 2506.21495: pairs that are refreshed now and then are nearly as good as online ones.

Each policy is DPO from SFT on 5,000 pairs with true Bradley-Terry labels, 628 steps, learning rate 1e-4, one
cosine. Only where the pairs come from differs: SFT's samples; the policy's own, drawn anew in 3, 10 or 30
rounds with one optimizer (one round is DPO on SFT's samples, bit by bit); those of the 10 rounds again,
shuffled and offline; RLHF's samples. "Informative": the share of pairs whose true rewards differ. "True
order": how often log pi/pi_ref ranks those right, on pairs of SFT's samples and of the policy's own.

Tuned on seed 100, four betas a source (sampled reward):

    beta                   1      .3     .1     .03
    SFT's samples          .310   .394   .305   .082
    on-policy, 10 rounds   .327   .416   .456   .456
    those pairs, offline   .326   .410   .253   .100
    RLHF's samples         .273   .378   .418   .401

So every source runs at .3, the best beta of SFT's samples, and at .1, that of the other two (on-policy's tie
goes to its greedy reward, .685 against .651). The learning rate is what sweep.py found for SFT's samples.

Three seeds, sampled reward: on-policy .448 +- .009 at its beta, SFT's samples .399 +- .004 at theirs, RLHF
.439 +- .044. In greedy reward the difference is .014 +- .037. At beta .3 it hardly matters that the pairs are
on-policy: the same pairs offline lose .013 +- .003, and in greedy reward nothing. At beta .1 they lose
.199 +- .024: what a pair is worth depends on the policy that learns from it. There more rounds lead to
RLHF's reward; at .3 they do not. Pairs of RLHF's samples are worse than SFT's. DPO on SFT's samples
classifies better than on-policy DPO, by .051 +- .016, but not better than RLHF.

Not shown: other learning rates for the other sources, pairs that more labels would buy, a beta that
changes over the rounds. What on-policy DPO gains at .1 is measured against a DPO that breaks there.
"""

import json
from argparse import Namespace

import numpy as np
import torch

from nanoroads import losses
from nanoroads.batch import pack
from nanoroads.progress import tracked
from nanoroads.randomness import generator, stream_key
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import (
    PAIRS,
    claim,
    differences,
    is_above,
    over_seeds,
    parse_flags,
    shared_phases,
    values_of,
    with_errors,
    write_results,
)
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, policy_row
from nanoroads.report.phases import claim as claim_folder
from nanoroads.report.phases import new_phase, run_phases
from nanoroads.report.write import plus_minus, table
from nanoroads.run.flags import run_script
from nanoroads.run.optim import adamw, batch_indices, learning_rate, total_steps, update
from nanoroads.score import mean_se, ranked_right, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import jsonl_bytes, read_config, write_bytes
from nanoroads.world import roadmap
from nanoroads.world.pairs import draw_pairs

WORLD = roadmap.WORLDS["roadmap"]
BETAS = {0.3: "dpo", 0.1: "dpo_beta_0.1"}  # and the runs on SFT's samples
ROUNDS = [3, 10, 30]  # times that pairs are drawn: once is DPO on SFT's samples
OWN_PAIRS = 2000  # of each policy's samples on held-out prompts
# The sources of pairs, as the table names them.
SFTS = "SFT's samples"
ON_POLICY = "on-policy, 10 rounds"
LAST = "on-policy, 30 rounds"
SAME = "the same 10 rounds, offline"
RLHFS = "RLHF's samples"
BEST = {SFTS: 0.3, ON_POLICY: 0.1, RLHFS: 0.1}  # betas of the largest sampled reward on seed 100
MEASURES = {  # the columns
    "informative": "informative",
    "reward": "reward",
    "greedy_reward": "greedy",
    "kl_to_ref": "KL",
    "legal": "legal",
    "accuracy_sft": "true order, SFT's pairs",
    "accuracy_own": "true order, own pairs",
}
BESIDE = {"textcoords": "offset points", "fontsize": 8}
SAMPLED = {"reward": "sampled", "greedy_reward": "greedy"}
LOOKS = {  # a marker and a colour for each source of pairs
    SFTS: ("s", COLOURS["dpo"]),
    ON_POLICY: ("^", "#e69f00"),
    SAME: ("v", "#56b4e9"),
    RLHFS: ("D", INK),
}


def named(source, beta):
    """The row of DPO on pairs from `source`."""
    return f"{source}, beta {beta}"


def rounds_named(rounds):
    return f"on-policy, {rounds} rounds"


# ---------------------------------------------------------------- pairs


def draw_labelled(policy, n, split, *stream):
    """n pairs of a policy's samples with Bradley-Terry labels, as nanoroads.world.pairs draws them.

    stream: names the random numbers."""
    prompts = roadmap.prompts(WORLD, split)
    triples = draw_pairs(policy, ENCODING, WORLD, prompts, n, stream_key("on-policy pairs", *stream))
    prompts = [prompt for prompt, _, _ in triples]
    first = [answer for _, answer, _ in triples]
    second = [answer for _, _, answer in triples]
    return roadmap.label_pairs(WORLD, prompts, first, second, generator("on-policy labels", *stream))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_tokens(rows):
    """P pairs -> (prompts, [chosen, rejected] of each), as `pack` takes them."""
    eos = tokenizer.eos_id(ENCODING)
    prompts = []
    responses = []
    for row in rows:
        prompts.append(tokenizer.encode(ENCODING, row["prompt"]))
        chosen = tokenizer.encode(ENCODING, row["chosen"]) + [eos]
        rejected = tokenizer.encode(ENCODING, row["rejected"]) + [eos]
        responses.append([chosen, rejected])
    return prompts, responses


def reward_gaps(rows):
    """The true reward of the chosen response minus that of the rejected one, (P,)."""
    gaps = []
    for row in rows:
        chosen = WORLD.reward(row["prompt"], row["chosen"])
        gaps.append(chosen - WORLD.reward(row["prompt"], row["rejected"]))
    return torch.tensor(gaps, dtype=torch.float64)


def true_order_accuracy(policy, reference, rows):
    """How often log pi/pi_ref puts the truly better response first, of the pairs that have one."""
    prompts, responses = as_tokens(rows)
    logp = sequence_logps(policy, prompts, responses, GROUPS_PER_PASS)  # (P, 2)
    log_ratio = logp - sequence_logps(reference, prompts, responses, GROUPS_PER_PASS)
    margin = log_ratio[:, 0] - log_ratio[:, 1]  # (P,)
    gap = reward_gaps(rows)
    return ranked_right(margin * gap.sign())[gap != 0].mean().item()


# ---------------------------------------------------------------- the runs


def train_on_policy(folder, seed, rounds, run):
    """DPO whose pairs are drawn from the policy itself, anew at the start of each round.

    Pairs, steps and flags are as many and as large as those of `run`, DPO on SFT's samples. With
    one round it is that run: the first round has the first of SFT's pairs. Returns (policy, all
    pairs, round after round)."""
    flags = Namespace(**read_config(folder / run)["args"])
    reference = load_policy(folder / "sft").requires_grad_(False)
    policy = load_policy(folder / "sft")
    optimizer = adamw(policy, flags.lr, flags.weight_decay)  # one over all rounds
    total = total_steps(PAIRS, flags.batch_size, flags.epochs, flags.steps)
    sft_pairs = read_rows(folder / "sft/pairs.jsonl")
    used = []
    for round_index in tracked(range(rounds), f"seed {seed}, {rounds} rounds", "round"):
        n = PAIRS * (round_index + 1) // rounds - len(used)
        if round_index == 0:
            rows = sft_pairs[:n]
        else:
            rows = draw_labelled(policy, n, "train", seed, rounds, round_index)
        used += rows
        prompts, responses = as_tokens(rows)
        ref_logp = sequence_logps(reference, prompts, responses, flags.batch_size)  # (n, 2)
        begin = total * round_index // rounds
        end = total * (round_index + 1) // rounds
        for step in range(begin, end):
            indices = batch_indices(n, flags.batch_size, step - begin, flags.seed)
            batch = pack([prompts[i] for i in indices], [responses[i] for i in indices])
            chosen, rejected = policy(batch).sequence.view(-1, 2).unbind(1)  # (B,) each
            ref_chosen, ref_rejected = ref_logp[indices].unbind(1)
            loss = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, flags.beta)  # (B,)
            loss.mean().backward()
            lr = learning_rate(flags.lr, step, total, flags.warmup, flags.schedule)
            update(policy, optimizer, lr, flags.clip)
    return policy, used


def run_seed(args, seed, lock):
    """All policies of one seed -> {policy: {measure: number}}."""
    folder = args.out / f"seed{seed}"
    test_pairs = folder / "sft/pairs_test.jsonl"
    train = ["train_dpo.py", "--seed", seed, "--data"]
    from_sft = ["--init", folder / "sft", "--beta"]
    sample = ["-m", "nanoroads.world.pairs", "--policy", folder / "rlhf_global", "--n", PAIRS, "--seed", seed]
    phases = shared_phases(folder, seed, "dpo", "rlhf_global")
    phases.append(new_phase(folder, BETAS[0.1], train + ["roadmap"] + from_sft + [0.1], ["sft/pairs.jsonl"]))
    phases.append(new_phase(folder, "rlhf_global/pairs.jsonl", sample, ["rlhf_global"]))
    run_phases(phases, args.out, args.jobs, lock)

    # The loop over rounds has no command, so it runs here; what is offline is train_dpo.py again.
    policies = {}
    pairs = {}
    offline = []
    runs = {"SFT": "sft", "RLHF": "rlhf_global"}
    for beta, run in BETAS.items():
        for rounds in ROUNDS:
            name = named(rounds_named(rounds), beta)
            policies[name], pairs[name] = train_on_policy(folder, seed, rounds, run)
        same = f"on_policy_pairs_beta_{beta}.jsonl"
        write_bytes(folder / same, jsonl_bytes(pairs[named(ON_POLICY, beta)]))
        runs[named(SFTS, beta)] = run
        pairs[named(SFTS, beta)] = read_rows(folder / "sft/pairs.jsonl")
        for source, word, data in ((SAME, "on_policy", same), (RLHFS, "rlhf", "rlhf_global/pairs.jsonl")):
            run = f"dpo_{word}_pairs_beta_{beta}"
            command = train + [folder / data, "--eval-data", test_pairs] + from_sft + [beta]
            offline.append(new_phase(folder, run, command, ["sft", "sft/pairs_test.jsonl", data]))
            runs[named(source, beta)] = run
            pairs[named(source, beta)] = read_rows(folder / data)
    run_phases(offline, args.out, args.jobs, lock)
    for name, run in runs.items():
        policies[name] = load_policy(folder / run)

    rows = {}
    for name, policy in policies.items():
        row = policy_row(policy, policies["SFT"], WORLD, roadmap.prompts(WORLD, "test"))
        row = {measure: cell["mean"] for measure, cell in row.items()}
        row["accuracy_sft"] = true_order_accuracy(policy, policies["SFT"], read_rows(test_pairs))
        own = draw_labelled(policy, OWN_PAIRS, "test", "own", seed)
        row["accuracy_own"] = true_order_accuracy(policy, policies["SFT"], own)
        if name in pairs:
            row["informative"] = (reward_gaps(pairs[name]) != 0).double().mean().item()
        rows[name] = row
    return rows


# ---------------------------------------------------------------- the report


def verdict(by_seed):
    """A line for each claim. by_seed: of each seed {policy: {measure: number}}."""

    def lead(one, other, measure):
        return differences(values_of(by_seed, one, measure), values_of(by_seed, other, measure))

    lines = []
    sfts = named(SFTS, BEST[SFTS])
    on_policy = named(ON_POLICY, BEST[ON_POLICY])
    for measure, word in SAMPLED.items():
        ahead = lead(on_policy, sfts, measure)
        text = f"on-policy pairs beat SFT's samples in {word} reward (Tajwar), each at its best beta: by "
        text += f"{with_errors(ahead)}."
        for beta in BETAS:
            equal = lead(named(ON_POLICY, beta), named(SFTS, beta), measure)
            text += f" Both at {beta}: {with_errors(equal)}."
        lines.append(claim(is_above(ahead), text))

    for beta in BETAS:
        sampled = lead(named(ON_POLICY, beta), named(SAME, beta), "reward")
        greedy = lead(named(ON_POLICY, beta), named(SAME, beta), "greedy_reward")
        text = f"at beta {beta} the same pairs do as well offline and shuffled (in Tang's ablation they do "
        text += f"not): on-policy leads by {with_errors(sampled)} sampled, {with_errors(greedy)} greedy."
        lines.append(claim(not is_above(sampled) and not is_above(greedy), text))
    better = lead(named(RLHFS, BEST[RLHFS]), sfts, "reward")
    text = "samples of a better policy, RLHF's, are better pairs than SFT's, each at its best beta: by "
    text += f"{with_errors(better)} in sampled reward."
    lines.append(claim(is_above(better), text))

    against_dpo = lead(sfts, on_policy, "accuracy_sft")
    against_rlhf = lead(sfts, "RLHF", "accuracy_sft")
    text = "offline policies classify SFT's held-out pairs better than online ones (Tang): DPO leads "
    text += f"on-policy DPO by {with_errors(against_dpo)}, RLHF by {with_errors(against_rlhf)}."
    lines.append(claim(is_above(against_dpo) and is_above(against_rlhf), text))
    own = lead(on_policy, sfts, "accuracy_own")
    text = f"on pairs of its own samples on-policy DPO classifies better than DPO: by {with_errors(own)}."
    for beta in BETAS:
        equal = lead(named(ON_POLICY, beta), named(SFTS, beta), "accuracy_own")
        text += f" Both at {beta}: {with_errors(equal)}."
    lines.append(claim(is_above(own), text))

    for beta in BETAS:
        for measure, word in SAMPLED.items():
            slope = mean_se([slope_of(row, beta, measure) for row in by_seed])
            from_dpo = lead(named(LAST, beta), named(SFTS, beta), measure)
            to_rlhf = lead("RLHF", named(LAST, beta), measure)
            text = f"at beta {beta} more rounds lead from DPO towards RLHF in {word} reward: "
            text += f"{with_errors(slope)} for ten times as many. {ROUNDS[-1]} rounds lead DPO by "
            text += f"{with_errors(from_dpo)}, RLHF leads them by {with_errors(to_rlhf)}."
            rises = is_above(slope) and is_above(from_dpo)
            lines.append(claim(rises and to_rlhf["mean"] > -2 * to_rlhf["se"], text))
    return lines


def by_rounds(beta):
    """{rounds: the policy's name}, from DPO on SFT's samples on."""
    names = {1: named(SFTS, beta)}
    for rounds in ROUNDS:
        names[rounds] = named(rounds_named(rounds), beta)
    return names


def slope_of(row, beta, measure):
    """How much a measure grows when there are ten times as many rounds, by least squares."""
    names = by_rounds(beta)
    values = [row[name][measure] for name in names.values()]
    return np.polyfit(np.log10(list(names)), values, 1)[0]


def table_of(by_seed):
    """A row for each policy."""
    names = ["SFT"]
    for beta in BETAS:
        names += [*by_rounds(beta).values(), named(SAME, beta), named(RLHFS, beta)]
    lines = []
    for name in [*names, "RLHF"]:
        cells = [name]
        for measure in MEASURES:
            measured = measure in by_seed[0][name]
            cells.append(plus_minus(over_seeds(by_seed, name, measure)) if measured else "")
        lines.append(cells)
    return table(["pairs", *MEASURES.values()], lines)


def figure_of(by_seed):
    """Sampled and greedy reward against KL, a marker for each source; both against rounds."""
    fig, (sampled, greedy, refreshes) = new_figure(14, 4.6, ncols=3, sharey=True)
    for ax, measure in ((sampled, "reward"), (greedy, "greedy_reward")):
        for source, (marker, colour) in LOOKS.items():
            for beta, face in zip(BETAS, (colour, "white"), strict=True):
                point(ax, by_seed, named(source, beta), measure, marker, colour, face)
        point(ax, by_seed, "RLHF", measure, "P", COLOURS["rlhf_global"], COLOURS["rlhf_global"])
        ax.axhline(over_seeds(by_seed, "SFT", measure)["mean"], color=COLOURS["sft"], ls=":", label="SFT")
        ax.set(title=f"{SAMPLED[measure]} reward", xlabel="KL to SFT, nats", xscale="log")
        ax.set_xticks([1, 2, 4], ["1", "2", "4"])
        ax.minorticks_off()
    sampled.set(ylabel="true reward")
    fig.legend(*sampled.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)

    for beta, face in zip(BETAS, ("#e69f00", "white"), strict=True):
        for measure, line in (("reward", "-"), ("greedy_reward", "--")):
            cells = [over_seeds(by_seed, name, measure) for name in by_rounds(beta).values()]
            means = [cell["mean"] for cell in cells]
            errors = [cell["se"] for cell in cells]
            style = {"fmt": f"^{line}", "color": "#e69f00", "mfc": face, "capsize": 3}
            refreshes.errorbar(list(by_rounds(beta)), means, errors, **style)
            refreshes.annotate(f"{SAMPLED[measure]}, beta {beta}", (30, means[-1]), (8, -3), **BESIDE)
    for measure, word in SAMPLED.items():
        height = over_seeds(by_seed, "RLHF", measure)["mean"]
        refreshes.plot([1, ROUNDS[-1]], [height, height], color=COLOURS["rlhf_global"], lw=1)
        refreshes.annotate(f"RLHF, {word}", (1, height), (0, 4), **BESIDE)
    refreshes.set(title="how often pairs are drawn", xlabel="rounds (1: DPO)", xscale="log", xlim=(0.8, 150))
    refreshes.set_xticks([1, *ROUNDS], [str(rounds) for rounds in (1, *ROUNDS)])
    refreshes.minorticks_off()
    return fig


def point(ax, by_seed, name, measure, marker, colour, face):
    """A policy's KL and reward, with the standard errors of both."""
    x = over_seeds(by_seed, name, "kl_to_ref")
    y = over_seeds(by_seed, name, measure)
    style = {"fmt": marker, "color": colour, "mfc": face, "ms": 8, "label": name}
    ax.errorbar(x["mean"], y["mean"], y["se"], x["se"], **style)


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = [run_seed(args, seed, lock) for seed in args.seeds]
    figure = figure_of(by_seed)
    write_results(args, "on_policy", __doc__, by_seed, table_of(by_seed), verdict(by_seed), figure)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
