"""Commands of phases without a new Python for each, which takes three seconds."""

import importlib


def run_phases(phases, *_):
    """Run the commands of phases as nanoroads.report.phases.run_phases does, one after another."""
    for phase in phases:
        if phase.result.is_file() or (phase.result / "model.safetensors").exists():
            continue  # an earlier call's
        words = phase.command
        if words[0] == "-m":
            importlib.import_module(words[1]).main(words[2:])
        else:
            importlib.import_module(words[0].removesuffix(".py")).main(words[1:])
