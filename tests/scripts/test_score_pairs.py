"""score.py: its numbers are those of training and of plain forward passes; what it refuses."""

import json

import pytest
import torch
from helpers.folders import small_folder
from helpers.refusals import change_config, copy
from helpers.runs import argv, read_jsonl, run, write_jsonl

import score as score_script
import train_rlhf
from nanoroads.run.folder import read_metrics
from nanoroads.text import data, layouts, tokenizer
from nanoroads.weights.checkpoint import load_model
from nanoroads.world import roadmap

TRUE_REWARD = "nanoroads.world.roadmap:true_reward"


@pytest.fixture
def scores(tmp_path, capsys):
    """scores(**flags): the lines of the table, and those of --out."""

    def lines(**flags):
        out = tmp_path / "scores.jsonl"
        out.unlink(missing_ok=True)
        capsys.readouterr()
        words = []
        for name in ("policy", "reward", "rule", "reference"):
            for value in flags.pop(name, []):
                words += [f"--{name}", str(value)]
        score_script.main(argv(score_script, device="cpu", out=out, **flags) + words)
        return capsys.readouterr().out.splitlines(), read_jsonl(out)

    return lines


def cells(table, label):
    """The numbers of the first line of the table that begins with `label`, without standard errors."""
    line = next(line for line in table if line.strip().startswith(label))
    words = line.strip().removeprefix(label).split()
    return [float(word) for word in words if not word.startswith("±")]


