"""H5 and the prior of local rewards: exact parts, verdicts that can come out either way, and figures."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import prior_of_local, reward_classes
from nanoroads.batch import pack
from nanoroads.experiments import local_rewards
from nanoroads.model import GPT, GPTConfig
from nanoroads.report import evidence, judged, measures
from nanoroads.text import tokenizer
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

SEEDS = 3

# ---------------------------------------------------------------- verdicts


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
    assert outcomes(lines) == ["yes"] * 8
    assert "local is better than dpo by nll: +0.080" in lines[0] and "best of 16: +0.080" in lines[2]
    assert "global is better than local by nll: +0.020" in lines[3]
    assert "each step by global over local +0.020" in lines[6] and "length over dpo +0.020" in lines[6]
    assert "Here it is global, local, last, prefix, length, dpo." in lines[6]
    assert "its least sure lead, over local: +0.020" in lines[7]


def change(row, path, more):
    """Add to the number at row[path[0]][path[1]]..."""
    for key in path[:-1]:
        row = row[key]
    row[path[-1]] += more


# Where a class has its measure, the class, what is added there, and the lines that it refutes.
REFUTE = [
    (("nll",), "local", 0.1, [0]),
    (("nll_rescaled",), "local", 0.1, [1]),
    (("best_of_n", "16"), "dpo", 0.09, [2]),
    (("nll",), "global", 0.03, [3]),
    (("nll_rescaled",), "global", 0.03, [4]),
    (("best_of_n", "16"), "local", 0.03, [5, 7]),
    (("accuracy",), "prefix", 0.03, [6]),
    (("best_of_n", "16"), "length", 0.2, [7]),
]


@pytest.mark.parametrize(("path", "name", "more", "fails"), REFUTE)
def test_each_line_of_the_ladder_can_fail(path, name, more, fails):
    by_seed = ladder_rows()
    for row in by_seed:
        change(row[name], path, more)
    assert not_held(reward_classes.verdict(by_seed)) == dict.fromkeys(fails, NO)


@pytest.mark.parametrize(("path", "name", "more", "fails"), REFUTE)
def test_an_order_of_means_is_not_enough(path, name, more, fails):
    """One class is as good as before on average, but not beyond doubt."""
    by_seed = ladder_rows()
    for row, off in zip(by_seed, (-2, 0, 2), strict=True):
        change(row[name], path, off * more)
    found = not_held(reward_classes.verdict(by_seed))
    assert set(fails) <= set(found) and set(found.values()) == {UNDECIDED}


def prior_rows():
    bare = str(-prior_of_local.BETA)
    row = {"global": {"curve": {"0.0": 0.49}, "value": 0.53}, "local": {"curve": {"0.0": 0.53, bare: 0.2}}}
    return [copy.deepcopy(row) for _ in range(SEEDS)]


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, []),
        ({("local", "curve", "0.0"): 0.48}, [0, 2]),  # there is no way to go half of
        ({("local", "curve", "0.0"): 0.58}, [2]),
        ({("global", "value"): 0.48}, [1, 2]),
        ({("local", "curve", "-0.3"): 0.5}, [3]),
    ],
)
def test_the_prior_can_hold_and_fail(changed, fails):
    by_seed = prior_rows()
    for row in by_seed:
        for path, value in changed.items():
            *names, last = path
            cell = row
            for name in names:
                cell = cell[name]
            cell[last] = value
    assert not_held(prior_of_local.verdict(by_seed)) == dict.fromkeys(fails, NO)


@pytest.mark.parametrize(
    ("path", "undecided"),
    [(("local", "curve", "0.0"), [0, 2]), (("global", "value"), [1, 2]), (("local", "curve", "-0.3"), [3])],
)
def test_a_wide_error_decides_nothing_of_the_prior(path, undecided):
    by_seed = prior_rows()
    for row, off in zip(by_seed, (-0.6, 0.0, 0.6), strict=True):
        change(row, path, off)
    assert not_held(prior_of_local.verdict(by_seed)) == dict.fromkeys(undecided, UNDECIDED)


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
