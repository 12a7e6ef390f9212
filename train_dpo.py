"""Road 1, offline: pairs -> policy in one stage. DPO (Rafailov et al., 2305.18290) and variants.

    python train_dpo.py                                    the built-in map, 20 s on two CPU cores
    python train_dpo.py --init FOLDER --data pairs.jsonl   your model and your pairs
    python train_dpo.py --loss ipo|simpo|kto|orpo|...      twelve losses: see the README's table

A pair is a row {"prompt", "chosen", "rejected"}. The chosen log-prob usually falls while the margin
grows (see metrics.jsonl): that is DPO, not a bug.
"""

from pathlib import Path

import torch

from nanoroads import loss_variants, losses
from nanoroads.batch import pack, upload
from nanoroads.run.commands import data_flag, print_next
from nanoroads.run.distributed import batch_means
from nanoroads.run.flags import (
    model_kind,
    non_negative,
    positive,
    row_limits,
    run_script,
    training_parser,
    use_defaults,
)
from nanoroads.run.inspect import inspect
from nanoroads.run.lora import adapted
from nanoroads.run.optim import Mean, adamw, batch_indices, learning_rate, rank_chunks, total_steps, update
from nanoroads.run.run import Run
from nanoroads.run.samples import show_samples
from nanoroads.score import ranked_right, reference_logps, sequence_logps
from nanoroads.text import data, layouts, tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reference
from nanoroads.world.task import task_of

# For a small model that is trained from scratch, as the map's is, and for a pretrained one, which the
# small one's learning rate would wreck.
DEFAULTS = {
    "small": {"lr": 1e-4, "epochs": 4.0, "beta": 0.3, "batch_size": 32, "micro_batch_size": None},
    "pretrained": {"lr": 1e-6, "epochs": 1.0, "beta": 0.1, "batch_size": 32, "micro_batch_size": 2},
}
LOSSES = ["dpo", "cdpo", "ipo", "hinge", "simpo", "reference-free"] + loss_variants.PAIR_LOSSES


def flags(argv):
    """The command line -> args."""
    parser = training_parser(__doc__, Path("out/dpo"), DEFAULTS)
    add = parser.add_argument_group("the pairs and the loss").add_argument
    below_half = non_negative(float, below=0.5)
    add("--init", type=Path, default=Path("out/sft"), help="reference policy (default: %(default)s)")
    add("--eval-data", type=Path, help="file of held-out pairs (default: 5 %% of --data)")
    add("--loss", default="dpo", choices=LOSSES, help="see the README's table of losses (default: dpo)")
    add("--beta", type=positive(float), help="weight of the regulariser (default: 0.3; pretrained 0.1)")
    add("--label-smoothing", type=below_half, default=0.1, help="cdpo: share of wrong labels (default: 0.1)")
    add("--gamma", type=non_negative(float), default=0.5, help="simpo: target margin (default: 0.5)")
    add("--nll-weight", type=non_negative(float), default=1.0, help="rpo: of the chosen's NLL (default: 1)")
    add("--odds-weight", type=positive(float), default=0.1, help="orpo: of the odds ratio (default: 0.1)")
    args = parser.parse_args(argv)

    kind = model_kind(args.init)
    use_defaults(args, DEFAULTS[kind], kind)
    if args.loss == "kto" and args.micro_batch_size and args.micro_batch_size < args.batch_size:
        parser.error("--micro-batch-size: --loss kto needs the whole --batch-size for its baseline")
    return args


def preference_loss(args, logp, ref_logp, lengths):
    """logp, ref_logp, lengths (P, 2), chosen first -> loss (P,) of each pair, before any mean."""
    chosen, rejected = logp.unbind(1)  # (P,) each: log pi(y|x), a sum over the response's tokens
    ref_chosen, ref_rejected = ref_logp.unbind(1)  # (P,) each: log pi_ref(y|x)
    if args.loss == "reference-free":
        return losses.reference_free(chosen, rejected, args.beta)
    if args.loss == "simpo":
        chosen_length, rejected_length = lengths.unbind(1)
        return losses.simpo(chosen, rejected, chosen_length, rejected_length, args.beta, args.gamma)
    if args.loss == "ipo":
        return losses.ipo(chosen, rejected, ref_chosen, ref_rejected, args.beta)
    if args.loss == "hinge":
        return losses.hinge(chosen, rejected, ref_chosen, ref_rejected, args.beta)
    if args.loss in loss_variants.PAIR_LOSSES:
        means = {}
        if args.loss == "kto":  # takes means over the whole step
            means = batch_means(chosen_mean=chosen - ref_chosen, rejected_mean=rejected - ref_rejected)
        weights = (args.beta, args.nll_weight, args.odds_weight)
        return loss_variants.of_pairs(args.loss, logp, ref_logp, lengths, *weights, **means)
    smoothing = args.label_smoothing if args.loss == "cdpo" else 0.0
    return losses.dpo(chosen, rejected, ref_chosen, ref_rejected, args.beta, smoothing)


