"""Where the project's random numbers come from.

A stream of random numbers has a name: its purpose, then the numbers that tell it from others of the
same purpose, e.g. ("responses", seed, step). It is derived from that name by hashing, so two names
never share numbers, and a stream does not depend on what was drawn before it, in which order, on
which device, or by how many processes.

Arithmetic on seeds would not do: torch's generator on a CPU keeps 32 bits of a seed, and seed + 1 of
one purpose is often the seed of another. sample.py does add to its seed, which is harmless, since
`uniform` hashes it.
"""

import hashlib

import numpy as np
import torch


def stream_key(purpose: str, *parts: int | str) -> int:
    """The name of a stream as an integer of 128 bits, which `generate` and `generator` take."""
    digest = hashlib.sha256(repr((purpose, *parts)).encode()).digest()
    return int.from_bytes(digest[:16], "little")


def generator(purpose: str, *parts: int | str) -> np.random.Generator:
    """NumPy's generator of a stream: shuffles, choices, labels."""
    return np.random.default_rng(stream_key(purpose, *parts))


def seed_weights(stage: str, seed: int) -> None:
    """Seed torch's global generators, from which the initial weights of new modules are drawn."""
    torch.manual_seed(stream_key("weights", stage, seed) % 2**32)


def uniform(prompts: list, k: int, length: int, seed: int) -> np.ndarray:
    """The random numbers that k responses to each of P prompts are sampled with.

    prompts: P token lists. Returns (P*k, length) fp64, uniform in [0, 1) with 53 bits each; row
    p*k + i is that of sample i of prompt p, the SHAKE-128 hash of (seed, prompt, i). Where a prompt
    occurs again, i counts on from there; nothing else in the batch matters."""
    samples_so_far = {}  # prompt -> how many of its samples have their numbers
    bits = np.empty((len(prompts) * k, length), dtype="<u8")
    row = 0
    for prompt in prompts:
        tokens = ",".join(map(str, prompt))
        first = samples_so_far.get(tokens, 0)
        samples_so_far[tokens] = first + k
        for sample in range(first, first + k):
            name = f"{seed}/{tokens}/{sample}"
            bits[row] = np.frombuffer(hashlib.shake_128(name.encode()).digest(8 * length), dtype="<u8")
            row += 1
    return (bits >> 11) * 2.0**-53  # the upper 53 bits, as many as fp64 holds
