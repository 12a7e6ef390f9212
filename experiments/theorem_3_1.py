"""Theorem 3.1: DPO over the policies that are optimal for simple rewards is RLHF over those rewards.

    python experiments/theorem_3_1.py --seeds 0 1 2    about 100 seconds a seed on two CPU cores

Swamy et al., 2503.01067, Theorem 3.1. R_sim is r(x, y) = phi . f(x, y). DPO searches only the
policies pi_ref e^(r / beta) / Z, with log Z by enumeration of all legal routes; RLHF fits r by
Bradley-Terry and projects exactly. Both are fitted by LBFGS in fp64 from different random
starts. World: roadmap-2, its 200 prompts, true reward exact by enumeration; "optimum"
is the soft optimum of the true reward at the same beta.

R_sim is one of two classes. "checks": f is whether the route is legal, arrives, has two moves, and
arrives in two; it CONTAINS the true reward, and its features are the true checks, so the pairs it
needs are a lower bound, not a like-for-like contest. "roads": f without the two that know the goal;
it does not contain the true reward. Beside them, with GPTs: unrestricted DPO, RLHF with a GPT as
its reward model, and stage 2 by RLOO on the reward of "checks" that 1,000 pairs give.

Rates were chosen on seed 100 at 20,000 pairs of 500 prompts, three each: DPO 3e-4 (of 1e-4, 3e-4,
1e-3) and RLOO 2e-3 (of 1e-3, 2e-3, 4e-3) by true reward, the lowest within .005 of the best; the
GPT reward model 3e-4 (of 3e-4, 1e-3, 2e-3) by held-out likelihood. DPO and reward models take 625
steps of 32 pairs, RL 300.

The roads over R_sim are one: parameters and log-probs 4e-7 apart on 20,000 pairs, a KL of at most
2e-14 nats on fewer, where up to 5,000 pairs do not determine the parameters of "checks" (log Z
cancels in DPO's loss, so the two losses are one function of phi, and what differs is the way to its
least value). With the true reward in R_sim 30 pairs are enough for 95 % of the optimum's reward;
with 20,000 pairs unrestricted DPO has .580 +- .025 and RLHF with a GPT reward model .494 +- .044
(SFT .328, optimum .967), so here RLHF does not lead DPO. Without the goal in R_sim both roads stay
at .358 +- .007, below unrestricted DPO. RLOO loses .048 +- .012 of the exact projection's reward:
it is not lossless. Few pairs and few steps are not told apart here.
"""

import json
import os

import torch

from nanoroads import losses, randomness
from nanoroads.report import evidence
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.on_map import route_logps
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.write import plus_minus, table
from nanoroads.run.flags import run_script
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import write_text
from nanoroads.world.distance import exact_reward, listed_routes
from nanoroads.world.roadmap import NEIGHBOURS, WORLDS, ends, prompts, reward_parts, route

WORLD = WORLDS["roadmap-2"]
BETA = 0.5  # of all roads
SFT = []  # flags of the reference's training: the defaults
STEPS = 625  # of DPO and of the GPT reward model, 32 pairs each
RL_STEPS = 300
SIMPLE_SIZES = [30, 100, 300, 1000, 5000, 20000]  # pairs
GPT_SIZES = [1000, 5000, 20000]
RLOO_PAIRS = 1000  # that RLOO's reward is fitted on
CLASSES = {"checks": slice(0, 4), "roads": slice(0, 4, 2)}  # columns of `features`
PHI = "NANOROADS_THEOREM_3_1_PHI"  # in the environment, JSON: the reward of `judge`
NAMES = {  # of the curves
    "checks": "both roads over R_sim, which has the true reward",
    "roads": "both roads over R_sim without the goal",
    "dpo": "DPO, unrestricted",
    "rlhf": "RLHF, a GPT as its reward model",
}


def features(prompt, response):
    """f(x, y), four numbers: legal, arrives, two moves, arrives in two. All 0 unless legal."""
    parts = reward_parts(prompt, response, WORLD)
    legal, arrives, two = float(parts["legal"]), float(parts["arrives"]), float(parts["moves"] == 2)
    return [legal, legal * arrives, legal * two, legal * arrives * two]


def judge(prompt, response):
    """phi . f(x, y), for train_rlhf.py --reward: what RLOO climbs."""
    phi = torch.tensor(json.loads(os.environ[PHI]), dtype=torch.float64)
    return (phi @ torch.tensor(features(prompt, response), dtype=torch.float64)).item()


