"""The same 5,000 labels, spent on other pairs: DPO gains by pairs of its own samples, at a small beta.

    python experiments/on_policy.py --seeds 0 1 2    about 170 seconds a seed on two CPU cores

Tajwar et al., 2404.14367: on-policy pairs help. Tang et al., 2405.08448: the same pairs, shuffled
and used offline, help less; offline policies classify better, online ones generate better.
Lanchantin et al., 2506.21495: pairs that are refreshed now and then are nearly as good as online.

Each policy is DPO from SFT on 5,000 pairs with true Bradley-Terry labels: 628 steps, one cosine.
Only where the pairs come from differs: SFT's samples; the policy's own, drawn anew in 3, 10 or 30
rounds with one optimizer (one round is DPO on SFT's samples, bit by bit); those of the 10 rounds
again, shuffled and offline; RLHF's samples. "Informative" is the share of pairs whose true rewards
differ; "true order" is how often log pi/pi_ref ranks such pairs right.

Tuned on seed 100 by sampled reward, beta 1, .3, .1 and .03: SFT's samples are best at .3 (.394),
RLHF's at .1 (.418), 10 rounds at .1 (.456; .03 has as much, but less greedy reward). So all sources
run at .3 and .1. The learning rate, 1e-4, is what sweep.py found for SFT's samples.

Three seeds. Each at its best beta, 10 on-policy rounds have a sampled reward of .448 +- .009 and
SFT's samples of .399 +- .004 (RLHF: .439 +- .044); in greedy reward the difference is only .014 +-
.037. Offline and shuffled, the same pairs lose little at beta .3 (.013 +- .003; in greedy reward
.000 +- .019) and much at .1 (.199 +- .024). With more rounds DPO comes up to RLHF at beta .1, as
far as RLHF's standard error of .044 can tell; at .3 it stays where it is. Pairs of RLHF's samples
are worse than SFT's. DPO on SFT's samples classifies better than on-policy DPO, by .051 +- .016,
but not better than RLHF.

Not shown: other learning rates for the other sources, more labels, a beta that changes over the
rounds. At beta .1 the DPO that the rounds are compared with has broken down (KL 5.4, legal .64).
"""

from argparse import Namespace

import numpy as np

from nanoroads import losses
from nanoroads.batch import pack
from nanoroads.progress import tracked
from nanoroads.randomness import generator, stream_key
from nanoroads.report import evidence
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import PAIRS, dpo_run, is_above, over_seeds, with_errors
from nanoroads.report.judged import pairs_as_tokens, read_pairs, true_margins
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, policy_row
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.write import plus_minus, table
from nanoroads.run.flags import run_script
from nanoroads.run.optim import adamw, batch_indices, learning_rate, total_steps, update
from nanoroads.score import mean_se, ranked_right, sequence_logps
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import jsonl_bytes, read_config, write_bytes
from nanoroads.world import roadmap
from nanoroads.world.pairs import draw_pairs

WORLD = roadmap.WORLDS["roadmap"]
BETAS = [0.3, 0.1]
ROUNDS = [3, 10, 30]  # times that pairs are drawn: once is DPO on SFT's samples
OWN_PAIRS = 2000  # of each policy's samples on held-out prompts
# Where pairs come from, as the table says it.
SFT_SAMPLES = "SFT's samples"
ON_POLICY = "on-policy, 10 rounds"
OFFLINE = "the same 10 rounds, offline"
RLHF_SAMPLES = "RLHF's samples"
MEASURES = {  # the columns
    "informative": "informative",
    "reward": "reward",
    "greedy_reward": "greedy",
    "kl_to_ref": "KL",
    "legal": "legal",
    "accuracy_sft": "true order, SFT's pairs",
    "accuracy_own": "true order, own pairs",
}
REWARDS = {"reward": "sampled", "greedy_reward": "greedy"}
ORANGE = "#e69f00"  # on-policy
LOOKS = {  # a marker and a colour for each source
    SFT_SAMPLES: ("s", COLOURS["dpo"]),
    ON_POLICY: ("^", ORANGE),
    OFFLINE: ("v", "#56b4e9"),
    RLHF_SAMPLES: ("D", INK),
}


def named(source, beta):
    """What DPO on pairs from `source` is called."""
    return f"{source}, beta {beta}"


# Each source at the beta that is best on seed 100.
BEST_SFT = named(SFT_SAMPLES, 0.3)
BEST_ON_POLICY = named(ON_POLICY, 0.1)
BEST_RLHF = named(RLHF_SAMPLES, 0.1)