def plain_logp(model, prompt, response):
    """log pi of one answer, from a forward pass of its own."""
    with torch.no_grad():
        logp = model.logits(torch.tensor([list(prompt) + list(response)]))[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(logp[place, token].item() for place, token in zip(places, response, strict=True))


def test_numbers_are_those_of_training(sft, dpo, rlhf, scores):
    """The held-out pairs of both stages, at the end of their runs."""
    flags = {"data": sft / "pairs_test.jsonl", "policy": [dpo], "reward": [rlhf / "reward"]}
    table, rows = scores(**flags, rule=[TRUE_REWARD])
    assert len(rows) == 40
    trained = read_metrics(dpo)[-1]
    logp, _, implicit, explicit, _ = cells(table, "all")[1:]
    assert implicit == pytest.approx(trained["eval_accuracy"], abs=6e-4)
    assert explicit == pytest.approx(read_metrics(rlhf / "reward")[-1]["eval_accuracy"], abs=6e-4)
    of_policy = [row["scores"][str(dpo)] for row in rows]
    for place, name in enumerate(("chosen", "rejected")):
        mean = sum(row["logp"][place] for row in of_policy) / 40
        assert mean == pytest.approx(trained[f"eval_{name}_logp"], abs=1e-4)
    margins = torch.tensor([row["reward"] for row in of_policy])
    assert (margins[:, 0] - margins[:, 1]).mean().item() == pytest.approx(trained["eval_margin"], abs=1e-5)
    right = [row["logp"][0] > row["logp"][1] for row in of_policy]
    assert logp == pytest.approx(sum(right) / 40, abs=6e-4)
    longer = sum(row["characters"][0] > row["characters"][1] for row in rows)
    shorter = sum(row["characters"][0] < row["characters"][1] for row in rows)
    assert cells(table, "chosen longer")[0] == longer != shorter == cells(table, "chosen shorter")[0]


def test_each_row_against_plain_forward_passes(sft, dpo, rlhf, scores):
    path = sft / "pairs_test.jsonl"
    _, found = scores(data=path, policy=[dpo, sft], reward=[rlhf / "reward"], rule=[TRUE_REWARD])
    texts = read_jsonl(path)
    encoding = tokenizer.get("roadmap")
    rows = data.load(path, layouts.preference_texts, encoding, data.Limits(32))
    policy, reference, reward_model = load_model(dpo), load_model(sft), load_model(rlhf / "reward")
    for i in (0, 7, 39):
        assert found[i]["row"] == i + 1
        assert found[i]["characters"] == [len(texts[i]["chosen"]), len(texts[i]["rejected"])]
        by_name = found[i]["scores"]
        assert by_name[str(sft)].keys() == {"tokens", "logp", "logp_per_token"}  # it has no reference
        for place, answer in enumerate(("chosen", "rejected")):
            prompt, response = rows.prompts[i], rows.responses[i][place]
            logp, ref_logp = plain_logp(policy, prompt, response), plain_logp(reference, prompt, response)
            of_dpo = {name: values[place] for name, values in by_name[str(dpo)].items()}
            assert of_dpo["tokens"] == len(response)
            assert of_dpo["logp"] == pytest.approx(logp, abs=1e-4)
            assert of_dpo["logp_per_token"] == pytest.approx(logp / len(response), abs=1e-4)
            assert of_dpo["ref_logp"] == pytest.approx(ref_logp, abs=1e-4)
            assert of_dpo["reward"] == pytest.approx(0.3 * (logp - ref_logp), abs=1e-4)
            assert by_name[str(sft)]["logp"][place] == pytest.approx(ref_logp, abs=1e-4)
            tokens = torch.tensor([list(prompt) + list(response)])
            hidden = reward_model.trunk(tokens, torch.arange(tokens.shape[1])[None])[0, -1]
            explicit = by_name[str(rlhf / "reward")]["reward"][place]
            assert explicit == pytest.approx(reward_model.scalar_head(hidden).item(), abs=1e-4)
            true_reward = roadmap.true_reward(texts[i]["prompt"], texts[i][answer])
            assert by_name[TRUE_REWARD]["reward"][place] == pytest.approx(true_reward, abs=1e-6)


def test_one_model_twice_and_a_reference_of_ones_own(sft, dpo, scores):
    path = sft / "pairs_test.jsonl"
    table, rows = scores(data=path, policy=[dpo, dpo], reference=[sft, dpo])
    first, second = [rows[0]["scores"][name] for name in (f"{dpo}", f"{dpo} (2)")]
    assert first["logp"] == second["logp"] and first["reward"] != second["reward"]
    assert second["reward"] == [0, 0]  # against itself all are ties
    assert cells(table, "all")[-1] == 0.5
    _, alone = scores(data=path, policy=[dpo])
    assert alone[0]["scores"][f"{dpo}"] == first


def test_other_passes_and_skipped_rows_change_nothing(sft, dpo, rlhf, scores, tmp_path):
    """Each row's numbers are the same but for rounding whatever else is scored, and the table is."""
    path = sft / "pairs_test.jsonl"
    models = {"policy": [dpo], "reward": [rlhf / "reward"]}
    table, rows = scores(data=path, **models)
    for size in (1, 7):
        other_table, other_rows = scores(data=path, micro_batch_size=size, **models)
        assert other_table == table
        assert other_rows == [approximate(row) for row in rows]
    texts = read_jsonl(path)
    texts[3]["prompt"] = "WA>" * 40 + "FL:"
    del texts[-1]["chosen"]
    long = write_jsonl(tmp_path / "long.jsonl", texts)
    table, other_rows = scores(data=long, skip_bad_rows=True, **models)
    assert other_rows == [approximate(row) for row in rows[:3] + rows[4:-1]]
    assert sum("skipped 2 bad rows of 40" in line for line in table) == 1


def approximate(row):
    """A line of --out, to compare another one with."""
    by_name = {}
    for name, measures in row["scores"].items():
        by_name[name] = {measure: pytest.approx(values, abs=1e-4) for measure, values in measures.items()}
    return {**row, "scores": by_name}


def test_the_local_class_and_rl(sft, tmp_path, scores):
    """A local reward model's is an implicit reward, of its own beta; RL's policy has its KL's weight."""
    local = run(train_rlhf, tmp_path / "local", init=sft, reward="local", steps=3, kl=0.25)
    table, rows = scores(data=sft / "pairs_test.jsonl", policy=[local], reward=[local / "reward"])
    assert any(f"{local}: implicit reward 0.25 log pi/pi_ref, pi_ref {sft}" in line for line in table)
    trained = read_metrics(local / "reward")[-1]
    assert cells(table, "all")[-1] == pytest.approx(trained["eval_accuracy"], abs=6e-4)
    for name, beta in ((local, 0.25), (local / "reward", 0.3)):
        found = rows[0]["scores"][str(name)]
        assert found["reward"][0] == pytest.approx(beta * (found["logp"][0] - found["ref_logp"][0]), abs=1e-5)


def test_rewardbench_and_chat(tmp_path, scores):
    """Its rows are text; --chat writes the folder's chat template around them."""
    folder = small_folder(tmp_path / "model")
    row = {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "5", "id": 3, "subset": "math-prm"}
    other = {**row, "subset": "hep-go", "id": 4}
    messages = {"prompt": [{"role": "user", "content": "2 + 2?"}], "chosen": "It is 4.", "rejected": "5"}
    path = write_jsonl(tmp_path / "bench.jsonl", [row, row, other, messages])
    table, rows = scores(data=path, policy=[folder])
    assert any("--chat writes its chat template around them" in line for line in table)
    assert [row.get("id") for row in rows] == [3, 3, 4, None]
    assert [row["subset"] for row in rows] == ["math-prm", "math-prm", "hep-go", "(none)"]
    as_text, as_messages = rows[0]["scores"][str(folder)], rows[3]["scores"][str(folder)]
    assert as_text["logp"] != pytest.approx(as_messages["logp"], abs=0.1)
    table, rows = scores(data=path, policy=[folder], chat=True)
    assert not any("--chat" in line for line in table)
    assert rows[0]["scores"][str(folder)]["logp"] == pytest.approx(as_messages["logp"], abs=1e-3)
    assert cells(table, "math-prm")[0] == 2


def test_what_it_refuses(refuses, sft, dpo, rlhf, tmp_path):
    data_flag = {"data": sft / "pairs_test.jsonl", "device": "cpu"}
    refuses(score_script, "--policy, --reward and --rule", **data_flag)
    refuses(score_script, "1 of --reference for 0", reference=sft, rule=TRUE_REWARD, **data_flag)
    kept = tmp_path / "scores.jsonl"
    kept.write_text("mine")
    refuses(score_script, f"--out {kept}: exists", policy=dpo, out=kept, **data_flag)
    reward = rlhf / "reward"
    refuses(score_script, reward, "a reward model, where a policy is wanted", policy=reward, **data_flag)
    refuses(score_script, f"--reward {sft}", "no reward", reward=sft, **data_flag)
    refuses(score_script, "--rule nosuch:f", "nosuch", rule="nosuch:f", **data_flag)
    refuses(score_script, "no such file", policy=dpo, data=tmp_path / "nothing.jsonl")
    refuses(score_script, "--by kind", policy=dpo, by="kind", **data_flag)
    long = write_jsonl(
        tmp_path / "long.jsonl", [{"prompt": "WA>" * 40 + "FL:", "chosen": "WA", "rejected": "OR"}]
    )
    words = [f"{long}:1:", "context is 32", "--max-prompt-tokens", "--skip-bad-rows"]
    refuses(score_script, *words, policy=dpo, data=long)
    refuses(score_script, f"{long}:1:", "no usable row", policy=dpo, data=long, skip_bad_rows=True)
    none = write_jsonl(tmp_path / "none.jsonl", [{"prompt": "WA>FL:"}])
    refuses(score_script, f"{none}:1:", "no usable row", policy=dpo, data=none, skip_bad_rows=True)


def test_a_reference_that_was_trained_again(refuses, sft, dpo, tmp_path):
    """It is refused where the run names it, and taken where the user does."""
    moved = copy(dpo, tmp_path / "dpo")
    change_config(moved, inputs={"init": {"weights": "others"}})
    words = [f"--policy {moved}", "was fitted against"]
    flags = {"data": sft / "pairs_test.jsonl", "policy": moved, "device": "cpu"}
    refuses(score_script, *words, **flags)
    score_script.main(argv(score_script, reference=sft, **flags))


def test_only_response_tokens_reach_the_vocabulary(sft, dpo, scores, monkeypatch):
    """Neither prompts nor padding: as many rows as the file has response tokens."""
    from nanoroads import model

    seen = []
    sequence_logp = model.kernels.sequence_logp

    def counted(hidden, *args, **options):
        seen.append(len(hidden))
        return sequence_logp(hidden, *args, **options)

    monkeypatch.setattr(model.kernels, "sequence_logp", counted)
    _, rows = scores(data=sft / "pairs_test.jsonl", policy=[dpo])
    tokens = sum(sum(row["scores"][str(dpo)]["tokens"]) for row in rows)
    assert sum(seen) == 2 * tokens  # the policy's and its reference's


def test_the_lines_of_out_are_plain_json(sft, scores):
    """A rule alone needs no model."""
    table, rows = scores(data=sft / "pairs_test.jsonl", rule=[TRUE_REWARD])
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0].keys() == {"row", "characters", "scores"}
    assert cells(table, "all")[0] == 40
