"""What a script asks of its --data: the built-in map, or a file of yours.

A task answers for its demonstrations and pairs, the length of its answers, and what can be measured
on it. The map's files are made when they are missing, and its true reward is known. Of a file
nothing is known, so its measures are empty.
"""

from pathlib import Path

import torch

from nanoroads import randomness
from nanoroads.errors import InputError, nearest_first
from nanoroads.generate import generate
from nanoroads.losses import kl_k1
from nanoroads.run.commands import make_if_missing
from nanoroads.run.made_from import policy_hash, unchanged_record
from nanoroads.score import sequence_logps
from nanoroads.text import tokenizer
from nanoroads.weights.files import jsonl_bytes, read_config, write_bytes
from nanoroads.world import roadmap

# Every policy is measured with the same random numbers, whatever the seed of its run.
MEASURES = randomness.stream_key("measures on the map")


def task_of(data: str) -> "MapTask | FileTask":
    """The task of a --data flag: the name of a world of the map, or a file.

    Raises InputError for a name that is neither."""
    if data in roadmap.WORLDS:
        return MapTask(roadmap.WORLDS[data])
    is_name = ":" not in data and "/" not in data and not Path(data).suffix
    if is_name and not Path(data).exists():
        worlds = nearest_first(data, roadmap.WORLDS, most=len(roadmap.WORLDS))
        raise InputError(f"--data {data}: no such file, and no world of the map; those are {worlds}")
    return FileTask(data)


def task_of_run(config: dict) -> "MapTask | FileTask":
    """The task that a run was trained on, by its config.json."""
    data = config.get("args", {}).get("data")
    if config.get("tokenizer") == "roadmap" and data in roadmap.WORLDS:
        return MapTask(roadmap.WORLDS[data])
    return FileTask(data)


def response_length(task, given, context, prompts):
    """The most tokens a sampled response may have: `given`, or the task's default if that is None.

    context: the model's. prompts: as tokens. Raises InputError where they do not fit together."""
    room = context - max(map(len, prompts))
    length = given or task.max_new_tokens(room)
    if not 0 < length <= room:
        raise InputError(
            f"prompt and --max-new-tokens {length} exceed the model's context of {context} tokens "
            f"by {length - room}"
        )
    return length


class FileTask:
    """A file of yours."""

    kl = 0.05  # default strength of RL's regulariser
    has_measures = False

    def __init__(self, path):
        self.path = path

    def demonstrations(self, out, rows, seed):
        """The file that SFT imitates."""
        return self.path

    def pairs(self, init, seed, eval_data):
        """(file of training pairs, file of held-out pairs or None)."""
        return self.path, eval_data

    def max_new_tokens(self, room, default=64):
        """Tokens of a sampled response, at most `room`."""
        return min(room, default)

    def measure(self, policy, reference, encoding, groups_per_pass):
        """{name: number} of a policy on held-out prompts."""
        return {}

    def true_reward(self, prompts, responses, encoding):
        """{"true_reward": its mean over sampled responses}, where it is known.

        prompts: strings. responses: token lists for each."""
        return {}

    def report(self, row):
        """Print a run's last measures: of a file there are none."""

    def default_prompt(self):
        """What sample.py begins with, where the user names no prompt."""
        return "\n"

    def check_prompt(self, prompt):
        """Raise InputError where no answer can have a reward: of a file that is not known."""

    def comment(self, prompt, answer):
        """What sample.py prints behind a sampled answer."""
        return ""


