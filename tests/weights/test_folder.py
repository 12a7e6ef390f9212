"""A model's folder is a stranger's: only regular files inside it are read, and only so much of them."""

import json
import os
import shutil
import socket

import pytest
import torch
from helpers.folders import edit_json, small_folder
from helpers.refusals import copy, stages, users_of
from safetensors.torch import load_file, save_file

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.encode import encode_row
from nanoroads.weights.checkpoint import load_model, load_policy
from nanoroads.weights.hf import copy_tokenizer_files

USER = {"role": "user", "content": "Hi"}
# Every file that is read of a folder.
READ = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole, tmp_path):
    return copy(whole, tmp_path / "model")


def use(folder):
    """All that a script reads of a folder. Returns the model's weights and a prompt's tokens."""
    tokenizer.get.cache_clear()
    policy = load_policy(folder)
    _, encoding = tokenizer.of(folder, policy)
    return policy.state_dict(), encode_row(encoding, [USER]).prompt


def same(a, b):
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])


def shard(folder, names):
    """Put the weights into model-1.safetensors; the index names the files `names`, in this order."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = {f"tensor {i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("name", READ)
def test_a_link_to_outside_is_not_read(name, model, whole):
    (model / name).unlink()
    (model / name).symlink_to(whole / name)
    with pytest.raises(InputError, match="outside of the folder; copy the file") as error:
        use(model)
    assert f"{model / name}: a link to {whole / name}" in str(error.value)


@pytest.mark.parametrize("name", READ)
def test_a_link_to_another_file_of_the_folder_is_read(name, model, whole):
    (model / "below").mkdir()
    (model / name).rename(model / "below" / "the file itself")
    (model / name).symlink_to("below/the file itself")
    same(use(model), use(whole))


def test_a_folder_may_be_a_link(model, whole, tmp_path):
    (tmp_path / "latest").symlink_to(model)
    same(use(tmp_path / "latest"), use(whole))


def test_a_folder_of_links_leads_out(model, whole, tmp_path):
    """Neither through a link to a folder, nor through two links."""
    (tmp_path / "other").mkdir()
    shutil.copy(model / "model.safetensors", tmp_path / "other/model-1.safetensors")
    shard(model, ["below/model-1.safetensors"])
    (model / "below").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="outside of the folder"):
        load_model(model)
    (model / "below").unlink()
    (model / "below").mkdir()
    (model / "second").symlink_to(tmp_path / "other/model-1.safetensors")
    (model / "below/model-1.safetensors").symlink_to("../second")
    with pytest.raises(InputError, match="outside of the folder"):
        load_model(model)


def test_links_that_lead_nowhere(model):
    for name, target in (
        ("tokenizer_config.json", "nothing"),
        ("special_tokens_map.json", "special_tokens_map.json"),
    ):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name}: a link to .* which is not there"):
            use(model)
        (model / name).unlink()


# ---------------------------------------------------------------- Hugging Face's cache


def cached(whole, cache, repository="models--org--name"):
    """A snapshot as huggingface_hub keeps it: links to blobs that are named by their hashes."""
    snapshot = cache / repository / "snapshots" / "0123abcd"
    blobs = cache / repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(whole.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_is_made_of_links_to_its_own_blobs(whole, tmp_path):
    snapshot = cached(whole, tmp_path)
    same(use(snapshot), use(whole))
    (tmp_path / "name").symlink_to(snapshot)
    same(use(tmp_path / "name"), use(whole))
    same(use(os.path.relpath(snapshot)), use(whole))


def test_newer_snapshots_share_their_large_blobs(whole, tmp_path):
    snapshot = cached(whole, tmp_path)
    weights = (snapshot / "model.safetensors").resolve()
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    weights.rename(shared)
    weights.symlink_to(os.path.relpath(shared, weights.parent))
    with pytest.raises(InputError, match="outside of the folder"):  # any folder may be called blobs
        use(snapshot)
    (tmp_path / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    same(use(snapshot), use(whole))


def test_a_snapshot_does_not_lead_to_another_model(whole, tmp_path):
    snapshot = cached(whole, tmp_path)
    other = cached(whole, tmp_path, "models--org--other")
    (snapshot / "tokenizer_config.json").unlink()
    (snapshot / "tokenizer_config.json").symlink_to((other / "tokenizer_config.json").resolve())
    with pytest.raises(InputError, match="outside of the folder"):
        use(snapshot)


@pytest.mark.parametrize("layout", ["blobs is a link", "no model's", "not a snapshot"])
def test_what_only_looks_like_a_cache(layout, whole, tmp_path):
    repository = "datasets--x" if layout == "no model's" else "models--x"
    snapshot = cached(whole, tmp_path, repository)
    if layout == "blobs is a link":
        (tmp_path / repository / "blobs").rename(tmp_path / "secrets")
        (tmp_path / repository / "blobs").symlink_to(tmp_path / "secrets")
    if layout == "not a snapshot":
        snapshot.parent.rename(tmp_path / repository / "versions")
        snapshot = tmp_path / repository / "versions" / snapshot.name
    with pytest.raises(InputError, match="outside of the folder"):
        use(snapshot)


# ---------------------------------------------------------------- names of shards

OUTSIDE = ["../model-1.safetensors", "a/../../x", "/etc/passwd", "", ".", "a\0b", "..\\x", "C:\\x", "\ud800",
           "\x1b[31m", 3, None, ["model-1.safetensors"], {"a": 1}]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_folder(name, model):
    shard(model, [name])
    with pytest.raises(InputError, match="index.json: not an index of safetensors files"):
        load_model(model)


def test_shards_in_a_folder_below_and_shards_that_are_missing(model, whole):
    shard(model, ["below/model-1.safetensors"] * 2)
    with pytest.raises(InputError, match="below/model-1.safetensors: no such file, though"):
        load_model(model)
    (model / "below").mkdir()
    (model / "model-1.safetensors").rename(model / "below/model-1.safetensors")
    same(use(model), use(whole))


def test_thousands_of_shards_are_not_looked_for(model):
    shard(model, [f"model-{i}.safetensors" for i in range(2, 50_000)])
    with pytest.raises(InputError, match="model-2.safetensors: no such file"):
        load_model(model)


def test_a_tensor_in_two_shards(model):
    shard(model, ["model-1.safetensors", "model-2.safetensors"])
    tensors = load_file(model / "model-1.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, model / "model-2.safetensors")
    with pytest.raises(InputError, match="model-2.safetensors: holds model.norm.weight, which is in model-1"):
        load_model(model)


# ---------------------------------------------------------------- no regular files


def replace(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        before = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 108 characters
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(path.name)
        os.chdir(before)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
@pytest.mark.parametrize("name", [*READ, "special_tokens_map.json"])
def test_what_is_no_regular_file_is_not_opened(name, kind, model):
    """Opening a pipe would wait for ever."""
    replace(model / name, kind)
    with pytest.raises(InputError, match=f"{name}: is a (folder|pipe or a device)"):
        use(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_scripts_say_so_in_one_line(name, refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "run")
    replace(folder / name, "pipe")
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / name, "is a pipe", **flags)


def test_rows_from_a_pipe_are_refused_before_anything_is_read(refuses, sft, tmp_path):
    replace(tmp_path / "rows.jsonl", "pipe")
    for number, (script, flags) in enumerate(stages(sft)):
        flags.update(data=tmp_path / "rows.jsonl", out=tmp_path / str(number))
        refuses(script, "rows.jsonl: is a pipe", "save its contents as a file", **flags)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_run_is_read_in_the_same_way(name, sft, tmp_path):
    folder = copy(sft, tmp_path / "run")
    replace(folder / name, "pipe")
    with pytest.raises(InputError, match=f"{name}: is a pipe"):
        load_model(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(sft / name)
    with pytest.raises(InputError, match="outside of the folder"):
        load_model(folder)


# ---------------------------------------------------------------- what is never done


def test_code_and_pickles_of_a_folder_are_left_alone(model, whole):
    evil = "raise SystemExit('code of the folder was run')"
    for name in ("modeling_x.py", "tokenization_x.py", "__init__.py", "chat.py"):
        (model / name).write_text(evil)
    auto_map = {"AutoModelForCausalLM": "modeling_x--X", "AutoTokenizer": ["tokenization_x.X", None]}
    edit_json(model / "config.json", auto_map=auto_map, trust_remote_code=True)
    edit_json(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="X")
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    same(use(model), use(whole))


def test_an_export_copies_the_folders_own_files(model, whole, tmp_path, capsys):
    (tmp_path / "secret").write_text("a secret")
    (model / "tokenizer.model").symlink_to(tmp_path / "secret")
    (model / "vocab.d").mkdir()
    (model / "merges.txt").symlink_to("tokenizer_config.json")
    templates = "additional_chat_templates"
    (model / templates).mkdir()
    (model / templates / "tool_use.jinja").write_text("{{ tools }}")
    (model / templates / "rag.jinja").symlink_to(tmp_path / "secret")
    out = tmp_path / "out"
    out.mkdir()
    (out / "chat_template.jinja").symlink_to(tmp_path / "secret")  # as somebody may have left it there
    copy_tokenizer_files(model, out)
    names = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        templates,
    }
    assert [path.name for path in (out / templates).iterdir()] == ["tool_use.jinja"]
    assert {path.name for path in out.iterdir()} == names
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (tmp_path / "secret").read_text() == "a secret"
    assert (out / "merges.txt").read_bytes() == (whole / "tokenizer_config.json").read_bytes()
    printed = capsys.readouterr().out
    for left_out in ("tokenizer.model: a link to", "rag.jinja: a link to", "vocab.d: is a folder"):
        assert left_out in printed