def measures(loss, logp, ref_logp, beta):
    """Measures of P pairs: {name: tensor}, whose means are logged.

    Margin and accuracy are those of the implicit reward, whatever the loss, so that runs can be compared."""
    reward = losses.implicit_reward(logp, ref_logp, beta)  # (P, 2)
    margin = reward[:, 0] - reward[:, 1]  # (P,), positive where the pair is ranked right
    return {
        "loss": loss,
        "accuracy": ranked_right(margin),
        "margin": margin,
        "chosen_logp": logp[:, 0],
        "rejected_logp": logp[:, 1],
        # On the map the responses are samples of the reference, so this estimates KL(reference || policy);
        # roughly, because the pairs leave out equal and cut-off samples.
        "kl_ref_policy": losses.kl_k1(ref_logp, logp),
    }


def held_out_measures(args, policy, rows, ref_logp, groups_per_pass):
    """The means of `measures` over held-out pairs: {"eval_loss", "eval_accuracy", ...}."""
    logp = sequence_logps(policy, rows.prompts, rows.responses, groups_per_pass)  # (P, 2)
    loss = preference_loss(args, logp, ref_logp, torch.tensor(rows.lengths()))
    values = measures(loss, logp, ref_logp, args.beta)
    return {f"eval_{name}": value.mean() for name, value in values.items()}


def main(argv=None):
    """Pairs -> a policy in --out."""
    args = flags(argv)
    run = Run(args, stage="dpo")  # the device, the seed, --out (refused if it holds another run)
    if run.finished:
        return run.export()

    # 1. The reference policy, and the pairs as tokens. On the map both are made if they are missing.
    task = task_of(args.data)
    train_path, test_path = task.pairs(args.init, args.seed, args.eval_data)
    reference = run.place(load_reference(args.init, run.compute_dtype, run.frozen_dtype))
    tokenizer_name, encoding = tokenizer.of(args.init, reference)
    limits = row_limits(args, reference)
    if args.inspect:
        return inspect(train_path, test_path, layouts.preference_texts, encoding, limits)
    train, test = data.load_split(train_path, test_path, layouts.preference_texts, encoding, limits)

    # 2. The reference never changes, so what it says of the pairs is computed once, and kept in --out.
    groups_per_pass = args.micro_batch_size or args.batch_size  # a group: one prompt and its responses
    ref_logp = reference_logps(run, "ref_logp", reference, train, groups_per_pass)  # (N, 2), on the CPU
    test_ref_logp = reference_logps(run, "ref_logp_test", reference, test, groups_per_pass)
    if not task.has_measures and not args.lora:
        reference = None  # the map's measures and adapters need it; else the policy can have its memory

    # 3. Train a second copy of --init, or adapters on the first. A step depends on (seed, step) alone.
    policy = adapted(run, reference) or run.place(load_policy(args.init, compute_dtype=run.compute_dtype))
    run.describe(policy, tokenizer_name, beta=args.beta, reference=str(args.init))  # config.json
    optimizer = adamw(policy, args.lr, args.weight_decay)
    total = total_steps(len(train), args.batch_size, args.epochs, args.steps)
    print(f"{args.loss}: {len(train):,} pairs, {total} steps, {run.device}")

    for step in run.steps(policy, optimizer, total):  # from the last checkpoint on, to the same bits
        indices = batch_indices(len(train), args.batch_size, step, args.seed)
        metrics = Mean()
        for chunk in rank_chunks(indices, args.micro_batch_size, policy, takes_mean=args.loss == "kto"):
            prompts, pairs = train.take(chunk)  # tokens; two responses per prompt, chosen first
            batch = run.counted(pack(prompts, pairs, device=run.device))  # P prompts, 2P responses in order
            logp = policy(batch).sequence.view(-1, 2)  # (P, 2): chosen, rejected
            chunk_ref_logp = upload(ref_logp[chunk], run.device)  # (P, 2)
            loss = preference_loss(args, logp, chunk_ref_logp, batch.lengths.view(-1, 2))  # (P,)
            (loss.sum() / len(indices)).backward()  # a mean over the pairs of the whole step
            metrics.add(**measures(loss, logp, chunk_ref_logp, args.beta))
        lr = learning_rate(args.lr, step, total, args.warmup, args.schedule)
        grad_norm = update(policy, optimizer, lr, args.clip)  # clips and steps; the norm before clipping

        # 4. Write down what happened. Nothing here waits for the device, unless the step is logged.
        row = {**metrics.means(), "grad_norm": grad_norm}
        if run.evaluates(step):
            row.update(held_out_measures(args, policy, test, test_ref_logp, groups_per_pass))
            row.update(task.measure(policy, reference, encoding, groups_per_pass))  # {} where it is not known
            show_samples(run, step, policy, test, encoding, task)  # samples.jsonl
        run.log(step, row, show=("loss", "accuracy", "margin"))  # every --log-every steps
        run.save(step, policy, optimizer)  # every --save-every steps

    run.finish(policy)  # model.safetensors, --export-hf
    loss, accuracy = run.last_row["eval_loss"], run.last_row["eval_accuracy"]
    print(f"held-out loss {loss:.4f}, accuracy {accuracy:.3f}, margin {run.last_row['eval_margin']:.3f}")
    task.report(run.last_row)
    rlhf = ["train_rlhf.py", "--init", args.init] + data_flag(args.data, pairs=args.data)
    print_next(rlhf, ["sample.py", "--model", run.out])


if __name__ == "__main__":
    run_script(main, many_ranks=True)
