"""Theorem 3.1 by enumeration: both roads over a class R_sim of simple rewards, in fp64.

experiments/theorem_3_1.py fits them here. R_sim is r(x, y) = phi . f(x, y), with few features f of a
route. DPO searches only the policies pi_ref e^(r / beta) / Z, with log Z by enumeration of all legal
routes; RLHF fits r by Bradley-Terry and projects exactly. Both are fitted by LBFGS from different random
starts. log Z cancels in DPO's loss, so the two losses are one function of phi, and what differs is the
way to its least value.

R_sim is one of two classes. "checks": f is whether the route is legal, arrives, has two moves, and
arrives in two; it contains the true reward. "roads": f without the two that know the goal; it does not.
`judge` is such a reward for train_rlhf.py --reward, and stands beside its features, since a run records
a hash of the module that its reward comes from. A function has no flags: its phi is in a file, which the
environment names.
"""

import json
import os
from functools import cache
from pathlib import Path

import torch

from nanoroads import losses, randomness
from nanoroads.experiments.exact_fit import minimise
from nanoroads.report.on_map import route_logps
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import write_json
from nanoroads.world.distance import exact_reward, listed_routes
from nanoroads.world.optimum import soft_optimum
from nanoroads.world.roadmap import NEIGHBOURS, WORLDS, ends, prompts, reward_parts, route

WORLD = WORLDS["roadmap-2"]
BETA = 0.5  # of all roads
GRADIENT_BELOW = 1e-11  # of a fit; on few pairs some phi may rank all right, and there is no least loss
CLASSES = {"checks": slice(0, 4), "roads": slice(0, 4, 2)}  # columns of `features`
PHI = "NANOROADS_THEOREM_3_1_PHI"  # in the environment: the path of the file with the phi of `judge`


def features(prompt, response):
    """f(x, y), four numbers: legal, arrives, two moves, arrives in two. All 0 unless legal."""
    parts = reward_parts(prompt, response, WORLD)
    legal, arrives, two = float(parts["legal"]), float(parts["arrives"]), float(parts["moves"] == 2)
    return [legal, legal * arrives, legal * two, legal * arrives * two]


def judge(prompt, response):
    """phi . f(x, y), for train_rlhf.py --reward: what RLOO climbs."""
    return (read_phi(os.environ[PHI]) @ torch.tensor(features(prompt, response), dtype=torch.float64)).item()


@cache
def read_phi(path):
    """phi, (4,) fp64, from its file, once in a process."""
    return torch.tensor(json.loads(Path(path).read_text()), dtype=torch.float64)


def set_judge(path, phi):
    """Let `judge` be phi . f in all commands that are started from now on: phi goes into the file `path`."""
    write_json(path, phi)
    os.environ[PHI] = str(path)


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


def mean_reward(logp, truth):
    """The true reward of a policy over all prompts. logp, truth (P, R + 1): log pi and r*."""
    return (logp.exp() * truth).sum(1).mean().item()


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
        logp = soft_optimum(ref_logp, f @ phi, BETA)
        loss = losses.dpo(logp[chosen], logp[rejected], ref_logp[chosen], ref_logp[rejected], BETA)
        return loss.mean()

    def reward_loss(phi):
        return losses.bradley_terry(f[chosen] @ phi, f[rejected] @ phi).mean()

    rng = randomness.generator("theorem 3.1 starts", seed)
    dpo_phi = minimise(dpo_loss, torch.tensor(rng.normal(size=f.shape[-1])), GRADIENT_BELOW)
    rlhf_phi = minimise(reward_loss, torch.tensor(rng.normal(size=f.shape[-1])), GRADIENT_BELOW)
    dpo = soft_optimum(ref_logp, f @ dpo_phi, BETA)
    rlhf = soft_optimum(ref_logp, f @ rlhf_phi, BETA)
    likely = ref_logp > -torch.inf
    return {
        "phi": rlhf_phi.tolist(),
        "parameters_apart": (dpo_phi - rlhf_phi).abs().max().item(),
        "logp_apart": (dpo - rlhf)[likely].abs().max().item(),
        "kl_apart": (dpo.exp() * (dpo - rlhf).masked_fill(~likely, 0)).sum(1).max().item(),
        "dpo": mean_reward(dpo, truth),
        "rlhf": mean_reward(rlhf, truth),
    }


def fit_classes(sft, sizes, seed):
    """Both roads over each class, on the first n pairs of SFT's samples for each n of `sizes`.

    sft: the reference's folder, with pairs.jsonl. Returns the true reward of SFT, that of the optimum,
    and {"class n": what `both_roads` says}."""
    world = enumerate_world(load_policy(sft))
    rows = (sft / "pairs.jsonl").read_text().splitlines()
    simple = {}
    for name, columns in CLASSES.items():
        for n in sizes:
            pairs = [json.loads(row) for row in rows[:n]]
            simple[f"{name} {n}"] = both_roads(world, pairs, columns, seed)
    _, ref_logp, _, truth = world
    optimum = soft_optimum(ref_logp, WORLD.bt_scale * truth, BETA)
    return mean_reward(ref_logp, truth), mean_reward(optimum, truth), simple


# ---------------------------------------------------------------- beside GPTs


def reward_of(folder):
    """The true reward of a GPT, exactly: over every route that has one."""
    logps = route_logps(load_policy(folder), listed_routes(WORLD))
    return exact_reward(WORLD, logps).mean().item()
