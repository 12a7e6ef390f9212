"""Both roads, DPO and RLHF, where every response is a legal route: logits are masked to roads and EOS.

    python -m nanoroads.world.legal --init out/sft --out out/legal.json

A policy held to legal routes still has to plan, but puts no mass on texts that are no routes. The
masked policy is another one than the policy whose weights it has: pairs, samples, log-probs and the
reference are masked too. The training scripts know no mask, so the loops of both roads stand here,
with the scripts' losses and batches, and their optimizer, warmup and schedule.

A route is a tensor here, of at most `moves` moves, filled up with EOS. After EOS only EOS is
allowed, and nothing is asked after the last possible move, so what fills up has probability 1.
"""

import copy
import time
from pathlib import Path

import torch

from nanoroads import losses, randomness
from nanoroads.attention import causal
from nanoroads.cache import KVCache
from nanoroads.progress import tracked
from nanoroads.run.flags import SEED, Parser, positive, run_script
from nanoroads.run.made_from import policy_hash, write_made
from nanoroads.run.optim import adamw, batch_indices, learning_rate, update
from nanoroads.sampling import choose
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy, new_reward_model
from nanoroads.weights.files import json_bytes, read_config
from nanoroads.world import roadmap
from nanoroads.world.distance import Optimum, listed_routes, row_of

ENCODING = tokenizer.get("roadmap")
EOS = tokenizer.eos_id(ENCODING)
PAIRS_PER_STEP = 32
SAMPLES = 8  # of each of RL's 32 prompts
ROUTES_PER_PASS = 4096


def allowed_tokens():
    """(98, 98) bool: which token (column) may follow which (row).

    A prompt's start, a state without its arrow, is the row before the first move; EOS may not follow it."""
    allowed = torch.zeros(ENCODING.n_vocab, ENCODING.n_vocab, dtype=torch.bool)
    for state, neighbours in roadmap.NEIGHBOURS.items():
        start = ENCODING.encode_single_token(state)
        arrow = ENCODING.encode_single_token(f">{state}")
        for neighbour in neighbours:
            road = ENCODING.encode_single_token(f">{neighbour}")
            allowed[start, road] = True
            allowed[arrow, road] = True
        allowed[arrow, EOS] = True
    allowed[EOS, EOS] = True
    return allowed


ALLOWED = allowed_tokens()

# ---------------------------------------------------------------- text and tensors


def prompt_tokens(prompts):
    """P prompts -> (P, 3): start, goal and colon of each."""
    return torch.tensor([tokenizer.encode(ENCODING, prompt) for prompt in prompts])


def route_tokens(texts, moves):
    """R texts of legal routes -> (R, moves), filled up with EOS."""
    routes = torch.full((len(texts), moves), EOS)
    for i, text in enumerate(texts):
        tokens = tokenizer.encode(ENCODING, text)
        routes[i, : len(tokens)] = torch.tensor(tokens)
    return routes


def route_texts(routes):
    """(R, moves) -> R texts, without EOS."""
    texts = []
    for row in routes.tolist():
        texts.append(ENCODING.decode([token for token in row if token != EOS]))
    return texts


# ---------------------------------------------------------------- the masked policy, the reward model


def log_probs(policy, prompts, routes):
    """prompts (R, 3), routes (R, moves) -> log pi (R,) of the masked policy."""
    tokens = torch.cat([prompts, routes[:, :-1]], 1)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = policy.trunk(tokens, position, causal)[:, 2:]  # (R, moves, D), from the prompt's last token on
    before = torch.cat([prompts[:, :1], routes[:, :-1]], 1)  # (R, moves)
    logits = policy.lm_head(hidden).masked_fill(~ALLOWED[before], -torch.inf)  # (R, moves, V)
    token = logits.log_softmax(-1).gather(2, routes[:, :, None]).squeeze(2)  # (R, moves)
    return token.sum(1)


@torch.no_grad()
def given_log_probs(policy, prompts, routes):
    """`log_probs` of many routes, without a gradient."""
    parts = zip(prompts.split(ROUTES_PER_PASS), routes.split(ROUTES_PER_PASS), strict=True)
    return torch.cat([log_probs(policy, *part) for part in parts])


@torch.no_grad()
def sample(policy, prompts, k, moves, seed):
    """prompts (P, 3) -> k routes of each, (P * k, moves), at temperature 1."""
    lists = prompts.tolist()
    u = torch.tensor(randomness.uniform(lists, k, moves, seed))  # (P * k, moves)
    cache = KVCache(policy.config, lists, moves)
    hidden = cache.read_prompts(policy).repeat_interleave(k, 0)  # (P * k, D)
    cache.repeat(k)
    before = prompts[:, 0].repeat_interleave(k)  # (P * k,)
    routes = []
    for move in range(moves):
        if move > 0:
            hidden = policy.trunk(before, cache.next_position(), cache.attend)
        logits = policy.lm_head(hidden).masked_fill(~ALLOWED[before], -torch.inf)  # (P * k, V)
        before, _ = choose(logits, u[:, move], temperature=1.0, top_k=0, top_p=1.0)
        routes.append(before)
    return torch.stack(routes, 1)


