"""What results.json says of one seed's finished runs, and how several seeds become one result.

Everything is measured on the CPU in fp32, on held-out prompts unless a name says otherwise. A
`folder` is that of a seed in the main world; it holds the runs sft, dpo, local, rlhf_global and
rlhf_local.
"""

import json
from collections import Counter
from pathlib import Path

import torch

from nanoroads.losses import bradley_terry
from nanoroads.randomness import stream_key
from nanoroads.report.gap_closed import SETTINGS, gap_closed_row, world_folder
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, policy_row, route_logps, true_rewards
from nanoroads.score import mean_se, ranked_right, rewards, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.text.data import Limits, load
from nanoroads.text.layouts import preference_texts
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.weights.files import json_bytes, read_config, read_safetensors
from nanoroads.world import roadmap
from nanoroads.world.optimum import optimal_reward, shortest_routes
from nanoroads.world.task import sample_routes

WORLD = roadmap.MAIN
BEST_OF = (1, 2, 4, 8, 16)  # the N of best-of-N
SHOWN = 3  # prompts on the maps of the report
CHOOSING = 16  # samples of a policy for each held-out prompt, by which those are chosen
DRAWN = 64  # samples of a policy for each prompt that is shown
ON_PAGE = 8  # samples of a policy for each held-out prompt on the map of the page
SHOWN_POLICIES = ("sft", "dpo", "rlhf_global")  # on those maps and on the page's


def measure(folder: Path, quick: bool) -> dict:
    """All measures of one seed. quick: there are no runs in the other worlds."""
    prompts = roadmap.prompts(WORLD, "test")
    reference = load_policy(folder / "sft")
    policies = {}
    for name in ("sft", "dpo", "rlhf_global", "rlhf_local"):
        policies[name] = policy_row(load_policy(folder / name), reference, WORLD, prompts)
    policies["optimum"] = optimum_row(reference, prompts)
    reward_models, best_of_n_true_reward = reward_model_rows(folder, prompts)
    gap_closed = {}
    if not quick:
        for setting, world in SETTINGS.items():
            gap_closed[setting] = gap_closed_row(world_folder(folder, world), world)
    return {
        "policies": policies,
        "reward_models": reward_models,
        "best_of_n_true_reward": best_of_n_true_reward,
        "equivalence": equivalence_row(folder, prompts),
        "gap_closed": gap_closed,
        "routes": shown_routes(folder, prompts),
    }


def measures_file(folder: Path, quick: bool) -> dict[str, bytes]:
    """measures.json of one seed, and routes.json for its page, for `made_from.make_or_keep`."""
    prompts = roadmap.prompts(WORLD, "test")
    return {
        "measures.json": json_bytes(measure(folder, quick)),
        # In one line: indented, it would be three times as long.
        "routes.json": json.dumps(map_routes(folder, prompts)).encode(),
    }


# ---------------------------------------------------------------- the policies


def optimum_row(reference, prompts):
    """The limit of pi_ref exp(r*/beta) / Z at beta -> 0: pi_ref restricted to the shortest routes.

    Exact, by enumeration. KL(pi* || pi_ref) is then -log of the mass that pi_ref has on them."""
    routes = {prompt: shortest_routes(prompt) for prompt in prompts}
    logps = route_logps(reference, routes)
    reward = mean_se([optimal_reward(prompt) for prompt in prompts])
    kl = mean_se([-torch.logsumexp(logps[prompt], 0).item() for prompt in prompts])
    # Every sample is optimal, so greedy is no better.
    return {"reward": reward, "greedy_reward": reward, "kl_to_ref": kl}


