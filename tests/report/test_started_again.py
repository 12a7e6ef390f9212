"""all_roads.py is started again: what is finished stays as it was, seconds and dates with it; what was
made from something that has changed is made again, and what somebody has changed is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.tiny_plan import SCRIPT

import all_roads
from experiments import sweep
from nanoroads.errors import InputError
from nanoroads.report import phases, write
from nanoroads.report.phases import new_phase

MEASURED = []  # the folders that were measured


def tiny_runs(seed_folder, seed, world, quick, machine_flags=()):
    """all_roads.plan with one run, whose weights are the last word of its command, and its pairs."""
    script = str(seed_folder.parent.parent / "train.py")
    return [
        new_phase(seed_folder, "sft", [script, *machine_flags]),
        new_phase(seed_folder, "sft/pairs.jsonl", ["-m", "draw"], ["sft"]),
    ]


def measure(folder, quick):
    MEASURED.append(folder.name)
    routes = {"rule": "", "prompts": [{"prompt": "WA>CA:", "samples": {}}]}
    weights = (folder / "sft/model.safetensors").read_text()
    return {"measures.json": json.dumps({"weights": weights, "routes": routes}).encode()}


def write_report(results, out, folder):
    (out / "report.md").write_text(f"report of {results['weights']}")
    (out / "rewards.png").write_bytes(b"a picture")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(*flags): all_roads.py on tiny runs, in the folder OUT. Returns results.json."""
    (tmp_path / "train.py").write_text(SCRIPT)
    draw = "import sys\nopen(sys.argv[sys.argv.index('--out') + 1], 'w').write('{}\\n')\n"
    (tmp_path / "draw.py").write_text(draw)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(phases, "POLL", 0.005)
    monkeypatch.setattr(all_roads, "plan", tiny_runs)
    monkeypatch.setattr(all_roads, "measures_file", measure)
    monkeypatch.setattr(write, "write_report", write_report)
    monkeypatch.setattr(all_roads, "verdict", lambda results: ["yes"])
    MEASURED.clear()

    def run(*flags):
        all_roads.main(["--quick", "--out", str(tmp_path / "out"), *flags])
        return json.loads((tmp_path / "out/results.json").read_text())

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def dates(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


def test_a_second_start_changes_nothing(start, out):
    first = start()
    assert first["seconds"].keys() == {"seed0/sft", "seed0/sft/pairs.jsonl", "total"}
    for path in out.rglob("*"):
        os.utime(path, (4e9, 4e9))  # a clock that was ahead
    before = dates(out)
    assert start() == first and dates(out) == before and MEASURED == ["seed0"]


def test_new_weights_are_measured_and_reported(start, out, tmp_path):
    first = start()
    os.utime(out / "seed0/measures.json", (4e9, 4e9))
    script = tmp_path / "train.py"
    script.write_text(script.read_text().replace("text + ", "text.upper() + "))
    shutil.rmtree(out / "seed0/sft")
    second = start()
    assert second["weights"] == first["weights"].upper() and MEASURED == ["seed0"] * 2
    assert (out / "report.md").read_text() == f"report of {second['weights']}"


@pytest.mark.parametrize("name", ["seed0/measures.json", "results.json", "report.md", "rewards.png"])
@pytest.mark.parametrize("how", ["same size and date", "binary", "empty", "a folder"])
def test_what_somebody_has_changed_is_refused(name, how, start, out):
    first = start()
    path = out / name
    before = path.stat()
    data = path.read_bytes()
    if how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"same size and date": data[:-1] + b" ", "binary": b"\xff\0", "empty": b""}[how])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=f"^{path}: has changed since it was made; delete it"):
        start()
    path.rmdir() if how == "a folder" else path.unlink()  # as the error says
    second = start()
    assert {**second, "seconds": 0} == {**first, "seconds": 0}


def test_more_seeds_keep_the_first_ones(start):
    start()
    assert start("--seeds", "0", "1")["seeds"] == [0, 1]
    assert MEASURED == ["seed0", "seed1"]
    assert start()["seeds"] == [0] and MEASURED == ["seed0", "seed1"]


def test_a_folder_of_somebody_elses_is_refused(start, out):
    out.mkdir()
    (out / "report.md").write_text("mine")
    with pytest.raises(InputError, match=f"--out {out}: holds report.md"):
        start()
    assert [path.name for path in out.iterdir()] == ["report.md"]


@pytest.mark.parametrize("moment", range(6, 12))
def test_killed_between_any_two_files_it_ends_with_the_same(moment, start, out, monkeypatch):
    """Of the measures and the report; the ledger has been written five times before."""
    replaced = []
    replace = os.replace

    def kill_at(source, target):
        replaced.append(Path(target).name)
        if len(replaced) == moment:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill_at)
    with pytest.raises(KeyboardInterrupt):
        start()
    monkeypatch.setattr(os, "replace", replace)
    assert start()["weights"] == "--resume" and (out / "report.md").exists(), replaced


def test_a_report_of_the_sweep_is_not_written_over_another_file(tmp_path):
    (tmp_path / "README.md").write_text("# mine")
    with pytest.raises(InputError, match="--report .*README.md: exists, and is no report"):
        sweep.main(["--out", str(tmp_path / "out"), "--report", str(tmp_path / "README.md")])
