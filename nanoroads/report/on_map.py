"""Measures of a policy's samples, and log-probs of given routes, the same in every world."""

import torch

from nanoroads.score import mean_se, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.world.task import measure_on_map

ENCODING = tokenizer.get("roadmap")
GROUPS_PER_PASS = 1024  # prompts with their responses in a forward pass: these models are tiny


def policy_row(policy, reference, world, prompts):
    """{measure: {"mean", "se"}} of a greedy response and 8 samples at temperature 1 per prompt."""
    values = measure_on_map(policy, reference, world, ENCODING, prompts, GROUPS_PER_PASS, samples=8)
    return {
        "reward": over_prompts(values["reward"], prompts),
        "greedy_reward": over_prompts(values["greedy_reward"], prompts),
        "kl_to_ref": over_prompts(values["kl"], prompts),  # in nats
        "legal": over_prompts(values["legal"], prompts),
        "arrives": over_prompts(values["arrives"], prompts),
    }


def true_rewards(world, prompts, responses):
    """The true reward (P, K) of K responses, as tokens, to each of P prompts, strings."""
    rewards = []
    for prompt, group in zip(prompts, responses, strict=True):
        rewards.append([world.reward(prompt, text) for text in tokenizer.decode_all(ENCODING, group)])
    return torch.tensor(rewards)


def over_prompts(values, prompts):
    """{"mean", "se"} over prompts. values: V for the first prompt, V for the second, and so on.

    The values of a prompt are averaged first, since they are not independent."""
    by_prompt = torch.tensor(values, dtype=torch.float64).view(len(prompts), -1)
    return mean_se(by_prompt.mean(1))


def route_logps(policy, routes):
    """log pi of given routes. routes: {prompt: R texts without EOS} -> {prompt: (R,) fp64}."""
    eos = tokenizer.eos_id(ENCODING)
    prompts = []
    responses = []
    for prompt, texts in routes.items():
        for text in texts:
            prompts.append(tokenizer.encode(ENCODING, prompt))
            response = tokenizer.encode(ENCODING, text) + [eos]
            responses.append([response])  # a group of one response
    logp = sequence_logps(policy, prompts, responses, GROUPS_PER_PASS).flatten().double()
    counts = [len(texts) for texts in routes.values()]
    return dict(zip(routes, logp.split(counts), strict=True))
