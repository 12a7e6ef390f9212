"""Theorem 2.2 (Swamy et al., 2503.01067) by the scripts: a local reward brings both roads together.

Its first half is exact: Bradley-Terry over local rewards is DPO, bit for bit. Its second half is
RL, so it is approximate. And the signs of RL: a step on a reward raises it, a step on the KL term
lowers the distance to the reference.
"""

from statistics import mean

import pytest
from helpers.runs import make_sft, metrics, run, weights

import train_dpo
import train_rlhf
from nanoroads.weights.files import read_config

BRIEFLY = {"eval_every": 1000, "save_every": 1000}  # the measures of the map are not looked at here


@pytest.mark.parametrize("more", [{}, {"micro_batch_size": 5, "weight_decay": 0.1, "schedule": "constant"}])
def test_stage_1_of_the_local_road_is_dpo_bit_for_bit(more, sft, tmp_path):
    flags = {"init": sft, "beta": 0.2, "seed": 5, **BRIEFLY, **more}
    dpo = run(train_dpo, tmp_path / "dpo", steps=None, epochs=2, **flags)
    local = {"reward": "local", "stop_after": "reward", "reward_epochs": 2, "reward_lr": 3e-3}
    rlhf = run(train_rlhf, tmp_path / "rlhf", **local, **flags)
    assert weights(rlhf / "reward") == weights(dpo) != weights(sft)
    assert [path.name for path in rlhf.iterdir()] == ["reward"]  # --stop-after reward
    for a, b in zip(metrics(rlhf / "reward"), metrics(dpo), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5, abs=2e-6)


@pytest.mark.slow
def test_rl_on_the_local_reward_comes_back_to_dpo(tmp_path):
    """KL(pi_DPO || pi) falls from about 1 nat to nearly nothing, when kl = beta and only then."""
    world = "roadmap-2"
    rarely = {"log_every": 150, "eval_every": 150, "save_every": 1000}
    sft = make_sft(tmp_path / "sft", world, steps=150, rows=2000)
    dpo = run(train_dpo, tmp_path / "dpo", init=sft, data=world, steps=100, beta=0.3, **rarely)

    def kl_to_dpo(name, **flags):
        """KL(pi_DPO || pi) after RL on DPO's reward."""
        rl = {"init": sft, "data": world, "lr": 5e-3, "samples": 8, "reward": dpo, "compare": dpo}
        return metrics(run(train_rlhf, tmp_path / name, **{**rl, **flags}))[-1]["kl_compare"]

    before = kl_to_dpo("before", steps=1, lr=1e-12)
    after = kl_to_dpo("rlhf", steps=150, **rarely)
    assert before > 0.3 and abs(after) < before / 20, (before, after)
    assert read_config(tmp_path / "rlhf")["kl"] == 0.3
    weak = kl_to_dpo("weak", steps=150, kl=1.0, **rarely)
    assert abs(weak) > 3 * abs(after)


# ---------------------------------------------------------------- the signs of RL

ALGORITHMS = train_rlhf.ALGORITHMS
WITH_AN_OPTIMUM = [
    algo for algo in ALGORITHMS if algo != "online-dpo"
]  # its labels are hard: no finite optimum


def for_brevity(out, sft, algo, kl):
    """metrics.jsonl of RL on a rule that likes few moves."""
    flags = {"init": sft, "algo": algo, "kl": kl, "reward": "helpers.runs:brevity", "steps": 25, "lr": 5e-3}
    if algo == "grpo":
        flags["updates"] = 2
    return metrics(run(train_rlhf, out, **flags, **BRIEFLY))


@pytest.fixture(scope="module")
def free(sft, tmp_path_factory):
    """{algorithm: metrics.jsonl of RL for brevity with next to no regulariser}."""
    folder = tmp_path_factory.mktemp("free")
    return {algo: for_brevity(folder / algo, sft, algo, kl=0.01) for algo in ALGORITHMS}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_rl_raises_its_reward(algo, free):
    log = free[algo]
    assert log[-1]["reward"] > log[0]["reward"] + 1  # moves fewer
    assert log[-1]["length"] < log[0]["length"] - 1
    assert log[-1]["kl"] > 0


@pytest.mark.parametrize("algo", WITH_AN_OPTIMUM)
def test_the_kl_term_holds_the_policy_back(algo, free, sft, tmp_path):
    """The same reward under a strong regulariser: the policy stays near the reference."""
    kl_free = free[algo][-1]["kl"]
    kl_held = for_brevity(tmp_path / "held", sft, algo, kl=10)[-1]["kl"]
    assert kl_free > 0.3 and abs(kl_held) < kl_free / 3, (kl_free, kl_held)


@pytest.mark.slow
@pytest.mark.parametrize("algo", WITH_AN_OPTIMUM)
def test_a_start_far_from_the_reference_is_drawn_back(algo, sft, dpo, tmp_path):
    """With a constant reward only the KL term is left, and it pulls --start to --init."""
    flags = {"init": sft, "start": dpo, "algo": algo, "reward": "helpers.runs:indifference", "kl": 1.0}
    flags.update(steps=30, lr=5e-3, batch_size=64, **BRIEFLY)
    log = metrics(run(train_rlhf, tmp_path / algo, **flags))
    before = mean(row["kl"] for row in log[:3])
    after = mean(row["kl"] for row in log[-3:])
    assert before > 0.3 and abs(after) < before / 3, (before, after)
