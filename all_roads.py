"""Every road on the built-in map, and where they meet: SFT, DPO, RLHF, best-of-N, Theorem 2.2, the gap closed both ways.

    python all_roads.py --quick              a first look: under a minute on two CPU cores
    python all_roads.py                      one seed: two minutes
    python all_roads.py --seeds 0 1 2        means and standard errors

It runs the commands that you would type and prints them, two at a time. A finished phase is not run again; a phase that
was killed goes on from its checkpoint. Results: OUT/report.md, OUT/results.json and the figures beside them.
"""

import argparse
import json
import os
import shlex
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from nanoroads import common, data, evaluate, losses, report, roadmap, tokenizer
from nanoroads.checkpoint import load_model, read_config, read_safetensors, write_json
from nanoroads.generate import generate

SIZES = Namespace(micro_batch_size=None, batch_size=1024, dtype="float32")  # of forward passes when measuring
CPU = torch.device("cpu")
READOUT = {"roadmap": "last", "roadmap-short": "last", "roadmap-hidden": "sum"}  # F1 is a sum over the states named
# What experiments/sweep.md found best, where that is not the scripts' default, which is the main world's.
DPO = {"roadmap": [], "roadmap-short": ["--lr", 3e-4], "roadmap-hidden": ["--lr", 1e-3]}
RLHF = {"roadmap": [], "roadmap-short": ["--kl", 0.3, "--lr", 5e-4], "roadmap-hidden": ["--kl", 0.3, "--reward-lr", 1e-3]}
LOW_BETA, LOW_KL = 0.05, 0.05  # too weak a regulariser, to see over-optimisation