def shown_routes(folder, prompts):
    """Samples of the policies for the maps of the report: {"rule", "prompts"}.

    "prompts": a row {"prompt", "samples": {policy: {route: how often it was drawn}}} for each of the
    prompts on which the policies differ most. They are chosen by other samples than those that are
    shown, since what is chosen because it is extreme is less so when it is drawn again."""
    policies = {name: load_policy(folder / name) for name in SHOWN_POLICIES}
    means = choosing_rewards(policies, prompts)  # (policies, prompts)
    spread = means.max(0).values - means.min(0).values  # (prompts,)
    chosen = [prompts[i] for i in spread.argsort(descending=True, stable=True)[:SHOWN]]

    rows = [{"prompt": prompt, "samples": {}} for prompt in chosen]
    for name, policy in policies.items():
        for row, texts in zip(rows, drawn(policy, chosen, DRAWN, "shown"), strict=True):
            row["samples"][name] = dict(Counter(texts).most_common())
    rule = (
        f"Prompts: the {SHOWN} of {len(prompts)} held-out ones on which the policies' mean true rewards, "
        f"of {CHOOSING} other samples, lie furthest apart."
    )
    return {"rule": rule, "prompts": rows}


def choosing_rewards(policies, prompts):
    """The mean true reward of each policy's CHOOSING samples of each prompt -> (policies, prompts)."""
    means = []  # for each policy (prompts,)
    for policy in policies.values():
        rewards_by_prompt = []
        for prompt, texts in zip(prompts, drawn(policy, prompts, CHOOSING, "choosing"), strict=True):
            rewards_by_prompt.append([WORLD.reward(prompt, text) for text in texts])
        means.append(torch.tensor(rewards_by_prompt).mean(1))
    return torch.stack(means)


def map_routes(folder, prompts):
    """routes.json: what the policies do on every prompt, for the map of the page: {"rule", "prompts"}.

    "prompts": a row {"prompt", "best", "policies"} each; best: the largest true reward that there is.
    Of a policy "greedy": [route, true reward], "samples": a list of these, and "choosing": the mean
    true reward of other samples. The page orders the prompts by it; `shown_routes` says why."""
    policies = {name: load_policy(folder / name) for name in SHOWN_POLICIES}
    means = choosing_rewards(policies, prompts).tolist()
    rows = [{"prompt": prompt, "best": optimal_reward(prompt), "policies": {}} for prompt in prompts]
    for (name, policy), choosing in zip(policies.items(), means, strict=True):
        samples = drawn(policy, prompts, ON_PAGE, "page")
        _, likeliest = sample_routes(policy, WORLD, ENCODING, prompts, 1, temperature=0)
        for i, row in enumerate(rows):
            greedy = tokenizer.decode_all(ENCODING, likeliest[i])
            answers = [[text, round(WORLD.reward(row["prompt"], text), 2)] for text in greedy + samples[i]]
            row["policies"][name] = {
                "greedy": answers[0],
                "samples": answers[1:],
                "choosing": round(choosing[i], 4),
            }
    rule = (
        f"The dots are mean true rewards of {CHOOSING} other samples of each policy, from 0 to 1. They order "
        f"the list, and the {ON_PAGE} samples on the maps are new ones: a prompt that heads the list by luck "
        "does not show the same luck below."
    )
    return {"rule": rule, "prompts": rows}


def drawn(policy, prompts, k, purpose):
    """k responses to each prompt at temperature 1, as texts; others for another purpose."""
    _, groups = sample_routes(policy, WORLD, ENCODING, prompts, k, seed=stream_key("routes", purpose))
    return [tokenizer.decode_all(ENCODING, group) for group in groups]


# ---------------------------------------------------------------- the reward models


