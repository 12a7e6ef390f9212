"""Measures that several scripts need: log-probs and scores of given responses, and how good a policy is on the map."""

import importlib
import math

import torch

from nanoroads import tokenizer
from nanoroads.batch import pack
from nanoroads.common import InputError, autocast, chunks
from nanoroads.generate import generate
from nanoroads.losses import implicit_reward


@torch.no_grad()
def score(model, prompts, responses, args, device):
    """A reward model's rewards, or a policy's sequence log-probs, of G groups of K responses -> (G, K) fp32 on the CPU."""
    parts = []
    for some in chunks(range(len(prompts)), args.micro_batch_size or args.batch_size):
        batch = pack([prompts[i] for i in some], [responses[i] for i in some], device=device)
        with autocast(args, device):
            value = model(batch)
        parts.append(value if model.config.head == "scalar" else value[0])
    return torch.cat(parts).view(len(prompts), -1).cpu()


def mean_se(values):
    """{"mean", "se"} of a list or tensor; se is the standard error of the mean, 0 for a single value."""
    x = torch.as_tensor(values, dtype=torch.float64)
    return {"mean": x.mean().item(), "se": x.std().item() / math.sqrt(len(x)) if len(x) > 1 else 0.0}


def texts(encoding, responses):
    """Token lists -> strings, without EOS."""
    eos = tokenizer.eos_id(encoding)
    return [tokenizer.decode(encoding, [t for t in r if t != eos]) for r in responses]


@torch.no_grad()
def on_map(model, ref, world, encoding, prompts, args, device, samples=1, seed=0):
    """A policy on the map: true reward at temperature 1 and greedy, its parts, and KL(policy || ref) in nats.

    prompts: strings. `samples` responses are drawn for each. Returns {name: list with one value a sample}; take mean_se."""
    from nanoroads import roadmap

    ids = [tokenizer.encode(encoding, p) for p in prompts]
    eos, length = tokenizer.eos_id(encoding), world.max_moves + 1
    responses = generate(model, ids, samples, length, eos=eos, seed=seed)
    greedy = [g[0] for g in generate(model, ids, 1, length, temperature=0, eos=eos)]
    result = {"reward": [], "legal": [], "arrives": [], "moves": []}
    for prompt, group in zip(prompts, responses, strict=True):
        for text in texts(encoding, group):
            parts = roadmap.reward_parts(prompt, text, world)
            for name in result:
                result[name].append(float(parts[name]))
    result["greedy_reward"] = [world.reward(p, t) for p, t in zip(prompts, texts(encoding, greedy), strict=True)]
    logp = score(model, ids, responses, args, device)
    result["kl"] = (logp - score(ref, ids, responses, args, device)).flatten().tolist()  # k1 on samples of the policy
    return result


def rewards_of(model, ref, prompts, responses, args, device, beta=None):
    """Rewards (G, K) of either class: a scalar head's, or the local beta (log pi - log pi_ref); ref None: log pi alone."""
    value = score(model, prompts, responses, args, device)
    if model.config.head == "scalar" or ref is None:
        return value
    return implicit_reward(value, score(ref, prompts, responses, args, device), beta)


def rule(name):
    """`module:function` -> a function of texts, (prompts, responses) -> rewards (S,). What it raises becomes one line."""
    module, _, function = name.partition(":")
    try:
        given = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--reward {name}: {error}") from None

    def rewards(prompts, responses):
        try:
            return torch.tensor([float(given(p, r)) for p, r in zip(prompts, responses, strict=True)])
        except Exception as error:
            raise InputError(f"--reward {name} raised {type(error).__name__}: {error}") from error

    return rewards
