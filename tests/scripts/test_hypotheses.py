"""H2 to H5 and the prior: exact parts, verdicts that can come out either way, and the four scripts end
to end in one folder, whose runs they share."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import hypotheses, prior_of_local, reward_classes, wider_data
from nanoroads.batch import pack
from nanoroads.experiments import local_rewards
from nanoroads.experiments.wider_data import relabel
from nanoroads.model import GPT, GPTConfig
from nanoroads.report import compared, evidence, judged, measures
from nanoroads.text import tokenizer
from nanoroads.world.roadmap import prompts
from tests.helpers.in_process import run_phases

SEEDS = 3


def policies(labels, rewards):
    """Rows of three seeds: each policy's true reward is the one in `rewards`, or .2, and a little more
    from seed to seed."""
    by_seed = []
    for seed in range(SEEDS):
        row = {}
        for name in labels:
            reward = rewards.get(name, 0.2) + 0.001 * seed * (1 + (name[:3] == "dpo"))
            cell = {"mean": reward, "se": 0.01}
            row[name] = {measure: dict(cell) for measure in compared.MEASURES}
        by_seed.append(row)
    return by_seed


def signs(lines):
    return [line.split(":")[0] for line in lines]


# ---------------------------------------------------------------- verdicts


FOR_RLHF = {"rlhf_global": 0.5, "rlhf_from_dpo": 0.51, "dpo": 0.4, "dpo_12_epochs": 0.44}
FOR_RLHF |= {"rlhf_8_epochs": 0.55, "dpo_8_epochs": 0.41}


def budget_rows(changed):
    by_seed = policies(hypotheses.LABELS, {**FOR_RLHF, **changed})
    for row in by_seed:
        row["nll"] = {"rlhf_global": 0.61, "rlhf_8_epochs": 0.6}
    return by_seed


def test_budgets_can_leave_a_gap():
    lines = hypotheses.verdict(budget_rows({}))
    assert signs(lines) == ["yes"] * 6
    assert "+0.099" in lines[0] and "+0.109" in lines[1] and "+0.010" in lines[2]
    assert "three times the epochs" in lines[4] and "+0.059" in lines[4]
    assert "+0.139" in lines[5] and "is then 0.600 ± 0.000, else 0.610" in lines[5]


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"rlhf_global": 0.4}, [0, 2, 3, 4]),
        ({"rlhf_from_dpo": 0.4}, [1, 2]),
        ({"rlhf_from_dpo": 0.53}, [2]),
        ({"dpo_8_epochs": 0.5}, [3, 4]),
        ({"dpo_ipo": 0.6}, [4]),
        ({"rlhf_8_epochs": 0.4}, [5]),
    ],
)
def test_a_budget_can_close_the_gap(changed, fails):
    lines = hypotheses.verdict(budget_rows(changed))
    assert [place for place, sign in enumerate(signs(lines)) if sign == "NO"] == fails


WIDER = {"rlhf_global": 0.5, "dpo": 0.4, "rlhf_relabelled": 0.52, "dpo_relabelled": 0.45}
WIDER |= {"rlhf_half": 0.45, "rlhf_augmented": 0.47}


def wider_rows(changed):
    by_seed = policies(wider_data.LABELS, {**WIDER, **changed})
    for row in by_seed:
        row["nll"] = {"rlhf_global": 0.6, "rlhf_half": 0.61, "rlhf_relabelled": 0.59}
    return by_seed


def test_wider_data_can_leave_a_gap():
    lines = wider_data.verdict(wider_rows({}))
    assert signs(lines) == ["yes"] * 3
    assert (
        "it adds +0.020" in lines[1]
        and "half of the lead is more by +0.030" in lines[1]
        and "+0.069" in lines[2]
        and "gains +0.050" in lines[2]
        and "RLHF +0.020" in lines[2]
    )
    assert "0.590 ± 0.000, without them 0.600" in lines[2]


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"rlhf_global": 0.4}, [0, 1]),  # where there is no gap, every gain is more than half of it
        ({"rlhf_augmented": 0.51}, [1]),
        ({"dpo_relabelled": 0.52}, [2]),
    ],
)
def test_wider_data_can_close_the_gap(changed, fails):
    lines = wider_data.verdict(wider_rows(changed))
    assert [place for place, sign in enumerate(signs(lines)) if sign == "NO"] == fails


def test_no_difference_must_be_known():
    """A mean near zero with a large standard error shows nothing."""
    budgets, wider = budget_rows({"rlhf_from_dpo": 0.5}), wider_rows({"rlhf_augmented": 0.45})
    assert signs(hypotheses.verdict(budgets))[2] == signs(wider_data.verdict(wider))[1] == "yes"
    for row, off in zip(wider, (-0.1, 0.0, 0.1), strict=True):
        row["rlhf_global"]["reward"]["mean"] += off  # half of a lead that is not sure itself
    assert signs(wider_data.verdict(wider))[1] == "NO"
    wider = wider_rows({"rlhf_augmented": 0.45})
    for seed, off in enumerate((-0.1, 0.0, 0.1)):
        budgets[seed]["rlhf_from_dpo"]["reward"]["mean"] += off
        wider[seed]["rlhf_augmented"]["reward"]["mean"] += off
    assert signs(hypotheses.verdict(budgets))[2] == signs(wider_data.verdict(wider))[1] == "NO"


def ladder_rows():
    """Three seeds in which every claim holds: the better the class, the more of everything."""
    by_seed = []
    for seed in range(SEEDS):
        row = {}
        for place, name in enumerate([*reward_classes.LADDER, "reference", "truth"]):
            worse = 0.02 * place + 0.001 * seed
            row[name] = {"nll": 0.6 + worse, "nll_rescaled": 0.6 + worse, "accuracy": 0.64 - worse}
            row[name] |= {"true_order": 0.9 - worse}
            row[name]["best_of_n"] = {str(n): 0.5 - worse for n in measures.BEST_OF}
        by_seed.append(row)
    return by_seed


def test_the_ladder_can_hold():
    lines = reward_classes.verdict(ladder_rows())
    assert signs(lines) == ["yes"] * 5
    assert "by +0.080" in lines[0] and "by +0.020" in lines[0] and "by +0.080" in lines[2]
    assert "each step by global over local +0.020" in lines[3] and "length over dpo +0.020" in lines[3]
    assert "Here it is global, local, last, prefix, length, dpo." in lines[3]
    assert "ahead of local, the best of the others, by +0.020" in lines[4]


@pytest.mark.parametrize(
    ("path", "name", "fails"), [(("accuracy",), "prefix", [3]), (("best_of_n", "16"), "global", [2, 4])]
)
def test_an_order_of_means_is_not_enough(path, name, fails):
    """One class is as good as before on average, but not beyond doubt."""
    by_seed = ladder_rows()
    for row, off in zip(by_seed, (-0.03, 0.0, 0.03), strict=True):
        cell = row[name]
        for key in path[:-1]:
            cell = cell[key]
        cell[path[-1]] += off
    lines = reward_classes.verdict(by_seed)
    assert [place for place, sign in enumerate(signs(lines)) if sign == "NO"] == fails


@pytest.mark.parametrize(
    ("path", "fails"),
    [(("nll",), [0]), (("nll_rescaled",), [1]), (("best_of_n", "16"), [2, 4]), (("accuracy",), [3])],
)
def test_each_line_of_the_ladder_can_fail(path, fails):
    by_seed = ladder_rows()
    for row in by_seed:
        cells = [row[name] for name in ("global", "local")]
        for name in path[:-1]:
            cells = [cell[name] for cell in cells]
        cells[0][path[-1]], cells[1][path[-1]] = cells[1][path[-1]], cells[0][path[-1]]
    lines = reward_classes.verdict(by_seed)
    assert [place for place, sign in enumerate(signs(lines)) if sign == "NO"] == fails


def prior_rows():
    bare = str(-prior_of_local.BETA)
    row = {"global": {"curve": {"0.0": 0.49}, "value": 0.53}, "local": {"curve": {"0.0": 0.53, bare: 0.2}}}
    return [copy.deepcopy(row) for _ in range(SEEDS)]


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, []),
        ({("local", "curve", "0.0"): 0.48}, [0]),
        ({("local", "curve", "0.0"): 0.58}, [2]),
        ({("global", "value"): 0.48}, [1, 2]),
        ({("local", "curve", "-0.3"): 0.5}, [3]),
    ],
)
def test_the_prior_can_hold_and_fail(changed, fails):
    by_seed = prior_rows()
    for row in by_seed:
        for path, value in changed.items():
            cell = row
            for name in path[:-1]:
                cell = cell[name]
            cell[path[-1]] = value
    lines = prior_of_local.verdict(by_seed)
    assert [place for place, sign in enumerate(signs(lines)) if sign == "NO"] == fails


def test_the_local_classes_that_train_dpo_knows(tmp_path):
    phases = {phase.name: phase.command for phase in reward_classes.phases_of(tmp_path, seed=3)}
    local, length = phases[str(tmp_path / "local_beta_0.1")], phases[str(tmp_path / "length_beta_2")]
    loss = local.index("--loss")
    assert local[loss : loss + 4] == ["--loss", "reference-free", "--beta", "0.1"]
    loss = length.index("--loss")
    assert length[loss : loss + 6] == ["--loss", "simpo", "--gamma", "0", "--beta", "2.0"]


# ---------------------------------------------------------------- tables and figures


def committed(script):
    """The folder with a script's results, and its rows of three seeds."""
    folder = Path(script.__file__).with_suffix("")
    return folder, json.loads((folder / "results.json").read_text())["by_seed"]


