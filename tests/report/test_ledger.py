"""A finished phase is used again only if it is what was made, from what is there now; the rest is made
again where it is ours, and refused by name where it may be somebody's work."""

import json
import os
import shutil

import pytest
from helpers.tiny_plan import results, seconds, tiny_plan

from nanoroads.errors import InputError
from nanoroads.report import phases
from nanoroads.report.ledger import Ledger, Phase
from nanoroads.report.phases import claim_folder, run_phases


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "scripts"))
    monkeypatch.setattr(phases, "POLL", 0.005)
    return tmp_path / "out"


@pytest.fixture
def finished(folder):
    """A folder in which all phases are finished."""
    run_phases(tiny_plan(folder), folder, 2)
    return folder


def change(path):
    """Other bytes, of the same number and with the same date."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def commands_run(folder, capsys, **texts):
    """The names of the phases whose commands are run."""
    capsys.readouterr()
    run_phases(tiny_plan(folder, **texts), folder, 2)
    printed = capsys.readouterr().out.splitlines()
    return [line.split("--out ")[1].split()[0].removeprefix(f"{folder}/") for line in printed]


def test_what_is_finished_is_not_run_again_whatever_its_date(finished, capsys):
    before = results(finished)
    assert before["dpo/model.safetensors"] == "dpo" + "sft" + "pairs" + "sft"
    for path in finished.rglob("*"):
        os.utime(path, (4e9, 4e9))
    times = seconds(finished)
    assert commands_run(finished, capsys) == []
    assert results(finished) == before and seconds(finished) == times


@pytest.mark.parametrize(
    "name", ["sft/model.safetensors", "dpo/config.json", "pairs", "other/model.safetensors"]
)
def test_a_result_that_somebody_has_changed_is_refused_by_name(name, finished):
    change(finished / name)
    before = (finished / name).read_bytes()
    with pytest.raises(InputError, match=f"{finished / name}: has changed since it was made; delete it"):
        run_phases(tiny_plan(finished), finished, 2)
    assert (finished / name).read_bytes() == before
    (finished / name).unlink()  # as the error says
    run_phases(tiny_plan(finished), finished, 2)


def test_a_changed_result_is_found_before_anything_is_run(finished):
    change(finished / "dpo/model.safetensors")
    shutil.rmtree(finished / "sft")
    with pytest.raises(InputError, match="dpo/model.safetensors: has changed"):
        run_phases(tiny_plan(finished), finished, 2)
    assert not (finished / "sft").exists()


def test_a_result_that_was_cut_short_is_refused(finished):
    (finished / "dpo/model.safetensors").write_text("d")
    with pytest.raises(InputError, match="dpo/model.safetensors: has changed"):
        run_phases(tiny_plan(finished), finished, 2)


def test_later_phases_of_a_result_that_became_another_are_made_again(finished, capsys):
    """Here sft is trained anew with another outcome: its program has changed, of which nobody knows."""
    script = finished.parent / "scripts/train.py"
    shutil.rmtree(finished / "sft")
    (finished / "dpo/notes.txt").write_text("mine")
    plan = tiny_plan(finished)
    script.write_text(script.read_text().replace("text + ", "text.upper() + "))
    run_phases(plan, finished, 2)
    assert results(finished)["pairs"] == "pairs" + "SFT"
    assert results(finished)["dpo/model.safetensors"] == "DPO" + "SFT" + "pairs" + "SFT"
    assert results(finished)["other/model.safetensors"] == "OTHER" + "SFT"
    assert (finished / "dpo/notes.txt").read_text() == "mine"
    assert commands_run(finished, capsys) == []


def test_a_result_that_is_made_again_and_is_the_same_keeps_the_rest(finished, capsys):
    shutil.rmtree(finished / "sft")
    assert commands_run(finished, capsys) == ["sft"]


def test_other_results_are_kept_where_one_changes(finished, capsys):
    (finished / "pairs").unlink()
    assert commands_run(finished, capsys, pairs="more") == ["pairs", "dpo"]
    assert results(finished)["dpo/model.safetensors"] == "dpo" + "sft" + "more" + "sft"


def test_a_run_with_other_flags_is_left_to_its_script(finished, capsys):
    """Which here does not mind; a real one refuses by name, or goes on where the flags do not matter."""
    assert commands_run(finished, capsys, other="flags") == ["other"]
    assert (finished / "other/model.safetensors").read_text() == "other" + "sft"


def test_a_file_that_no_command_of_ours_has_made_is_never_deleted(folder):
    folder.mkdir()
    (folder / "pairs").write_text("mine")
    with pytest.raises(InputError, match=f"{folder / 'pairs'}: no record says what it was made from"):
        run_phases(tiny_plan(folder), folder, 2)
    assert (folder / "pairs").read_text() == "mine"


def test_a_file_in_the_place_of_a_killed_phase_is_refused_too(finished):
    """The ledger says that pairs were begun, and not that they were finished."""
    ledger = json.loads((finished / "phases.json").read_text())
    del ledger[f"{finished}/pairs"]
    (finished / "phases.json").write_text(json.dumps(ledger))
    (finished / "pairs").write_text("mine")
    with pytest.raises(InputError, match="pairs: has changed since it was made"):
        run_phases(tiny_plan(finished), finished, 2)


def test_a_run_that_was_begun_from_something_else_is_refused(finished):
    for name in ("dpo", "pairs"):
        ledger = json.loads((finished / "phases.json").read_text())
        del ledger[f"{finished}/{name}"]
        (finished / "phases.json").write_text(json.dumps(ledger))
    (finished / "pairs").unlink()
    (finished / "dpo/model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{finished / 'dpo'}: was begun before {finished}/pairs changed"):
        run_phases(tiny_plan(finished, pairs="more"), finished, 2)


# ---------------------------------------------------------------- damaged state files


ENTRY = {"command": ["a.py"], "read": {}, "seconds": 1.5, "made": {"a/model.safetensors": "0"}}


def damaged(damage):
    """A ledger with one thing wrong, as bytes."""
    whole = json.dumps({"a": ENTRY, "b": ENTRY}).encode()
    if damage == "truncated":
        return whole[:-20]
    if damage == "not UTF-8":
        return whole.replace(b"a.py", b"\xff\xfe", 1)
    if damage == "binary":
        return bytes(range(256))
    if damage == "a list":
        return b"[1]"
    if damage == "nested":
        return b"[" * 100_000
    if damage == "an entry is text":
        return b'{"a": "x"}'
    if damage == "no made":
        return json.dumps({"a": {name: ENTRY[name] for name in ("command", "read", "seconds")}}).encode()
    return json.dumps({"b": ENTRY, "a": {**ENTRY, **json.loads(damage)}}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "not UTF-8",
        "binary",
        "a list",
        "nested",
        "an entry is text",
        "no made",
        '{"seconds": "x"}',
        '{"seconds": true}',
        '{"seconds": -1}',
        '{"seconds": NaN}',
        '{"command": 7}',
        '{"command": [1]}',
        '{"read": []}',
        '{"read": {"x": 1}}',
        '{"made": null}',
        '{"made": {"x": ["y"]}}',
    ],
)
def test_a_damaged_ledger_is_one_line_that_says_what_to_do(damage, tmp_path):
    path = tmp_path / "phases.json"
    path.write_text(json.dumps({"a": ENTRY}))
    assert Ledger(tmp_path).finished == {"a": ENTRY}
    path.write_bytes(damaged(damage))
    with pytest.raises(InputError, match=f"^{path}: .*delete it and start again") as error:
        Ledger(tmp_path)
    assert "\n" not in str(error.value)


def test_without_its_ledger_what_is_finished_is_not_trained_again(finished):
    before = results(finished)
    (finished / "phases.json").unlink()
    run_phases(tiny_plan(finished), finished, 2)
    assert results(finished) == before
    assert "is finished" in (finished / "logs/dpo.txt").read_text()


@pytest.mark.parametrize("name", ["phases.json", "started.json"])
def test_a_folder_in_the_place_of_a_ledger(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{tmp_path / name}: not a file; delete it"):
        Ledger(tmp_path)


# ---------------------------------------------------------------- the folder


def test_results_of_an_exact_experiment_are_no_strangers(tmp_path):
    """experiments/beta.py and misspecified.py run no commands, and may be the first to write there."""
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta/results.json").write_text("{}")
    with pytest.raises(InputError, match="holds beta, no result of ours"):
        claim_folder(tmp_path)
    (tmp_path / "beta/table.md").write_text("")
    claim_folder(tmp_path).release()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(InputError, match="holds report.md"):
        claim_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "logs"], ["lock", "started.json.17.tmp"]])
def test_what_a_run_leaves_that_was_killed_at_once_is_ours(left, tmp_path):
    for name in left:
        (tmp_path / name).touch()
    claim_folder(tmp_path).release()
    (tmp_path / "report.md").write_text("a later one")
    claim_folder(tmp_path).release()


@pytest.mark.parametrize("kind", ["a file", "a link that leads nowhere"])
def test_what_is_no_folder_is_refused(kind, tmp_path):
    out = tmp_path / "out"
    if kind == "a file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere/at/all")
    with pytest.raises(InputError, match=f"--out {out}: is there, and is no folder"):
        claim_folder(out)


# ---------------------------------------------------------------- other kinds of files


def test_without_its_ledger_a_finished_folder_is_used_again(finished):
    """As the error about a damaged ledger says. The pairs are drawn again, and are the same."""
    before = results(finished)
    weights = finished / "dpo/model.safetensors"
    date = weights.stat().st_mtime_ns
    (finished / "phases.json").unlink()
    run_phases(tiny_plan(finished), finished, 2)
    assert results(finished) == before and weights.stat().st_mtime_ns == date


@pytest.mark.parametrize("name", ["pairs", "pairs.made_from.json", "dpo/model.safetensors"])
@pytest.mark.parametrize("kind", ["a folder", "a pipe"])
def test_a_result_that_is_no_file_any_more_is_refused(name, kind, finished):
    path = finished / name
    path.unlink()
    if kind == "a pipe":  # to read it would wait for ever
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(InputError, match=f"{path}: has changed since it was made"):
        run_phases(tiny_plan(finished), finished, 2)


@pytest.mark.parametrize("name", ["logs", "logs/sft.txt", "lock"])
def test_nothing_is_written_through_a_link(name, folder, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "sft.txt").write_text("the work of months")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(mine if name == "logs" else mine / "sft.txt")
    with pytest.raises(InputError, match=f"{folder / name}: a link, where"):
        run_phases(tiny_plan(folder), folder, 2)
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("sft.txt", "the work of months")]


def test_a_command_that_makes_two_files_is_finished_when_both_are_there(tmp_path, monkeypatch, capsys):
    """As nanoroads.world.pairs does: train pairs, and held-out ones."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/two.py").write_text(TWO_FILES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "scripts"))
    out = tmp_path / "out"
    one, other = out / "one", out / "other"
    plan = [Phase(str(one), [], ["-m", "two", "--out", str(one), "--test-out", str(other)])]

    def is_run():
        capsys.readouterr()
        run_phases(plan, out, 1)
        return "-m two" in capsys.readouterr().out

    assert is_run() and not is_run()
    before = Ledger(out).made_hash(str(one))
    other.unlink()
    assert is_run() and other.exists() and Ledger(out).made_hash(str(one)) == before
    change(other)
    with pytest.raises(InputError, match="other: has changed since it was made"):
        is_run()
    (out / "phases.json").unlink()  # killed before it was entered as finished
    with pytest.raises(InputError, match="other: has changed since it was made"):
        is_run()
    change(other)  # back
    assert is_run()


TWO_FILES = """
import sys, time
from pathlib import Path
from nanoroads.run.made_from import write_made
for flag in ("--out", "--test-out"):
    path = Path(sys.argv[sys.argv.index(flag) + 1])
    assert not path.exists()
    write_made(path, {path.name: flag.encode()}, {}, time.time())
"""