def flags(argv):
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="(default: out/all_roads, or out/quick)")
    p.add_argument(
        "--seeds", type=common.seed, nargs="+", default=[0], help="0 1 2, or a lone 3 for the first three (default: 0)"
    )
    p.add_argument("--quick", action="store_true", help="half of the steps, the main world alone")
    p.add_argument("--jobs", type=common.positive(int), default=2, help="phases at a time, one core each (default: 2)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], help="of the training scripts (default: theirs, auto)")
    p.add_argument("--kernel", choices=["auto", "torch", "triton"], help="of the training scripts (default: theirs, auto)")
    args = p.parse_args(argv)
    if len(args.seeds) == 1:
        args.seeds = list(range(max(1, args.seeds[0])))
    args.seeds = list(dict.fromkeys(args.seeds))  # twice the same one would be two runs in one directory
    args.out = args.out or Path("out/quick" if args.quick else "out/all_roads")
    return args


# ---------------------------------------------------------------- the commands


def plan(at, seed, world, quick, *more):
    """Phases of one seed in one world: a list of (name, names of the phases it needs, command). more: flags of the scripts."""
    phases, flags = [], ["--seed", seed, "--data", world, *more]
    if world != "roadmap":
        at = at / world.removeprefix("roadmap-")
    sft = at / "sft"

    def add(name, needs, *command):
        phases.append((f"{at}/{name}", [f"{at}/{n}" for n in needs], [str(word) for word in command]))

    # A quick look is shorter; otherwise the scripts' own defaults stand. DPO and stage 1 of the local road must stay the same.
    short = {"sft": ["--steps", 700], "pairs": ["--epochs", 2], "rl": ["--reward-epochs", 2, "--steps", 120]}
    short = short if quick else dict.fromkeys(short, [])
    add("sft", [], "train_sft.py", *flags, "--out", sft, *short["sft"])
    pairs = ["-m", "nanoroads.pairs", "--policy", sft, "--seed", seed]
    add("sft/pairs.jsonl", ["sft"], *pairs, "--out", sft / "pairs.jsonl")
    add("sft/pairs_test.jsonl", ["sft"], *pairs, "--split", "test", "--n", 1000, "--out", sft / "pairs_test.jsonl")
    known = ["sft/pairs.jsonl", "sft/pairs_test.jsonl"]
    dpo, rlhf = (["train_dpo.py", *flags, "--init", sft], ["train_rlhf.py", *flags, "--init", sft])
    tuned = ["--readout", READOUT[world], *RLHF[world]]
    add("rlhf_global", known, *rlhf, "--out", at / "rlhf_global", *tuned, *short["rl"])
    add("dpo", known, *dpo, "--out", at / "dpo", *DPO[world], *short["pairs"])
    if world == "roadmap":
        local = [*rlhf, "--out", at / "rlhf_local", "--reward", "local", "--compare", at / "dpo"]
        add("rlhf_local", [*known, "dpo"], *local, *short["rl"])
        add("local", known, *dpo, "--out", at / "local", "--loss", "reference-free", *short["pairs"])
    if world == "roadmap" and not quick:  # over-optimisation: too little KL on either road
        add("dpo_low_beta", known, *dpo, "--out", at / "dpo_low_beta", "--beta", LOW_BETA)
        low = ["--reward", at / "rlhf_global/reward", "--kl", LOW_KL]
        add("rlhf_low_kl", ["rlhf_global"], *rlhf, "--out", at / "rlhf_low_kl", *low)
    return phases


def run_phases(phases, out, jobs):
    """Run the commands, `jobs` at a time, each when those it needs are done. Returns {name: seconds}; finished ones are kept."""
    ledger = out / "phases.json"
    known = common.read_object(ledger) if ledger.exists() else {}
    target = lambda command: Path(command[command.index("--out") + 1])  # noqa: E731
    done = {name: known.get(name) for name, _, c in phases if known.get(name, {}).get("command") == c and target(c).exists()}
    height = {}  # of a phase: the longest chain of phases that wait for it; the highest start first
    for name, needs, _ in reversed(phases):
        for needed in needs:
            height[needed] = max(height.get(needed, 0), height.get(name, 0) + 1)
    waiting = sorted((p for p in phases if p[0] not in done), key=lambda p: -height.get(p[0], 0))
    running = {}
    (out / "logs").mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")  # phases inherit it: those that a killed run left behind finish before their files are touched
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out}: waiting for the phases that another run of it has started", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    env = common.environment() | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    bar = tqdm(total=len(phases), initial=len(done), desc="phases", unit="phase", disable=None, dynamic_ncols=True)
    try:
        while waiting or running:
            for phase in [p for p in waiting if all(n in done for n in p[1])][: jobs - len(running)]:
                name, _, command = phase
                waiting.remove(phase)
                tqdm.write(f"python {shlex.join(command)}")
                log = open(out / "logs" / (name.removeprefix(f"{out}/").replace("/", "-") + ".txt"), "w")
                resume = ["--resume"] if command[0].endswith(".py") else []
                if not resume:  # a file of pairs from a run whose ledger was lost
                    target(command).unlink(missing_ok=True)
                streams = {"stdin": lock, "stdout": log, "stderr": subprocess.STDOUT}
                child = subprocess.Popen(common.python([*command, *resume]), env=env, **streams)
                running[name] = (child, command, time.time(), log)
            bar.set_postfix_str(", ".join(name.removeprefix(f"{out}/") for name in running))
            time.sleep(0.1)
            for name, (child, command, begun, log) in list(running.items()):
                if child.poll() is None:
                    continue
                log.close()
                if child.returncode:
                    last = (Path(log.name).read_text().strip().splitlines() or ["no output"])[-1]
                    raise common.InputError(f"{name} failed: {last} (all of it: {log.name})")
                del running[name]
                done[name] = known[name] = {"command": command, "seconds": round(time.time() - begun, 1)}
                write_json(ledger, known)
                bar.update()
    finally:
        for child, *_ in running.values():
            child.terminate()
        bar.close()
    return {name.removeprefix(f"{out}/"): phase["seconds"] for name, phase in done.items()}


# ---------------------------------------------------------------- the measures


def per_prompt(values, prompts):
    """Mean and standard error over prompts; a prompt's own samples are averaged first, since they are not independent."""
    return evaluate.mean_se(torch.tensor(values, dtype=torch.float64).view(len(prompts), -1).mean(1))


def policy_row(model, ref, world, encoding, prompts):
    seen = evaluate.on_map(model, ref, world, encoding, prompts, SIZES, CPU, samples=8, seed=12345)
    names = {"reward": "reward", "greedy_reward": "greedy_reward", "kl_to_ref": "kl", "legal": "legal", "arrives": "arrives"}
    return {name: per_prompt(seen[key], prompts) for name, key in names.items()}


def optimum_row(ref, encoding, prompts):
    """The limit of pi_ref exp(r*/beta) at beta -> 0: pi_ref restricted to the shortest routes. Exact, by enumeration."""
    routes = [(p, route) for p in prompts for route in roadmap.shortest_routes(p)]
    logp = evaluate.score(ref, *route_tokens(encoding, routes), SIZES, CPU).flatten().double()
    mass = {p: torch.logsumexp(logp[[i for i, (q, _) in enumerate(routes) if q == p]], 0).item() for p in prompts}
    reward = evaluate.mean_se([roadmap.optimal_reward(p) for p in prompts])
    return {"reward": reward, "greedy_reward": reward, "kl_to_ref": evaluate.mean_se([-mass[p] for p in prompts])}


