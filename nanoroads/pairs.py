"""Preference pairs: two samples of a policy, labelled by Bradley-Terry on a known reward.

python -m nanoroads.pairs --policy out/sft --n 5000 --out out/sft/pairs.jsonl
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from nanoroads import common, data, roadmap, tokenizer
from nanoroads.checkpoint import load_fitting, read_config
from nanoroads.evaluate import texts
from nanoroads.generate import generate


def draw(model, encoding, world, prompts, n, seed, chunk=512):
    """n (prompt, first, second) of two samples each at temperature 1. Redrawn: two that are the same, since they say nothing,
    and samples without EOS, since a row of text cannot say that it was cut."""
    generator = torch.Generator().manual_seed(seed)
    triples = []
    with tqdm(total=n, desc="pairs", unit="pair", disable=None) as bar:
        for attempt in range(n // chunk * 20 + 20):
            some = [prompts[i] for i in torch.randint(len(prompts), (chunk,), generator=generator)]
            ids = [tokenizer.encode(encoding, p) for p in some]
            eos, length = tokenizer.eos_id(encoding), world.max_moves + 1
            groups = generate(model, ids, 2, length, eos=eos, seed=seed * 1_000 + attempt)
            good = [i for i, (a, b) in enumerate(groups) if a != b and a[-1] == b[-1] == eos and min(len(a), len(b)) > 1]
            new = [(some[i], *texts(encoding, groups[i])) for i in good[: n - len(triples)]]
            triples += new
            bar.update(len(new))
            if len(triples) == n:
                return triples
    raise common.InputError(f"the policy hardly ever gives two different responses: {len(triples)} pairs of {n}")


def main(argv=None):
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", type=Path, required=True, help="run directory of the policy to sample")
    p.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    p.add_argument("--n", type=common.positive(int), default=5000, help="pairs (default: %(default)s)")
    p.add_argument("--split", default="train", choices=["train", "test"], help="prompts of the map to use")
    p.add_argument("--seed", type=common.seed, default=0)
    args = p.parse_args(argv)
    config = read_config(args.policy)
    world = roadmap.WORLDS.get(config.get("args", {}).get("data"))
    if world is None:
        raise common.InputError(f"{args.policy}: not a policy of the built-in map, so its samples have no known reward")
    if args.out.exists():
        raise common.InputError(f"{args.out} exists; choose another --out")
    model = load_fitting(args.policy)
    encoding = tokenizer.get(config["tokenizer"])
    seed = args.seed + 2**31 * (args.split == "test")  # in the hidden world both splits have the same prompts, not the same pairs
    triples = draw(model, encoding, world, roadmap.prompts(world, args.split), args.n, seed)
    data.write_rows(args.out, roadmap.label_pairs(world, *zip(*triples, strict=True), seed=seed))
    print(f"{args.out}: {args.n} pairs\nnext: python train_dpo.py --init {args.policy}")


if __name__ == "__main__":
    common.run_script(main)
