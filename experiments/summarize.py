"""Both roads on a pretrained model: summaries, and two settings that close the paper's gap.

    python experiments/summarize.py --model FOLDER --data FILE --reduced --jobs 2    two CPU cores
    python experiments/summarize.py --model FOLDER --data FILE                   a GPU; not run yet

FOLDER: a Hugging Face model. FILE: rows {"document", "summary"}, as .jsonl, .jsonl.gz or .parquet.
--seeds 0 1 2 runs three seeds, one after the other. With --reduced a seed took 33 to 41 minutes,
beside other work.

Swamy et al., 2503.01067: RLHF is ahead on summaries, because verifying them is easier
than writing them (hypothesis H6). It is not where they have two words, which are as easy to write,
nor where the reward is ROUGE-L with a summary that nobody is shown, which is as hard to verify.
Here: one-line, two-word, hidden; their rewards are in nanoroads/text/documents.py. The paper's RL
is online DPO, ours is RLOO.

In each setting: SFT on the summaries. Of eight samples for each document, the two whose rewards
differ most are a pair, labelled by Bradley-Terry. On these pairs DPO; and a reward model on SFT's
trunk, and RLOO against it. The objective of both is E[r] - .1 KL(policy || SFT), with r as they
learn it. On held-out documents: true rewards, win rates, KL, the objective with the true reward.

Result, three seeds, RLHF's wins against DPO: one-line .457 +- .019, two-word .481 +- .060, hidden
.552 +- .028. The paper's order does not come out. In one-line RLHF is not ahead: .495, .443, .433,
in the mean 2.2 standard errors below one half, and in the objective neither is ahead. In hidden it
wins more. Reward models rank .94, .90 and .79 right, of pairs that are easier than any two samples.
Settings that were tried, and what it does not show: experiments/README.md.
"""

from pathlib import Path

from nanoroads.experiments import summarize as stages
from nanoroads.experiments.summaries_over_seeds import write_over_seeds
from nanoroads.report.phases import claim_folder, run_phases
from nanoroads.report.summaries import comparison
from nanoroads.run.flags import SEED, Parser, positive, run_script
from nanoroads.text.documents import read_documents, reward_function


def flags(argv):
    """The command line -> (args, Size)."""
    parser = Parser("--model DIR --data FILE", description=__doc__)
    add = parser.add_argument_group("the experiment").add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder of the pretrained model")
    add("--data", type=Path, required=True, help='file of rows {"document", "summary"}')
    add("--out", type=Path, default="out/summarize", help="folder of the results (default: %(default)s)")
    settings = stages.SETTINGS
    add("--settings", nargs="+", default=list(settings), choices=settings, help="(default: all)")
    seeds = "seeds of data order and samples (default: 0)"
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="SEED", help=seeds)
    dtype = "of activations (default: bfloat16 with --reduced or --tiny, else on a GPU only)"
    add("--dtype", choices=["float32", "bfloat16"], help=dtype)
    add("--reduced", action="store_true", help="sizes for a 135M model on two CPU cores")
    jobs = "commands at a time; a CPU with two cores runs 2 (default: 1)"
    add("--jobs", type=positive(int), default=1, help=jobs)
    add("--tiny", action="store_true", help="a few steps of everything: does it run here?")
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))  # the same seed twice would be one run counted twice
    return args, stages.size_of(args)


def main(argv=None):
    """Run the seeds. OUT/results.json, report.md and figure.svg hold what is known after each one.

    What is there already is not made again, unless it was made from something that has changed since."""
    args, size = flags(argv)
    stages.refuse_old_layout(args.out)
    lock_of_out = claim_folder(args.out)  # a lock, held to the end
    seeds = []
    for seed in args.seeds:  # what is to be refused is refused now, and not after the first seed's hour
        run = stages.args_of_seed(args, seed)
        lock = claim_folder(run.out)
        documents = read_documents(args.data, size, seed)
        stages.check_settings(run, size, documents)
        seeds.append((run, documents, lock))
    paths = []
    for run, documents, lock in seeds:
        paths.append(run_seed(run, size, documents, lock))
        write_over_seeds(args.out, paths)
    lock_of_out.release()


def run_seed(args, size, documents, lock):
    """All settings of one seed, in args.out. Returns its results.json, which grows with each setting."""
    rewards = {setting: reward_function(setting, documents.all) for setting in args.settings}

    # SFT, then pairs of its samples, then both roads in all settings. Those that train are commands that a
    # user would type. Sizes, rates and flags: REDUCED and road_phases in nanoroads/experiments/summarize.py.
    seconds = run_phases(stages.sft_phases(args, size, documents), args.out, args.jobs, lock)
    roads = []
    for setting, reward in rewards.items():
        seconds.update(stages.make_pairs(args, size, setting, documents, reward))
        roads += stages.road_phases(args, size, setting)
    seconds.update(run_phases(roads, args.out, args.jobs, lock))

    # Measure the policies, and write down what is known so far.
    hashes = stages.hashes_of(args.model, documents)
    measured = []
    for setting, reward in rewards.items():
        seconds[f"{setting}/measures"] = stages.make_measures(args, size, setting, documents.test, reward)
        measured.append(setting)
        results = stages.write_seed_results(args, size, hashes, seconds, measured, documents.test[0])
        print(f"{setting}: {comparison(results['settings'][setting]['rlhf_against_dpo'])}", flush=True)
    print(f"{args.out}/report.md")
    return args.out / "results.json"


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
