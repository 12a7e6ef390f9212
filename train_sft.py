"""Stage 0: supervised fine-tuning. Maximum likelihood on responses makes the reference policy of both roads.

python train_sft.py                                           the built-in map: about 15 s on two CPU cores
python train_sft.py --data rows.jsonl --tokenizer gpt2        your rows {"prompt", "response"}, a new model
python train_sft.py --data rows.jsonl --init FOLDER           your rows, a model that exists
"""

from pathlib import Path

import torch

from nanoroads import common, data, evaluate, roadmap, tokenizer
from nanoroads.batch import pack
from nanoroads.checkpoint import finish, is_finished, load_fitting, load_state, save_config, save_state
from nanoroads.hf import export
from nanoroads.model import GPT, GPTConfig

PRETRAINED = {"lr": 1e-5, "epochs": 1.0, "batch_size": 32, "micro_batch_size": 4}


def flags(argv):
    p = common.parser(__doc__, PRETRAINED, out=Path("out/sft"), lr=3e-3, epochs=2.5, batch_size=96)
    p.add_argument("--init", help="run directory or Hugging Face folder to start from (default: a new model)")
    p.add_argument("--tokenizer", default="roadmap", help="of a new model: roadmap | gpt2 | a folder (default: %(default)s)")
    p.add_argument("--n-layer", type=common.positive(int), default=2, help="of a new model (default: %(default)s)")
    p.add_argument("--n-head", type=common.positive(int), default=2, help="of a new model (default: %(default)s)")
    p.add_argument("--n-embd", type=common.positive(int), default=64, help="of a new model (default: %(default)s)")
    p.add_argument("--block-size", type=common.positive(int), default=64, help="context of a new model, in tokens")
    p.add_argument("--prompt-template", help="format string over a row's fields, e.g. '{document}\\n\\nTL;DR:'")
    p.add_argument("--rows", type=common.positive(int), default=40_000, help="demonstrations of the map to write")
    return p.parse_args(argv)


def build(args):
    """The model, the name of its tokenizer, and the tokenizer."""
    if args.init:
        model = load_fitting(args.init)
        return model, *tokenizer.of(args.init, model)
    encoding = tokenizer.get(args.tokenizer)
    if args.n_embd % args.n_head:
        raise common.InputError(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
    shape = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "block_size": args.block_size}
    return GPT(GPTConfig(vocab_size=encoding.n_vocab, tied=False, mlp="gelu", **shape)), args.tokenizer, encoding


def nll(model, batch, tokens):
    """Negative log-likelihood of the batch's response tokens, in nats, over `tokens` of the whole optimizer step."""
    _, token_logp = model(batch)  # (R,)
    return -token_logp.sum() / tokens


@torch.no_grad()
def held_out_nll(model, prompts, responses, args, device):
    logp = evaluate.score(model, prompts, responses, args, device)  # (G, 1)
    return -logp.sum() / sum(len(r) for group in responses for r in group)


def main(argv=None):
    args = flags(argv)
    device = common.pick_device(args)
    common.set_kernel(args, device)
    out = common.open_run(args, "sft")
    if is_finished(out):
        print(f"{out} is finished")
        return export(out, args.export_hf)
    torch.manual_seed(args.seed)

    model, tokenizer_name, encoding = build(args)
    path = args.data
    if world := roadmap.WORLDS.get(args.data):
        path = out / "demos.jsonl"
        data.write_rows(path, roadmap.demonstrations(world, args.rows, args.seed))
    read = lambda row: data.sft_texts(row, args.prompt_template)  # noqa: E731
    limits = args.max_prompt_tokens, args.max_response_tokens, args.skip_bad_rows
    prompts, responses, _ = data.load(path, read, encoding, model.config.block_size, *limits)
    if args.inspect:
        return data.inspect(prompts, responses, encoding)
    (prompts, responses), held_out = data.hold_out(prompts, responses, path)

    save_config(out, args, "sft", model, tokenizer_name)
    model.to(device)
    optimizer = common.make_optimizer(args, model)
    steps = common.total_steps(args, len(prompts))
    start = load_state(out, model, optimizer)
    common.compile_trunk(args, model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(prompts):,} rows, {steps} steps, {device}")

    with common.profiled(args, device) as profile_step:
        for step in (bar := common.progress(start, steps, "sft")):
            some = common.batch_indices(len(prompts), args.batch_size, step, args.seed)
            tokens = sum(len(responses[i][0]) for i in some)  # the loss is a mean over the tokens of the whole step
            loss = 0.0
            for micro in common.chunks(some, args.micro_batch_size):
                batch = pack([prompts[i] for i in micro], [responses[i] for i in micro], device=device)
                with common.autocast(args, device):
                    part = nll(model, batch, tokens)
                part.backward()
                loss = loss + part.detach()
            grad_norm = common.update(args, model, optimizer, step, steps)
            profile_step()

            done = step + 1
            row = {"loss": loss, "grad_norm": grad_norm}
            if done % args.eval_every == 0 or done == steps:
                row["eval_loss"] = held_out_nll(model, *held_out, args, device)
            if done % args.log_every == 0 or "eval_loss" in row:
                row = common.log_metrics(out, done, row)
                bar.set_postfix(loss=row["loss"])
            if done % args.save_every == 0 and done < steps:
                save_state(out, model, optimizer, done)
    finish(out, model)
    export(out, args.export_hf)
    print(f"held-out loss {row['eval_loss']:.4f} nats a token\nnext: python train_dpo.py --init {out}")


if __name__ == "__main__":
    common.run_script(main)