def by_rounds(beta):
    """{rounds: the policy's name}, from DPO on SFT's samples on."""
    names = {1: named(SFT_SAMPLES, beta)}
    for rounds in ROUNDS:
        names[rounds] = named(f"on-policy, {rounds} rounds", beta)
    return names


def in_files(beta):
    """{source: (its run, the file of its pairs)} of the sources that are drawn before training."""
    return {
        SFT_SAMPLES: (dpo_run(beta), "sft/pairs.jsonl"),
        OFFLINE: (f"dpo_on_policy_pairs_beta_{beta}", f"on_policy_pairs_beta_{beta}.jsonl"),
        RLHF_SAMPLES: (f"dpo_rlhf_pairs_beta_{beta}", "rlhf_global/pairs.jsonl"),
    }


# ---------------------------------------------------------------- pairs


def draw_labelled(policy, n, split, *stream):
    """n pairs of a policy's samples with Bradley-Terry labels, as nanoroads.world.pairs draws them.

    stream: names the random numbers."""
    split_prompts = roadmap.prompts(WORLD, split)
    key = stream_key("on-policy pairs", *stream)
    triples = draw_pairs(policy, ENCODING, WORLD, split_prompts, n, key)
    prompts, first, second = zip(*triples, strict=True)
    return roadmap.label_pairs(WORLD, prompts, first, second, generator("on-policy labels", *stream))


def true_order_accuracy(policy, reference, pairs):
    """How often log pi/pi_ref puts the truly better response first, of the pairs that have one."""
    prompts, responses = pairs_as_tokens(pairs)
    logp = sequence_logps(policy, prompts, responses, GROUPS_PER_PASS)  # (P, 2)
    log_ratio = logp - sequence_logps(reference, prompts, responses, GROUPS_PER_PASS)
    margin = log_ratio[:, 0] - log_ratio[:, 1]  # (P,)
    true_margin = true_margins(pairs)
    return ranked_right(margin * true_margin.sign())[true_margin != 0].mean().item()


# ---------------------------------------------------------------- the runs


def train_on_policy(folder, seed, rounds, run):
    """DPO whose pairs are drawn from the policy itself, anew at the start of each round.

    The first round has the first of SFT's pairs, so one round is `run`, DPO on SFT's samples, whose
    flags and budget this has. Returns (policy, all pairs, round after round)."""
    flags = Namespace(**read_config(folder / run)["args"])
    reference = load_policy(folder / "sft").requires_grad_(False)
    policy = load_policy(folder / "sft")
    optimizer = adamw(policy, flags.lr, flags.weight_decay)  # one over all rounds
    total = total_steps(PAIRS, flags.batch_size, flags.epochs, flags.steps)
    used = []
    # The rounds share the pairs and the steps of one run.
    for round_index in tracked(range(rounds), f"seed {seed}, {rounds} rounds", "round"):
        n = PAIRS * (round_index + 1) // rounds - len(used)
        if round_index == 0:
            pairs = read_pairs(folder / "sft/pairs.jsonl")[:n]
        else:
            pairs = draw_labelled(policy, n, "train", seed, rounds, round_index)
        used += pairs

        prompts, responses = pairs_as_tokens(pairs)
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
    phases = evidence.regularised_phases(folder, seed, BETAS, kls=[])
    sample = ["-m", "nanoroads.world.pairs", "--policy", folder / "rlhf_global", "--n", PAIRS, "--seed", seed]
    phases.append(new_phase(folder, "rlhf_global/pairs.jsonl", sample, ["rlhf_global"]))
    run_phases(phases, args.out, args.jobs, lock)

    # The loop over rounds has no command, so it runs here; what is offline is train_dpo.py again.
    policies = {}
    pairs = {}
    offline = []
    test_pairs = folder / "sft/pairs_test.jsonl"
    dpo = ["train_dpo.py", "--seed", seed, "--data"]
    held_out = ["--eval-data", test_pairs, "--init", folder / "sft"]
    for beta in BETAS:
        for rounds in ROUNDS:
            name = by_rounds(beta)[rounds]
            policies[name], pairs[name] = train_on_policy(folder, seed, rounds, dpo_run(beta))
        _, file = in_files(beta)[OFFLINE]
        write_bytes(folder / file, jsonl_bytes(pairs[named(ON_POLICY, beta)]))
        for source in (OFFLINE, RLHF_SAMPLES):
            run, file = in_files(beta)[source]
            command = dpo + [folder / file] + held_out + ["--beta", beta]
            offline.append(new_phase(folder, run, command, ["sft", "sft/pairs.jsonl", file]))
    run_phases(offline, args.out, args.jobs, lock)

    # All policies are measured in the same way.
    policies["SFT"] = load_policy(folder / "sft")
    policies["RLHF"] = load_policy(folder / "rlhf_global")
    for beta in BETAS:
        for source, (run, file) in in_files(beta).items():
            policies[named(source, beta)] = load_policy(folder / run)
            pairs[named(source, beta)] = read_pairs(folder / file)
    rows = {}
    for name, policy in policies.items():
        rows[name] = measure(policy, policies["SFT"], read_pairs(test_pairs), seed)
        if name in pairs:
            rows[name]["informative"] = (true_margins(pairs[name]) != 0).double().mean().item()
    return rows