def scalar_rewards(model, prompts, routes):
    """prompts (R, 3), routes (R, moves) -> a reward model's (R,), read at EOS as in the scripts."""
    tokens = torch.cat([prompts, routes, torch.full((len(routes), 1), EOS)], 1)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = model.trunk(tokens, position, causal)  # (R, 3 + moves + 1, D)
    end = 3 + (routes != EOS).sum(1)  # (R,) the place of the first EOS
    return model.scalar_head(hidden[torch.arange(len(routes)), end]).squeeze(1)


# ---------------------------------------------------------------- pairs, and the two roads


def draw_pairs(policy, world, n, seed):
    """n labelled pairs of the masked policy's samples -> prompts (n, 3), chosen and rejected (n, moves)."""
    everything = roadmap.prompts(world, "train")
    rng = randomness.generator("legal pair prompts", seed)
    prompts = []
    drawn_pairs = []  # (M, 2, moves) each
    attempt = 0
    while len(prompts) < n:
        drawn = [everything[i] for i in rng.integers(len(everything), size=ROUTES_PER_PASS)]
        key = randomness.stream_key("legal pair samples", seed, attempt)
        routes = sample(policy, prompt_tokens(drawn), 2, world.max_moves, key).view(len(drawn), 2, -1)
        differ = (routes[:, 0] != routes[:, 1]).any(1)  # two equal routes say nothing
        prompts += [drawn[i] for i in differ.nonzero().flatten().tolist()]
        drawn_pairs.append(routes[differ])
        attempt += 1
    prompts = prompts[:n]
    pairs = torch.cat(drawn_pairs)[:n]  # (n, 2, moves)
    first, second = route_texts(pairs[:, 0]), route_texts(pairs[:, 1])
    labels = randomness.generator("legal labels", seed)
    rows = roadmap.label_pairs(world, prompts, first, second, labels)
    is_chosen = torch.tensor([row["chosen"] == text for row, text in zip(rows, first, strict=True)])
    pairs[~is_chosen] = pairs[~is_chosen].flip(1)
    return prompt_tokens(prompts), pairs[:, 0], pairs[:, 1]


def train(model, lr, steps, name, loss_of):
    """`steps` updates, with the warmup, schedule and clip that the scripts have by default.

    loss_of(step) -> the losses of a step, (N,)."""
    optimizer = adamw(model, lr, weight_decay=0.0)
    for step in tracked(range(steps), name, "step"):
        loss_of(step).mean().backward()
        rate = learning_rate(lr, step, steps, warmup=10, schedule="cosine")
        update(model, optimizer, rate, clip=1.0)


def train_dpo(reference, pairs, beta, lr, steps, seed):
    """Road 1 -> a policy."""
    prompts, chosen, rejected = pairs
    ref_chosen = given_log_probs(reference, prompts, chosen)  # (n,)
    ref_rejected = given_log_probs(reference, prompts, rejected)
    policy = copy.deepcopy(reference)

    def loss_of(step):
        i = batch_indices(len(prompts), PAIRS_PER_STEP, step, seed)
        logp = log_probs(policy, prompts[i].repeat(2, 1), torch.cat([chosen[i], rejected[i]]))
        logp_chosen, logp_rejected = logp.chunk(2)
        return losses.dpo(logp_chosen, logp_rejected, ref_chosen[i], ref_rejected[i], beta)

    train(policy, lr, steps, "legal dpo", loss_of)
    return policy


def train_reward(init, pairs, lr, steps, seed):
    """Stage 1 of road 2 -> a reward model. init: folder of the reference."""
    prompts, chosen, rejected = pairs
    randomness.seed_weights("legal reward", seed)
    model = new_reward_model(init)

    def loss_of(step):
        i = batch_indices(len(prompts), PAIRS_PER_STEP, step, seed)
        reward = scalar_rewards(model, prompts[i].repeat(2, 1), torch.cat([chosen[i], rejected[i]]))
        reward_chosen, reward_rejected = reward.chunk(2)
        return losses.bradley_terry(reward_chosen, reward_rejected)

    train(model, lr, steps, "legal reward", loss_of)
    return model


