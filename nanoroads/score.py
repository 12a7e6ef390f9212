"""Log-probs and rewards of given responses, and the judges of RL.

A judge is a reward model, a local reward beta log pi/pi_ref, or your function."""

import importlib
import math
import sys
from pathlib import Path

import torch

from nanoroads.batch import pack, upload
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.losses import implicit_reward, kl_k1
from nanoroads.model import GPT
from nanoroads.progress import tracked
from nanoroads.randomness import stream_key
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import is_base, load_policy, load_reward_model, with_run_adapters
from nanoroads.weights.files import local_folder, read_config
from nanoroads.weights.identity import find, of_model

GROUPS_PER_PASS = 64  # prompts in a forward pass, where the caller does not say

# ---------------------------------------------------------------- of given responses


@torch.no_grad()
def sequence_logps(
    policy: GPT, prompts: list, responses: list, groups_per_pass: int | None = GROUPS_PER_PASS
) -> torch.Tensor:
    """log pi(y|x) of G groups of K responses -> (G, K) fp32 on the CPU.

    groups_per_pass bounds the memory; None: all at once."""
    parts = [policy(batch).sequence for batch in batches(policy, prompts, responses, groups_per_pass)]
    return torch.cat(parts).view(len(prompts), -1).cpu()


def reference_logps(run, name, reference, rows, groups_per_pass):
    """log pi_ref of N pairs (N, 2): computed once, before training, and kept by the run.

    run: a Run. name: of the file in its folder. rows: the pairs, as data Rows."""

    def compute(indices):
        return sequence_logps(reference, *rows.take(indices), groups_per_pass)

    return run.once(name, compute, of=[reference, rows], count=len(rows))


@torch.no_grad()
def scalar_rewards(
    reward_model: GPT, prompts: list, responses: list, groups_per_pass: int | None = GROUPS_PER_PASS
) -> torch.Tensor:
    """The scalar head's reward of G groups of K responses -> (G, K) fp32 on the CPU."""
    parts = [reward_model(batch) for batch in batches(reward_model, prompts, responses, groups_per_pass)]
    return torch.cat(parts).view(len(prompts), -1).cpu()


def batches(model, prompts, responses, groups_per_pass):
    """Yields the groups as Batches on the model's device, and shows how many of them are done."""
    device = model.embedding.weight.device
    starts = range(0, len(prompts), groups_per_pass or len(prompts))
    for start in tracked(starts, "scoring", "batch"):
        end = start + (groups_per_pass or len(prompts))
        yield pack(prompts[start:end], responses[start:end], device=device)


def rewards(
    reward_model: GPT,
    reference: GPT | None,
    prompts: list,
    responses: list,
    beta: float | None = None,
    groups_per_pass: int | None = GROUPS_PER_PASS,
) -> torch.Tensor:
    """Rewards (G, K) of either class: a scalar head's, or beta (log pi - log pi_ref).

    A policy without a reference gives log pi, without beta."""
    if reward_model.config.head == "scalar":
        return scalar_rewards(reward_model, prompts, responses, groups_per_pass)
    logp = sequence_logps(reward_model, prompts, responses, groups_per_pass)
    if reference is None:
        return logp
    return implicit_reward(logp, sequence_logps(reference, prompts, responses, groups_per_pass), beta)


class OtherSamples:
    """Samples of another policy, drawn once before training, to measure KL(other || policy) during it.

    folder: of the other policy. like: the policy being trained. prompts: as tokens; of each,
    4 responses of at most `length` tokens."""

    def __init__(self, folder, like, prompts, length, eos, seed, groups_per_pass=GROUPS_PER_PASS):
        policy = load_policy(folder, like.embedding.weight.device, like.compute_dtype, like=like)
        self.prompts = prompts
        self.responses = []
        # Part by part: the cache of all samples at once could be larger than the model.
        for start in range(0, len(prompts), groups_per_pass):
            part = prompts[start : start + groups_per_pass]
            self.responses += generate(policy, part, 4, length, eos=eos, seed=seed)
        self.logp = sequence_logps(policy, prompts, self.responses, groups_per_pass)  # (P, 4)

    def kl(self, policy, groups_per_pass=GROUPS_PER_PASS):
        """KL(the other || policy) in nats: the mean of log other - log ours."""
        logp = sequence_logps(policy, self.prompts, self.responses, groups_per_pass)
        return kl_k1(self.logp, logp).mean()


def other_samples(run, policy, prompts, max_new_tokens, eos, groups_per_pass):
    """The OtherSamples of --compare, to the first 256 prompts; None without that flag."""
    args = run.args
    if not args.compare:
        return None
    seed = stream_key("compare", args.seed)
    prompts = prompts[:256]  # enough for a mean
    return OtherSamples(args.compare, policy, prompts, max_new_tokens, eos, seed, groups_per_pass)


# ---------------------------------------------------------------- statistics