def measure(policy, reference, test_pairs, seed):
    """{measure: number} on held-out prompts, on SFT's held-out pairs, and on pairs of the policy's own."""
    on_prompts = policy_row(policy, reference, WORLD, roadmap.prompts(WORLD, "test"))
    row = {name: cell["mean"] for name, cell in on_prompts.items()}
    row["accuracy_sft"] = true_order_accuracy(policy, reference, test_pairs)
    own_pairs = draw_labelled(policy, OWN_PAIRS, "test", "own", seed)
    row["accuracy_own"] = true_order_accuracy(policy, reference, own_pairs)
    return row


# ---------------------------------------------------------------- the report


def lead(by_seed, one, other, measure):
    """{"mean", "se"} over seeds of how far one policy is ahead of another, seed by seed."""
    ours = evidence.values_of(by_seed, one, measure)
    return evidence.differences(ours, evidence.values_of(by_seed, other, measure))


def at_equal_beta(by_seed, measure):
    """How far on-policy pairs are ahead of SFT's samples at each beta, in words."""
    text = ""
    for beta in BETAS:
        ahead = lead(by_seed, named(ON_POLICY, beta), named(SFT_SAMPLES, beta), measure)
        text += f" Both at {beta}: {with_errors(ahead)}."
    return text


def verdict(by_seed):
    """A line for each claim. by_seed: of each seed {policy: {measure: number}}."""
    lines = []
    for measure, word in REWARDS.items():
        ahead = lead(by_seed, BEST_ON_POLICY, BEST_SFT, measure)
        text = f"on-policy pairs beat SFT's samples in {word} reward (Tajwar), each at its best beta: by "
        text += f"{with_errors(ahead)}.{at_equal_beta(by_seed, measure)}"
        lines.append(evidence.claim(is_above(ahead), text))
    for beta in BETAS:
        sampled = lead(by_seed, named(ON_POLICY, beta), named(OFFLINE, beta), "reward")
        greedy = lead(by_seed, named(ON_POLICY, beta), named(OFFLINE, beta), "greedy_reward")
        text = f"at beta {beta} the same pairs do as well offline and shuffled (in Tang's ablation they do "
        text += f"not): on-policy leads by {with_errors(sampled)} sampled, {with_errors(greedy)} greedy."
        lines.append(evidence.claim(not is_above(sampled) and not is_above(greedy), text))
    better = lead(by_seed, BEST_RLHF, BEST_SFT, "reward")
    text = "samples of a better policy, RLHF's, are better pairs than SFT's, each at its best beta: by "
    text += f"{with_errors(better)} in sampled reward."
    lines.append(evidence.claim(is_above(better), text))

    # Who ranks pairs right.
    over_dpo = lead(by_seed, BEST_SFT, BEST_ON_POLICY, "accuracy_sft")
    over_rlhf = lead(by_seed, BEST_SFT, "RLHF", "accuracy_sft")
    text = "offline policies classify SFT's held-out pairs better than online ones (Tang): DPO leads "
    text += f"on-policy DPO by {with_errors(over_dpo)}, RLHF by {with_errors(over_rlhf)}."
    lines.append(evidence.claim(is_above(over_dpo) and is_above(over_rlhf), text))
    own = lead(by_seed, BEST_ON_POLICY, BEST_SFT, "accuracy_own")
    text = f"on pairs of its own samples on-policy DPO classifies better than DPO: by {with_errors(own)}."
    lines.append(evidence.claim(is_above(own), text + at_equal_beta(by_seed, "accuracy_own")))

    # Whether more rounds lead to RLHF's reward, and not beyond it.
    for beta in BETAS:
        most_rounds = by_rounds(beta)[ROUNDS[-1]]
        for measure, word in REWARDS.items():
            slope = mean_se([slope_of(row, beta, measure) for row in by_seed])
            from_dpo = lead(by_seed, most_rounds, named(SFT_SAMPLES, beta), measure)
            to_rlhf = lead(by_seed, "RLHF", most_rounds, measure)
            text = f"at beta {beta} more rounds lead from DPO towards RLHF in {word} reward: "
            text += f"{with_errors(slope)} for ten times as many. {ROUNDS[-1]} rounds lead DPO by "
            text += f"{with_errors(from_dpo)}, RLHF leads them by {with_errors(to_rlhf)}."
            rises = is_above(slope) and is_above(from_dpo)
            lines.append(evidence.claim(rises and not evidence.is_below(to_rlhf), text))
    return lines


