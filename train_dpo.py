"""Road 1, offline: preference pairs -> policy, in one stage. DPO (Rafailov et al., 2305.18290) and its variants.

    python train_dpo.py                                        the built-in map: about 15 s on two CPU cores
    python train_dpo.py --init FOLDER --data pairs.jsonl --lr 5e-7 --beta 0.1 --epochs 1       your model, your pairs
    python train_dpo.py --loss ipo|hinge|simpo|cdpo|reference-free

The chosen log-prob usually falls while the margin grows: that is DPO, not a bug, and metrics.jsonl shows it.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from nanoroads import common, data, evaluate, losses, roadmap, tokenizer
from nanoroads.batch import pack, upload
from nanoroads.checkpoint import (
    finish,
    is_finished,
    load_fitting,
    load_model,
    load_state,
    read_safetensors,
    save_config,
    save_state,
    write_atomic,
)
from nanoroads.hf import export

PRETRAINED = {"lr": 1e-6, "epochs": 1.0, "beta": 0.1, "micro_batch_size": 2}  # 5e-5 wrecks a pretrained model
LOSSES = ["dpo", "cdpo", "ipo", "hinge", "simpo", "reference-free"]


def flags(argv):
    p = common.parser(__doc__, PRETRAINED, out=Path("out/dpo"), lr=1e-4, epochs=4.0, batch_size=32)
    p.add_argument("--init", type=Path, default=Path("out/sft"), help="the reference policy (default: %(default)s)")
    p.add_argument("--loss", default="dpo", choices=LOSSES, help="(default: %(default)s)")
    p.add_argument("--beta", type=common.positive(float), default=0.3, help="strength of the regulariser (default: %(default)s)")
    p.add_argument(
        "--label-smoothing",
        type=common.positive(float, or_zero=True, below=0.5),
        default=0.1,
        help="cdpo: share of flipped labels (default: %(default)s)",
    )
    p.add_argument(
        "--gamma",
        type=common.positive(float, or_zero=True),
        default=0.5,
        help="simpo: target margin per token (default: %(default)s)",
    )
    p.add_argument("--eval-data", type=Path, help="held-out pairs (default: the last 5 %% of --data)")
    return p.parse_args(argv)


def preference_loss(args, logp, ref_logp, lengths):
    """logp, ref_logp, lengths (P, 2), chosen first -> loss (P,) of each pair, before any mean."""
    chosen, rejected = logp.unbind(1)
    ref_chosen, ref_rejected = ref_logp.unbind(1)
    if args.loss == "reference-free":
        return losses.reference_free(chosen, rejected, args.beta)
    if args.loss == "simpo":
        return losses.simpo(chosen, rejected, *lengths.unbind(1), args.beta, args.gamma)
    if args.loss == "ipo":
        return losses.ipo(chosen, rejected, ref_chosen, ref_rejected, args.beta)
    if args.loss == "hinge":
        return losses.hinge(chosen, rejected, ref_chosen, ref_rejected, args.beta)
    smoothing = args.label_smoothing if args.loss == "cdpo" else 0.0
    return losses.dpo(chosen, rejected, ref_chosen, ref_rejected, args.beta, smoothing)


def measures(loss, logp, ref_logp, beta):
    """What a person wants to see of some pairs; tensors, so that nothing waits for the device."""
    margin = losses.implicit_reward(logp, ref_logp, beta) @ logp.new_tensor([1.0, -1.0])  # (P,)
    return {
        "loss": loss.mean(),
        "accuracy": evaluate.accuracy(margin),
        "margin": margin.mean(),
        "chosen_logp": logp[:, 0].mean(),
        "rejected_logp": logp[:, 1].mean(),
        # The responses are samples of the reference where the pairs are, as on the map: then this is KL(ref || policy).
        "kl_ref_policy": losses.kl_k1(ref_logp, logp).mean(),
    }


def reference_logps(out, name, prompts, responses, args, device):
    """(P, 2) reference log-probs: computed once before training and kept beside the run."""
    path = out / "ref_logp.safetensors" if name == "train" else out / f"ref_logp_{name}.safetensors"
    if not path.exists():
        reference = load_model(args.init, device=device)
        logp = evaluate.score(reference, prompts, responses, args, device)
        write_atomic(path, lambda p: save_file({"logp": logp}, p))
    logp = read_safetensors(path)[0]["logp"]
    if len(logp) != len(prompts):
        raise common.InputError(f"{path}: is of {len(logp)} pairs, the data has {len(prompts)} now")
    return logp


def main(argv=None):
    args = flags(argv)
    device = common.pick_device(args)
    common.set_kernel(args, device)
    out = common.open_run(args, "dpo")
    if is_finished(out):
        print(f"{out} is finished")
        return export(out, args.export_hf)
    torch.manual_seed(args.seed)

    world = roadmap.WORLDS.get(args.data)
    if world:
        train_path, test_path = common.make_map_inputs(args)
    else:
        train_path, test_path = Path(args.data), args.eval_data
    model = load_fitting(args.init, device)
    tokenizer_name, encoding = tokenizer.of(args.init, model)
    limits = model.config.block_size, args.max_prompt_tokens, args.max_response_tokens, args.skip_bad_rows
    prompts, pairs, _ = data.load(train_path, data.preference_texts, encoding, *limits)
    if args.inspect:
        return data.inspect(prompts, pairs, encoding)
    if test_path:
        test_prompts, test_pairs, _ = data.load(test_path, data.preference_texts, encoding, *limits)
    else:
        (prompts, pairs), (test_prompts, test_pairs) = data.hold_out(prompts, pairs, train_path)

    save_config(out, args, "dpo", model, tokenizer_name, beta=args.beta, reference=str(args.init))
    ref_logp = reference_logps(out, "train", prompts, pairs, args, device)  # (P, 2), on the CPU
    test_ref_logp = reference_logps(out, "test", test_prompts, test_pairs, args, device)
    test_lengths = torch.tensor([[len(r) for r in pair] for pair in test_pairs])
    optimizer = common.make_optimizer(args, model)
    steps = common.total_steps(args, len(prompts))
    start = load_state(out, model, optimizer)
    common.compile_trunk(args, model)
    if world:
        reference, test_texts = load_model(args.init, device=device), roadmap.prompts(world, "test")
    print(f"{args.loss}: {len(prompts):,} pairs, {steps} steps, {device}")

    with common.profiled(args, device) as profile_step:
        for step in (bar := common.progress(start, steps, args.loss)):
            some = common.batch_indices(len(prompts), args.batch_size, step, args.seed)
            parts = []
            for micro in common.chunks(some, args.micro_batch_size):
                batch = pack([prompts[i] for i in micro], [pairs[i] for i in micro], device=device)
                with common.autocast(args, device):
                    logp = model(batch)[0].view(-1, 2)  # (P, 2): chosen, rejected
                ref = upload(ref_logp[micro], device)
                loss = preference_loss(args, logp, ref, batch.lengths.view(-1, 2))  # (P,)
                (loss.sum() / len(some)).backward()  # a mean over the pairs of the whole step
                parts.append((loss.detach(), logp.detach(), ref))
            grad_norm = common.update(args, model, optimizer, step, steps)
            profile_step()

            done = step + 1
            row = {}
            if done % args.eval_every == 0 or done == steps:
                logp = evaluate.score(model, test_prompts, test_pairs, args, device)
                loss = preference_loss(args, logp, test_ref_logp, test_lengths)
                row = {f"eval_{k}": v for k, v in measures(loss, logp, test_ref_logp, args.beta).items()}
                if world:
                    seen = evaluate.on_map(model, reference, world, encoding, test_texts, args, device)
                    row |= {f"map_{k}": sum(v) / len(v) for k, v in seen.items()}
            if done % args.log_every == 0 or row:
                row |= measures(*map(torch.cat, zip(*parts, strict=True)), args.beta) | {"grad_norm": grad_norm}
                row = common.log_metrics(out, done, row)
                bar.set_postfix(loss=row["loss"], accuracy=row["accuracy"])
            if done % args.save_every == 0 and done < steps:
                save_state(out, model, optimizer, done)
    finish(out, model)
    export(out, args.export_hf)
    print(f"held-out loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:.3f}, margin {row['eval_margin']:.3f}")
    if world:
        print(f"on the map: true reward {row['map_reward']:.3f}, greedy {row['map_greedy_reward']:.3f}, KL {row['map_kl']:.2f}")
    print(f"next: python train_rlhf.py --init {args.init}    or: python sample.py --model {out}")


if __name__ == "__main__":
    common.run_script(main)
