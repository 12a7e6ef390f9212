"""What a user gets wrong: rows, folders, and the scripts that
meet them. See the fixture `refuses`."""

import json
import shutil

import sample
import score
import train_dpo
import train_rlhf
import train_sft
from helpers.runs import write_jsonl
from nanoroads.run.folder import LOCK
from nanoroads.world import pairs

ROW = {"prompt": "WA>FL:", "response": ">OR", "chosen": ">OR", "rejected": ">CA"}
RULE = {"reward": "helpers.runs:brevity", "max_new_tokens": 12}


def files(folder):
    """{path: bytes} of every file below a folder, but for locks: pytest keeps a failed run, and its lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {path: path.read_bytes() for path in paths}


def row_file(tmp_path, rows=5):
    """A file of good rows, for any script."""
    return write_jsonl(tmp_path / "rows.jsonl", [ROW] * rows)


def copy(folder, path):
    shutil.copytree(folder, path)
    return path


def change_config(folder, **changes):
    """Write other entries into a run's config.json."""
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def stages(sft):
    """[(script, flags)] of the three scripts that read --data."""
    return [(train_sft, {}), (train_dpo, {"init": sft}), (train_rlhf, {"init": sft, "max_new_tokens": 12})]


def users_of(folder, tmp_path):
    """[(script, flags)] of everything that opens a run by its folder."""
    out, rows = tmp_path / "out", row_file(tmp_path)
    return [
        (train_sft, {"init": folder, "data": rows, "out": out / "0"}),
        (train_dpo, {"init": folder, "data": rows, "out": out / "1"}),
        (train_rlhf, {"init": folder, "data": rows, "out": out / "2", **RULE}),
        (sample, {"model": folder, "device": "cpu"}),
        (pairs, {"policy": folder, "out": out / "pairs.jsonl", "n": 4}),
        (score, {"policy": folder, "data": rows, "device": "cpu"}),
    ]