def test_tables_show_the_results():
    folder, by_seed = committed(reward_classes)
    shown = (folder / "table.md").read_text()
    assert shown.startswith(reward_classes.table_of(by_seed, reward_classes.LADDER))
    folder, by_seed = committed(prior_of_local)
    assert (folder / "table.md").read_text().startswith(prior_of_local.table_of(by_seed))


def test_the_ladder_is_drawn():
    _, by_seed = committed(reward_classes)
    ladder, best = reward_classes.figure_of(by_seed, reward_classes.PAPER).axes
    for place, name in enumerate([*reward_classes.LADDER, "truth"]):
        assert (
            ladder.lines[3 * place].get_ydata()[0] == evidence.over_seeds(by_seed, name, "accuracy")["mean"]
        )
        curve = [evidence.over_seeds(by_seed, name, "best_of_n", str(n))["mean"] for n in measures.BEST_OF]
        assert list(best.lines[place].get_ydata()) == curve
    assert list(ladder.lines[-1].get_ydata()) == list(reward_classes.PAPER.values())


def test_the_prior_is_drawn():
    _, by_seed = committed(prior_of_local)
    (ax,) = prior_of_local.figure_of(by_seed, prior_of_local.WEIGHTS).axes
    for container, name in zip(ax.containers, ("global", "local"), strict=True):
        means = [evidence.over_seeds(by_seed, name, "curve", str(w))["mean"] for w in prior_of_local.WEIGHTS]
        assert container.get_label() == name and list(container.lines[0].get_ydata()) == means
        assert list(container.lines[0].get_xdata()) == prior_of_local.WEIGHTS


