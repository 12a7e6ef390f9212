"""The local classes of rewards of experiments/reward_classes.py, beside train_rlhf.py's global one.

local      beta log pi, without a reference (train_dpo.py --loss reference-free)
last       beta log pi of the last token, EOS, alone: is this a place to stop?
prefix     beta log pi of all tokens before it, so local is the sum of these two. The paper's authors
           do not say what their "prefix" is; this is our reading.
length     beta log pi / length (train_dpo.py --loss simpo, no target margin)
dpo        beta log pi / pi_ref (train_dpo.py)
reference  beta log pi of SFT's policy

No stage's script trains last and prefix; `train` does.
"""

import torch

from nanoroads import losses
from nanoroads.batch import Batch, pack
from nanoroads.model import GPT
from nanoroads.run.optim import adamw, batch_indices, learning_rate, total_steps, update
from nanoroads.score import GROUPS_PER_PASS, batches, scalar_rewards
from nanoroads.text.data import Rows

BATCH = 32  # pairs a step, as train_dpo.py


def local_reward(name: str, beta: float, policy: GPT, batch: Batch) -> torch.Tensor:
    """What a local class says of S responses, (S,); of DPO's policy without the reference's part."""
    logps = policy(batch)
    last = logps.token[batch.cu_seqlens[1:].long() - 1]
    if name == "last":
        return beta * last
    if name == "prefix":
        return beta * (logps.sequence - last)
    if name == "length":
        return beta * logps.sequence / batch.lengths
    return beta * logps.sequence


def train(name: str, beta: float, policy: GPT, pairs: Rows, seed: int, lr: float, epochs: int) -> GPT:
    """Bradley-Terry on a local class: train_dpo.py's loop with another reward."""
    optimizer = adamw(policy, lr, weight_decay=0.0)
    steps = total_steps(len(pairs), BATCH, epochs)
    for step in range(steps):
        prompts, responses = pairs.take(batch_indices(len(pairs), BATCH, step, seed))
        batch = pack(prompts, responses)
        chosen, rejected = local_reward(name, beta, policy, batch).view(-1, 2).unbind(1)  # (P,) each
        losses.bradley_terry(chosen, rejected).mean().backward()
        update(policy, optimizer, learning_rate(lr, step, steps, 10, "cosine"), clip=1.0)
    return policy


@torch.no_grad()
def rewards(name: str, betas: dict[str, float], models: dict, prompts, responses) -> torch.Tensor:
    """Rewards (G, K) of G groups of K responses, as tokens, by a class; "reference": log pi_ref.

    betas, models: {class: its beta, its model}; those of DPO need the reference's beside them."""
    if name == "global":
        return scalar_rewards(models[name], prompts, responses)
    parts = []
    for batch in batches(models[name], prompts, responses, GROUPS_PER_PASS):
        parts.append(local_reward(name, betas[name], models[name], batch))
    reward = torch.cat(parts).view(len(prompts), -1)
    if name == "dpo":
        reward -= betas[name] * rewards("reference", betas, models, prompts, responses)
    return reward
