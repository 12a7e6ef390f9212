"""The folder of a run: its config.json, the log that follows its checkpoints, its export."""

from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from helpers.tiny import tiny

from nanoroads.errors import InputError
from nanoroads.run.folder import read_metrics
from nanoroads.run.optim import adamw, update
from nanoroads.run.run import Run
from nanoroads.weights.checkpoint import save_model, save_state
from nanoroads.weights.files import read_config

TOKENS = torch.arange(20).view(2, 10)


def start(out, stage="sft", **changed):
    """A Run in the folder `out`, with these flags."""
    flags = {"out": out, "seed": 0, "device": "cpu", "dtype": "float32", "kernel": "auto", "compile": False}
    flags |= {"fsdp": False, "resume": True, "inspect": False, "profile": False, "export_hf": None}
    flags |= {"eval_every": 1, "log_every": 1, "save_every": 100, "track": None}
    flags |= {"lora": None, "checkpoint_activations": False}
    return Run(Namespace(**flags | changed), stage)


def test_config_is_what_the_run_was(tmp_path):
    model = tiny()
    run = start(tmp_path, "dpo", seed=3)
    run.describe(model, "roadmap", beta=0.2)
    config = read_config(tmp_path)
    assert config["stage"] == config["nanoroads"] == "dpo"
    assert config["tokenizer"] == "roadmap" and config["beta"] == 0.2
    assert config["args"] == {**vars(run.args), "out": str(tmp_path)}
    assert config["args"]["seed"] == 3 and config["model"] == asdict(model.config)


@pytest.mark.parametrize("end", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1.0}', "\n", '{"step":'])
def test_later_lines_of_the_log_go(end, tmp_path):
    model = tiny().float()
    optimizer = adamw(model, 0.01, 0.1)
    run = start(tmp_path)
    run.describe(model, "roadmap")
    for step in run.steps(model, optimizer, total=4):
        model.logits((TOKENS + step) % 23).logsumexp(-1).mean().backward()
        update(model, optimizer, lr=0.01, clip=1.0)
        run.log(step, {"loss": step + 1})
        if step + 1 == 3:
            save_state(tmp_path, model, optimizer, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(end)

    again = start(tmp_path)
    steps = again.steps(model, optimizer, total=10)
    assert next(steps) == 3
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    again.log(3, {"loss": 0})
    assert len(read_metrics(tmp_path)) == 4
    steps.close()

    (
        tmp_path / "resume.safetensors"
    ).unlink()  # without a checkpoint the run starts over, and so does its log
    steps = start(tmp_path).steps(model, optimizer, total=10)
    assert next(steps) == 0
    assert read_metrics(tmp_path) == []
    steps.close()


def test_a_log_of_something_else_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    model = tiny()
    with pytest.raises(InputError, match="not a run of nanoroads: it holds metrics.jsonl"):
        next(start(tmp_path).steps(model, adamw(model, 0.01, 0.1), total=4))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"loss": 1}\n'


def test_a_run_is_exported_with_its_tokenizer_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny().float()
    out, folder = tmp_path / "run", tmp_path / "exported"
    run = start(out)
    run.describe(model, "roadmap")
    save_model(out, model)
    run.export()  # without --export-hf: nothing
    assert not folder.exists()
    run.args.export_hf = folder
    run.export()
    x = torch.randint(23, (2, 9))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(x).logits, model.logits(x))
    assert theirs.config.eos_token_id == 97
    before = (folder / "model.safetensors").read_bytes()
    (folder / "config.json").unlink()  # as if killed before its last file
    (folder / "model.safetensors").write_bytes(b"half")
    run.export()
    assert (folder / "model.safetensors").read_bytes() == before and (folder / "config.json").exists()
    (folder / "model.safetensors").write_bytes(b"another model")
    run.export()  # whole: it stays
    assert (folder / "model.safetensors").read_bytes() == b"another model"
    (folder / "config.json").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run.export()
    (folder / "notes.txt").unlink()
    (folder / "additional_chat_templates").symlink_to(tmp_path)  # nothing is written through it
    with pytest.raises(InputError, match="not empty"):
        run.export()
    assert (folder / "model.safetensors").read_bytes() == b"another model"