# ---------------------------------------------------------------- exact parts


def test_relabelling_follows_the_reward():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"} for _ in range(4000)]
    reward = torch.tensor([[1.0, 0.0]] * 4000)
    kept = [row["chosen"] == "a" for row in relabel(rows, reward, np.random.default_rng(0))]
    chance = 1 / (1 + math.exp(-1))
    assert abs(sum(kept) / 4000 - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)
    certain = relabel(rows[:9], 100 * reward[:9].flip(1), np.random.default_rng(0))
    assert certain == [{"prompt": "p", "chosen": "b", "rejected": "a"}] * 9
    assert rows[0]["chosen"] == "a"  # the rows themselves stay as they are


def test_pair_measures():
    margin = torch.tensor([2.0, -1.0, 0.5])
    row = judged.pair_measures(margin, torch.tensor([0.3, 0.2, 0.0]))
    assert row["nll"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in (2, -1, 0.5)) / 3, rel=1e-6)
    assert row["accuracy"] == pytest.approx(2 / 3) and row["true_order"] == 0.5
    fewest = min(
        sum(math.log1p(math.exp(-s * m)) for m in (2, -1, 0.5)) / 3 for s in np.logspace(-2, 1.5, 4000)
    )
    assert row["nll_rescaled"] == pytest.approx(fewest, abs=1e-4)
    # A reward on another scale has the same rescaled likelihood.
    other = judged.pair_measures(3 * margin, torch.tensor([-0.3, 0.2, 0.0]))
    assert other["nll_rescaled"] == pytest.approx(fewest, abs=1e-4) and other["true_order"] == 0.0


ENCODING = tokenizer.get("roadmap")


def tokens(text):
    return tokenizer.encode(ENCODING, text)


def small_policy(seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=ENCODING.n_vocab, n_layer=1, n_embd=16, block_size=16, tied=False))


def test_the_parts_of_a_local_reward():
    policy = small_policy(0)
    eos = tokenizer.eos_id(ENCODING)
    responses = [tokens(">OR") + [eos], tokens(">OR>CA>NV") + [eos]]
    batch = pack([tokens("WA>FL:")], [responses])
    value = {}
    for name, beta in reward_classes.BETA.items():
        value[name] = local_rewards.local_reward(name, beta, policy, batch) / beta
    logps = policy(batch)
    lengths = torch.tensor([len(response) for response in responses])
    torch.testing.assert_close(value["last"], logps.token[lengths.cumsum(0) - 1])
    torch.testing.assert_close(value["last"] + value["prefix"], value["local"])
    torch.testing.assert_close(value["local"], logps.sequence)
    torch.testing.assert_close(value["length"] * lengths, logps.sequence)

    models = {"dpo": policy, "reference": small_policy(1)}
    reward = local_rewards.rewards("dpo", reward_classes.BETA, models, [tokens("WA>FL:")], [responses])
    ratio = logps.sequence - models["reference"](batch).sequence
    torch.testing.assert_close(reward, reward_classes.BETA["dpo"] * ratio[None].detach())


