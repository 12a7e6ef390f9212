"""Fixtures: tiny runs that tests look at and do not touch, and
a script that must refuse its input."""

import pytest
import torch
from helpers.refusals import files
from helpers.runs import argv, make_sft, read_jsonl, run, write_jsonl

import train_dpo
import train_rlhf
from nanoroads.progress import LINE
from nanoroads.run.flags import run_script


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sft(tmp_path_factory):
    """A finished SFT run on the map, with its pairs. Look, do not touch."""
    folder = tmp_path_factory.mktemp("map") / "sft"
    return make_sft(folder, "roadmap", steps=150, rows=2000, eval_every=75)


@pytest.fixture(scope="session")
def dpo(sft, tmp_path_factory):
    return run(train_dpo, tmp_path_factory.mktemp("map") / "dpo", init=sft, steps=30)


@pytest.fixture(scope="session")
def rlhf(sft, tmp_path_factory):
    """Both stages, with the global reward."""
    return run(train_rlhf, tmp_path_factory.mktemp("map") / "rlhf", init=sft)


@pytest.fixture(scope="session")
def rows(sft, tmp_path_factory):
    """A folder of the user's files: sft.jsonl, pairs.jsonl,
    prompts.jsonl. Their prompts are not the map's."""
    folder = tmp_path_factory.mktemp("rows")

    def with_other_prompts(path, count):
        """ "WA>FL:" -> "WA>WA>FL:", which the map's tokenizer reads and its reward does not."""
        changed = []
        for row in read_jsonl(path)[:count]:
            changed.append({**row, "prompt": row["prompt"][:3] + row["prompt"]})
        return changed

    demonstrations = with_other_prompts(sft / "demos.jsonl", 120)
    preferences = with_other_prompts(sft / "pairs.jsonl", 80)
    write_jsonl(folder / "sft.jsonl", demonstrations)
    write_jsonl(folder / "pairs.jsonl", preferences)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in preferences[:3]])
    return folder


@pytest.fixture
def refuses(capfd, tmp_path):
    """refuses(script, *words, **flags): it ends with code 2 and one line of stderr that holds every word.

    Before it stand at most the lines that say how far a loop was. Files that were there are as they were,
    and no weights are written. Returns the line."""

    def check(script, *words, **flags):
        before = files(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: script.main(argv(script, **flags)))
        said = capfd.readouterr().err
        assert stopped.value.code == 2, said
        *progress, error = said.splitlines(keepends=True)
        assert all(LINE.match(line) for line in progress), said
        assert error.startswith("error: ") and error.endswith("\n"), said
        assert "Traceback" not in error and len(error) < 400
        for word in words:
            assert str(word) in error, f"{word!r} is not in {error!r}"
        after = files(tmp_path)
        assert {path: after.get(path) for path in before} == before
        for path in after:
            assert path.suffix != ".tmp"
            assert path.name != "model.safetensors" or path in before
        return error

    return check