class MapTask:
    """One of the worlds of the built-in map, with the same methods."""

    kl = 0.5
    has_measures = True

    def __init__(self, world):
        self.world = world

    # ---------------------------------------------------------------- files, as you would bring them

    def demonstrations(self, out, rows, seed):
        """Writes OUT/demos.jsonl. Raises InputError where it is there already and holds anything else."""
        path = out / "demos.jsonl"
        demos = jsonl_bytes(roadmap.demonstrations(self.world, rows, seed))
        if not path.exists():
            write_bytes(path, demos)
        elif not path.is_file() or path.read_bytes() != demos:
            raise InputError(f"{path}: holds other rows than the map's; delete it, or choose another --out")
        return path

    def reference(self, init, seed):
        """Makes the reference policy `init`, if it is missing."""
        if str(init).startswith("hf:"):
            raise InputError(f"--init {init}: a policy of the map is wanted; --data gives other pairs")
        name = self.world.name
        make_sft = ["train_sft.py", "--data", name, "--out", init, "--resume", "--seed", seed]
        make_if_missing(init / "model.safetensors", make_sft)
        trained_on = read_config(init).get("args", {}).get("data", name)
        if trained_on != name:  # the pairs would be of another world
            raise InputError(
                f"{init}: a policy of --data {trained_on}, not of {name}; --init DIR names (or makes) another"
            )

    def pairs(self, init, seed, eval_data):
        """Makes the reference policy `init` and its labelled pairs, if they are missing.

        Raises InputError for pairs that are not this policy's. Their seed and number may be any."""
        if eval_data:
            raise InputError("--eval-data: the map has its own held-out pairs; it goes with --data FILE")
        self.reference(init, seed)
        train, test = init / "pairs.jsonl", init / "pairs_test.jsonl"
        make_pairs = ["-m", "nanoroads.world.pairs", "--policy", init, "--seed", seed]
        make_if_missing(train, make_pairs + ["--out", train])
        make_if_missing(test, make_pairs + ["--split", "test", "--n", 1000, "--out", test])
        policy = policy_hash(init)
        self.check_pairs(train, policy, "train")
        self.check_pairs(test, policy, "test")
        return train, test

    def check_pairs(self, path, policy, split):
        """Raises InputError unless a file of pairs is as it was drawn, from this policy on this split.

        policy: its policy_hash."""
        drawn_from = unchanged_record(path)["made_from"]
        for name, value in {"policy": policy, "world": self.world.name, "split": split}.items():
            if drawn_from.get(name) != value:
                raise InputError(f"{path}: was drawn from another {name}; delete it, and it is drawn again")

    # ---------------------------------------------------------------- sampling and measures

    def max_new_tokens(self, room, default=64):
        return min(room, self.world.max_moves + 1)

    def measure(self, policy, reference, encoding, groups_per_pass):
        prompts = roadmap.prompts(self.world, "test")
        measures = measure_on_map(policy, reference, self.world, encoding, prompts, groups_per_pass)
        return {f"map_{name}": sum(values) / len(values) for name, values in measures.items()}

    def true_reward(self, prompts, responses, encoding):
        rewards = []
        for prompt, group in zip(prompts, responses, strict=True):
            for answer in tokenizer.decode_all(encoding, group):
                rewards.append(self.world.reward(prompt, answer))
        return {"true_reward": sum(rewards) / len(rewards)}

    def report(self, row):
        reward, greedy, kl = row["map_reward"], row["map_greedy_reward"], row["map_kl"]
        print(f"on the map: true reward {reward:.3f}, greedy {greedy:.3f}, KL {kl:.2f}")

    # ---------------------------------------------------------------- for sample.py

    def default_prompt(self):
        return roadmap.prompts(self.world, "test")[0] if self.world.same_prompts else "WA>FL:"

    def check_prompt(self, prompt):
        self.world.reward(prompt, "")  # raises on a malformed prompt

    def comment(self, prompt, answer):
        parts = roadmap.reward_parts(prompt, answer, self.world)
        reward = parts["reward"]
        legal = parts["legal"]
        arrives = parts["arrives"]
        moves = parts["moves"]
        return f"  true reward {reward:.2f} (legal {legal}, arrives {arrives}, {moves} moves)"


def sample_routes(policy, world, encoding, prompts, k, temperature=1.0, seed=0):
    """k responses to each prompt.

    prompts: strings. Returns (prompts, responses) as tokens, for `sequence_logps`."""
    ids = [tokenizer.encode(encoding, prompt) for prompt in prompts]
    eos, length = tokenizer.stop_ids(encoding), world.max_moves + 1
    return ids, generate(policy, ids, k, length, temperature=temperature, eos=eos, seed=seed)


@torch.no_grad()
def measure_on_map(
    policy, reference, world, encoding, prompts, groups_per_pass=None, samples=1, seed=MEASURES
):
    """A policy's true reward, sampled and greedy, its parts, and KL(policy || reference) in nats.

    prompts: strings; `samples` responses to each are drawn at temperature 1. Returns {name: list}:
    one value per sample, for greedy_reward one per prompt."""
    ids, responses = sample_routes(policy, world, encoding, prompts, samples, seed=seed)
    _, likeliest = sample_routes(policy, world, encoding, prompts, 1, temperature=0)
    values = {"reward": [], "legal": [], "arrives": [], "moves": [], "greedy_reward": [], "kl": []}
    for prompt, group in zip(prompts, responses, strict=True):
        for answer in tokenizer.decode_all(encoding, group):
            parts = roadmap.reward_parts(prompt, answer, world)
            for name in ("reward", "legal", "arrives", "moves"):
                values[name].append(float(parts[name]))
    for prompt, group in zip(prompts, likeliest, strict=True):
        answer = tokenizer.decode_all(encoding, group)[0]
        values["greedy_reward"].append(world.reward(prompt, answer))
    logp = sequence_logps(policy, ids, responses, groups_per_pass)
    ref_logp = sequence_logps(reference, ids, responses, groups_per_pass)
    values["kl"] = kl_k1(logp, ref_logp).flatten().tolist()  # unbiased on samples of the policy
    return values
