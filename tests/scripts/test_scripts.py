"""Each script end to end, tiny: the files it leaves, the keys it logs, the numbers of step 0, and that it learns."""

import json
import math
import re

import pytest
import tiktoken
import torch
from helpers.runs import argv, metrics, read_jsonl, run, weights, write_jsonl

import sample
import train_dpo
import train_rlhf
import train_sft
from nanoroads import common, data, evaluate, losses, pairs, tokenizer
from nanoroads.weights.checkpoint import load_model, read_config, read_safetensors
from nanoroads.generate import generate

SFT_KEYS = {"step", "loss", "grad_norm"}
MAP_KEYS = {f"map_{k}" for k in ("reward", "legal", "arrives", "moves", "greedy_reward", "kl")}
DPO_MEASURES = {"loss", "accuracy", "margin", "chosen_logp", "rejected_logp", "kl_ref_policy"}
DPO_KEYS = DPO_MEASURES | {"step", "grad_norm"}
RM_KEYS = {"step", "loss", "accuracy", "grad_norm"}
RL_KEYS = {"step", "loss", "reward", "kl", "entropy", "clip_fraction", "length", "grad_norm"}
SECONDS = {"seconds_sampling", "seconds_scoring", "seconds_training"}


def check_run(folder, stage, every, at_evaluation):
    """The documented files and keys. Returns the rows of metrics.jsonl."""
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "config.json", "metrics.jsonl"}
    assert not list(folder.glob("*.tmp")) and not (folder / "resume.safetensors").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["stage"] == stage and {"model", "tokenizer", "args"} <= config.keys()
    load_model(folder)
    rows = common.read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        evaluated = row["step"] % read_config(folder)["args"]["eval_every"] == 0 or row["step"] == len(rows)
        assert row.keys() == every | (at_evaluation if evaluated else set()), row["step"]
        assert all(math.isfinite(v) for v in row.values())
    return rows


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------- SFT


def test_sft_on_the_map(sft):
    log = check_run(sft, "sft", SFT_KEYS, {"eval_loss"})
    assert log[0]["loss"] == pytest.approx(math.log(98), abs=0.02)  # a new model knows nothing of its 98 tokens
    assert log[-1]["loss"] < 2.4 and log[-1]["eval_loss"] < 2.4
    assert read_config(sft)["tokenizer"] == "roadmap" and len(read_jsonl(sft / "demos.jsonl")) == 2000


def test_sft_on_own_rows(rows, sft, tmp_path):
    log = check_run(run(train_sft, tmp_path / "new", data=rows / "sft.jsonl", rows=None), "sft", SFT_KEYS, {"eval_loss"})
    assert log[-1]["loss"] < log[0]["loss"] - 1
    # from a policy that exists, the first loss is the policy's own on that batch, not a new model's
    log = metrics(run(train_sft, tmp_path / "more", data=rows / "sft.jsonl", init=sft, steps=3, lr=1e-4))
    prompts, responses, _ = data.load(rows / "sft.jsonl", data.sft_texts, tokenizer.get("roadmap"), 32)
    some = common.batch_indices(114, 32, 0, 0)  # 120 rows, 5% of them held out
    chosen = [responses[i] for i in some]
    logp = evaluate.score(load_model(sft), [prompts[i] for i in some], chosen, sizes(), torch.device("cpu"))
    assert log[0]["loss"] == pytest.approx(-logp.sum().item() / sum(len(r[0]) for r in chosen), abs=1e-5)


def sizes(batch_size=256):
    return train_sft.flags(["--device", "cpu", "--batch-size", str(batch_size)])


