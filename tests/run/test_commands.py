"""Commands for what is missing: they are printed as a user would
type them, and run from any directory."""

import os
import sys
from pathlib import Path

import pytest

from nanoroads.errors import InputError
from nanoroads.run import commands
from nanoroads.run.commands import data_flag, print_next

SFT = ["train_sft.py", "--out", Path("a b"), "--seed", 3]


def test_what_is_missing_is_made_once(tmp_path, monkeypatch, capsys):
    ran = []

    def fake(command, making):
        ran.append(commands.command_line(command))
        (tmp_path / "it").touch()
        return 0

    monkeypatch.setattr(commands, "run_command", fake)
    for _ in range(2):
        commands.make_if_missing(tmp_path / "it", SFT)
    assert ran == [[sys.executable, str(commands.ROOT / "train_sft.py"), "--out", "a b", "--seed", "3"]]
    assert [path.name for path in tmp_path.iterdir()] == ["it"]  # the lock is gone
    assert capsys.readouterr().out.splitlines()[1:] == ["  python train_sft.py --out 'a b' --seed 3"]


def test_a_command_that_fails_ends_the_run(tmp_path, monkeypatch):
    code = 1

    monkeypatch.setattr(commands, "run_command", lambda command, making: code)
    with pytest.raises(InputError, match="it: the command above failed"):
        commands.make_if_missing(tmp_path / "it", SFT)
    assert not list(tmp_path.iterdir())
    code = 2  # it has said why, in a line of its own
    with pytest.raises(SystemExit) as stopped:
        commands.make_if_missing(tmp_path / "it", SFT)
    assert stopped.value.code == 2
    code = -9
    with pytest.raises(InputError, match="it: the command above was killed, perhaps because memory ran out"):
        commands.make_if_missing(tmp_path / "it", SFT)


def test_commands_work_from_any_directory(monkeypatch):
    module = ["-m", "nanoroads.world.pairs", "--n", "3"]
    assert commands.command_line(module) == [sys.executable, *module]
    root = str(commands.ROOT)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert commands.child_environment()["PYTHONPATH"].split(os.pathsep) == [root, "/elsewhere"]
    monkeypatch.delenv("PYTHONPATH")
    assert commands.child_environment()["PYTHONPATH"] == root
    assert (commands.ROOT / "train_sft.py").is_file()


def test_the_next_command_can_be_typed_as_it_is(capsys):
    print_next(["train_dpo.py", "--init", Path("my run")], ["sample.py", "--prompt", "WA>FL:"])
    assert capsys.readouterr().out == (
        "next: python train_dpo.py --init 'my run'    or: python sample.py --prompt 'WA>FL:'\n"
    )


def test_the_next_command_reads_the_same_world_or_a_file_of_pairs():
    assert data_flag("roadmap") == []
    assert data_flag("roadmap-short") == ["--data", "roadmap-short"]
    assert data_flag("rows.jsonl") == ["--data", "pairs.jsonl"]
    assert data_flag("my pairs.jsonl", pairs="my pairs.jsonl") == ["--data", "my pairs.jsonl"]


def test_a_printed_command_cannot_write_to_the_terminal(capsys):
    print_next(["sample.py", "--model", "out/\x1b[31mred"])
    assert capsys.readouterr().out == "next: python sample.py --model 'out/\\x1b[31mred'\n"