def test_training_a_part_raises_its_margin(tmp_path):
    """Of a pair whose chosen response ends with another token than the rejected one."""
    row = {"prompt": "WA>FL:", "chosen": ">OR", "rejected": ">ID"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    pairs, _ = judged.pairs_of(path, context=16)
    batch = pack(pairs.prompts, pairs.responses)
    for name in ("last", "prefix"):
        beta = reward_classes.BETA[name]
        policy = local_rewards.train(name, beta, small_policy(0), pairs, seed=0, lr=1e-2, epochs=30)
        chosen, rejected = local_rewards.local_reward(name, beta, policy, batch).tolist()
        before = local_rewards.local_reward(name, beta, small_policy(0), batch)
        assert chosen - rejected > (before[0] - before[1]).item() + 0.1


def test_true_margins(tmp_path):
    rows = [
        {"prompt": "WA>OR:", "chosen": ">OR", "rejected": ">ID>OR"},
        {"prompt": "WA>OR:", "chosen": ">NV", "rejected": ">OR"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, margins = judged.pairs_of(path, context=16)
    torch.testing.assert_close(margins, torch.tensor([0.05, -1.0]))
    assert len(pairs) == 2


def test_the_weight_is_chosen_on_other_prompts():
    """On every other prompt the prior is the truth, on those between it is the truth turned round."""
    truth = torch.arange(16.0).repeat(4, 1)
    ref_logp = truth.clone()
    ref_logp[1::2] *= -1
    found = prior_of_local.with_prior(torch.zeros(4, 16), ref_logp, truth)
    # Chosen on the even prompts, a positive weight, which is the worst on the odd ones; and the other
    # way round.
    assert found["weights"][0] > 0 > found["weights"][1] and found["value"] == 0
    assert found["curve"]["0.5"] == 7.5
    without = prior_of_local.with_prior(truth, torch.zeros(4, 16), truth)
    assert without["value"] == 15


# ---------------------------------------------------------------- the commands


def few_prompts(world, split):
    return prompts(world, split)[:6]


SMALL = {"SFT": ["--n-layer", 1, "--n-embd", 16, "--rows", 500, "--steps", 60, "--lr", 2e-2]}
SMALL |= {"DPO": ["--steps", 2], "RLHF": ["--steps", 1, "--reward-epochs", 1, "--samples", 2]}
SMALL |= {"PAIRS": 40, "TEST_PAIRS": 20}


def test_the_commands(tmp_path, monkeypatch, capsys):
    for name, value in SMALL.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(compared, "prompts", few_prompts)
    monkeypatch.setattr(judged, "prompts", few_prompts)
    monkeypatch.setattr(wider_data, "DRAWN", 120)
    monkeypatch.setattr(reward_classes, "EPOCHS", 1)
    scripts = {
        "hypotheses": hypotheses,
        "wider_data": wider_data,
        "reward_classes": reward_classes,
        "prior_of_local": prior_of_local,
    }
    for name, script in scripts.items():
        monkeypatch.setattr(script, "run_phases", run_phases)
        script.main(["--seeds", "5", "--out", str(tmp_path)])
        written = json.loads((tmp_path / name / "results.json").read_text())
        assert written["seeds"] == [5] and all(line[:4] in ("yes:", "NO: ") for line in written["verdict"])
        assert written["claim"].endswith(".") and len(written["by_seed"]) == 1
        assert "<svg" in (tmp_path / name / "figure.svg").read_text()
        assert (tmp_path / name / "table.md").read_text() in capsys.readouterr().out

    folder = tmp_path / "seed5"
    rows = {}
    for name in ("more_pairs", "half_pairs", "relabelled_pairs", "all_prompts", "sft/pairs"):
        rows[name] = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert rows["more_pairs"][:40] == rows["sft/pairs"] == rows["relabelled_pairs"][:40]
    new = zip(rows["more_pairs"][40:80], rows["relabelled_pairs"][40:], strict=True)
    assert all({*before.values()} == {*after.values()} for before, after in new)
    everything = prompts(compared.WORLD, "train")
    assert [row["prompt"] for row in rows["all_prompts"]] == everything
    assert {row["prompt"] for row in rows["half_pairs"]} <= {*everything[: len(everything) // 2]}
    config = json.loads((folder / "rlhf_from_dpo/config.json").read_text())
    assert config["args"]["start"].endswith("seed5/dpo") and config["reference"].endswith("seed5/sft")
    config = json.loads((folder / "dpo_12_epochs_3e-5/config.json").read_text())
    assert config["args"]["lr"] == 3e-5 and config["args"]["epochs"] == 12
    config = json.loads((folder / "rlhf_augmented/config.json").read_text())
    assert config["args"]["reward"].endswith("rlhf_half/reward") and config["kl"] == 0.5
