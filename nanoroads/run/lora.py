"""--lora RANK: what a training script trains in place of a second copy of --init.

weights/lora.py has the adapters themselves. Here they are put on the weights of a run's reference,
which is thereby in memory once.
"""

import torch

from nanoroads.errors import InputError
from nanoroads.randomness import seed_weights
from nanoroads.weights.checkpoint import is_base, with_run_adapters
from nanoroads.weights.files import read_config
from nanoroads.weights.lora import ALPHA, add_adapters


def check(args):
    """Raises InputError, before a run begins, for flags that --lora does not go with."""
    if not args.lora:
        return
    lora = f"--lora {args.lora}"
    if args.init is None:
        raise InputError(f"{lora}: adapts a model that exists; name it by --init")
    if args.fsdp:
        raise InputError(f"{lora}: does not go with --fsdp; leave out one of the two")
    start = getattr(args, "start", None)
    if start:
        config = read_config(start)
        if config.get("lora", {}).get("rank") != args.lora or not is_base(config, args.init):
            wanted = f"a run of {lora} on {args.init}, whose adapters go on"
            raise InputError(f"--start {start}: with --lora it must be {wanted}")


def frozen_dtype(args):
    """What a run holds the matrices in that it does not train; None: fp32.

    With --lora and --dtype bfloat16, by name, in bf16: the products cast them to that anyway. Not with
    "auto", which is another dtype on another device."""
    if args.lora and args.dtype == "bfloat16":
        return torch.bfloat16
    return None


def adapted(run, reference):
    """The policy that a run of --lora trains; None without --lora.

    It shares the reference's weights, which are frozen. Its new adapters change nothing, so before the
    first step it is the reference; with --start they are that run's. Raises InputError."""
    args = run.args
    if not args.lora:
        return None
    start = getattr(args, "start", None)
    if start:
        policy = with_run_adapters(reference, start, read_config(start))
    else:
        # Seeded here: a resumed run, which skips what came before, must draw the same numbers.
        seed_weights(f"{run.stage} adapters", args.seed)
        policy = add_adapters(reference, args.lora)
    say_what_is_trained(args, policy)
    return policy


def adapted_reward_model(run, reference):
    """As adapted, for the reward model of --reward global: adapters and a new scalar head."""
    model = adapted(run, reference)
    if model is not None:
        model.set_scalar_head(run.args.readout)
    return model


def say_what_is_trained(args, model):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"--lora {args.lora}: {trained:,} of {parameters:,} parameters are trained, alpha {ALPHA}")


def description(args, inputs):
    """What config.json says of a run of --lora: its adapters, and what they are added to. {} without --lora.

    inputs: the run's hashes, by which a changed base is noticed."""
    if not args.lora:
        return {}
    lora = {"rank": args.lora, "alpha": ALPHA, "base": inputs["init"]}
    return {"base": str(args.init), "lora": lora}
