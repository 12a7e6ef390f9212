"""Stage 0: supervised fine-tuning on responses makes the reference policy of both roads.

python train_sft.py                                     the built-in map, 20 s on two CPU cores
python train_sft.py --data rows.jsonl --tokenizer gpt2  rows {"prompt", "response"}, a new model
python train_sft.py --data rows.jsonl --init FOLDER     your rows, a model that exists
"""

from functools import partial
from pathlib import Path

from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.run.commands import data_flag, print_next
from nanoroads.run.flags import model_kind, positive, row_limits, run_script, training_parser, use_defaults
from nanoroads.run.inspect import inspect
from nanoroads.run.lora import adapted
from nanoroads.run.optim import Mean, adamw, batch_indices, learning_rate, rank_chunks, total_steps, update
from nanoroads.run.run import Run
from nanoroads.run.samples import show_samples
from nanoroads.score import sequence_logps
from nanoroads.text import data, layouts, tokenizer
from nanoroads.weights.checkpoint import load_policy
from nanoroads.world.task import task_of

# For a new model, or a small one that was trained from scratch, and for a pretrained one.
DEFAULTS = {
    "small": {"lr": 3e-3, "epochs": 2.5, "batch_size": 96, "micro_batch_size": None},
    "pretrained": {"lr": 1e-5, "epochs": 1.0, "batch_size": 32, "micro_batch_size": 4},
}


def flags(argv):
    """The command line -> args."""
    parser = training_parser(__doc__, Path("out/sft"), DEFAULTS)
    add = parser.add_argument_group("the model and its rows").add_argument
    add("--init", type=Path, help="run directory or Hugging Face folder to start from (default: a new model)")
    template_help = "format string over a row's fields, e.g. '{document}\\n\\nTL;DR:' (default: none)"
    add("--prompt-template", help=template_help)
    add("--rows", type=positive(int), default=40_000, help="demonstrations of the map (default: 40000)")
    add("--tokenizer", default="roadmap", help="roadmap|gpt2|folder, of a new model (default: roadmap)")
    add("--n-layer", type=positive(int), default=2, help="blocks of a new model (default: 2)")
    add("--n-head", type=positive(int), default=2, help="attention heads of a new model (default: 2)")
    add("--n-embd", type=positive(int), default=64, help="width of a new model (default: 64)")
    add("--block-size", type=positive(int), default=64, help="tokens a new model can read (default: 64)")
    args = parser.parse_args(argv)

    kind = model_kind(args.init)
    use_defaults(args, DEFAULTS[kind], kind)
    return args


def build(args, compute_dtype, frozen_dtype=None):
    """The policy to train, its tokenizer's name, and the tokenizer. Raises InputError."""
    if args.init:
        policy = load_policy(args.init, compute_dtype=compute_dtype, matrix_dtype=frozen_dtype)
        name, encoding = tokenizer.of(args.init, policy)
        return policy, name, encoding
    # A new model, with GPT-NeoX's GELU and a head of its own; GPTConfig has all that can be chosen.
    if args.n_embd % args.n_head:
        raise InputError(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
    encoding = tokenizer.get(args.tokenizer)
    config = GPTConfig(
        vocab_size=encoding.n_vocab,
        block_size=args.block_size,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        mlp="gelu",
        tied=False,
    )
    return GPT(config, compute_dtype), args.tokenizer, encoding


def held_out_loss(policy, rows, groups_per_pass):
    """Negative log-likelihood of held-out responses, in nats per token."""
    logp = sequence_logps(policy, rows.prompts, rows.responses, groups_per_pass)  # (N, 1), nats per response
    return -logp.sum() / rows.response_tokens(range(len(rows)))


def main(argv=None):
    """Prompts and responses -> a policy in --out."""
    args = flags(argv)
    run = Run(args, stage="sft")  # the device, the seed, --out (refused if it holds another run)
    if run.finished:
        return run.export()

    # 1. The policy, and the rows as tokens. On the map the rows are demonstrations, written here first.
    task = task_of(args.data)
    policy, tokenizer_name, encoding = build(args, run.compute_dtype, run.frozen_dtype)
    run.place(policy)  # on the device; weights are fp32, products run in run.compute_dtype
    policy = adapted(run, policy) or policy
    rows_path = task.demonstrations(run.out, args.rows, args.seed)
    layout = partial(layouts.sft_texts, template=args.prompt_template)  # a row -> prompt, [response]
    limits = row_limits(args, policy)
    if args.inspect:
        return inspect(rows_path, None, layout, encoding, limits)
    train, test = data.load_split(rows_path, None, layout, encoding, limits)  # 5 % are held out

    # 2. Train it. Each step is a function of (seed, step), so a resumed run ends in the same bits.
    run.describe(policy, tokenizer_name)  # config.json
    optimizer = adamw(policy, args.lr, args.weight_decay)
    total = total_steps(len(train), args.batch_size, args.epochs, args.steps)
    groups_per_pass = args.micro_batch_size or args.batch_size
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{parameters:,} parameters, {len(train):,} rows, {total} steps, {run.device}")

    for step in run.steps(policy, optimizer, total):  # from the last checkpoint on
        indices = batch_indices(len(train), args.batch_size, step, args.seed)
        step_tokens = train.response_tokens(indices)
        metrics = Mean()
        for chunk in rank_chunks(indices, args.micro_batch_size, policy):
            prompts, responses = train.take(chunk)  # tokens; one response per prompt, EOS included
            batch = run.counted(pack(prompts, responses, device=run.device))  # for the tokens a second
            loss = -policy(batch).token  # (R,): -log pi(y_t|x, y_<t) of each response token
            (loss.sum() / step_tokens).backward()  # a mean over the response tokens of the whole step
            metrics.add(loss=loss)
        lr = learning_rate(args.lr, step, total, args.warmup, args.schedule)
        grad_norm = update(policy, optimizer, lr, args.clip)  # clips and steps; the norm before clipping

        # 3. Write down what happened. Nothing here waits for the device, unless the step is logged.
        row = {**metrics.means(), "grad_norm": grad_norm}
        if run.evaluates(step):
            row["eval_loss"] = held_out_loss(policy, test, groups_per_pass)
            show_samples(run, step, policy, test, encoding, task)  # samples.jsonl
        run.log(step, row)  # every --log-every steps
        run.save(step, policy, optimizer)  # every --save-every steps

    run.finish(policy)  # model.safetensors, --export-hf
    print(f"held-out loss {run.last_row['eval_loss']:.4f} nats per token")
    print_next(["train_dpo.py", "--init", run.out, *data_flag(args.data)])


if __name__ == "__main__":
    run_script(main, many_ranks=True)
