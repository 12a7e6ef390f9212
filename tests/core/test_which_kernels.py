"""Hugging Face's package `kernels` where ours should be: one line says so and what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOUND = {
    "theirs": "from kernels.load import get_kernel",
    "theirs, which needs what is not there": "import a_package_that_nobody_has",
    "an empty one": "",
}
IMPORTS = ["nanoroads", "nanoroads.model", "nanoroads.losses", "nanoroads.run.run", "nanoroads.text.rows"]


def installed(folder, init):
    """What site-packages holds after both were installed: our files, their __init__.py (None: gone,
    because their package was uninstalled again)."""
    (folder / "nanoroads").symlink_to(ROOT / "nanoroads")
    (folder / "kernels").mkdir()
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name != "__init__.py":
            (folder / "kernels" / path.name).symlink_to(path)
    (folder / "kernels" / "load.py").write_text("def get_kernel():\n    pass\n")
    if init is not None:
        (folder / "kernels" / "__init__.py").write_text(init + "\n")


def last_line_of(folder, code):
    """Of what `python -c code` prints on stderr, with that folder as the only place of our packages."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", [*FOUND, "theirs, uninstalled again"])
def test_another_package_is_noticed(name, tmp_path):
    installed(tmp_path, FOUND.get(name))
    line = last_line_of(tmp_path, "import nanoroads.model")
    assert line.startswith("ImportError: the package kernels is not nanoroads' own")
    assert "run from the checkout" in line and str(tmp_path / "kernels") in line or "__init__.py" in line


def test_a_file_of_that_name_is_noticed(tmp_path):
    """In the working directory, which `python -c` and `python -m` look into first."""
    (tmp_path / "nanoroads").symlink_to(ROOT / "nanoroads")
    (tmp_path / "kernels.py").write_text("import torch\n")
    assert str(tmp_path / "kernels.py") in last_line_of(tmp_path, "import nanoroads.losses")


@pytest.mark.parametrize("module", IMPORTS)
def test_wherever_the_import_begins(module, tmp_path):
    installed(tmp_path, FOUND["theirs"])
    assert "run from the checkout" in last_line_of(tmp_path, f"import {module}")


@pytest.mark.slow
def test_ours_passes(tmp_path):
    installed(tmp_path, (ROOT / "kernels" / "__init__.py").read_text())
    command = [sys.executable, "-c", "import nanoroads.losses"]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True, timeout=60)