def legal_routes(prompt):
    """All routes of one or two moves by road, as text: those that may have a reward of R_sim, which are
    more than those that have a true reward."""
    found = []
    for first in NEIGHBOURS[ends(prompt)[0]]:
        found.append(route([first]))
        found += [route([first, second]) for second in NEIGHBOURS[first]]
    return found


# ---------------------------------------------------------------- the simple classes, exactly


def enumerate_world(reference):
    """Every legal route of every training prompt, and in the last place all other texts together.

    Returns places {(prompt, route): (p, r)}, log pi_ref (P, R + 1), f (P, R + 1, 4), r* (P, R + 1)."""
    listed = {prompt: legal_routes(prompt) for prompt in prompts(WORLD, "train")}
    logps = route_logps(reference, listed)
    width = max(map(len, listed.values())) + 1
    ref_logp = torch.full((len(listed), width), -torch.inf, dtype=torch.float64)
    f = torch.zeros(len(listed), width, 4, dtype=torch.float64)
    truth = torch.zeros(len(listed), width, dtype=torch.float64)
    places = {}
    for p, (prompt, routes) in enumerate(listed.items()):
        known = torch.as_tensor(logps[prompt]).double()
        ref_logp[p, : len(routes)] = known
        of_others = (1 - known.exp().sum()).clamp(min=1e-300)  # rounding may leave less than nothing
        ref_logp[p, -1] = of_others.log()
        for r, text in enumerate(routes):
            places[prompt, text] = p, r
            f[p, r] = torch.tensor(features(prompt, text))
            truth[p, r] = WORLD.reward(prompt, text)
    return places, ref_logp, f, truth


def soft_optimum(ref_logp, reward):
    """log pi of pi_ref e^(r / beta) / Z, (P, R + 1)."""
    return torch.log_softmax(ref_logp + reward / BETA, -1)


def mean_reward(logp, truth):
    """The true reward of a policy over all prompts. logp, truth (P, R + 1): log pi and r*."""
    return (logp.exp() * truth).sum(1).mean().item()


def fit(loss_of, start):
    """The phi where loss_of(phi) is least, by LBFGS.

    On few pairs there may be no least value, since some phi may rank all of them right; then the phi
    where the gradient is below 1e-11."""
    phi = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [phi], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(phi)
        loss.backward()
        return loss

    optimizer.step(closure)
    return phi.detach()


def both_roads(world, rows, columns, seed):
    """DPO over the soft-optimal policies, and RLHF, on the same pairs -> a dict of numbers."""
    places, ref_logp, f, truth = world
    f = f[..., columns]
    elsewhere = ref_logp.shape[1] - 1
    index = {prompt: p for p, prompt in enumerate(prompts(WORLD, "train"))}

    def place(row, name):
        return places.get((row["prompt"], row[name]), (index[row["prompt"]], elsewhere))

    # Texts that are no legal routes share the last place. Which of them it is does not matter: f = 0 for
    # all, so a policy of the class is pi_ref / Z on each.
    chosen = torch.tensor([place(row, "chosen") for row in rows]).unbind(1)  # (N,) prompts, (N,) routes
    rejected = torch.tensor([place(row, "rejected") for row in rows]).unbind(1)

    def dpo_loss(phi):
        logp = soft_optimum(ref_logp, f @ phi)
        loss = losses.dpo(logp[chosen], logp[rejected], ref_logp[chosen], ref_logp[rejected], BETA)
        return loss.mean()

    def reward_loss(phi):
        return losses.bradley_terry(f[chosen] @ phi, f[rejected] @ phi).mean()

    rng = randomness.generator("theorem 3.1 starts", seed)
    dpo_phi = fit(dpo_loss, torch.tensor(rng.normal(size=f.shape[-1])))
    rlhf_phi = fit(reward_loss, torch.tensor(rng.normal(size=f.shape[-1])))
    dpo = soft_optimum(ref_logp, f @ dpo_phi)
    rlhf = soft_optimum(ref_logp, f @ rlhf_phi)
    likely = ref_logp > -torch.inf
    return {
        "phi": rlhf_phi.tolist(),
        "parameters_apart": (dpo_phi - rlhf_phi).abs().max().item(),
        "logp_apart": (dpo - rlhf)[likely].abs().max().item(),
        "kl_apart": (dpo.exp() * (dpo - rlhf).masked_fill(~likely, 0)).sum(1).max().item(),
        "dpo": mean_reward(dpo, truth),
        "rlhf": mean_reward(rlhf, truth),
    }


