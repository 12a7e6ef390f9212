"""What experiments/displacement.py measures beside its identity: which responses rise, and the samples."""

import torch

from nanoroads.batch import pack
from nanoroads.losses import kl_k1
from nanoroads.report.judged import WORLD
from nanoroads.report.on_map import ENCODING
from nanoroads.run.folder import read_metrics
from nanoroads.text import tokenizer
from nanoroads.world.roadmap import prompts, reward_parts
from nanoroads.world.task import sample_routes

UNSEEN = 1e-3  # a token to which SFT gives less is one that its samples, the data, hardly ever show


def better_of(reward_gap):
    """Which response of each pair has the larger true reward: 0 chosen, 1 rejected, -1 neither. (P,)

    reward_gap: true reward of the chosen less that of the rejected, (P,)."""
    better = torch.full(reward_gap.shape, -1)
    better[reward_gap > 0] = 0
    better[reward_gap < 0] = 1
    return better


def which_rise(logp, ref_logp, better):
    """Which responses of P pairs rise. logp, ref_logp (P, 2): chosen first; better (P,): of `better_of`."""
    change = logp - ref_logp  # (P, 2)
    chosen = change[:, 0]
    differ = better >= 0
    of_better = change[differ].gather(1, better[differ, None])
    mass = logp[:, 0].exp().sum()
    ref_mass = ref_logp[:, 0].exp().sum()
    return {
        "better": of_better.mean().item(),  # change in nats
        "ties": chosen[~differ].mean().item(),  # of the chosen: their labels are coins
        "rise": (chosen > 0).double().mean().item(),  # a share of the chosen
        "chosen_mass": (mass / ref_mass).item(),
    }


def along_training(run, ref_logp):
    """The held-out changes that a run of DPO has logged: rows of "step", "chosen", "rejected".

    run: its folder. ref_logp (P, 2): SFT's, chosen first."""
    ref_chosen, ref_rejected = ref_logp.mean(0).tolist()
    points = [{"step": 0, "chosen": 0.0, "rejected": 0.0}]
    for row in read_metrics(run):
        if "eval_loss" in row:
            chosen = row["eval_chosen_logp"] - ref_chosen
            rejected = row["eval_rejected_logp"] - ref_rejected
            points.append({"step": row["step"], "chosen": chosen, "rejected": rejected})
    return points


@torch.no_grad()
def sample_row(policy, reference, key):
    """Means over eight samples of a policy for each held-out prompt."""
    held_out = prompts(WORLD, "test")
    ids, responses = sample_routes(policy, WORLD, ENCODING, held_out, 8, seed=key)
    measures = []
    for prompt, group in zip(held_out, responses, strict=True):
        for text in tokenizer.decode_all(ENCODING, group):
            parts = reward_parts(prompt, text, WORLD)
            measures.append([parts["reward"], parts["arrives"], not parts["legal"]])
    reward, arrives, illegal = torch.tensor(measures).double().mean(0).tolist()

    # How far from the reference: in nats, and in samples with a token that it hardly ever draws.
    batch = pack(ids, responses)
    ref = reference(batch)
    kl = kl_k1(policy(batch).sequence, ref.sequence).mean().item()
    least = []
    for token_logps in ref.token.split(batch.lengths.tolist()):  # of a response
        least.append(token_logps.min())
    unseen = (torch.stack(least).exp() < UNSEEN).double().mean().item()
    return {"reward": reward, "arrives": arrives, "illegal": illegal, "kl": kl, "unseen": unseen}