def route_tokens(encoding, routes):
    eos = tokenizer.eos_id(encoding)
    return [tokenizer.encode(encoding, p) for p, _ in routes], [[tokenizer.encode(encoding, r) + [eos]] for _, r in routes]


def reward_model_rows(at, encoding, prompts):
    """Held-out Bradley-Terry likelihood, and the true reward of the best of N samples of the SFT policy, by each model."""
    sft, world = load_model(at / "sft"), roadmap.WORLDS["roadmap"]
    models = {
        "dpo": (at / "dpo", sft),  # beta log pi/pi_ref
        "local": (at / "local", None),  # beta log pi, the paper's local reward model: without the reference
        "global": (at / "rlhf_global/reward", None),
    }
    test = data.load(at / "sft/pairs_test.jsonl", data.preference_texts, encoding, sft.config.block_size)[:2]
    ids = [tokenizer.encode(encoding, p) for p in prompts]
    samples = generate(sft, ids, 16, world.max_moves + 1, eos=tokenizer.eos_id(encoding), seed=999)
    true = torch.tensor(
        [[world.reward(p, t) for t in evaluate.texts(encoding, g)] for p, g in zip(prompts, samples, strict=True)]
    )
    rows = {}
    for name, (folder, ref) in models.items():
        model, beta = load_model(folder), read_config(folder).get("beta")
        pair = evaluate.rewards_of(model, ref, *test, SIZES, CPU, beta)  # (P, 2)
        pair = pair * beta if name == "local" else pair
        value = evaluate.rewards_of(model, ref, ids, samples, SIZES, CPU, beta)  # (prompts, 16)
        rows[name] = {
            "nll": losses.bradley_terry(*pair.unbind(1)).mean().item(),
            "accuracy": evaluate.accuracy(pair[:, 0] - pair[:, 1]).item(),
            "best_of_n": best_of_n(value, true),
        }
    return rows, best_of_n(true, true)


def best_of_n(value, true):
    """value, true (prompts, 16): the true reward of each block of N samples' favourite, for N = 1 ... 16."""
    result = {}
    for n in (1, 2, 4, 8, 16):
        blocks, truth = value.view(len(value), -1, n), true.view(len(value), -1, n)
        result[str(n)] = truth.gather(2, blocks.argmax(2, keepdim=True)).mean().item()
    return result


def equivalence_row(at, encoding, prompts):
    """KL(pi_DPO || .) in nats on samples of pi_DPO; and how far apart stage 1 of the local road and DPO ended (Theorem 2.2)."""
    dpo, world = load_model(at / "dpo"), roadmap.WORLDS["roadmap"]
    ids = [tokenizer.encode(encoding, p) for p in prompts]
    samples = generate(dpo, ids, 8, world.max_moves + 1, eos=tokenizer.eos_id(encoding), seed=777)
    logp = evaluate.score(dpo, ids, samples, SIZES, CPU)
    kl = {n: (logp - evaluate.score(load_model(at / n), ids, samples, SIZES, CPU)).mean().item() for n in ("rlhf_local", "sft")}
    one, two = (read_safetensors(at / n / "model.safetensors")[0] for n in ("dpo", "rlhf_local/reward"))
    apart = max((one[k] - two[k]).abs().max().item() for k in one)
    return {"kl_dpo_rlhf_local": kl["rlhf_local"], "kl_dpo_sft": kl["sft"], "stage_1_weights_apart": apart}


def gap_closed_row(at, name):
    """True reward of both roads in a world where generating is no harder than verifying, or verifying no easier."""
    world = roadmap.WORLDS[name]
    at, prompts = at / name.removeprefix("roadmap-"), roadmap.prompts(world, "test")
    encoding, ref = tokenizer.get("roadmap"), load_model(at / "sft")
    rows = {n: policy_row(load_model(at / n), ref, world, encoding, prompts) for n in ("sft", "dpo", "rlhf_global")}
    result = {n: row["reward"] for n, row in rows.items()}
    if name == "roadmap-short":  # few prompts: is it new ones that a road is bad at?
        seen = roadmap.prompts(world, "train")[:256]
        for n in rows:
            result[n]["on_training_prompts"] = policy_row(load_model(at / n), ref, world, encoding, seen)["reward"]
        # The soft optimum that both roads aim at is exact here: how far is each from it?
        routes = [(p, r) for p in prompts for r in roadmap.routes(world, p)]
        logp = evaluate.score(ref, *route_tokens(encoding, routes), SIZES, CPU).flatten().double()
        for n in ("dpo", "rlhf_global"):
            beta = read_config(at / n).get("beta" if n == "dpo" else "kl")
            log_z = []
            for p in prompts:
                mine = [i for i, (q, _) in enumerate(routes) if q == p]
                r = world.bt_scale * torch.tensor([world.reward(p, routes[i][1]) for i in mine], dtype=torch.float64)
                log_z.append(roadmap.exact_optimum(logp[mine], r, beta)["log_z"].item())
            reward, mean_log_z = world.bt_scale * rows[n]["reward"]["mean"], sum(log_z) / len(log_z)
            result[n]["kl_to_optimum"] = roadmap.kl_to_optimum(rows[n]["kl_to_ref"]["mean"], reward, mean_log_z, beta)
    return result


