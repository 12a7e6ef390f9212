"""Measures that several scripts need: log-probs and scores of given responses, and how good a policy is on the map."""

import importlib
import math
import sys

import torch
from tqdm import tqdm

from nanoroads import tokenizer
from nanoroads.batch import pack
from nanoroads.common import InputError, autocast, chunks, local
from nanoroads.generate import generate
from nanoroads.losses import implicit_reward


@torch.no_grad()
def score(model, prompts, responses, args, device):
    """A reward model's rewards, or a policy's sequence log-probs, of G groups of K responses -> (G, K) fp32 on the CPU."""
    parts = []
    rows = chunks(range(len(prompts)), args.micro_batch_size or args.batch_size)
    for some in tqdm(rows, desc="scoring", unit="batch", disable=None, delay=3, leave=False):
        batch = pack([prompts[i] for i in some], [responses[i] for i in some], device=device)
        with autocast(args, device):
            value = model(batch)
        parts.append(value if model.config.head == "scalar" else value[0])
    return torch.cat(parts).view(len(prompts), -1).cpu()


def accuracy(margin):
    """Share of pairs (P,) that are ranked right, as a tensor; a tie, also one but for rounding, is half right."""
    return (0.5 + 0.5 * margin.sign() * (margin.abs() > 1e-5)).mean()


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


def check_local(folder, config, init):
    """A policy is a reward model of the local class only with a scale and against the reference that it was fitted with.
    config: its config.json; init: the reference at hand. Raises InputError."""
    if "beta" not in config or config.get("args", {}).get("loss") in ("reference-free", "simpo"):
        raise InputError(f"--reward {folder}: its log-ratio to a reference was not fitted to anything, so it is no reward")
    if local(config["reference"]).resolve() != local(init).resolve():
        raise InputError(f"--reward {folder}: was fitted against {config['reference']}, not against {init}")


def rewards_of(model, ref, prompts, responses, args, device, beta=None):
    """Rewards (G, K) of either class: a scalar head's, or the local beta (log pi - log pi_ref); ref None: log pi alone."""
    value = score(model, prompts, responses, args, device)
    if model.config.head == "scalar" or ref is None:
        return value
    return implicit_reward(value, score(ref, prompts, responses, args, device), beta)


def rule(name):
    """`module:function` -> a function of texts, (prompts, responses) -> rewards (S,). What it raises becomes one line."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # the user's own directory
    try:
        given = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise InputError(f"--reward {name}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove("")

    def rewards(prompts, responses):
        try:
            values = [float(given(p, r)) for p, r in zip(prompts, responses, strict=True)]
        except (Exception, SystemExit) as error:
            raise InputError(f"--reward {name} raised {type(error).__name__}: {error}") from error
        for prompt, response, value in zip(prompts, responses, values, strict=True):
            if not abs(value) < 1e30:  # NaN, or too large for fp32 and its sums
                raise InputError(f"--reward {name} says {value} of {response!r} after {prompt!r}")
        return torch.tensor(values)

    return rewards