def test_sft_is_the_same_for_a_seed_and_another_for_another(rows, tmp_path):
    a, b, c = (run(train_sft, tmp_path / n, data=rows / "sft.jsonl", steps=3, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert weights(a) == weights(b) != weights(c)


# ---------------------------------------------------------------- DPO


def step_0_loss(loss, sft, beta):
    """The loss of the first batch where policy = reference, from the reference log-probs alone."""
    if loss in ("dpo", "cdpo"):
        return math.log(2)
    if loss in ("ipo", "hinge"):
        return {"ipo": 1 / (2 * beta) ** 2, "hinge": 1.0}[loss]
    prompts, pairs_, _ = data.load(sft / "pairs.jsonl", data.preference_texts, tokenizer.get("roadmap"), 32)
    some = common.batch_indices(len(prompts), 32, 0, 0)
    prompts, pairs_ = [prompts[i] for i in some], [pairs_[i] for i in some]
    chosen, rejected = evaluate.score(load_model(sft), prompts, pairs_, sizes(), torch.device("cpu")).unbind(1)
    if loss == "simpo":
        long = torch.tensor([[len(r) for r in pair] for pair in pairs_])
        margin = beta * (chosen / long[:, 0] - rejected / long[:, 1]) - 0.5
        return -torch.nn.functional.logsigmoid(margin).mean().item()
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean().item()


@pytest.mark.parametrize("loss", train_dpo.LOSSES)
def test_dpo(loss, sft, tmp_path):
    out = run(train_dpo, tmp_path / "dpo", init=sft, loss=loss, beta=0.2, steps=30)
    log = check_run(out, "dpo", DPO_KEYS, {f"eval_{k}" for k in DPO_MEASURES} | MAP_KEYS)
    first, last = log[0], log[-1]
    assert first["loss"] == pytest.approx(step_0_loss(loss, sft, 0.2), abs=2e-6)
    assert first["margin"] == first["kl_ref_policy"] == pytest.approx(0, abs=2e-6)
    assert mean(r["loss"] for r in log[-5:]) < mean(r["loss"] for r in log[:5])
    assert last["margin"] > 0 and last["accuracy"] > 0.6
    config = read_config(out)
    assert config["beta"] == 0.2 and config["reference"] == str(sft)
    # the reference log-probs beside the run are those of the reference
    ref = read_safetensors(out / "ref_logp.safetensors")[0]["logp"]
    prompts, pairs_, _ = data.load(sft / "pairs.jsonl", data.preference_texts, tokenizer.get("roadmap"), 32)
    assert torch.equal(ref, evaluate.score(load_model(sft), prompts, pairs_, sizes(32), torch.device("cpu")))


def test_dpo_starts_at_its_reference_bit_for_bit(sft, tmp_path):
    """In the same batch layout (each pair alone) the policy of step 0 gives the reference's log-probs: every pair is a tie."""
    first = metrics(run(train_dpo, tmp_path / "dpo", init=sft, micro_batch_size=1, steps=1))[0]
    assert (first["accuracy"], first["margin"], first["kl_ref_policy"]) == (0.5, 0.0, 0.0)


def test_dpo_evaluates_on_the_test_pairs_of_the_map(dpo, sft):
    log = metrics(dpo)
    prompts, pairs_, _ = data.load(sft / "pairs_test.jsonl", data.preference_texts, tokenizer.get("roadmap"), 32)
    logp, ref = (evaluate.score(load_model(m), prompts, pairs_, sizes(), torch.device("cpu")) for m in (dpo, sft))
    expected = losses.dpo(*logp.unbind(1), *ref.unbind(1), 0.3).mean().item()
    assert log[-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    margin = 0.3 * ((logp - ref)[:, 0] - (logp - ref)[:, 1])
    want = {"chosen_logp": logp[:, 0], "rejected_logp": logp[:, 1], "kl_ref_policy": ref - logp, "margin": margin}
    want["accuracy"] = (margin > 0).float()
    for name, value in want.items():
        assert log[-1][f"eval_{name}"] == pytest.approx(value.mean().item(), abs=1e-4), name


def test_dpo_on_own_rows(rows, sft, tmp_path):
    out = run(train_dpo, tmp_path / "a", init=sft, data=rows / "pairs.jsonl")
    log = check_run(out, "dpo", DPO_KEYS, {f"eval_{k}" for k in DPO_MEASURES})
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[-1]["loss"] < log[0]["loss"]
    assert len(read_safetensors(out / "ref_logp.safetensors")[0]["logp"]) == 76  # 5% of the 80 pairs are held out
    out = run(train_dpo, tmp_path / "b", init=sft, data=rows / "pairs.jsonl", eval_data=rows / "pairs.jsonl", steps=1)
    assert {len(read_safetensors(p)[0]["logp"]) for p in out.glob("ref_logp*")} == {80}


# ---------------------------------------------------------------- RLHF


def check_rl(out, extra=frozenset()):
    log = check_run(out, "rlhf", RL_KEYS | SECONDS | extra, MAP_KEYS if "true_reward" in extra else set())
    assert (log[0]["kl"], log[0]["clip_fraction"]) == (0.0, 0.0)  # the policy is the reference, and the sampler
    assert log[0]["entropy"] > 0 and 1 <= log[0]["length"] <= 12 and log[-1]["kl"] != 0
    return log


def test_rlhf_global(rlhf, sft):
    log = check_run(rlhf / "reward", "reward", RM_KEYS, {"eval_loss", "eval_accuracy"})
    assert len(log) == 10 and mean(r["loss"] for r in log[-3:]) < mean(r["loss"] for r in log[:3])  # 1.5 epochs of 7 steps
    config = read_config(rlhf / "reward")
    assert config["model"]["head"] == "scalar" and config["reference"] == str(sft)
    check_rl(rlhf, {"true_reward"})
    assert read_config(rlhf)["kl"] == 0.5


def test_rlhf_checkpoint_of_a_reward_model_is_the_same_run(rlhf, sft, tmp_path):
    out = run(train_rlhf, tmp_path / "again", init=sft, reward=rlhf / "reward")
    assert not (out / "reward").exists()
    assert weights(out) == weights(rlhf) and metrics(out) == metrics(rlhf)


def test_rlhf_local(sft, tmp_path):
    out = run(train_rlhf, tmp_path / "local", init=sft, reward="local", beta=0.25)
    log = check_run(out / "reward", "reward", RM_KEYS, {"eval_loss", "eval_accuracy"})
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[-1]["loss"] < log[0]["loss"]
    check_rl(out, {"true_reward"})
    assert read_config(out)["kl"] == 0.25  # Theorem 2.2 wants the same beta on both sides


@pytest.mark.parametrize("algo", ["rloo", "grpo", "online-dpo", "rebel", "reinforce"])
def test_rlhf_rule(algo, sft, tmp_path):
    reward = {"reward": "nanoroads.world.roadmap:true_reward", "reward_epochs": None}
    out = run(train_rlhf, tmp_path / algo, init=sft, algo=algo, **reward, updates=2 if algo == "grpo" else 1)
    log = check_rl(out, {"true_reward"})
    assert all(row["reward"] == pytest.approx(row["true_reward"], abs=2e-6) for row in log)
    assert not (out / "reward").exists()
    if algo == "grpo":
        assert all(row["clip_fraction"] == 0 for row in log[::2])  # the first of two updates is on policy
        assert any(row["clip_fraction"] > 0 for row in log[1::2])
    if algo == "online-dpo":
        compared = log[0]["loss"] / math.log(2) * 32  # ln 2 of each prompt whose samples are not all as good
        assert compared == pytest.approx(round(compared), abs=1e-3) and compared > 0.5


def test_rlhf_on_own_rows(rows, sft, tmp_path):
    for reward in ("global", "local"):
        out = run(train_rlhf, tmp_path / reward, init=sft, data=rows / "pairs.jsonl", max_new_tokens=12, reward=reward)
        check_rl(out)
        check_run(out / "reward", "reward", RM_KEYS, {"eval_loss", "eval_accuracy"})


def test_rlhf_start_and_compare(dpo, sft, tmp_path):
    """--start from the policy compared with: the two are one at first, and the distance to the reference is not 0."""
    rule = {"reward": "nanoroads.world.roadmap:true_reward", "start": dpo, "compare": dpo}
    log = metrics(run(train_rlhf, tmp_path / "a", init=sft, **rule, lr=1e-12, steps=2, eval_every=1))
    assert log[0]["kl_compare"] == pytest.approx(0, abs=1e-5) and abs(log[0]["kl"]) > 1e-4
    log = metrics(run(train_rlhf, tmp_path / "b", init=sft, **rule | {"start": sft}, lr=1e-12, steps=2, eval_every=1))
    assert log[0]["kl_compare"] > 1e-4 and log[0]["kl"] == 0


# ---------------------------------------------------------------- gradient accumulation


@pytest.mark.parametrize("stage", ["sft", "dpo", "rm", "rl", "rl-grpo", "rl-online-dpo", "rl-rebel"])
def test_accumulation_changes_nothing(stage, sft, tmp_path, monkeypatch):
    # Plain gradient descent and no clipping: AdamW forgives a gradient of the wrong scale.
    monkeypatch.setattr(common, "make_optimizer", lambda args, model: torch.optim.SGD(model.parameters(), lr=args.lr))
    flags = {"batch_size": 8, "steps": 4, "clip": 1e9, "lr": 0.1, "schedule": "constant"}
    if stage == "sft":
        script, flags = train_sft, flags | {"data": sft / "demos.jsonl"}
    elif stage == "dpo":
        script, flags = train_dpo, flags | {"init": sft}
    elif stage == "rm":
        script, flags = train_rlhf, flags | {"init": sft, "stop_after": "reward", "reward_lr": 0.1, "reward_batch_size": 8}
    else:
        algo = stage.partition("-")[2] or "rloo"
        script, flags = train_rlhf, flags | {"init": sft, "reward": "helpers.runs:brevity", "algo": algo, "lr": 0.01}
    whole, parts = (run(script, tmp_path / f"{m}", micro_batch_size=m, **flags) for m in (None, 3))
    if stage == "rm":
        whole, parts = whole / "reward", parts / "reward"
    one, two = (read_safetensors(p / "model.safetensors")[0] for p in (whole, parts))
    start = load_model(sft).state_dict()
    moved = max((one[k] - start[k]).abs().max().item() for k in one if k in start)
    apart = max((one[k] - two[k]).abs().max().item() for k in one)
    assert apart < 1e-5 and moved > 20 * apart and moved > 1e-3
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_other_ways_to_run(sft, rows, tmp_path):
    """bfloat16 activations, a trace, cut responses: each still learns, and the weights stay fp32."""
    plain = metrics(run(train_dpo, tmp_path / "plain", init=sft))
    half = run(train_dpo, tmp_path / "half", init=sft, dtype="bfloat16", profile=True)
    assert all(v.dtype == torch.float32 for v in read_safetensors(half / "model.safetensors")[0].values())
    assert metrics(half)[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05) and metrics(half) != plain
    assert len(json.loads((half / "trace.json").read_text())["traceEvents"]) > 100
    cut = {"max_prompt_tokens": 3, "max_response_tokens": 2}
    out = run(train_sft, tmp_path / "cut", data=rows / "sft.jsonl", **cut)
    assert metrics(out)[-1]["loss"] < metrics(out)[0]["loss"] - 1


# ---------------------------------------------------------------- inputs that are made


def test_missing_policy_and_pairs_are_made(tmp_path, monkeypatch, capsys):
    """Without inputs, the commands that the user would type are printed and run; here they run tiny, in this process."""
    ran = []

    class Done:
        returncode = 0

    def run_here(command, env):
        words = command[command.index("-m") + 1 :] if "-m" in command else command[1:]
        ran.append(words)
        tiny = argv(train_sft) if words[0].endswith("train_sft.py") else ["--n", "64"]
        (train_sft if words[0].endswith("train_sft.py") else pairs).main(words[1:] + tiny)
        return Done

    monkeypatch.setattr(common.subprocess, "run", run_here)
    init = tmp_path / "sft"
    run(train_dpo, tmp_path / "dpo", init=init, data="roadmap-short", seed=3, steps=2)
    assert [words[0].rpartition("/")[2] for words in ran] == ["train_sft.py", "nanoroads.world.pairs", "nanoroads.world.pairs"]
    assert capsys.readouterr().out.count("is missing; making it:\n  python ") == 3
    assert read_config(init)["args"]["data"] == "roadmap-short" and read_config(init)["args"]["seed"] == 3
    run(train_rlhf, tmp_path / "rlhf", init=init, data="roadmap-short", seed=3, steps=2, reward="local")
    assert len(ran) == 3  # what is there is not made again

    Done.returncode = 1
    monkeypatch.setattr(common.subprocess, "run", lambda command, env: Done)
    with pytest.raises(common.InputError, match="sft2/model.safetensors: the command above failed"):
        run(train_dpo, tmp_path / "dpo2", init=tmp_path / "sft2")
    Done.returncode = 2  # it has said why in a line of its own
    with pytest.raises(SystemExit, match="2"):
        run(train_dpo, tmp_path / "dpo2", init=tmp_path / "sft2")


def test_defaults_need_no_flag():
    """On the map, each stage finds the one before it."""
    assert train_dpo.flags([]).init == train_rlhf.flags([]).init == train_sft.flags([]).out
    assert all(script.flags([]).data == "roadmap" for script in (train_sft, train_dpo, train_rlhf))


def test_defaults_for_a_model_and_data_of_ones_own():
    """What suits the map's small model would wreck a pretrained one; what is given stands."""
    own = ["--init", "folder", "--data", "pairs.jsonl"]
    for script in (train_sft, train_dpo, train_rlhf):
        small, large = script.flags([]), script.flags(own)
        assert small.lr >= 1e-4 and small.micro_batch_size is None and large.lr <= 1e-5 and large.micro_batch_size <= 4
        assert large.epochs == 1 and script.flags([*own, "--lr", "3e-3"]).lr == 3e-3 and large.data == "pairs.jsonl"
    assert train_sft.flags(["--data", "rows.jsonl"]).lr == train_sft.flags([]).lr  # a new model is small
    rates = [train_rlhf.flags([*w, "--reward", r]).reward_lr for w in ([], own) for r in ("global", "local")]
    assert rates == [3e-4, 1e-4, 3e-6, 1e-6] and rates[1::2] == [train_dpo.flags(w).lr for w in ([], own)]


def test_pairs_are_for_the_seed(sft, tmp_path):
    a, b, c = (run(pairs, tmp_path / n, policy=sft, n=20, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert read_jsonl(a) == read_jsonl(b) != read_jsonl(c)
    assert all(row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"] for row in read_jsonl(a))


# ---------------------------------------------------------------- sampling


def said(capsys, **flags):
    capsys.readouterr()
    sample.main(argv(sample, device="cpu", **flags))
    return capsys.readouterr().out.splitlines()


def test_sample_greedy(sft, capsys):
    encoding = tokenizer.get("roadmap")
    greedy = said(capsys, model=sft, prompt="WA>FL:", temperature=0)
    ids = generate(load_model(sft), [tokenizer.encode(encoding, "WA>FL:")], 1, 12, temperature=0, eos=tokenizer.eos_id(encoding))
    assert greedy[0] == "WA>FL:" + evaluate.texts(encoding, ids[0])[0]
    assert re.fullmatch(r"  true reward \d\.\d\d \(legal \w+, arrives \w+, \d+ moves\)", greedy[1])
    assert greedy == said(capsys, model=sft, temperature=0, seed=5)  # WA>FL: is the default
    drawn = [said(capsys, model=sft, seed=s, num_samples=3) for s in (0, 0, 9)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 6
    assert drawn[0][2:4] == said(capsys, model=sft, seed=1) != drawn[0][:2]  # sample i of seed s is sample 0 of seed s + i
    assert said(capsys, model=sft, top_k=1)[0] == greedy[0] == said(capsys, model=sft, top_p=1e-6)[0]


def test_sample_prompts(sft, rows, tmp_path, capsys):
    texts = ["WA>FL:", "ME>CA:", "TX>NY:"]
    lines = said(capsys, model=sft, prompts=write_jsonl(tmp_path / "p.jsonl", [{"prompt": t} for t in texts]), num_samples=2)
    assert [line[:6] for line in lines[::2]] == [t for t in texts for _ in range(2)] and len(lines) == 12


@pytest.mark.parametrize("kind", ["global", "policy"])
def test_sample_best_of(kind, sft, dpo, rlhf, capsys):
    reward = rlhf / "reward" if kind == "global" else dpo
    lines = said(capsys, model=sft, prompt="WA>OR:", reward=reward, best_of=8, seed=1)
    encoding, prompt = tokenizer.get("roadmap"), tokenizer.encode(tokenizer.get("roadmap"), "WA>OR:")
    responses = generate(load_model(sft), [prompt], 8, 12, eos=tokenizer.eos_id(encoding), seed=1)
    ref = None if kind == "global" else load_model(sft)
    value = evaluate.rewards_of(load_model(reward), ref, [prompt], responses, sizes(), torch.device("cpu"), 0.3)[0]
    assert lines[0] == "WA>OR:" + evaluate.texts(encoding, responses[0])[value.argmax()]
    assert lines[1] == f"  score {value.max():.3f}, the best of 8 (mean {value.mean():.3f})"


def test_chat(tmp_path, monkeypatch, capsys):
    """A byte-level model that learnt one answer gives it, and sees the conversation so far."""
    special = {"<|endoftext|>": 256}
    encoding = tiktoken.Encoding(
        "b", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens=special
    )
    monkeypatch.setattr(tokenizer, "get", lambda name: encoding)
    rows = [{"prompt": [{"role": "user", "content": f"number {i}"}], "response": "öko"} for i in range(40)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    model = run(train_sft, tmp_path / "sft", data=path, tokenizer="bytes", block_size=64, rows=None)
    monkeypatch.setattr("sys.stdin", iter_stdin(["number 7", "and so on", ""]))
    lines = said(capsys, model=model, chat=True, temperature=0, max_new_tokens=12)
    assert lines == [" öko", " öko"]


def iter_stdin(lines):
    lines = iter(lines)

    class Stdin:
        isatty = staticmethod(lambda: False)
        readline = staticmethod(lambda: next(lines) + "\n")

    return Stdin


def test_epochs_of_rl_are_passes_over_the_prompts():
    steps = lambda *words: common.total_steps(train_rlhf.flags(list(words)), 320)  # noqa: E731
    assert (steps(), steps("--epochs", "2"), steps("--steps", "7"), steps("--steps", "7", "--epochs", "2")) == (300, 20, 7, 7)


def test_an_epoch_of_rl_samples_each_prompt_once_whatever_the_updates(sft, tmp_path):
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"WA>{goal}:"} for goal in ("FL", "GA", "ME", "NY", "TX")])
    flags = {"init": sft, "data": data, "reward": "helpers.runs:brevity", "max_new_tokens": 12, "batch_size": 2, "steps": None}
    out = run(train_rlhf, tmp_path / "out", epochs=1, updates=3, **flags)
    assert metrics(out)[-1]["step"] == 3 * 3


def test_several_updates_of_rloo_are_clipped_ratios(sft, tmp_path):
    """The second step on a batch is off policy: with lr large its ratio leaves the interval, and is clipped."""
    log = metrics(run(train_rlhf, tmp_path / "out", init=sft, reward="helpers.runs:brevity", updates=2, lr=0.05, steps=8))
    assert all(row["clip_fraction"] == 0 for row in log[::2]) and max(row["clip_fraction"] for row in log[1::2]) > 0


def test_rl_samples_a_few_micro_batches_at_a_time(sft, tmp_path, monkeypatch):
    """In order, and each with random numbers of its own."""
    calls, generate = [], train_rlhf.generate

    def recorded(policy, prompts, k, length, temperature, eos, seed):
        calls.append((len(prompts), seed))
        return generate(policy, prompts, k, length, temperature, eos=eos, seed=seed)

    monkeypatch.setattr(train_rlhf, "generate", recorded)
    run(train_rlhf, tmp_path / "out", init=sft, reward="helpers.runs:brevity", batch_size=20, micro_batch_size=1, steps=1)
    assert [size for size, _ in calls] == [8, 8, 4] and len({seed for _, seed in calls}) == 3