def measure(at, quick):
    """Everything results.json says of one seed."""
    world, encoding = roadmap.WORLDS["roadmap"], tokenizer.get("roadmap")
    prompts, ref = roadmap.prompts(world, "test"), load_model(at / "sft")
    names = ("sft", "dpo", "rlhf_global", "rlhf_local")
    policies = {n: policy_row(load_model(at / n), ref, world, encoding, prompts) for n in names}
    policies["optimum"] = optimum_row(ref, encoding, prompts)
    reward_models, ceiling = reward_model_rows(at, encoding, prompts)
    worlds = {} if quick else {"short_horizon": "roadmap-short", "hidden_reference": "roadmap-hidden"}
    return {
        "policies": policies,
        "reward_models": reward_models,
        "best_of_n_true_reward": ceiling,
        "equivalence": equivalence_row(at, encoding, prompts),
        "gap_closed": {label: gap_closed_row(at, name) for label, name in worlds.items()},
        "routes": greedy_routes(at, encoding, prompts),
    }


def greedy_routes(at, encoding, prompts):
    """{policy: {prompt: its likeliest response}} for the map in the report: the first held-out prompts 2, 3, 4, 5 moves apart."""
    moves = {p: roadmap.shortest_routes(p)[0].count(">") for p in prompts}
    some = [next(p for p in prompts if moves[p] == n) for n in (2, 3, 4, 5)]
    ids, settings = [tokenizer.encode(encoding, p) for p in some], {"temperature": 0, "eos": tokenizer.eos_id(encoding)}
    rows = {"optimum": {p: roadmap.shortest_routes(p)[0] for p in some}}
    for name in ("sft", "dpo", "rlhf_global"):
        responses = generate(load_model(at / name), ids, 1, roadmap.WORLDS["roadmap"].max_moves + 1, **settings)
        rows[name] = dict(zip(some, evaluate.texts(encoding, [r[0] for r in responses]), strict=True))
    return rows


def combine(rows):
    """Results of several seeds -> one: {"mean", "se"} become mean and standard error over seeds, plain numbers their mean."""
    first = rows[0]
    if len(rows) == 1 or not isinstance(first, (dict, float, int)):
        return first
    if isinstance(first, dict) and "mean" in first:
        rest = {k: combine([row[k] for row in rows]) for k in first if k not in ("mean", "se")}
        return evaluate.mean_se([row["mean"] for row in rows]) | rest
    if isinstance(first, dict):
        return {k: combine([row[k] for row in rows]) for k in first}
    return sum(rows) / len(rows)


def main(argv=None):
    args = flags(argv)
    begun, out = time.time(), args.out
    worlds = ["roadmap"] if args.quick else ["roadmap", "roadmap-short", "roadmap-hidden"]
    more = [word for name in ("device", "kernel") if getattr(args, name) for word in (f"--{name}", getattr(args, name))]
    phases = [p for seed in args.seeds for world in worlds for p in plan(out / f"seed{seed}", seed, world, args.quick, *more)]
    seconds = run_phases(phases, out, args.jobs)
    rows = []
    for seed in tqdm(args.seeds, desc="measuring", unit="seed", disable=None):
        measures = out / f"seed{seed}" / "measures.json"
        if not measures.exists() or measures.stat().st_mtime < (out / "phases.json").stat().st_mtime:
            write_json(measures, measure(out / f"seed{seed}", args.quick))
        rows.append(json.loads(measures.read_text()))
    seconds["total"] = round(time.time() - begun, 1)
    n = sum(1 for _ in open(out / f"seed{args.seeds[0]}" / "sft/pairs.jsonl"))
    results = {"seeds": args.seeds, "seconds": seconds, "pairs": n, **combine(rows)}
    write_json(out / "results.json", results)
    report.write(results, out, out / f"seed{args.seeds[0]}")
    print("\n".join(report.verdict(results)))
    print(f"\n{out}/report.md has the tables and figures, {out}/results.json the numbers ({seconds['total']:.0f} s)")
    print(f"next: python sample.py --model {out}/seed{args.seeds[0]}/rlhf_global --prompt 'WA>FL:'")


if __name__ == "__main__":
    common.run_script(main)