# ---------------------------------------------------------------- the GPTs, by the scripts


def sft_phases(folder, seed):
    """The reference and the largest set of pairs."""
    sft = folder / "sft"
    train_sft = ["train_sft.py", "--data", WORLD.name, "--seed", seed, *SFT]
    sample_pairs = ["-m", "nanoroads.world.pairs", "--policy", sft, "--n", max(SIMPLE_SIZES), "--seed", seed]
    return [new_phase(folder, "sft", train_sft), new_phase(folder, "sft/pairs.jsonl", sample_pairs, ["sft"])]


def gpt_phases(folder, seed):
    """Unrestricted DPO and RLHF on the first n pairs, and RLOO on the reward `judge`.

    The environment says which reward that is. The ledger does not see it, but sees the pairs, from
    which it follows."""
    common = ["--init", folder / "sft", "--seed", seed, "--lr"]
    phases = []
    for n in GPT_SIZES:
        pairs = ["--data", folder / f"pairs_{n}.jsonl"]
        epochs = STEPS * 32 / (0.95 * n)  # 5 % are held out
        dpo = ["train_dpo.py", *pairs, *common, "3e-4", "--beta", BETA, "--steps", STEPS]
        rlhf = ["train_rlhf.py", *pairs, *common, "2e-3", "--kl", BETA, "--steps", RL_STEPS]
        rlhf += ["--max-new-tokens", WORLD.max_moves + 1]
        phases.append(new_phase(folder, f"dpo_{n}", dpo))
        phases.append(new_phase(folder, f"rlhf_{n}", rlhf + ["--reward-epochs", epochs]))
    # RLOO has the prompts of all pairs, those of the last round of the loop.
    rloo = rlhf + ["--reward", "experiments.theorem_3_1:judge"]
    phases.append(new_phase(folder, "rloo", rloo))
    return phases


def reward_of(folder):
    """The true reward of a GPT, exactly: over every route that has one."""
    logps = route_logps(load_policy(folder), listed_routes(WORLD))
    return exact_reward(WORLD, logps).mean().item()


def run_seed(args, seed, lock):
    """All numbers of one seed."""
    folder = args.out / "theorem_3_1" / f"seed{seed}"
    run_phases(sft_phases(folder, seed), args.out, args.jobs, lock)
    rows = (folder / "sft/pairs.jsonl").read_text().splitlines()
    world = enumerate_world(load_policy(folder / "sft"))
    simple = {}
    for name, columns in CLASSES.items():
        for n in SIMPLE_SIZES:
            pairs = [json.loads(row) for row in rows[:n]]
            simple[f"{name} {n}"] = both_roads(world, pairs, columns, seed)
    for n in GPT_SIZES:
        write_text(folder / f"pairs_{n}.jsonl", "\n".join(rows[:n]) + "\n")
    os.environ[PHI] = json.dumps(simple[f"checks {RLOO_PAIRS}"]["phi"])
    run_phases(gpt_phases(folder, seed), args.out, args.jobs, lock)
    _, ref_logp, _, truth = world
    optimum = soft_optimum(ref_logp, WORLD.bt_scale * truth)
    results = {
        "sft": mean_reward(ref_logp, truth),
        "optimum": mean_reward(optimum, truth),
        "rloo": reward_of(folder / "rloo"),
        "simple": simple,
    }
    for road in ("dpo", "rlhf"):
        for n in GPT_SIZES:
            results[f"{road} {n}"] = reward_of(folder / f"{road}_{n}")
    return results


# ---------------------------------------------------------------- the report


def curves_of(seeds):
    """{road: {pairs: {"mean", "se"}}} of the true reward over seeds."""
    curves = {}
    for name in CLASSES:
        curves[name] = {n: evidence.over_seeds(seeds, "simple", f"{name} {n}", "dpo") for n in SIMPLE_SIZES}
    for road in ("dpo", "rlhf"):
        curves[road] = {n: evidence.over_seeds(seeds, f"{road} {n}") for n in GPT_SIZES}
    return curves


def pairs_needed(curve, goal):
    """The fewest pairs from which on the mean stays at `goal` or above; None: more than there are."""
    needed = None
    for n in reversed(curve):
        if curve[n]["mean"] < goal:
            break
        needed = n
    return needed


