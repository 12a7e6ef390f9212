"""RLHF leads DPO as soon as a state in between has to be planned, and less at eleven moves than at three.

    python experiments/horizon.py --seeds 0 1 2    about 220 seconds a seed on two CPU cores

Swamy et al., 2503.01067, H6: generating is harder than verifying, and RLHF's lead is that gap.
Worlds: routes of at most 1 to 11 moves, 200 prompts each, the same for pairs, RL and measures. Both
roads have 20,000 pairs and beta = kl = .5, hence one soft optimum, exact up to 5 moves. Twice: with
any token, and with legal moves only, where no mass can go to texts that are no routes.

Result, three seeds: from two moves on RLHF leads at every horizon, the most at three (.210 ± .007
with any token, .245 ± .005 with legal moves), and less at eleven (.092, .144). At two moves it is
not shown to lead by .05: .163 ± .069, .065 ± .023. At one move DPO is .004 ahead with legal moves,
RLHF .021 ± .002 with any token. So the lead does not grow with the horizon, and most of it needs a
state to be planned.
Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments.horizon import least_sure, longest_less_best, not_ahead
from nanoroads.experiments.small_worlds import pairs_phase, reference_phase
from nanoroads.report import evidence
from nanoroads.report.evidence import against, against_both, in_errors, is_above, is_below, with_errors
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.to_optimum import KINDS, figure_of, further_road, lead, rows_of, table_of
from nanoroads.report.write import NEAR, SMALL, plus_minus
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
    for kind, name in KINDS.items():
        gap, far = lead(by_seed, kind, 1), further_road(by_seed, kind, 1)
        closed = evidence.is_within(gap, SMALL) and is_below(far, NEAR)
        text = f"{name}: at one move RLHF and DPO are within .01 of each other ({against_both(gap, SMALL)}), "
        text += f"and within .3 nats of the soft optimum (the further one {plus_minus(far, 2)}, "
        lines.append(evidence.claim(closed, f"{text}{in_errors(far, NEAR)})."))
        gap = lead(by_seed, kind, 2)
        text = f"{name}: at two moves, one state in between, RLHF leads by more than .05"
        lines.append(evidence.claim(is_above(gap, 0.05), f"{text} ({against(gap, 0.05)})."))
        behind = not_ahead(by_seed, kind, WORLDS)
        moves, least = least_sure(by_seed, kind, WORLDS)
        text = f"{name}: RLHF leads at every horizon from two moves on"
        if behind:
            text += f" (not at {', '.join(behind)})"
        text += f"; its least sure lead, at {moves}: {with_errors(least)}."
        lines.append(evidence.claim(not behind, text))
        best, more = longest_less_best(by_seed, kind, WORLDS)
        text = f"{name}: the longest horizon, {max(WORLDS)} moves, has RLHF's largest lead: less that at "
        text += f"{best}, the largest of the others, {with_errors(more)}."
        lines.append(evidence.claim(is_above(more), text))
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