def train_rl(reference, reward_model, prompts, moves, kl, lr, steps, seed):
    """Stage 2 of road 2, RLOO with the KL in the reward -> a policy. prompts (P, 3)."""
    policy = copy.deepcopy(reference)

    def loss_of(step):
        drawn = prompts[batch_indices(len(prompts), PAIRS_PER_STEP, step, seed)]
        routes = sample(policy, drawn, SAMPLES, moves, randomness.stream_key("legal responses", seed, step))
        drawn = drawn.repeat_interleave(SAMPLES, 0)
        logp = log_probs(policy, drawn, routes)
        with torch.no_grad():
            log_ratio = losses.kl_k1(logp, log_probs(reference, drawn, routes))
            reward = scalar_rewards(reward_model, drawn, routes) - kl * log_ratio
        advantage = losses.rloo_advantage(reward.view(-1, SAMPLES)).flatten()
        return losses.policy_gradient(logp, advantage)

    train(policy, lr, steps, "legal rl", loss_of)
    return policy


# ---------------------------------------------------------------- measures, and the command


def route_logps(policy, listed, moves):
    """log pi of listed routes under the masked policy: {prompt: R texts} -> {prompt: (R,)}."""
    counts = [len(texts) for texts in listed.values()]
    prompts = prompt_tokens(listed).repeat_interleave(torch.tensor(counts), 0)
    texts = [text for texts in listed.values() for text in texts]
    logp = given_log_probs(policy, prompts, route_tokens(texts, moves))
    return dict(zip(listed, logp.split(counts), strict=True))


def measure(policy, reference, world, optimum, k=16):
    """`distance.row_of` a masked policy, from k samples of each prompt."""
    everything = roadmap.prompts(world, "train")
    tokens = prompt_tokens(everything)
    routes = sample(policy, tokens, k, world.max_moves, randomness.stream_key("legal measures"))
    rewards = []
    for i, text in enumerate(route_texts(routes)):
        rewards.append(world.reward(everything[i // k], text))
    tokens = tokens.repeat_interleave(k, 0)
    log_ratio = given_log_probs(policy, tokens, routes) - given_log_probs(reference, tokens, routes)
    logps = None
    if optimum is not None:
        logps = route_logps(policy, listed_routes(world), world.max_moves)
    return row_of(torch.tensor(rewards).view(-1, k), log_ratio.view(-1, k), optimum, logps)


def both_roads(args, reference, world):
    """{"sft", "optimum", "dpo", "rlhf"}: the measures of each, the optimum's where routes can be listed."""
    optimum = None
    if listed_routes(world) is not None:
        ref_logps = route_logps(reference, listed_routes(world), world.max_moves)
        optimum = Optimum(world, ref_logps, args.beta)
    pairs = draw_pairs(reference, world, args.n, args.seed)
    dpo = train_dpo(reference, pairs, args.beta, args.lr, args.steps, args.seed)
    reward_model = train_reward(args.init, pairs, args.reward_lr, args.steps, args.seed)
    prompts = prompt_tokens(roadmap.prompts(world, "train"))
    moves, kl = world.max_moves, args.beta  # both roads are held to the reference as strongly
    rlhf = train_rl(reference, reward_model, prompts, moves, kl, args.rl_lr, args.rl_steps, args.seed)
    rows = {}
    for name, policy in {"sft": reference, "dpo": dpo, "rlhf": rlhf}.items():
        rows[name] = measure(policy, reference, world, optimum)
    if optimum is not None:
        rows["optimum"] = optimum.row
    return rows


def main(argv=None):
    """A reference -> the measures of both masked roads, as JSON."""
    parser = Parser("--init DIR --out FILE", description=__doc__)
    add = parser.add_argument_group("both roads").add_argument
    add("--init", type=Path, required=True, help="run directory of the reference, a policy of the map")
    add("--out", type=Path, required=True, help="JSON file to write")
    add("--n", type=positive(int), default=20_000, help="number of pairs (default: 20000)")
    add("--beta", type=positive(float), default=0.5, help="of DPO and of RL's KL term (default: 0.5)")
    add("--steps", type=positive(int), default=625, help="of DPO and of the reward model (default: 625)")
    add("--lr", type=positive(float), default=1e-3, help="of DPO (default: 1e-3)")
    add("--reward-lr", type=positive(float), default=1e-3, help="of the reward model (default: 1e-3)")
    add("--rl-steps", type=positive(int), default=150, help="of RL (default: 150)")
    add("--rl-lr", type=positive(float), default=1e-3, help="of RL (default: 1e-3)")
    add("--seed", type=SEED, default=0, help="seed of pairs, data order and samples (default: 0)")
    args = parser.parse_args(argv)
    world = roadmap.WORLDS[read_config(args.init)["args"]["data"]]
    begin = time.monotonic()
    rows = both_roads(args, load_policy(args.init), world)
    made_from = {**vars(args), "init": policy_hash(args.init), "out": args.out.name}
    write_made(args.out, {args.out.name: json_bytes(rows)}, made_from, round(time.monotonic() - begin, 1))
    print(f"{args.out}: true reward DPO {rows['dpo']['reward']:.3f}, RLHF {rows['rlhf']['reward']:.3f}")


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