def reward_model_rows(folder, prompts):
    """({reward model: its row}, best of N by the true reward, which no reward model can exceed).

    A row: held-out Bradley-Terry likelihood and accuracy, and best of N of the SFT policy's
    samples."""
    sft = load_policy(folder / "sft")
    limits = Limits(context=sft.config.block_size)
    pairs = load(folder / "sft/pairs_test.jsonl", preference_texts, ENCODING, limits)
    ids, samples = sample_routes(sft, WORLD, ENCODING, prompts, BEST_OF[-1], seed=stream_key("best of n"))
    true_reward = true_rewards(WORLD, prompts, samples)  # (prompts, 16)

    runs = {
        "dpo": folder / "dpo",  # its reward is beta log pi/pi_ref
        "local": folder / "local",  # beta log pi: the paper's local class, without a reference
        "global": folder / "rlhf_global/reward",  # a scalar head
    }
    rows = {}
    for name, run in runs.items():
        model = load_reward_model(run)
        beta = read_config(run).get("beta")
        reference = sft if name == "dpo" else None
        reward = rewards(model, reference, pairs.prompts, pairs.responses, beta, GROUPS_PER_PASS)  # (P, 2)
        if name == "local":  # without a reference, `rewards` leaves beta out
            reward = beta * reward
        chosen = reward[:, 0]  # (P,)
        rejected = reward[:, 1]
        sample_reward = rewards(model, reference, ids, samples, beta, GROUPS_PER_PASS)  # (prompts, 16)
        rows[name] = {
            "nll": bradley_terry(chosen, rejected).mean().item(),
            "accuracy": ranked_right(chosen - rejected).mean().item(),
            "best_of_n": best_of_n(sample_reward, true_reward),
        }
    return rows, best_of_n(true_reward, true_reward)


def best_of_n(reward, true_reward):
    """The mean true reward of the sample that a reward model likes best of N, for N = 1 ... 16.

    reward, true_reward (prompts, K), K a multiple of 16. A prompt's samples are cut into K / N blocks;
    in each the sample with the highest reward is picked."""
    row = {}
    for n in BEST_OF:
        blocks = reward.view(len(reward), -1, n)  # (prompts, K / N, N)
        true_blocks = true_reward.view(len(true_reward), -1, n)
        favourite = blocks.argmax(2, keepdim=True)  # (prompts, K / N, 1)
        row[str(n)] = true_blocks.gather(2, favourite).mean().item()
    return row


# ---------------------------------------------------------------- Theorem 2.2


def equivalence_row(folder, prompts):
    """KL(pi_DPO || pi) in nats, on samples of pi_DPO, for RL on the local reward and for SFT.

    And how far apart the weights of DPO and of stage 1 of that RL ended: they are the same loss."""
    dpo = load_policy(folder / "dpo")
    ids, samples = sample_routes(dpo, WORLD, ENCODING, prompts, 8, seed=stream_key("equivalence"))
    logp = sequence_logps(dpo, ids, samples, GROUPS_PER_PASS)  # (prompts, 8)
    kl = {}
    for name in ("rlhf_local", "sft"):
        other_logp = sequence_logps(load_policy(folder / name), ids, samples, GROUPS_PER_PASS)
        kl[name] = (logp - other_logp).mean().item()
    dpo_weights, _ = read_safetensors(folder / "dpo/model.safetensors")
    stage_1_weights, _ = read_safetensors(folder / "rlhf_local/reward/model.safetensors")
    differences = [(dpo_weights[name] - stage_1_weights[name]).abs().max().item() for name in dpo_weights]
    return {
        "kl_dpo_rlhf_local": kl["rlhf_local"],
        "kl_dpo_sft": kl["sft"],
        "stage_1_weights_apart": max(differences),
    }


# ---------------------------------------------------------------- several seeds


def without_routes(row: dict) -> dict:
    """One seed's measures as numbers alone, for differences that are taken seed by seed."""
    return {name: value for name, value in row.items() if name != "routes"}


def combine(rows: list):
    """The results of several seeds as one.

    {"mean", "se"} over prompts become mean and standard error over seeds, plain numbers their mean;
    what is no number is the first seed's. A single seed's results stay as they are."""
    first = rows[0]
    if len(rows) == 1:
        return first
    if isinstance(first, dict):
        combined = {}
        if "mean" in first:
            combined.update(mean_se([row["mean"] for row in rows]))
        for name in first:
            if name not in combined:
                combined[name] = combine([row[name] for row in rows])
        return combined
    if isinstance(first, (float, int)):
        return sum(rows) / len(rows)
    return first