def ranked_right(margin: torch.Tensor) -> torch.Tensor:
    """margin (P,), chosen minus rejected -> (P,), whose mean is the accuracy.

    1 where the pair is ranked right, 0 where wrong; a tie (margin below 1e-5) counts one half."""
    # sign() is 1 or -1, and the factor makes ties 0.
    return 0.5 + 0.5 * margin.sign() * (margin.abs() > 1e-5)


def mean_se(values) -> dict[str, float]:
    """{"mean", "se"} of a list or tensor, not empty; se: the mean's standard error, 0 for one value."""
    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) == 0:
        raise ValueError("mean_se: no values")
    se = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return {"mean": x.mean().item(), "se": se}


# ---------------------------------------------------------------- the judges of RL

# judge(batch, ref, prompt_texts, response_tokens) -> reward (S,) of a batch of S responses. ref: the
# reference's LogProbs of it. prompt_texts: S strings. response_tokens: S token lists.
# judge.beta: the scale of a local reward, None for the others.


class ScalarJudge:
    """The global reward class: the output of a reward model's scalar head."""

    beta = None

    def __init__(self, model):
        self.model = model

    def __call__(self, batch, ref, prompt_texts, response_tokens):
        return self.model(batch)


class LocalJudge:
    """The local reward class: beta log pi/pi_ref of a policy (Swamy et al., 2503.01067, section 2).

    It was fitted at temperature 1. In RL both log-probs are at RL's temperature, as those of the policy
    and the KL are: so whatever that is, the optimum at kl = beta is this very policy (Theorem 2.2)."""

    def __init__(self, policy, beta, temperature):
        self.policy = policy
        self.beta = beta
        self.temperature = temperature

    def __call__(self, batch, ref, prompt_texts, response_tokens):
        return implicit_reward(self.policy(batch, self.temperature).sequence, ref.sequence, self.beta)


class RuleJudge:
    """Your function(prompt, response) -> float, of texts without EOS. What it raises becomes one
    line."""

    beta = None

    def __init__(self, name, encoding, flag="--reward"):
        """flag: what named the rule, for errors."""
        self.name = f"{flag} {name}"
        self.encoding = encoding
        self.function = import_function(name, flag)

    def __call__(self, batch, ref, prompt_texts, response_tokens):
        answers = tokenizer.decode_all(self.encoding, response_tokens)
        values = [self.value(prompt, answer) for prompt, answer in zip(prompt_texts, answers, strict=True)]
        return upload(torch.tensor(values), batch.tokens.device)

    def value(self, prompt, answer):
        try:
            value = float(self.function(prompt, answer))
        except (Exception, SystemExit) as error:
            raise InputError(f"{self.name} raised {type(error).__name__}: {error}") from error
        if not abs(value) < 1e30:  # NaN, or too large for fp32 and its sums
            raise InputError(f"{self.name} says {value} of {answer!r} after {prompt!r}")
        return value


def import_function(name, flag="--reward"):
    """`module:function` -> the function; the module may lie in the user's own directory. Raises
    InputError."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise InputError(f"{flag} {name}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove("")


def load_judge(reward, reference, init, encoding, temperature=1.0):
    """The judge that `reward` names: a run's folder, or module:function.

    reference: the policy that RL is held near, loaded from `init`. Raises InputError."""
    if ":" in str(reward):
        return RuleJudge(str(reward), encoding)
    folder, device = Path(reward), reference.embedding.weight.device
    tokenizer.check_same(folder, encoding, init)
    config = read_config(folder)
    if "lora" in config and is_base(config, init):  # its other weights are those of the reference
        model = with_run_adapters(reference, folder, config)
    else:
        model = load_reward_model(folder, device, reference.compute_dtype, like=reference)
    model.requires_grad_(False)
    if model.config.head == "scalar":
        return ScalarJudge(model)
    check_fitted(folder)
    check_reference(folder, init)
    return LocalJudge(model, config["beta"], temperature)


# Losses that compare log-probs without a reference, or means over tokens: their sum of log pi/pi_ref is
# fitted to nothing.
NO_REWARD = ["reference-free", "simpo", "orpo", "dpo-norm"]


def check_fitted(folder):
    """beta log pi/pi_ref is a reward only if it was fitted to pairs. Raises InputError for another policy."""
    config = read_config(folder)
    loss = config.get("args", {}).get("loss")
    if "beta" not in config or "reference" not in config or loss in NO_REWARD:
        reason = "its log-ratio to a reference was not fitted to anything, so it is no reward"
        raise InputError(f"--reward {folder}: {reason}")


def check_reference(folder, init, flag="--reward"):
    """beta log pi/pi_ref is a reward only with the pi_ref it was fitted with: `init`. Raises InputError.

    The contents of the two are compared: a reference may have been moved, or trained again."""
    config = read_config(folder)
    fitted = config.get("inputs", {}).get("init")
    if fitted is not None:
        is_same = fitted == of_model(init)
    else:  # of an older version
        is_same = Path(find(folder, config, "reference")).resolve() == local_folder(init).resolve()
    if not is_same:
        raise InputError(f"{flag} {folder}: was fitted against {config['reference']}, not against {init}")
