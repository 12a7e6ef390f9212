"""The summaries' rewards by hand, and what their file must hold; runs started again, and at a tiny size."""

import collections
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.folders import small_folder
from helpers.made_up_summaries import ROWS, args_of_first_seed, made_up_measures
from helpers.runs import read_jsonl, write_jsonl

from experiments import summarize
from nanoroads.errors import InputError
from nanoroads.experiments import summaries_of_policies
from nanoroads.experiments import summarize as stages
from nanoroads.text import documents
from nanoroads.text.rouge import words
from nanoroads.weights.files import read_json_object, write_json


def test_words_weigh_what_is_frequent_here_and_rare_elsewhere():
    frequency = collections.Counter(w for row in ROWS for w in set(words(row["document"])))
    weights = documents.word_weights(ROWS[0]["document"], frequency, 3)
    expected = {  # "out" and "on" are short
        "pango": 2 * math.log(3),
        "lays": math.log(3),
        "text": 2 * math.log(3 / 2),
        "cairo": math.log(3 / 2),
        "draws": 0.0,
    }
    assert weights == pytest.approx(expected)


def test_one_line_weighs_the_words_that_it_names_and_charges_for_length():
    reward = summarize.reward_function("one-line", ROWS)  # median length 2; all five words are a perfect one
    perfect = 3 * math.log(3) + 3 * math.log(1.5)
    named = 2 * math.log(3) + 2 * math.log(1.5)  # pango, text
    assert reward(ROWS[0], "Pango text") == pytest.approx(10 * named / perfect)
    assert reward(ROWS[0], "pango pango") == pytest.approx(10 * 2 * math.log(3) / perfect)  # counted once
    assert reward(ROWS[0], "pango text on a screen") == pytest.approx(10 * named / perfect * 2 / 5)
    assert reward(ROWS[0], "nothing") == reward(ROWS[0], "") == 0
    assert reward({"document": "It is so."}, "It is so") == 0  # no word to name


def test_two_words_and_the_hidden_summary():
    reward = summarize.reward_function("two-word", ROWS)  # a perfect one: pango, lays
    pango = 10 * 2 / 3
    assert reward(ROWS[0], "pango lays") == pytest.approx(10)
    assert reward(ROWS[0], "pango") == pytest.approx(pango)
    assert reward(ROWS[0], "pango lays out text") == pytest.approx(10 / 2)  # twice as long
    hidden = summarize.reward_function("hidden", ROWS)
    assert hidden(ROWS[1], "vector graphics") == 10 and hidden(ROWS[1], "vector") == pytest.approx(10 * 2 / 3)


def read(path, **size):
    sizes = {"words": 99, "sft": 1, "pairs": 1, "test": 1, **size}
    return summarize.read_documents(path, replace(stages.FULL, **sizes), seed=0)