def verdict(seeds, close=1e-6):
    """A line for each claim."""
    most = SIMPLE_SIZES[-1]
    apart = 0.0
    for name in CLASSES:
        for distance in ("parameters_apart", "logp_apart"):
            apart = max([apart] + evidence.values_of(seeds, "simple", f"{name} {most}", distance))
    optimum = evidence.over_seeds(seeds, "optimum")["mean"]
    curves = curves_of(seeds)
    needed, words = {}, {}
    for road, curve in curves.items():
        needed[road] = pairs_needed(curve, 0.95 * optimum) or 10 * most  # more than there are
        words[road] = f"{needed[road]:,}" if needed[road] <= most else f"more than {max(curve):,}"
    fewer = needed["checks"] < min(needed["dpo"], needed["rlhf"])
    last = max(curves["dpo"])
    unrestricted = evidence.values_of(seeds, f"dpo {last}")
    goalless = evidence.values_of(seeds, "simple", f"roads {most}", "dpo")
    lead = evidence.differences(unrestricted, goalless)
    exact = evidence.values_of(seeds, "simple", f"checks {RLOO_PAIRS}", "rlhf")
    lost = evidence.differences(exact, evidence.values_of(seeds, "rloo"))  # in reward
    simple = evidence.values_of(seeds, "simple", f"checks {last}", "dpo")
    gap = evidence.differences(simple, evidence.values_of(seeds, f"rlhf {last}"))
    return [
        evidence.claim(
            apart < close,
            "DPO over the policies that are optimal for R_sim is RLHF over R_sim (Theorem 3.1): on "
            f"{most:,} pairs parameters and log-probs are {apart:.0e} apart at most.",
        ),
        evidence.claim(
            fewer,
            f"that takes fewer pairs, if R_sim contains the true reward: 95 % of the optimum's {optimum:.3f} "
            f"from {words['checks']} pairs on, DPO unrestricted {words['dpo']}, RLHF with a GPT "
            f"{words['rlhf']}. It leads the last on {last:,} pairs by {evidence.with_errors(gap)}.",
        ),
        evidence.claim(
            evidence.is_above(lead),
            "what R_sim contains makes the lead: without the goal in it, unrestricted DPO on "
            f"{last:,} pairs is ahead by {evidence.with_errors(lead)}.",
        ),
        evidence.claim(
            abs(lost["mean"]) < 0.01,
            "RLOO in place of the exact projection loses less than .01 of its reward (it loses "
            f"{evidence.with_errors(lost)}).",
        ),
    ]


def table_of(seeds):
    """True rewards, and how far the two roads over R_sim are apart."""
    lines = []
    for name in ("sft", "optimum", "rloo"):
        pairs = RLOO_PAIRS if name == "rloo" else ""
        lines.append([name, str(pairs), plus_minus(evidence.over_seeds(seeds, name)), "", ""])
    for road, curve in curves_of(seeds).items():
        for n, cell in curve.items():
            apart = ["", ""]
            if road in CLASSES:
                fits = [row["simple"][f"{road} {n}"] for row in seeds]
                apart = [f"{max(fit[key] for fit in fits):.0e}" for key in ("parameters_apart", "kl_apart")]
            lines.append([road, str(n), plus_minus(cell), *apart])
    return table(["policy", "pairs", "true reward", "parameters apart", "KL apart, nats"], lines)


def figure_of(seeds):
    """True reward against pairs."""
    fig, ax = new_figure(7, 4)
    styles = {
        "checks": ("o-", COLOURS["rlhf_local"]),
        "roads": ("o--", COLOURS["sft"]),
        "dpo": ("s-", COLOURS["dpo"]),
        "rlhf": ("^-", COLOURS["rlhf_global"]),
    }
    for road, curve in curves_of(seeds).items():
        style, colour = styles[road]
        means = [cell["mean"] for cell in curve.values()]
        errors = [cell["se"] for cell in curve.values()]
        ax.errorbar(list(curve), means, errors, fmt=style, color=colour, capsize=3, label=NAMES[road])
    for name in ("sft", "optimum"):
        height = evidence.over_seeds(seeds, name)["mean"]
        ax.axhline(height, color=INK, lw=0.8, ls=":")
        ax.annotate(name, (SIMPLE_SIZES[0], height), (0, 3), textcoords="offset points")
    ax.set(xscale="log", xlabel="pairs", ylabel="true reward", title="How many pairs each search needs")
    ax.legend()
    return fig


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    seeds = [run_seed(args, seed, lock) for seed in args.seeds]
    lines = verdict(seeds)
    evidence.write_results(args, "theorem_3_1", __doc__, seeds, table_of(seeds), lines, figure_of(seeds))


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
