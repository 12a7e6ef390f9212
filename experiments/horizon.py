"""Where nothing is to be planned RLHF has no lead over DPO; where something is it has, and it grows.

    python experiments/horizon.py --seeds 0 1 2    about 210 seconds a seed on two CPU cores

Swamy et al., 2503.01067, H6: generating is harder than verifying, and RLHF's lead is that gap.
Worlds: routes of at most 1 to 11 moves, 200 prompts each, the same for pairs, RL and measures. Both
roads have 20,000 pairs and beta = kl = .5, hence one soft optimum, exact up to 5 moves. Twice: with
any token, and with legal moves only, where no mass can go to texts that are no routes.

Result, three seeds: at two moves RLHF's lead is larger than at one, by .143 ± .068 with any token
and .069 ± .023 with legal moves; that it leads there by .05 is not shown (.163 ± .069, .065 ±
.023). It leads at every horizon from two moves on, but less at eleven than at three (by .118 ± .009
and .101 ± .009). At one move the gap is closed with legal moves (-.004), not with any token (.021).
Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments.small_worlds import pairs_phase, reference_phase
from nanoroads.report import evidence, to_optimum
from nanoroads.report.cells import above, beside_bound, claim, every, least_sure, with_errors
from nanoroads.report.gap_closed import closed_line
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.to_optimum import KINDS, distance, figure_of, rlhf_lead, rows_of, table_of
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
CLEARLY = 0.05  # of true reward, what RLHF is to lead by at two moves
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
    """Five lines for each kind of response."""
    lines = []
    *shorter, longest = sorted(WORLDS)
    for kind, name in KINDS.items():
        lead = {moves: rlhf_lead(by_seed, kind, moves) for moves in WORLDS}
        distances = [distance(by_seed, kind, 1, road) for road in ("dpo", "rlhf")]
        lines.append(closed_line(f"{name}: at one move", lead[1], *distances))

        text = f"{name}: at two moves, one state in between, RLHF leads by more than {CLEARLY} "
        lines.append(claim(above(lead[2], CLEARLY), f"{text}({beside_bound(lead[2], CLEARLY)})."))
        more = to_optimum.lead_difference(by_seed, kind, 2, 1)
        text = f"{name}: this state makes RLHF's lead larger: it is more than at one move by "
        lines.append(claim(above(more), f"{text}{with_errors(more)}."))

        planned = {moves: lead[moves] for moves in WORLDS if moves > 1}
        least = least_sure(planned)
        text = f"{name}: RLHF leads at every horizon from two moves on; its least sure lead, at {least}: "
        lines.append(claim(every(map(above, planned.values())), f"{text}{with_errors(lead[least])}."))

        more = {moves: to_optimum.lead_difference(by_seed, kind, longest, moves) for moves in shorter}
        least = least_sure(more)
        text = f"{name}: the lead is largest at {longest} moves, the longest; least surely above {least}"
        lines.append(claim(every(map(above, more.values())), f"{text}'s, by {with_errors(more[least])}."))
    return lines


def main(argv=None):
    """All horizons of all seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    phases = []
    for seed in args.seeds:
        phases.append(evidence.sft_phase(args.out / f"seed{seed}", seed))
        for moves in WORLDS:
            phases += world_phases(args.out, seed, moves)
    run_phases(phases, args.out, args.jobs, lock)
    by_seed = [measure(args.out, seed) for seed in args.seeds]
    table = table_of(by_seed, WORLDS, "most moves")
    figure = figure_of(by_seed, WORLDS, "most moves of a route")
    evidence.write_results(args, "horizon", __doc__, by_seed, table, verdict(by_seed), figure)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
