"""Sample from, or chat with, any checkpoint: a run directory or a Hugging Face folder. Tokens are streamed.

python sample.py --model out/rlhf --prompt 'WA>FL:'
python sample.py --model out/sft --prompt 'WA>FL:' --reward out/rlhf/reward --best-of 16
python sample.py --model out/dpo --prompts prompts.jsonl --num-samples 4 --temperature 0.7
python sample.py --model FOLDER --chat
"""

import argparse
import codecs
import sys
from argparse import Namespace
from pathlib import Path

import torch

from nanoroads import common, data, evaluate, roadmap, tokenizer
from nanoroads.checkpoint import load_fitting, read_config
from nanoroads.generate import generate, stream


def flags(argv):
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="run directory or Hugging Face folder")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="one prompt (default: WA>FL: for a policy on the map)")
    source.add_argument("--prompts", type=Path, help='.jsonl file of {"prompt"} rows')
    source.add_argument("--chat", action="store_true", help="a conversation; an empty line ends it")
    p.add_argument("--num-samples", type=common.positive(int), default=1, help="of each prompt (default: %(default)s)")
    p.add_argument(
        "--temperature", type=common.positive(float, or_zero=True), default=1.0, help="0 is greedy (default: %(default)s)"
    )
    p.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    p.add_argument("--top-p", type=float, default=1.0, help="only the likeliest tokens that make up this probability")
    p.add_argument("--max-new-tokens", type=common.positive(int), help="(default: the map's longest route; 128 elsewhere)")
    p.add_argument("--seed", type=common.seed, default=0)
    p.add_argument("--reward", type=Path, help="a reward model's run, or a policy's whose log-ratio is the reward")
    p.add_argument("--best-of", type=common.positive(int), help="draw this many, print the one that --reward likes best")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--kernel", default="auto", choices=["auto", "torch", "triton"])
    args = p.parse_args(argv)
    if not 0 < args.top_p <= 1 or args.top_k < 0:
        p.error("--top-p must be in (0, 1], --top-k must not be negative")
    if bool(args.best_of) != bool(args.reward):
        p.error("--best-of and --reward go together")
    if args.best_of and (args.chat or args.num_samples > 1):
        p.error("--best-of goes with neither --chat nor --num-samples")
    return args


def say(model, encoding, prompt, seed, settings):
    """Stream one response to stdout, as text, as soon as its bytes are whole. Returns the text."""
    eos, whole = tokenizer.eos_id(encoding), codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    for tokens, finished in stream(model, [prompt], 1, eos=eos, seed=seed, **settings):
        if finished.item():
            break
        piece = whole.decode(tokenizer.piece(encoding, int(tokens[0])))
        text += piece
        print(piece, end="", flush=True)
    print(whole.decode(b"", final=True))  # bytes that no token completed
    return text


def best_of(args, model, encoding, prompts, settings, device):
    """Draw --best-of responses of each prompt and print the one with the highest reward."""
    config = read_config(args.reward)
    reward = load_fitting(args.reward, device, like=model, head=None)
    reference = None
    if reward.config.head == "lm":
        evaluate.check_local(args.reward, config, config.get("reference", ""))
        reference = load_fitting(config["reference"], device, like=model)
    sizes = Namespace(micro_batch_size=None, batch_size=64, dtype=args.dtype)
    eos = tokenizer.eos_id(encoding)
    for text, prompt in prompts:
        responses = generate(model, [prompt], args.best_of, eos=eos, seed=args.seed, **settings)
        scores = evaluate.rewards_of(reward, reference, [prompt], responses, sizes, device, config.get("beta"))[0]
        best = int(scores.argmax())
        print(f"{text}{evaluate.texts(encoding, responses[0])[best]}")
        print(f"  score {scores[best]:.3f}, the best of {args.best_of} (mean {scores.mean():.3f})")


def ask():
    """What the user types; nothing at the end of the input."""
    try:
        return input("you: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def chat(model, encoding, args, settings):
    messages = []
    while line := ask():
        messages.append({"role": "user", "content": line})
        prompt = data.encode(encoding, messages)[0]  # by the folder's chat template, if it has one
        room = model.config.block_size - settings["max_new_tokens"]
        answer = say(model, encoding, data.cut_prompt(encoding, prompt, room), args.seed + len(messages), settings)
        messages.append({"role": "assistant", "content": answer.strip()})


def main(argv=None):
    args = flags(argv)
    device = common.pick_device(args)
    common.set_kernel(args, device)
    config = read_config(args.model)
    model, world = load_fitting(args.model, device), None
    name, encoding = tokenizer.of(args.model, model)
    if name == "roadmap":
        world = roadmap.WORLDS.get(config.get("args", {}).get("data"))  # None: trained on a file of one's own
    room = model.config.block_size
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    settings["max_new_tokens"] = args.max_new_tokens or (world.max_moves + 1 if world else min(128, room // 2))
    if settings["max_new_tokens"] >= room:
        raise common.InputError(
            f"--max-new-tokens {settings['max_new_tokens']} leaves no room for a prompt in a context of {room}"
        )
    if args.chat:
        with common.autocast(args, device):
            return chat(model, encoding, args, settings)

    if args.prompts:
        prompts, _, texts = data.load(args.prompts, data.prompt_texts, encoding, room)
    else:
        default = "\n" if not world else roadmap.prompts(world, "test")[0] if world.hidden else "WA>FL:"
        texts = [default if args.prompt is None else args.prompt]
        prompts = [data.encode(encoding, texts[0])[0]]
    if not all(prompts) or max(map(len, prompts)) + settings["max_new_tokens"] > room:
        raise common.InputError(f"an empty prompt, or prompt and --max-new-tokens exceed the model's context of {room} tokens")
    if world:
        [world.reward(text, "") for text in texts]  # a prompt that names no start and goal is refused before anything is sampled
    with common.autocast(args, device), torch.no_grad():
        if args.best_of:
            return best_of(args, model, encoding, list(zip(texts, prompts, strict=True)), settings, device)
        for text, prompt in zip(texts, prompts, strict=True):
            for i in range(args.num_samples):
                print(text, end="", flush=True)
                answer = say(model, encoding, prompt, args.seed + i, settings)
                if world:
                    seen = roadmap.reward_parts(text, answer, world)
                    parts = f"legal {seen['legal']}, arrives {seen['arrives']}, {seen['moves']} moves"
                    print(f"  true reward {seen['reward']:.2f} ({parts})")


if __name__ == "__main__":
    common.run_script(main)