def slope_of(row, beta, measure):
    """How much a measure grows when there are ten times as many rounds, by least squares."""
    names = by_rounds(beta)
    values = [row[name][measure] for name in names.values()]
    return np.polyfit(np.log10(list(names)), values, 1)[0]


def table_of(by_seed):
    """A line a policy."""
    names = ["SFT"]
    for beta in BETAS:
        names += [*by_rounds(beta).values(), named(OFFLINE, beta), named(RLHF_SAMPLES, beta)]
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
    fig, (sampled, greedy, rounds) = new_figure(14, 4.6, ncols=3, sharey=True)
    draw_sources(sampled, by_seed, "reward")
    draw_sources(greedy, by_seed, "greedy_reward")
    sampled.set(ylabel="true reward")
    fig.legend(*sampled.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    draw_rounds(rounds, by_seed)
    return fig


def draw_sources(ax, by_seed, measure):
    """A reward against KL; filled: the first beta, open: the second."""
    points = []
    for source, (marker, colour) in LOOKS.items():
        points.append((named(source, BETAS[0]), marker, colour, colour))
        points.append((named(source, BETAS[1]), marker, colour, "white"))
    points.append(("RLHF", "P", COLOURS["rlhf_global"], COLOURS["rlhf_global"]))
    for name, marker, colour, face in points:
        x = over_seeds(by_seed, name, "kl_to_ref")
        y = over_seeds(by_seed, name, measure)
        style = {"fmt": marker, "color": colour, "mfc": face, "ms": 8, "label": name}
        ax.errorbar(x["mean"], y["mean"], y["se"], x["se"], **style)
    ax.axhline(over_seeds(by_seed, "SFT", measure)["mean"], color=COLOURS["sft"], ls=":", label="SFT")
    ax.set(title=f"{REWARDS[measure]} reward", xlabel="KL to SFT, nats", xscale="log")
    ax.set_xticks([1, 2, 4], ["1", "2", "4"])
    ax.minorticks_off()


def draw_rounds(ax, by_seed):
    """Both rewards against the number of rounds, beside RLHF's."""
    beside = {"textcoords": "offset points", "fontsize": 8}
    for beta, face in zip(BETAS, (ORANGE, "white"), strict=True):
        for measure, line in (("reward", "-"), ("greedy_reward", "--")):
            cells = [over_seeds(by_seed, name, measure) for name in by_rounds(beta).values()]
            means = [cell["mean"] for cell in cells]
            errors = [cell["se"] for cell in cells]
            style = {"fmt": f"^{line}", "color": ORANGE, "mfc": face, "capsize": 3}
            ax.errorbar([1, *ROUNDS], means, errors, **style)
            ax.annotate(f"{REWARDS[measure]}, beta {beta}", (ROUNDS[-1], means[-1]), (8, -3), **beside)
    for measure, word in REWARDS.items():
        height = over_seeds(by_seed, "RLHF", measure)["mean"]
        ax.plot([1, ROUNDS[-1]], [height, height], color=COLOURS["rlhf_global"], lw=1)
        ax.annotate(f"RLHF, {word}", (1, height), (0, 4), **beside)
    ax.set(title="how often pairs are drawn", xlabel="rounds (1: DPO)", xscale="log", xlim=(0.8, 150))
    ax.set_xticks([1, *ROUNDS], [str(rounds) for rounds in (1, *ROUNDS)])
    ax.minorticks_off()


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = [run_seed(args, seed, lock) for seed in args.seeds]
    results = table_of(by_seed), verdict(by_seed), figure_of(by_seed)
    evidence.write_results(args, "on_policy", __doc__, by_seed, *results)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
