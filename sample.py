"""Sample from, or chat with, any checkpoint (a run directory or a Hugging Face folder), streaming.

python sample.py --model out/rlhf --prompt 'WA>FL:'
python sample.py --model out/sft --prompt 'WA>FL:' --reward out/rlhf/reward --best-of 16
python sample.py --model out/dpo --prompts prompts.jsonl --num-samples 4 --temperature 0.7
python sample.py --model FOLDER --chat
"""

import codecs
import sys
from pathlib import Path

import torch

from nanoroads.errors import InputError, printable
from nanoroads.generate import generate, stream
from nanoroads.run.flags import SEED, Parser, add_machine_flags, non_negative, positive, run_script
from nanoroads.run.run import pick_device, pick_dtype, pick_kernel
from nanoroads.score import check_fitted, check_reference, rewards
from nanoroads.text import data, layouts, tokenizer
from nanoroads.text.encode import cut_prompt, encode_row
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.weights.files import read_config
from nanoroads.weights.identity import find
from nanoroads.world.task import task_of_run


def flags(argv):
    """The command line -> args."""
    parser = Parser("--model DIR", description=__doc__)
    group = parser.add_argument_group("the model and its prompts: one of three")
    group.add_argument("--model", type=Path, required=True, help="run directory or Hugging Face folder")
    source = group.add_mutually_exclusive_group().add_argument
    source("--prompt", help="one prompt (default: WA>FL: for a policy of the map, else a line break)")
    source("--prompts", type=Path, help='file of rows {"prompt"} (default: none)')
    chat_help = "a conversation; Ctrl-C stops an answer, an empty line ends it"
    source("--chat", action="store_true", help=chat_help)

    # How to sample.
    add = parser.add_argument_group("sampling").add_argument
    add("--num-samples", type=positive(int), default=1, help="responses per prompt (default: 1)")
    add("--temperature", type=non_negative(float), default=1.0, help="0 is greedy (default: 1)")
    add("--top-k", type=int, default=0, help="from the k likeliest tokens; 0 is all (default: 0)")
    add("--top-p", type=float, default=1.0, help="from the likeliest tokens of this probability (default: 1)")
    add("--max-new-tokens", type=positive(int), help="tokens per response (default: longest route; else 128)")
    add("--seed", type=SEED, default=0, help="seed of the first sample (default: 0)")

    # Best of N by a reward.
    add = parser.add_argument_group("best of N").add_argument
    reward_help = "a reward model's folder, or a policy's, whose log-ratio is the reward (default: none)"
    best_of_help = "draw this many, print the one that --reward likes best (default: none)"
    add("--reward", type=Path, help=reward_help)
    add("--best-of", type=positive(int), help=best_of_help)
    add_machine_flags(parser.add_argument_group("the machine"))
    args = parser.parse_args(argv)

    # Refuse what does not go together.
    if not 0 < args.top_p <= 1 or args.top_k < 0:
        parser.error("--top-p must be in (0, 1], --top-k must not be negative")
    if bool(args.best_of) != bool(args.reward):
        parser.error("--best-of and --reward go together")
    if args.best_of and (args.chat or args.num_samples > 1):
        parser.error("--best-of goes with neither --chat nor --num-samples")
    return args


def pieces(model, encoding, prompt, seed, settings):
    """Yields one response as text, piece by piece, as soon as the bytes of a character are whole."""
    stop = tokenizer.stop_ids(encoding)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of half a character
    with model.autocast():  # around the loop: weights are cast once, not at every step
        for tokens, finished in stream(model, [prompt], 1, eos=stop, seed=seed, **settings):
            if finished.item():  # EOS, which is not printed
                break
            # A token may be part of a character: what is not whole yet is printed with a later one.
            yield decoder.decode(tokenizer.piece(encoding, int(tokens[0])))
    yield decoder.decode(b"", final=True)  # bytes that no token completed


def say(text_pieces, said):
    """Print the pieces of a response as they come, and append them to the list `said`."""
    for piece in text_pieces:
        said.append(piece)
        # Character by character, since an escape sequence may come in several pieces.
        print(printable(piece), end="", flush=True)
    print()


