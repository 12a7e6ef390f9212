"""The points of experiments/overoptimisation.py: how far a policy is from SFT, and what it earns there.

A row {"setting", "kl", "gold", "proxy"} is a point: KL to SFT in nats, gold the true reward, proxy the score
of a reward model."""

from nanoroads.experiments.gao import best_of_n, kl_of_best_of
from nanoroads.losses import kl_k1
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, true_rewards
from nanoroads.score import scalar_rewards, sequence_logps
from nanoroads.weights.checkpoint import load_policy
from nanoroads.world.roadmap import MAIN, prompts
from nanoroads.world.task import sample_routes

WORLD = MAIN


def sample(policy, reference, proxy_model, k, key):
    """k samples for each held-out prompt -> log pi/pi_ref, gold, proxy: (256, k) each."""
    held_out = prompts(WORLD, "test")
    ids, responses = sample_routes(policy, WORLD, ENCODING, held_out, k, seed=key)
    gold = true_rewards(WORLD, held_out, responses)
    logp = sequence_logps(policy, ids, responses, GROUPS_PER_PASS)
    ref_logp = sequence_logps(reference, ids, responses, GROUPS_PER_PASS)
    proxy = scalar_rewards(proxy_model, ids, responses, GROUPS_PER_PASS)
    return kl_k1(logp, ref_logp).double(), gold.double(), proxy.double()


def best_of_n_rows(gold, proxy, best_of):
    """A row for each n of `best_of`. gold, proxy (256, N): of N of SFT's samples for each prompt."""
    rows = []
    for n in best_of:
        best_gold = best_of_n(proxy, gold, n)
        best_proxy = best_of_n(proxy, proxy, n)
        rows.append({"setting": n, "kl": kl_of_best_of(n), "gold": best_gold, "proxy": best_proxy})
    return rows


def policy_rows(runs, reference, proxy_model, k, key):
    """A row for each run, of k samples for each prompt. runs: {setting: folder}."""
    rows = []
    for setting, folder in runs.items():
        log_ratio, gold, proxy = sample(load_policy(folder), reference, proxy_model, k, key)
        kl = max(log_ratio.mean().item(), 1e-6)  # the estimate of a small KL may be negative
        rows.append({"setting": setting, "kl": kl, "gold": gold.mean().item(), "proxy": proxy.mean().item()})
    return rows


def logged_rows(metrics):
    """A row for each step that RL has logged: of 256 samples, on 32 training prompts."""
    rows = []
    for row in metrics:
        gold = row["true_reward"]
        rows.append({"setting": row["step"], "kl": row["kl"], "gold": gold, "proxy": row["reward"]})
    return rows
