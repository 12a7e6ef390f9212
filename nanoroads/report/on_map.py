"""A policy's samples and given routes on the map, measured alike in every world."""

import torch

from nanoroads.score import mean_se, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.world.task import measure_on_map

ENCODING = tokenizer.get("roadmap")
GROUPS_PER_PASS = 1024  # prompts with their responses in a forward pass: these models are tiny


def policy_row(policy, reference, world, prompts):
    """{measure: {"mean", "se"}} of 8 samples per prompt at temperature 1 and the greedy response."""
    values = measure_on_map(
        policy, reference, world, ENCODING, prompts, GROUPS_PER_PASS, samples=8, seed=12345
    )
    return {
        "reward": over_prompts(values["reward"], prompts),
        "greedy_reward": over_prompts(values["greedy_reward"], prompts),
        "kl_to_ref": over_prompts(values["kl"], prompts),  # in nats
        "legal": over_prompts(values["legal"], prompts),
        "arrives": over_prompts(values["arrives"], prompts),
    }


def over_prompts(values, prompts):
    """{"mean", "se"} over prompts of a list of values, the same number for each prompt in turn.

    The samples of a prompt are averaged first, since they are not independent."""
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
            responses.append([tokenizer.encode(ENCODING, text) + [eos]])
    logp = sequence_logps(policy, prompts, responses, GROUPS_PER_PASS).flatten().double()
    counts = [len(texts) for texts in routes.values()]
    return dict(zip(routes, logp.split(counts), strict=True))
