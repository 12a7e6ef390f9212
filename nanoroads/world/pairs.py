"""Preference pairs: two samples of a policy, labelled by Bradley-Terry on the map's true reward.

    python -m nanoroads.world.pairs --policy out/sft --n 5000 --out out/sft/pairs.jsonl

With --test-out it draws the held-out pairs as well. A file that exists is never overwritten.
FILE.made_from.json records what the pairs were drawn from; without it train_dpo.py and
train_rlhf.py do not take pairs that lie beside their --init.
"""

import time
from pathlib import Path

from nanoroads import randomness
from nanoroads.errors import InputError
from nanoroads.progress import Progress
from nanoroads.run.commands import data_flag, print_next
from nanoroads.run.flags import SEED, Parser, positive, run_script
from nanoroads.run.made_from import policy_hash, write_made
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import jsonl_bytes, read_config
from nanoroads.world import roadmap
from nanoroads.world.task import sample_routes

CHUNK = 512  # prompts that are sampled at a time


def draw_pairs(policy, encoding, world, prompts, n, seed, split="train"):
    """n (prompt, first, second): two samples of each of n random prompts, at temperature 1.

    Draws again if the two samples are equal (no information), one is empty, or one was cut off (its
    text cannot show that). Raises InputError for a policy whose samples are hardly ever good for a
    pair."""
    eos = tokenizer.eos_id(encoding)
    rng = randomness.generator("pair prompts", split, seed)
    attempts = 20 * (n // CHUNK + 1)  # 20 times the samples that n pairs need at least
    triples = []
    with Progress("drawing pairs", "pair", total=n) as progress:
        for attempt in range(attempts):
            drawn_prompts = [prompts[i] for i in rng.integers(len(prompts), size=CHUNK)]
            samples = randomness.stream_key("pair samples", split, seed, attempt)
            _, groups = sample_routes(policy, world, encoding, drawn_prompts, 2, seed=samples)
            before = len(triples)
            for prompt, (a, b) in zip(drawn_prompts, groups, strict=True):
                ended = a[-1] == eos and b[-1] == eos
                empty = len(a) == 1 or len(b) == 1  # EOS alone
                if ended and not empty and a != b and len(triples) < n:
                    first, second = tokenizer.decode_all(encoding, (a, b))
                    triples.append((prompt, first, second))
            progress.advance(len(triples) - before)
            if len(triples) == n:
                return triples
    raise InputError(f"the policy hardly ever gives two different responses: {len(triples)} pairs of {n}")


def labelled_pairs(policy, encoding, world, split, n, seed):
    """n rows {"prompt", "chosen", "rejected"}, on the prompts of a split."""
    # Each split has streams of its own: in most worlds both have the same prompts.
    split_prompts = roadmap.prompts(world, split)
    triples = draw_pairs(policy, encoding, world, split_prompts, n, seed, split)
    prompts = [prompt for prompt, _, _ in triples]
    first = [answer for _, answer, _ in triples]
    second = [answer for _, _, answer in triples]
    labels = randomness.generator("labels", split, seed)
    return roadmap.label_pairs(world, prompts, first, second, labels)


def main(argv=None):
    """Sample the policy, label the pairs, write them as rows {"prompt", "chosen", "rejected"}."""
    parser = Parser("--policy DIR --out FILE", description=__doc__)
    add = parser.add_argument_group("the pairs").add_argument
    add("--policy", type=Path, required=True, help="run directory of the policy to sample")
    add("--out", type=Path, required=True, help="JSONL file to write")
    add("--n", type=positive(int), default=5000, help="number of pairs (default: 5000)")
    add("--split", default="train", choices=["train", "test"], help="prompts of the map (default: train)")
    add("--test-out", type=Path, help="JSONL file of pairs of the test split, too (default: none)")
    add("--test-n", type=positive(int), default=1000, help="number of those (default: 1000)")
    add("--seed", type=SEED, default=0, help="seed of prompts, samples and labels (default: 0)")
    args = parser.parse_args(argv)
    files = [(args.out, args.split, args.n)]
    if args.test_out:
        files.append((args.test_out, "test", args.test_n))
    config = read_config(args.policy)
    world = roadmap.WORLDS.get(config.get("args", {}).get("data"))
    if world is None:
        reason = "not a policy of the built-in map, so its samples have no known reward"
        raise InputError(f"{args.policy}: {reason}")
    for path, _, _ in files:
        if path.exists():
            raise InputError(f"{path} exists; choose another")

    policy = load_policy(args.policy)
    encoding = tokenizer.of(args.policy, policy)[1]
    for path, split, n in files:
        begin = time.monotonic()
        rows = labelled_pairs(policy, encoding, world, split, n, args.seed)
        drawn_from = {"policy": policy_hash(args.policy), "world": world.name, "split": split}
        made_from = {**drawn_from, "n": n, "seed": args.seed}
        write_made(path, {path.name: jsonl_bytes(rows)}, made_from, round(time.monotonic() - begin, 1))
        print(f"{path}: {n} pairs")
    print_next(["train_dpo.py", "--init", args.policy, *data_flag(world.name)])


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
