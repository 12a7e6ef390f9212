"""Who imports whom: no circles, kernels stand alone, scripts do
not know one another, imports at the top."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ["nanoroads", "kernels"]
SCRIPTS = sorted([*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")])
SCRIPT_NAMES = ["experiments", *(path.stem for path in SCRIPTS)]
# They are not on every machine.
OPTIONAL = {"datasets", "huggingface_hub", "pyarrow", "tokenizers", "transformers", "triton", "trl", "wandb"}
# What takes time, or a package that is not on every machine, and is of use to some runs alone.
SLOW = {
    "torch.nn.attention.flex_attention",
    "torch.utils.tensorboard",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
}
# The only methods that may import modules of ours, for the comfort of whoever has a GPT.
LAZY_METHODS = {"from_pretrained", "save_pretrained"}


def module_name(path):
    """nanoroads/run/optim.py -> nanoroads.run.optim."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {}
for package in PACKAGES:
    for source in sorted((ROOT / package).rglob("*.py")):
        MODULES[module_name(source)] = source


def imported(node):
    """The modules that one import statement names; `from
    package import module` names the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"line {node.lineno}: a relative import"
    names = []
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        names.append(submodule if submodule in MODULES else node.module)
    return names


def imports(path):
    """(modules imported at the top, [(function, module)] imported within functions)."""
    top, lazy = [], []

    def visit(node, function):
        for name in imported(node):
            if function is None:
                top.append(name)
            else:
                lazy.append((function, name))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), None)
    return top, lazy


def package_of(module):
    return module.partition(".")[0]


TOP = {}  # {module: those of ours that it imports at the top}
for module, source in MODULES.items():
    TOP[module] = [name for name in imports(source)[0] if name in MODULES]


def needs_an_optional_package(module):
    """Whether the module, or one that it imports, needs a package that is not on every machine."""
    top, _ = imports(MODULES[module])
    if OPTIONAL.intersection(package_of(name) for name in top):
        return True
    return any(needs_an_optional_package(name) for name in TOP[module])


# ---------------------------------------------------------------- the checks check


@pytest.mark.parametrize(
    "source, top, lazy",
    [
        ("import os\nfrom nanoroads.run import optim", ["os", "nanoroads.run.optim"], []),
        ("from nanoroads.run.optim import Mean", ["nanoroads.run.optim"], []),
        ("try:\n    import fcntl\nexcept ImportError:\n    pass", ["fcntl"], []),
        ("class A:\n    def f(self):\n        import datasets", [], [("f", "datasets")]),
        ("def f():\n    def g():\n        from kernels import api", [], [("g", "kernels.api")]),
    ],
)
def test_imports_are_found(source, top, lazy, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imports(path) == (top, lazy)


def test_the_modules_are_found():
    assert {"nanoroads.model", "nanoroads.run.run", "kernels", "kernels.api"} <= MODULES.keys()
    assert "nanoroads.batch" in TOP["nanoroads.score"]
    assert len(SCRIPTS) >= 5


# ---------------------------------------------------------------- the house


def test_no_import_circle():
    try:
        list(graphlib.TopologicalSorter(TOP).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"an import circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module):
    """Lazy ones are of optional packages or slow ones, or of our modules that
    need one; and those of GPT's two methods."""
    for function, name in imports(MODULES[module])[1]:
        if name in SLOW:
            continue
        if name in MODULES and module == "nanoroads.model" and function in LAZY_METHODS:
            continue
        if name in MODULES:
            assert needs_an_optional_package(name), f"{function} imports {name}"
        elif package_of(module) == "nanoroads":  # the benchmark of the kernels compares with many libraries
            assert package_of(name) in OPTIONAL, f"{function} imports {name}"


def test_only_the_methods_of_gpt_import_ours_within_functions():
    functions = {function for function, name in imports(MODULES["nanoroads.model"])[1] if name in MODULES}
    assert functions == LAZY_METHODS


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) == "kernels"])
def test_kernels_stand_alone(module):
    top, lazy = imports(MODULES[module])
    for name in top + [name for _, name in lazy]:
        assert package_of(name) != "nanoroads"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_do_not_import_scripts(script):
    top, lazy = imports(script)
    for _, name in lazy:
        assert package_of(name) in OPTIONAL
    for name in top:
        assert package_of(name) not in SCRIPT_NAMES


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) == "nanoroads"])
def test_modules_do_not_import_scripts(module):
    top, _ = imports(MODULES[module])
    for name in top:
        assert package_of(name) not in SCRIPT_NAMES
