"""Theorem 2.2 (Swamy et al., 2503.01067) by the scripts themselves: with the local reward the two roads end in one policy.

Its first half is exact: Bradley-Terry over local rewards is DPO, bit for bit. Its second half is RL, so it is approximate.
And the signs of RL: a step on a reward raises it, a step on the KL term lowers the distance to the reference.
"""

import pytest
from helpers.runs import make_sft, metrics, run, weights

import train_dpo
import train_rlhf
from nanoroads.weights.files import read_config


@pytest.mark.parametrize("more", [{}, {"micro_batch_size": 5, "weight_decay": 0.1, "schedule": "constant"}])
def test_stage_1_of_the_local_road_is_dpo_bit_for_bit(more, sft, tmp_path):
    dpo = run(train_dpo, tmp_path / "dpo", init=sft, beta=0.2, seed=5, steps=None, epochs=2, **more)
    local = {"reward": "local", "stop_after": "reward", "reward_epochs": 2, "reward_lr": 3e-3}
    rlhf = run(train_rlhf, tmp_path / "rlhf", init=sft, beta=0.2, seed=5, **local, **more)
    assert weights(rlhf / "reward") == weights(dpo) != weights(sft)
    assert [p.name for p in rlhf.iterdir()] == ["reward"]  # --stop-after reward
    for a, b in zip(metrics(rlhf / "reward"), metrics(dpo), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5, abs=2e-6)


def test_rl_on_the_local_reward_comes_back_to_dpo(tmp_path):
    """KL(pi_DPO || pi) falls from about 1 nat to nearly nothing, when kl = beta and only then."""
    world, few = "roadmap-short", {"log_every": 150, "eval_every": 150, "save_every": 1000}
    sft = make_sft(tmp_path / "sft", world, steps=150, rows=2000)
    dpo = run(train_dpo, tmp_path / "dpo", init=sft, data=world, steps=100, beta=0.3, **few)
    rl = {"init": sft, "data": world, "lr": 5e-3, "samples": 8, "reward": dpo, "compare": dpo}
    before = metrics(run(train_rlhf, tmp_path / "before", **rl | {"steps": 1, "lr": 1e-12}))[-1]["kl_compare"]
    road = run(train_rlhf, tmp_path / "rlhf", **rl, steps=150, **few)
    after = metrics(road)[-1]["kl_compare"]
    assert before > 0.3 and abs(after) < before / 20, (before, after)
    assert read_config(road)["kl"] == 0.3
    weak = metrics(run(train_rlhf, tmp_path / "weak", **rl, steps=150, kl=1.0, **few))[-1]["kl_compare"]
    assert abs(weak) > 3 * abs(after)


ALGOS = ["rloo", "grpo", "online-dpo", "rebel", "reinforce"]


@pytest.mark.parametrize("algo", ALGOS)
def test_rl_raises_its_reward(algo, sft, tmp_path):
    rule = {"reward": "helpers.runs:brevity", "kl": 0.01, "steps": 25, "lr": 5e-3}
    log = metrics(
        run(train_rlhf, tmp_path / algo, init=sft, algo=algo, updates=2 if algo == "grpo" else 1, **rule)
    )
    assert log[-1]["reward"] > log[0]["reward"] + 1  # moves fewer
    assert log[-1]["length"] < log[0]["length"] - 1 and log[-1]["kl"] > 0


@pytest.mark.parametrize(
    "algo", [a for a in ALGOS if a != "online-dpo"]
)  # its labels are hard: no finite optimum at any kl
def test_the_kl_term_holds_the_policy_back(algo, sft, tmp_path):
    """The same reward under a strong regulariser: the policy stays near the reference."""
    rule = {"reward": "helpers.runs:brevity", "steps": 25, "lr": 5e-3, "init": sft, "algo": algo}
    free, held = (metrics(run(train_rlhf, tmp_path / str(kl), **rule, kl=kl))[-1]["kl"] for kl in (0.01, 10))
    assert free > 0.3 and abs(held) < free / 3, (free, held)


@pytest.mark.parametrize("algo", [a for a in ALGOS if a != "online-dpo"])
def test_a_start_far_from_the_reference_is_drawn_back(algo, sft, dpo, tmp_path):
    """With a constant reward only the KL term is left, and it pulls --start to --init."""
    rule = {"reward": "helpers.runs:indifference", "kl": 1.0, "steps": 30, "lr": 5e-3, "batch_size": 64}
    log = metrics(run(train_rlhf, tmp_path / algo, init=sft, start=dpo, algo=algo, **rule))
    before, after = (sum(row["kl"] for row in rows) / 3 for rows in (log[:3], log[-3:]))
    assert before > 0.3 and abs(after) < before / 3, (before, after)
