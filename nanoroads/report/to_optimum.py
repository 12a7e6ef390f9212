"""Both roads beside the soft optimum: what experiments/horizon.py and data_size.py measure and show.

`by_seed` has of each seed {kind: {case: {policy: its measures}}}. A kind is one of KINDS, a case a
number of moves or of pairs; the measures are those of world/distance.py's `row_of`.
"""

from pathlib import Path

import torch

from nanoroads.report.cells import plus_minus
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import differences, over_seeds, values_of
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, route_logps
from nanoroads.report.write import table
from nanoroads.score import mean_se
from nanoroads.weights.checkpoint import load_policy
from nanoroads.world.distance import Optimum, listed_routes, row_of
from nanoroads.world.roadmap import WORLDS, prompts
from nanoroads.world.task import measure_on_map

SAMPLES = 16  # of each prompt
KINDS = {"any": "any token", "legal": "legal moves only"}  # of responses: {kind: its name}
ROADS = {"dpo": "dpo", "rlhf": "rlhf_global"}  # {road: its colour}


def rows_of(world_name: str, sft: Path, runs: dict[str, Path], beta: float) -> dict[str, dict]:
    """{"sft" and each name of `runs`: its measures}, on the training prompts.

    And "optimum", where the routes with a reward can be listed: pi* of this reference and beta."""
    world = WORLDS[world_name]
    everything = prompts(world, "train")
    reference = load_policy(sft)
    listed = listed_routes(world)
    optimum = None
    rows = {}
    if listed is not None:
        optimum = Optimum(world, route_logps(reference, listed), beta)
        rows["optimum"] = optimum.row
    for name, folder in {"sft": sft, **runs}.items():
        policy = load_policy(folder)
        values = measure_on_map(policy, reference, world, ENCODING, everything, GROUPS_PER_PASS, SAMPLES)
        reward = torch.tensor(values["reward"]).view(-1, SAMPLES)  # (P, 16)
        log_ratio = torch.tensor(values["kl"]).view(-1, SAMPLES)
        logps = None
        if listed is not None:
            logps = route_logps(policy, listed)
        rows[name] = row_of(reward, log_ratio, optimum, logps)
    return rows


# ---------------------------------------------------------------- over seeds


def rlhf_lead(by_seed, kind, case):
    """{"mean", "se"} over seeds of RLHF's lead."""
    return mean_se(rlhf_leads(by_seed, kind, case))


def lead_difference(by_seed, kind, one, other):
    """{"mean", "se"} over seeds of how much larger RLHF's lead is in one case than in another."""
    return differences(rlhf_leads(by_seed, kind, one), rlhf_leads(by_seed, kind, other))


def rlhf_leads(by_seed, kind, case):
    """RLHF - DPO in true reward, of each seed."""
    roads = zip(rewards_of(by_seed, kind, case, "rlhf"), rewards_of(by_seed, kind, case, "dpo"), strict=True)
    return [rlhf - dpo for rlhf, dpo in roads]


def rewards_of(by_seed, kind, case, policy):
    """A policy's true reward, of each seed."""
    return values_of(by_seed, kind, str(case), policy, "reward")


def has_optimum(by_seed, kind, case):
    """Whether pi* is known there."""
    return "optimum" in by_seed[0][kind][str(case)]


def distance(by_seed, kind, case, road):
    """{"mean", "se"} over seeds of a road's KL(pi || pi*), in nats."""
    return over_seeds(by_seed, kind, str(case), road, "kl_to_optimum")


# ---------------------------------------------------------------- table and figure


def table_of(by_seed, cases, name):
    """A row for each kind and case. name: the column of the cases."""
    lines = []
    for kind, kind_name in KINDS.items():
        for case in cases:
            cells = [kind_name, f"{case:,}"]
            for policy in ("sft", *ROADS):
                cells.append(plus_minus(over_seeds(by_seed, kind, str(case), policy, "reward")))
            cells.append(plus_minus(rlhf_lead(by_seed, kind, case)))
            if has_optimum(by_seed, kind, case):
                optimum = over_seeds(by_seed, kind, str(case), "optimum", "reward")
                cells.append(f"{optimum['mean']:.3f}")
                for road in ROADS:
                    cells.append(plus_minus(distance(by_seed, kind, case, road), digits=2))
            else:
                cells += ["-", "-", "-"]
            lines.append(cells)
    head = ["responses", name, "SFT", "DPO", "RLHF", "RLHF - DPO", "optimum"]
    return table(head + ["KL(DPO, optimum), nats", "KL(RLHF, optimum), nats"], lines)


def figure_of(by_seed, cases, xlabel, xscale="linear"):
    """Left RLHF's lead, right the distance of both roads, against the cases."""
    fig, (left, right) = new_figure(11, 4, ncols=2)
    for kind, style in (("any", "o-"), ("legal", "s--")):
        draw(left, cases, [rlhf_lead(by_seed, kind, case) for case in cases], style, INK, KINDS[kind])
        known = [case for case in cases if has_optimum(by_seed, kind, case)]
        for road, colour in ROADS.items():
            cells = [distance(by_seed, kind, case, road) for case in known]
            draw(right, known, cells, style, COLOURS[colour], f"{road.upper()}, {KINDS[kind]}")
    left.axhline(0, color=INK, lw=0.8, ls=":")
    left.set(title="RLHF's lead over DPO", ylabel="true reward, RLHF - DPO")
    right.set(title="Distance to the soft optimum", ylabel="KL(policy, optimum), nats")
    for ax in (left, right):
        ax.set(xlabel=xlabel, xscale=xscale)
        ax.set_xticks(list(cases), [f"{case:,}" for case in cases])
        ax.minorticks_off()
        ax.legend()
    return fig


def draw(ax, cases, cells, style, colour, label):
    """A curve with its standard errors."""
    means = [cell["mean"] for cell in cells]
    errors = [cell["se"] for cell in cells]
    ax.errorbar(list(cases), means, errors, fmt=style, color=colour, capsize=3, label=label)