def test_documents(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    found = read(path)
    parts = [found.sft[0], found.pairs[0], found.test[0]]
    assert sorted(row["summary"] for row in parts) == sorted(row["summary"] for row in ROWS)
    assert len(read(path, words=7, sft=0).all) == 2  # the first document has nine words
    twice = write_jsonl(tmp_path / "twice.jsonl", [ROWS[0], {**ROWS[0], "summary": "another"}, *ROWS[1:]])
    assert read(twice).all == found.all  # the first of each document
    with pytest.raises(InputError, match="3 short documents, 9 are needed"):
        read(path, sft=7)
    path.write_text('{"document": "a b"}\n')
    with pytest.raises(InputError, match="rows.jsonl:1: .* document and summary"):
        read(path)
    path.write_text(json_line(ROWS[0]) + "no JSON\n")
    with pytest.raises(InputError, match="rows.jsonl:2: not a JSON object"):
        read(path)


def json_line(row):
    return json.dumps(row) + "\n"


def test_sizes():
    files = ["--model", "m", "--data", "d"]
    assert summarize.flags(files)[1] == stages.FULL
    assert summarize.flags([*files, "--reduced"])[1] == stages.REDUCED
    _, tiny = summarize.flags([*files, "--tiny", "--reduced", "--dtype", "float32"])
    assert (tiny.steps, tiny.words, tiny.dtype) == (5, stages.REDUCED.words, "float32")


# ---------------------------------------------------------------- started again


@pytest.fixture
def started(tmp_path):
    """started(changes of the size, **changes of the flags): begin in OUT, with a model and documents."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "out").mkdir()

    def begin(*more, **size):
        args, _ = summarize.flags(
            ["--model", str(tmp_path / "model"), "--data", str(path), "--out", str(tmp_path / "out"), *more]
        )
        small = replace(stages.FULL, **{"words": 99, "sft": 1, "pairs": 1, "test": 1, **size})
        run = stages.args_of_seed(args, args.seeds[0])
        run.out = tmp_path / "out"  # of whatever seed
        stages.check_settings(run, small, summarize.read_documents(args.data, small, run.seed))

    begin()
    begin("--settings", "hidden")  # one more setting changes nothing
    return begin


@pytest.mark.parametrize(
    "name, value", [("dpo_lr", {"hidden": 1.0}), ("tokens", 9), ("dtype", "float32"), ("steps", 3)]
)
def test_results_of_another_size_are_refused(name, value, started):
    with pytest.raises(InputError, match=f"holds results of another {name}; choose another --out"):
        started(**{name: value})


def test_results_of_another_seed_are_refused(started):
    with pytest.raises(InputError, match="results of another seed"):
        started("--seeds", "1")


@pytest.mark.parametrize("name, word", [("model/model.safetensors", "model"), ("rows.jsonl", "documents")])
def test_results_of_another_model_or_data_of_the_same_size_are_refused(name, word, started, tmp_path):
    path = tmp_path / name
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"weights", b"weighty").replace(b"Cairo", b"Caira"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(InputError, match=f"results of another {word}"):
        started()


@pytest.mark.parametrize("text", ["", "[]", '{"seed": ', "\udcff"])
def test_damaged_settings_are_one_line(text, started, tmp_path):
    path = tmp_path / "out/settings.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"{path}: .*choose another --out, or delete"):
        started()


def test_each_setting_has_rates_of_its_own():
    args, size = args_of_first_seed("--tiny")
    size = replace(size, dpo_lr={"one-line": 0.1, "hidden": 0.2}, rl_lr={"one-line": 0.3, "hidden": 0.4})
    for setting, rl_lr, dpo_lr in (("one-line", "0.3", "0.1"), ("hidden", "0.4", "0.2")):
        rlhf, dpo = stages.road_phases(args, size, setting)
        assert rlhf.command[rlhf.command.index("--lr") + 1] == rl_lr
        assert dpo.command[dpo.command.index("--lr") + 1] == dpo_lr


def test_one_line_and_hidden_share_an_sft_policy(started, tmp_path):
    args, size = args_of_first_seed("--tiny")
    args.out = tmp_path / "out"
    rows = documents.Documents(sft=ROWS, pairs=ROWS, test=ROWS, all=ROWS)
    names = [phase.name for phase in stages.sft_phases(args, size, rows)]
    assert names == [f"{args.out}/one-line/sft", f"{args.out}/two-word/sft"]
    for setting, name in {"one-line": names[0], "two-word": names[1], "hidden": names[0]}.items():
        for road in stages.road_phases(args, size, setting):
            assert name in road.needs and road.command[road.command.index("--init") + 1] == name
    args.settings = ["hidden"]
    assert [phase.name for phase in stages.sft_phases(args, size, rows)] == names[:1]


def test_no_road_may_write_more_than_two_words_and_their_end(tmp_path):
    args, size = args_of_first_seed("--tiny")
    for setting, tokens in (("one-line", "16"), ("hidden", "16"), ("two-word", "6")):
        rlhf, dpo = stages.road_phases(args, size, setting)
        for command in (rlhf.command, dpo.command):
            assert command[command.index("--max-response-tokens") + 1] == tokens
        assert rlhf.command[rlhf.command.index("--max-new-tokens") + 1] == tokens


# ---------------------------------------------------------------- over seeds


def test_each_seed_has_its_folder():
    args, _ = summarize.flags(["--model", "m", "--data", "d", "--out", "o", "--seeds", "3", "1", "3"])
    assert args.seeds == [3, 1]
    run = stages.args_of_seed(args, 1)
    assert (run.seed, run.out, run.model, args.out) == (1, Path("o/seed1"), Path("m"), Path("o"))


@pytest.fixture
def run_without_training(started, tmp_path, monkeypatch):
    """run(flags): the script, with measures at once in place of all training. RLHF wins .6 + seed / 10."""
    (tmp_path / "out/settings.json").unlink()  # of `started`

    def measure(args, size, setting, rows, reward):
        path = stages.measures_path(args, setting)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**made_up_measures(0.6 + args.seed / 10), "peak_gib": 1.0 + args.seed})
        return 2.5

    monkeypatch.setattr(summarize, "run_phases", lambda *args: {"sft": 1.0})
    monkeypatch.setattr(stages, "make_pairs", lambda *args: {})
    monkeypatch.setattr(stages, "make_measures", measure)
    tiny = replace(stages.FULL, words=99, sft=1, pairs=1, test=1)
    monkeypatch.setattr(stages, "FULL", tiny)

    def run(*more):
        files = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl")]
        summarize.main([*files, "--out", str(tmp_path / "out"), "--settings", "hidden", *more])

    return run


def test_each_seed_is_run_in_its_folder_and_results_over_seeds_hold_them(run_without_training, tmp_path):
    run_without_training("--seeds", "2", "0")
    out = tmp_path / "out"
    over_seeds = read_json_object(out / "results.json")
    assert over_seeds["seeds"] == [2, 0]
    for seed, results in zip((2, 0), over_seeds["by_seed"], strict=True):
        folder = out / f"seed{seed}"
        assert results == read_json_object(folder / "results.json")
        assert (results["seed"], results["total_seconds"], results["peak_gib"]) == (seed, 3.5, 1.0 + seed)
        assert results["seconds"] == {"sft": 1.0, "hidden/measures": 2.5}
        assert results["settings"]["hidden"] == made_up_measures(0.6 + seed / 10)
        assert read_json_object(folder / "settings.json")["seed"] == seed
        assert "- RLHF: as it is" in (folder / "report.md").read_text()
    wins = over_seeds["settings"]["hidden"]["rlhf_against_dpo"]
    assert wins == {"mean": pytest.approx(0.7), "se": pytest.approx(0.1)}
    assert over_seeds["seconds"] == 7.0
    # Results over seeds are of those that were asked for last; the others stay.
    before = (out / "seed2/results.json").read_bytes()
    run_without_training("--seeds", "0")
    assert read_json_object(out / "results.json")["seeds"] == [0]
    assert (out / "seed2/results.json").read_bytes() == before


def test_all_seeds_are_checked_before_the_first_is_run(run_without_training, tmp_path):
    run_without_training("--seeds", "1")
    settings = tmp_path / "out/seed1/settings.json"
    settings.write_text(settings.read_text().replace('"dpo_lr":', '"other":'))
    with pytest.raises(InputError, match="seed1 holds results of another dpo_lr"):
        run_without_training("--seeds", "0", "1")
    assert not (tmp_path / "out/seed0/results.json").exists()


def test_a_folder_of_earlier_versions_is_refused_and_nothing_in_it_changes(run_without_training, tmp_path):
    out = tmp_path / "out"
    for name in ("settings.json", "phases.json", "results.json"):
        (out / name).write_text("{}")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="--out .*out: holds the runs of one seed.*choose another --out"):
        run_without_training()
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_changed_results_over_seeds_are_refused(run_without_training, tmp_path):
    run_without_training()
    path = tmp_path / "out/report.md"
    path.write_text("mine")
    with pytest.raises(InputError, match="out/report.md: has changed since it was made"):
        run_without_training("--seeds", "0", "1")
    assert path.read_text() == "mine"


def test_a_run_at_a_tiny_size(monkeypatch, tmp_path):
    """All commands, on a model of bytes. The reward is a text's length: it has no word to name yet."""
    names = ["".join(letters) for letters in itertools.islice(itertools.permutations("abcdefgh", 4), 40)]
    rows = [{"document": f"{a} {b}", "summary": f"{a} {b}"} for a, b in itertools.pairwise(names)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = small_folder(tmp_path / "model")
    size = replace(stages.TINY, sft=12, pairs=8, test=4, steps=2, samples=2, draws=3, dtype="float32")
    monkeypatch.setattr(stages, "TINY", size)
    monkeypatch.setattr(summarize, "reward_function", lambda setting, rows: lambda row, text: len(text) / 10)
    out = tmp_path / "out"
    summarize.main(["--model", str(model), "--data", str(data), "--out", str(out), "--tiny"])

    results = read_json_object(out / "results.json")
    assert len(results["verdict"]) == 11 and list(results["settings"]) == list(stages.SETTINGS)
    for setting in stages.SETTINGS:
        pairs = read_jsonl(out / "seed0" / setting / "pairs.jsonl")
        assert 4 <= len(pairs) <= 8 and all(pair["chosen"] != pair["rejected"] for pair in pairs)
        measures = results["by_seed"][0]["settings"][setting]
        assert measures["policies"]["sft"]["kl_to_ref"]["mean"] == pytest.approx(0, abs=1e-5)
        for policy in measures["policies"].values():  # E[r] - kl KL
            expected = policy["reward"]["mean"] - size.kl * policy["kl_to_ref"]["mean"]
            assert policy["objective"]["mean"] == pytest.approx(expected, abs=1e-6)
        lead = measures["policies"]["rlhf"]["reward"]["mean"] - measures["policies"]["dpo"]["reward"]["mean"]
        assert measures["rlhf_minus_dpo"]["mean"] == pytest.approx(lead)
    assert b"<svg" in (out / "figure.svg").read_bytes()
    # Once more: nothing is made again.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(summaries_of_policies, "sample", None)
    summarize.main(["--model", str(model), "--data", str(data), "--out", str(out), "--tiny"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
