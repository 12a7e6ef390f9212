"""Rows, command lines and results of experiments/summarize.py, which nobody has trained for or measured."""

from experiments import summarize
from nanoroads.experiments import summarize as stages
from nanoroads.report.summaries import COLUMNS

ROWS = [
    {"document": "Pango lays out text; pango draws text on Cairo.", "summary": "text layout with Pango"},
    {"document": "Cairo draws vector graphics on many surfaces.", "summary": "vector graphics"},
    {"document": "A library which draws text quickly.", "summary": "quick text"},
]


def args_of_first_seed(*more):
    """(args, size) of the first seed of a command line."""
    args, size = summarize.flags(["--model", "m", "--data", "d", *more])
    return stages.args_of_seed(args, args.seeds[0]), size


def made_up_measures(win_rate, se=0.05, accuracy=0.7):
    """A setting of one seed. All means but the accuracy are `win_rate`, all errors `se`."""
    cell = {"mean": win_rate, "se": se}
    policies = {}
    for policy in ("sft", "dpo", "rlhf"):
        policies[policy] = {**dict.fromkeys(COLUMNS, cell), "example": " as it is"}
    measures = {"policies": policies, "reward_model": {"nll": 0.6, "accuracy": accuracy, "pairs": 210}}
    others = ("demos", "rlhf_minus_dpo", "objective_gap", "rlhf_against_dpo", "labels_right")
    return {**measures, **dict.fromkeys(others, cell)}


def one_seed(seed, **settings):
    """results.json of a seed. settings: {setting, with _ for -: its measures}."""
    measures = {name.replace("_", "-"): value for name, value in settings.items()}
    results = {"seed": seed, "size": {"sft": 9, "kl": 0.1}, "total_seconds": 100.4 + seed, "peak_gib": 1.5}
    results.update(model="a" * 64, documents="b" * 64)
    return {**results, "seconds": {"one-line/sft": 100.4 + seed}, "settings": measures}
