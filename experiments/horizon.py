"""RLHF leads DPO as soon as a state in between has to be planned, and less at eleven moves than at three.

    python experiments/horizon.py --seeds 0 1 2    about 220 seconds a seed on two CPU cores

Swamy et al., 2503.01067, H6: generating is harder than verifying, and RLHF's lead is that gap.
Worlds: routes of at most 1 to 11 moves, 200 prompts each, the same for pairs, RL and measures. Both
roads have 20,000 pairs and beta = kl = .5, hence one soft optimum, exact up to 5 moves. Twice: with
any token, and with legal moves only, where no mass can go to texts that are no routes.

Result, three seeds: from two moves on RLHF leads at every horizon, the most at three (.210 ± .007
with any token, .245 ± .005 with legal moves), and less at eleven (.092, .144). At one move DPO is
.004 ahead with legal moves, RLHF .021 ± .002 with any token. So the lead does not grow with the
horizon, and most of it needs a state to be planned.

Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments.horizon import largest_lead, not_ahead
from nanoroads.experiments.small_worlds import pairs_phase, reference_phase
from nanoroads.report import evidence
from nanoroads.report.evidence import is_above, with_errors
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.to_optimum import KINDS, distance, figure_of, lead, rows_of, table_of
from nanoroads.run.flags import run_script
from nanoroads.weights.files import read_json_object

# {most moves of a route: the world}
WORLDS = {
    1: "roadmap-short",
    2: "roadmap-2",
    3: "roadmap-3",
    5: "roadmap-5",
    8: "roadmap-8",
    11: "roadmap-11",
}
BETA = 0.5  # of DPO and of RL's KL term, hence the same optimum
PAIRS, TEST_PAIRS = 20_000, 1000
STEPS, RL_STEPS = 625, 150  # of 32 pairs, of 32 prompts
ANY = {"dpo": 1e-4, "reward": 3e-4, "rl": 1e-3}  # learning rates
LEGAL = {"dpo": 1e-3, "reward": 1e-3, "rl": 1e-3}


def world_phases(out, seed, moves):
    """One horizon: the reference, its pairs, and both roads, with any token and with legal moves."""
    world = WORLDS[moves]
    here = f"horizon/seed{seed}/{moves}"
    sft = out / here / "sft"
    pairs = [f"{here}/sft/pairs.jsonl"]
    from_sft = ["--seed", seed, "--data", world, "--init", sft, "--eval-every", 1000]  # at the end only
    dpo = ["train_dpo.py"] + from_sft + ["--beta", BETA, "--lr", ANY["dpo"], "--steps", STEPS]
    rlhf = ["train_rlhf.py"] + from_sft + ["--kl", BETA, "--lr", ANY["rl"], "--steps", RL_STEPS]
    rlhf += ["--reward-lr", ANY["reward"], "--reward-epochs", 32 * STEPS / PAIRS]
    legal = ["-m", "nanoroads.world.legal", "--init", sft, "--seed", seed, "--beta", BETA, "--n", PAIRS]
    legal += ["--lr", LEGAL["dpo"], "--reward-lr", LEGAL["reward"], "--steps", STEPS]
    legal += ["--rl-lr", LEGAL["rl"], "--rl-steps", RL_STEPS]
    return [
        reference_phase(out, seed, here, world),
        pairs_phase(out, seed, here, pairs[0], PAIRS, ["--test-n", TEST_PAIRS]),
        new_phase(out, f"{here}/dpo", dpo, pairs),
        new_phase(out, f"{here}/rlhf", rlhf, pairs),
        new_phase(out, f"{here}/legal.json", legal, [f"{here}/sft"]),
    ]


def measure(out, seed):
    """{kind: {moves: {policy: its measures}}}."""
    rows = {"any": {}, "legal": {}}
    for moves, world in WORLDS.items():
        folder = out / f"horizon/seed{seed}/{moves}"
        roads = {"dpo": folder / "dpo", "rlhf": folder / "rlhf"}
        rows["any"][str(moves)] = rows_of(world, folder / "sft", roads, BETA)
        rows["legal"][str(moves)] = read_json_object(folder / "legal.json")
    return rows


def verdict(by_seed):
    """Four lines for each kind of response."""
    lines = []
    longest = max(WORLDS)
    for kind, name in KINDS.items():
        gap = lead(by_seed, kind, 1)
        furthest = max(distance(by_seed, kind, 1, "dpo")["mean"], distance(by_seed, kind, 1, "rlhf")["mean"])
        closed = abs(gap["mean"]) < 0.01 and furthest < 0.3
        text = f"{name}: at one move RLHF and DPO are within .01 of each other ({with_errors(gap)}), "
        text += f"and within .3 nats of the soft optimum (the further one {furthest:.2f})."
        lines.append(evidence.claim(closed, text))
        gap = lead(by_seed, kind, 2)
        text = f"{name}: at two moves, one state in between, RLHF leads by more than .05"
        lines.append(evidence.claim(is_above(gap, 0.05), f"{text} ({with_errors(gap)})."))
        behind = not_ahead(by_seed, kind, WORLDS)
        text = f"{name}: RLHF leads at every horizon from two moves on"
        if behind:
            text += f" (not at {', '.join(behind)})"
        lines.append(evidence.claim(not behind, text + "."))
        largest, fall = largest_lead(by_seed, kind, WORLDS)
        text = f"{name}: the longer the horizon, the larger RLHF's lead: it is largest at {largest} moves"
        if largest != longest:
            text += f", and higher there than at {longest} by {with_errors(fall)}"
        lines.append(evidence.claim(largest == longest, text + "."))
    return lines


def main(argv=None):
    """All horizons of all seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    phases = []
    for seed in args.seeds:
        phases.append(evidence.shared_phases(args.out / f"seed{seed}", seed)[0])  # the main world's SFT
        for moves in WORLDS:
            phases += world_phases(args.out, seed, moves)
    run_phases(phases, args.out, args.jobs, lock)
    by_seed = [measure(args.out, seed) for seed in args.seeds]
    table = table_of(by_seed, WORLDS, "most moves")
    figure = figure_of(by_seed, WORLDS, "most moves of a route")
    evidence.write_results(args, "horizon", __doc__, by_seed, table, verdict(by_seed), figure)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