def best_of(args, model, encoding, task, texts, prompts, settings):
    """Draw --best-of responses of each prompt and print the one with the highest reward."""
    # Either class of reward: a scalar head, or the log-ratio of a policy to the reference it was fitted with.
    config = read_config(args.reward)
    device = model.embedding.weight.device
    tokenizer.check_same(args.reward, encoding, args.model)
    reward_model = load_reward_model(args.reward, device, model.compute_dtype, like=model)
    reference = None
    if reward_model.config.head == "lm":
        check_fitted(args.reward)
        reference_folder = find(args.reward, config, "reference")
        check_reference(args.reward, reference_folder)  # it may have been trained again
        reference = load_policy(reference_folder, device, model.compute_dtype, like=model)

    stop = tokenizer.stop_ids(encoding)
    for text, prompt in zip(texts, prompts, strict=True):
        responses = generate(model, [prompt], args.best_of, eos=stop, seed=args.seed, **settings)
        scores = rewards(reward_model, reference, [prompt], responses, config.get("beta"))  # (1, K)
        scores = scores.squeeze(0)  # (K,), K = --best-of
        best = int(scores.argmax())
        answers = tokenizer.decode_all(encoding, responses[0])
        print(printable(f"{text}{answers[best]}"))
        print(f"  score {scores[best]:.3f}, the best of {args.best_of} (mean {scores.mean():.3f})")
        comment = task.comment(text, answers[best])  # on the map: its true reward
        if comment:
            mean = task.true_reward([text], responses, encoding)["true_reward"]
            print(f"{comment}; mean of the {args.best_of}: {mean:.2f}")


def ask():
    """What the user types; nothing at the end of the input, or where Ctrl-C is pressed."""
    try:  # no "you: " where the input is a file or a pipe
        return input("you: " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()  # the next prompt of the shell begins a line
        return ""


def chat(args, model, encoding, settings):
    """A conversation, until an empty line. Ctrl-C stops the answer, and the conversation goes on."""
    messages = []  # the whole conversation, {"role", "content"} each
    room = model.config.block_size - settings["max_new_tokens"]  # tokens that a prompt may have
    line = ask()
    while line:
        messages.append({"role": "user", "content": line})
        said = []  # pieces of the answer, as many as there are when Ctrl-C is pressed
        try:
            prompt = encode_row(encoding, messages).prompt  # by the folder's chat template, if it has one
            prompt = cut_prompt(encoding, prompt, room)  # the oldest tokens go, but not the BOS
            # Each turn draws from a seed of its own; the same words give the same conversation.
            say(pieces(model, encoding, prompt, args.seed + len(messages), settings), said)
        except KeyboardInterrupt:
            print(" [stopped]")
        messages.append({"role": "assistant", "content": "".join(said).strip()})
        line = ask()


def read_prompts(args, task, encoding, context):
    """(prompts as texts, prompts as tokens) of --prompts or --prompt. Raises InputError."""
    if args.prompts:
        # Any row that has a prompt; its answers are not read.
        rows = data.load(args.prompts, layouts.prompt_texts, encoding, data.Limits(context))
        return rows.texts, rows.prompts
    text = task.default_prompt() if args.prompt is None else args.prompt  # --prompt '' is refused later
    prompt = encode_row(encoding, text, typed=True).prompt
    return [text], [prompt]


@torch.no_grad()
def main(argv=None):
    """A model and prompts -> responses on stdout."""
    args = flags(argv)

    # The model, its tokenizer, and what it was trained on: answers of a policy of the map are scored.
    device = pick_device(args.device)
    compute_dtype = pick_dtype(args.dtype, device)
    pick_kernel(args.kernel, device, compute_dtype)
    model = load_policy(args.model, device, compute_dtype)
    _, encoding = tokenizer.of(args.model, model)
    task = task_of_run(read_config(args.model))  # the map's, or that of a file

    # How long an answer may be, and what else `stream` wants to know.
    context = model.config.block_size
    length = args.max_new_tokens or task.max_new_tokens(context // 2, default=128)
    if length >= context:
        raise InputError(f"--max-new-tokens {length} leaves no room for a prompt in a context of {context}")
    # The keyword arguments of `stream` and `generate` that are the same for every prompt.
    settings = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "max_new_tokens": length,
    }
    if args.chat:  # prompts come one by one
        return chat(args, model, encoding, settings)

    # Refuse every prompt that has no answer before the first one is answered.
    texts, prompts = read_prompts(args, task, encoding, context)
    for text, prompt in zip(texts, prompts, strict=True):
        if not prompt:
            raise InputError("an empty prompt")
        if len(prompt) + length > context:
            over = f"the model's context of {context} tokens"
            raise InputError(f"a prompt of {len(prompt)} tokens and --max-new-tokens {length} exceed {over}")
        task.check_prompt(text)

    # Answer them, streaming. Sample i of every prompt has the seed --seed + i: each can be drawn again alone.
    if args.best_of:
        return best_of(args, model, encoding, task, texts, prompts, settings)
    for text, prompt in zip(texts, prompts, strict=True):
        for i in range(args.num_samples):  # one after the other, since they are streamed
            print(printable(text), end="", flush=True)
            said = []
            say(pieces(model, encoding, prompt, args.seed + i, settings), said)
            comment = task.comment(text, "".join(said))  # on the map: its true reward
            if comment:
                print(comment)


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory="a smaller --best-of or --max-new-tokens")
