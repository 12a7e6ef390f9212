"""RLHF leads DPO as soon as a state in between has to be planned, and the most at three moves.

    python experiments/horizon.py --seeds 0 1 2    270 seconds a seed on two CPU cores

Swamy et al., 2503.01067, hypothesis H6: generating is harder than verifying, and RLHF's lead is
that gap; with responses of two words there is none. Worlds: routes of at most 1, 2, 3, 5, 8 and 11
moves, 200 prompts each, the same for pairs, RL and measures, so nothing here is about new prompts.
Reference: the main world's SFT policy, trained 150 more steps on the world's own demonstrations,
since a policy of routes of 11 moves hardly ever stops after one. Both roads have beta = kl = .5,
hence one soft optimum, and 625 steps of 32 of the same 20,000 pairs; RL 150 steps of 32 prompts x
8.

Twice: with any token, by the scripts; and with legal moves only (nanoroads/world/legal.py: logits
masked to roads and EOS, the reference too, with pairs of its own), where no mass can go to texts
that are no routes.

Exact up to 5 moves: true rewards and log Z, over all routes that earn a reward; the KL inside a
distance is a mean over 16 samples a prompt. Beyond that the routes are too many (2 million at 8
moves), rewards are means over 16 samples a prompt, and no distance is given: a GPT's next state
depends on the whole route, so no dynamic programming over (state, moves left) gives log Z.

Rates were chosen on seed 100, two for each road, by the mean true reward over the six horizons, and
are the same at all of them. Any token: DPO 1e-4 (.540; 3e-4: .522, which at one move falls to .90,
and to .87 with all prompts among its pairs), reward model 3e-4 (.674; 1e-3: .666). Legal moves: DPO
1e-3 (of 3e-4), reward model 1e-3 (of 3e-4). RL 1e-3, untuned.

Result, three seeds. From two moves on RLHF leads at every horizon, the most at three (.210 +- .007
with any token, .245 +- .005 with legal moves), and less at eleven (.092, .144). At one move the
roads are .004 apart with legal moves, and both near the optimum. With any token they are not one:
RLHF leads by .021 +- .002, and DPO is .39 +- .04 nats away. The main job, whose SFT is longer, has
.002 and .29 there. At two moves the lead varies (.163 +- .069 with any token: seed 1's reward model
is weak). So the lead does not grow with the horizon; what is sure is that it begins where a state
has to be planned.
"""

from nanoroads.report import evidence
from nanoroads.report.evidence import differences, is_above, with_errors
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.to_optimum import KINDS, distance, figure_of, lead, leads_of, rows_of, table_of
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
SFT = ["--rows", 10_000, "--steps", 150, "--lr", 1e-3]
PAIRS, TEST_PAIRS = 20_000, 1000
STEPS, RL_STEPS = 625, 150  # of 32 pairs, of 32 prompts
ANY = {"dpo": 1e-4, "reward": 3e-4, "rl": 1e-3}  # learning rates
LEGAL = {"dpo": 1e-3, "reward": 1e-3, "rl": 1e-3}


def world_phases(out, seed, moves):
    """One horizon: the main world's SFT policy goes on with this world's demonstrations, then both roads."""
    world = WORLDS[moves]
    here = f"horizon/seed{seed}/{moves}"
    sft = out / here / "sft"
    pairs = [f"{here}/sft/pairs.jsonl"]
    common = ["--seed", seed, "--data", world]
    train_sft = ["train_sft.py"] + common + ["--init", out / f"seed{seed}/sft"] + SFT
    draw = ["-m", "nanoroads.world.pairs", "--policy", sft, "--seed", seed, "--n", PAIRS]
    draw += ["--test-out", sft / "pairs_test.jsonl", "--test-n", TEST_PAIRS]
    from_sft = common + ["--init", sft, "--eval-every", 1000]  # at the end only
    dpo = ["train_dpo.py"] + from_sft + ["--beta", BETA, "--lr", ANY["dpo"], "--steps", STEPS]
    rlhf = ["train_rlhf.py"] + from_sft + ["--kl", BETA, "--lr", ANY["rl"], "--steps", RL_STEPS]
    rlhf += ["--reward-lr", ANY["reward"], "--reward-epochs", 32 * STEPS / PAIRS]
    legal = ["-m", "nanoroads.world.legal", "--init", sft, "--seed", seed, "--beta", BETA, "--n", PAIRS]
    legal += ["--lr", LEGAL["dpo"], "--reward-lr", LEGAL["reward"], "--steps", STEPS]
    legal += ["--rl-lr", LEGAL["rl"], "--rl-steps", RL_STEPS]
    return [
        new_phase(out, f"{here}/sft", train_sft, [f"seed{seed}/sft"]),
        new_phase(out, pairs[0], draw, [f"{here}/sft"]),
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
        leads, behind = {}, []
        for moves in WORLDS:
            leads[moves] = lead(by_seed, kind, moves)
            if moves > 1 and not is_above(leads[moves]):
                behind.append(str(moves))
        furthest = max(distance(by_seed, kind, 1, "dpo")["mean"], distance(by_seed, kind, 1, "rlhf")["mean"])
        closed = abs(leads[1]["mean"]) < 0.01 and furthest < 0.3
        text = f"{name}: at one move RLHF and DPO are within .01 of each other ({with_errors(leads[1])}), "
        text += f"and within .3 nats of the soft optimum (the further one {furthest:.2f})."
        lines.append(evidence.claim(closed, text))
        text = f"{name}: at two moves, one state in between, RLHF leads by more than .05"
        lines.append(evidence.claim(is_above(leads[2], 0.05), f"{text} ({with_errors(leads[2])})."))
        text = f"{name}: RLHF leads at every horizon from two moves on"
        if behind:
            text += f" (not at {', '.join(behind)})"
        lines.append(evidence.claim(not behind, text + "."))
        lines.append(still_rising(by_seed, kind, name))
    return lines


def still_rising(by_seed, kind, name):
    """Whether the longest horizon has the largest lead, which H6 alone would suggest."""
    longest = max(WORLDS)
    largest = longest
    for moves in WORLDS:
        if lead(by_seed, kind, moves)["mean"] > lead(by_seed, kind, largest)["mean"]:
            largest = moves
    text = f"{name}: the longer the horizon, the larger RLHF's lead: it is largest at {largest} moves"
    if largest == longest:
        return evidence.claim(True, text + ".")
    fall = differences(leads_of(by_seed, kind, largest), leads_of(by_seed, kind, longest))
    return evidence.claim(False, f"{text}, and higher there than at {longest} by {with_errors(fall)}.")


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
