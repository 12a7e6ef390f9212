"""--help of every script: short usage, groups, every default, at most 100 columns."""

import re

import pytest

import all_roads
import sample
import score
import train_dpo
import train_rlhf
import train_sft
from experiments import bench_step, beta, misspecified, ppo, summarize, sweep, theorem_3_1
from nanoroads.experiments import summaries_over_seeds
from nanoroads.report import curves, page
from nanoroads.run.flags import Parser
from nanoroads.world import pairs

# What reads each script's command line.
COMMANDS = {
    "train_sft": train_sft.flags,
    "train_dpo": train_dpo.flags,
    "train_rlhf": train_rlhf.flags,
    "sample": sample.flags,
    "score": score.flags,
    "all_roads": all_roads.parse_flags,
    "pairs": pairs.main,
    "bench_step": bench_step.flags,
    "beta": beta.main,
    "curves": curves.main,
    "misspecified": misspecified.main,
    "page": page.main,
    "ppo": ppo.flags,
    "summaries_over_seeds": summaries_over_seeds.main,
    "summarize": summarize.flags,
    "sweep": sweep.main,
    "theorem_3_1": theorem_3_1.main,
}
LISTS = {"worlds", "settings"}  # flags whose default is everything


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(command): the parser that a script makes, and its help on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")
    made = []

    def keep(parser, *args, **options):
        made.append(parser)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", keep)

    def parser(command):
        with pytest.raises(SystemExit):
            COMMANDS[command]([])
        return made[-1], made[-1].format_help()

    return parser


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_at_most_100_columns_wide_and_its_usage_is_one_line(command, parser_of):
    _, text = parser_of(command)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert re.match(r"usage: [\w./ -]+?( RUN \[RUN \.\.\.\])?( --[a-z]+ [A-Z]+)* \[flags\]\n\n", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_stands_in_a_group(command, parser_of):
    parser, text = parser_of(command)
    ungrouped = re.search(r"^options:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)[1]
    assert ungrouped.strip().startswith("-h, --help") and ungrouped.count("--") == 1


def told(action):
    """The numbers and words that the help of a flag gives as defaults."""
    match = re.search(r"\(default: (.*)\)$", action.help, re.DOTALL)
    assert match, f"{action.option_strings[0]}: {action.help}"
    return match[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_tells_its_default(command, parser_of):
    parser, _ = parser_of(command)
    for action in parser._actions:
        if action.nargs == 0 or action.required:  # a switch, or a flag that must be given
            continue
        default = action.default
        text = told(action)
        assert "None" not in text
        if default is None or action.dest in LISTS:
            continue
        if isinstance(default, list):
            default = " ".join(map(str, default))
        if isinstance(default, float):
            assert float(text) == default
        else:
            assert text.split(",")[0] in (str(default), "%(default)s")


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rlhf])
def test_both_columns_of_the_defaults_are_told_where_they_differ(script, parser_of):
    parser, text = parser_of(script.__name__)
    actions = {action.dest: action for action in parser._actions}
    for name, small in script.DEFAULTS["small"].items():
        large = script.DEFAULTS["pretrained"][name]
        if small != large:
            assert "pretrained" in told(actions[name]), name
        for default in (small, large):
            if isinstance(default, (int, float)):
                numbers = [float(n) for n in re.findall(r"\d[\d.e-]*", told(actions[name]))]
                assert default in numbers, name
    assert "A default after `pretrained` is for" in text


def test_the_steps_of_rl_are_told(parser_of):
    _, text = parser_of("train_rlhf")
    assert "300" in text and text.index("stage 1") < text.index("stage 2")


def test_an_experiment_lists_no_flag_that_it_refuses(parser_of):
    _, text = parser_of("ppo")
    for flag in ("--resume", "--epochs", "--export-hf", "--micro-batch-size", "--inspect", "--compile"):
        assert f"  {flag}" not in text


# ---------------------------------------------------------------- names that there are not


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--bta", "3"], "--bta 3; the nearest flags are --beta"),
        (["--micro-batchsize=3"], "the nearest flags are --micro-batch-size"),
    ],
)
def test_a_misspelt_flag_is_refused_with_those_that_there_are(argv, words, capsys):
    with pytest.raises(SystemExit):
        train_dpo.flags(argv)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0,1", "0-2", "three", "1.5", "0,1 2"])
def test_seeds_are_explained_to_whoever_writes_them_otherwise(text, capsys):
    with pytest.raises(SystemExit):
        all_roads.parse_flags(["--seeds", text])
    error = capsys.readouterr().err
    assert text in error and "--seeds 0 1 2" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["4294967296", "-1"])
def test_a_seed_out_of_range_says_so(text, capsys):
    with pytest.raises(SystemExit):
        all_roads.parse_flags([f"--seeds={text}"])
    error = capsys.readouterr().err
    assert text in error and "below 4294967296" in error and "micro" not in error
