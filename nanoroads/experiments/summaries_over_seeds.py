"""What experiments/summarize.py found over seeds, out of each seed's results.json.

    python -m nanoroads.experiments.summaries_over_seeds RESULTS.json [RESULTS.json ...] --out DIR

The script does this after each of its --seeds: it reads OUT/seedS/results.json of those done, and
writes OUT/results.json, report.md and figure.svg. The command does the same for files from
anywhere, say of seeds that ran on different machines. Their model, documents, sizes and settings
have to be the same.
"""

from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.report.summaries import over_seeds_files
from nanoroads.run.flags import Parser, run_script
from nanoroads.run.made_from import check_fields, is_object, is_seconds, write_made
from nanoroads.weights.files import read_json_object
from nanoroads.weights.identity import of_file


def write_over_seeds(out, paths):
    """Write results.json, report.md and figure.svg to the folder `out`, and print the verdict.

    paths: the results.json of each seed. Raises InputError: a file is not of one seed, or two do
    not belong together; a file that is there and not ours."""
    by_seed = [read_one_seed(path) for path in paths]
    for path, results in zip(paths, by_seed, strict=True):
        check_alike(path, results, by_seed[0])
    seeds = [results["seed"] for results in by_seed]
    for seed in seeds:
        if seeds.count(seed) > 1:  # it would be one run counted twice
            raise InputError(f"{paths[seeds.index(seed)]}: there are two files of seed {seed}")
    made_from = {str(path): of_file(path) for path in paths}
    results, files = over_seeds_files(seeds, by_seed)
    write_made(out / "results.json", files, made_from, results["seconds"])
    print("\n".join(results["verdict"]))
    print(f"{out}/report.md")


def read_one_seed(path):
    """One seed's results.json, as experiments/summarize.py writes it."""
    results = read_json_object(path)
    advice = "give the results.json of one seed of experiments/summarize.py"
    fields = {"seed": is_seed, "model": is_hash, "documents": is_hash, "size": is_object}
    fields.update(settings=is_object, total_seconds=is_seconds, peak_gib=is_seconds)
    check_fields(results, fields, path, advice)
    return results


def is_seed(value):
    return type(value) is int and value >= 0


def is_hash(value):
    return isinstance(value, str)


def check_alike(path, results, first):
    """Raises InputError unless results are of the same sizes and settings as the first ones."""
    for name, value in first["size"].items():
        if results["size"].get(name) != value:
            raise InputError(f"{path}: its {name} is not that of seed {first['seed']}")
    for name in ("model", "documents"):
        if results[name] != first[name]:
            raise InputError(f"{path}: made with another {name} than that of seed {first['seed']}")
    if set(results["settings"]) != set(first["settings"]):
        raise InputError(f"{path}: its settings are not those of seed {first['seed']}")


def main(argv=None):
    """Read the files, write the results over seeds."""
    parser = Parser("RESULTS.json --out DIR", description=__doc__)
    add = parser.add_argument_group("what is read and written").add_argument
    add("results", type=Path, nargs="+", metavar="RESULTS.json", help="results.json of each seed")
    add("--out", type=Path, required=True, help="folder for the results over seeds")
    args = parser.parse_args(argv)
    write_over_seeds(args.out, args.results)


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
