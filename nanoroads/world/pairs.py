"""Preference pairs: two samples of a policy, labelled by Bradley-Terry on the map's true reward.

python -m nanoroads.world.pairs --policy out/sft --n 5000 --out out/sft/pairs.jsonl
"""

from pathlib import Path

import torch
from tqdm import tqdm

from nanoroads.errors import InputError
from nanoroads.run.flags import SEED, Parser, positive, run_script
from nanoroads.text import tokenizer
from nanoroads.text.rows import write_rows
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import read_config
from nanoroads.world import roadmap
from nanoroads.world.task import sample_routes

CHUNK = 512  # prompts that are sampled at a time
TEST_SEEDS = 2**31  # the test split's seeds begin here: in the hidden world both splits have the same prompts


def draw(policy, encoding, world, prompts, n, seed):
    """n (prompt, first, second): two samples of each of n random prompts, at temperature 1.

    Draws again if the two samples are equal (no information) or one was cut off (its text cannot
    show that). Raises InputError for a policy whose samples are hardly ever good for a pair."""
    eos = tokenizer.eos_id(encoding)
    generator = torch.Generator().manual_seed(seed)
    triples = []
    with tqdm(total=n, desc="pairs", unit="pair", disable=None) as bar:
        for attempt in range(n // CHUNK * 20 + 20):
            chosen = torch.randint(len(prompts), (CHUNK,), generator=generator)
            asked = [prompts[i] for i in chosen]
            _, groups = sample_routes(policy, world, encoding, asked, 2, seed=seed * 1_000 + attempt)
            before = len(triples)
            for prompt, (a, b) in zip(asked, groups, strict=True):
                whole = a[-1] == b[-1] == eos and min(len(a), len(b)) > 1
                if whole and a != b and len(triples) < n:
                    first, second = tokenizer.decode_all(encoding, (a, b))
                    triples.append((prompt, first, second))
            bar.update(len(triples) - before)
            if len(triples) == n:
                return triples
    raise InputError(f"the policy hardly ever gives two different responses: {len(triples)} pairs of {n}")


def main(argv=None):
    """Sample the policy, label the pairs, write them as rows {"prompt", "chosen", "rejected"}."""
    p = Parser(description=__doc__)
    p.add_argument("--policy", type=Path, required=True, help="run directory of the policy to sample")
    p.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    p.add_argument("--n", type=positive(int), default=5000, help="number of pairs (default: 5000)")
    p.add_argument(
        "--split", default="train", choices=["train", "test"], help="prompts of the map (default: train)"
    )
    p.add_argument("--seed", type=SEED, default=0, help="seed of prompts, samples and labels (default: 0)")
    args = p.parse_args(argv)
    config = read_config(args.policy)
    world = roadmap.WORLDS.get(config.get("args", {}).get("data"))
    if world is None:
        raise InputError(
            f"{args.policy}: not a policy of the built-in map, so its samples have no known reward"
        )
    if args.out.exists():
        raise InputError(f"{args.out} exists; choose another --out")

    policy = load_policy(args.policy)
    encoding = tokenizer.get(config["tokenizer"])
    seed = args.seed
    if args.split == "test":
        seed += TEST_SEEDS
    triples = draw(policy, encoding, world, roadmap.prompts(world, args.split), args.n, seed)
    prompts = [prompt for prompt, _, _ in triples]
    first = [answer for _, answer, _ in triples]
    second = [answer for _, _, answer in triples]
    write_rows(args.out, roadmap.label_pairs(world, prompts, first, second, seed=seed))
    print(f"{args.out}: {args.n} pairs\nnext: python train_dpo.py --init {args.policy}")


if __name__ == "__main__":
    run_script(main)
