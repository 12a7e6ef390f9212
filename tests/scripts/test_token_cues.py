"""Two names for each move: the tokens, rewards by their definition, verdicts that can come out either way,
and the script."""

import json
import re

import numpy as np
import pytest
import torch

from experiments import token_cues
from nanoroads.experiments import token_cues as drawn
from nanoroads.experiments import two_names
from nanoroads.model import GPT, GPTConfig
from nanoroads.report import evidence
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.world import pairs, roadmap
from tests.helpers.in_process import run_phases
from tests.helpers.runs import read_jsonl
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

MAP = tokenizer.get("roadmap")


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two names")
    two_names.write_tokenizer(folder)
    return tokenizer.get(str(folder))


# ---------------------------------------------------------------- the tokens


def test_the_maps_ids_stay_and_each_move_has_one_more(encoding):
    assert encoding.n_vocab == 146 and tokenizer.eos_id(encoding) == tokenizer.eos_id(MAP) == 97
    pieces = [tokenizer.piece(encoding, token) for token in range(146)]
    assert len(set(pieces)) == 146 and pieces[:98] == [tokenizer.piece(MAP, token) for token in range(98)]
    for state in roadmap.STATES:
        (move,) = tokenizer.encode(encoding, f">{state}")
        assert tokenizer.encode(encoding, f">{state.lower()}") == [move + 50]


def test_ids_and_text_are_one_to_one(encoding):
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = [int(i) for i in rng.permutation(146) if i != 97][: rng.integers(1, 30)]
        assert tokenizer.encode(encoding, tokenizer.decode(encoding, ids)) == ids


def test_a_rewritten_route_is_the_same_route():
    rng = np.random.default_rng(0)
    assert two_names.rewritten(">OR>NV", "as trained", rng) == ">OR>NV"
    assert two_names.rewritten(">OR>NV", "renamed", rng) == ">or>nv"
    assert two_names.rewritten(">OR:WA", "renamed", rng) == ">or:WA"  # a start has no second name
    route = roadmap.route(roadmap.STATES * 40)
    mixed = two_names.rewritten(route, "mixed", rng)
    assert mixed.upper() == route
    renamed = re.findall(">[a-z]{2}", mixed)
    assert len(set(renamed)) == 48 and 0.47 < len(renamed) / (48 * 40) < 0.53


@pytest.mark.parametrize("reference", two_names.KNOWN)
def test_demonstrations_are_the_maps_in_the_writings_that_are_known(reference):
    rows = roadmap.demonstrations(two_names.WORLD, 900, 3)
    known = two_names.KNOWN[reference]
    found = two_names.demonstrations(known, 900, 3)
    assert found == two_names.demonstrations(known, 900, 3)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert [row["response"].upper() for row in found] == [row["response"] for row in rows]
    upper = sum(row["response"].isupper() for row in found)
    lower = sum(row["response"].islower() for row in found)
    if reference == "two_names_unmixed":
        assert upper + lower == 900 and 400 < upper < 500
    else:  # a third each, but a mixed route of few moves may look like one of the others
        assert 300 < upper < 400 and 300 < lower < 400 and 200 < 900 - upper - lower < 300


def test_pairs_as_tokens(encoding):
    rows = [{"prompt": "WA>CA:", "chosen": ">OR>CA", "rejected": ">ID"}] * 40
    trained = two_names.pairs_as_tokens(rows, "as trained", encoding, 0)
    prompts, responses = two_names.pairs_as_tokens(rows, "renamed", encoding, 0)
    assert prompts == trained[0] == [tokenizer.encode(MAP, "WA>CA:")] * 40
    chosen, rejected = trained[1][0]
    assert chosen == tokenizer.encode(MAP, ">OR>CA") + [97] and rejected == tokenizer.encode(MAP, ">ID") + [
        97
    ]
    assert responses[0] == [[chosen[0] + 50, chosen[1] + 50, 97], [rejected[0] + 50, 97]]
    mixed = two_names.pairs_as_tokens(rows, "mixed", encoding, 0)[1]
    assert {tuple(group[0]) for group in mixed} == {
        (chosen[0] + one, chosen[1] + two, 97) for one in (0, 50) for two in (0, 50)
    }
    assert mixed == two_names.pairs_as_tokens(rows, "mixed", encoding, 0)[1]


# ---------------------------------------------------------------- the rewards

PAIRS = [
    {"prompt": "WA>CA:", "chosen": ">OR>CA", "rejected": ">ID"},
    {"prompt": "WA>OR:", "chosen": ">ID>OR", "rejected": ">OR"},
    {"prompt": "WA>ID:", "chosen": ">OR", "rejected": ">CA"},  # equal true rewards
]


def small(seed, **options):
    """A GPT in fp64 whose weights are far from their initial ones."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(vocab_size=146, n_layer=1, n_embd=16, n_head=2, block_size=16, tied=False, **options)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def log_prob(policy, prompt, response):
    """log pi(y|x) by its definition."""
    logp = policy.logits(torch.tensor([prompt + response]))[0].log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(response))


def head_reward(model, prompt, response):
    """The scalar head at the last token."""
    tokens = torch.tensor([prompt + response])
    hidden = model.trunk(tokens, torch.arange(tokens.shape[1])[None])
    return hidden[0, -1] @ model.scalar_head.weight[0]


def by_definition(reward_of, asked, answers):
    """What `measure` has to say of PAIRS as tokens, for a reward of (prompt, response)."""
    margins = []
    for prompt, (chosen, rejected) in zip(asked, answers, strict=True):
        margins.append((reward_of(prompt, chosen) - reward_of(prompt, rejected)).item())
    true_margins = [0.95, -0.05, 0]
    right = [margin * true > 0 for margin, true in zip(margins, true_margins, strict=True) if true]
    nll = [np.log1p(np.exp(-margin)) for margin in margins]
    return {"true_order": np.mean(right), "nll": np.mean(nll), "accuracy": np.mean(np.array(margins) > 0)}


@pytest.mark.parametrize("seed", range(4))  # in which different pairs are ranked right
def test_rewards_are_what_they_are_called(encoding, seed):
    policy, reference, head = small(seed), small(seed + 10), small(seed, head="scalar")

    def implicit(prompt, response):
        return 0.3 * (log_prob(policy, prompt, response) - log_prob(reference, prompt, response))

    def explicit(prompt, response):
        return head_reward(head, prompt, response)

    with torch.no_grad():
        for model, ref, reward_of in ((policy, reference, implicit), (head, None, explicit)):
            found = token_cues.measure(model, ref, PAIRS, encoding, seed)
            assert list(found) == ["as trained", "renamed", "mixed"]
            for writing, measures in found.items():
                asked, answers = two_names.pairs_as_tokens(PAIRS, writing, encoding, seed)
                for name, value in by_definition(reward_of, asked, answers).items():
                    assert measures[name] == pytest.approx(value, abs=1e-5)


# ---------------------------------------------------------------- the verdict


def seeds_that_agree():
    """Results of two seeds for which every claim holds."""
    by_seed = []
    for more in (0.0, 0.002):  # no standard error is 0
        rows = {}
        for reference, extra in zip(drawn.REFERENCES, (0.0, 0.01), strict=True):
            rows[reference] = {name: {} for name in drawn.LABELS}
            for lost, writing in zip((0.0, 0.1, 0.2), two_names.WRITINGS, strict=True):
                accuracies = {
                    "implicit": 0.8 - lost - more * (1 + lost),
                    "head_3e-4": 0.9 - lost / 2 + extra,
                    "head_1e-3": 0.95 - lost / 4 + extra,
                }
                for name, accuracy in accuracies.items():
                    rows[reference][name][writing] = {"true_order": accuracy}
        by_seed.append(rows)
    return by_seed


def test_every_claim_can_hold():
    lines = token_cues.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 6
    for title, three in zip(drawn.REFERENCES.values(), (lines[:3], lines[3:]), strict=True):
        for writing, line in zip(two_names.WRITINGS, three, strict=True):
            assert title in line and writing in line
    found = [re.findall(r"(\+\d.\d+) ± .*?\(scalar head at rate (....)\)", line) for line in lines]
    assert found[0] == [("+0.101", "3e-4"), ("+0.151", "1e-3")]
    assert found[1] == found[4] == [("+0.050", "3e-4"), ("+0.075", "1e-3")]
    assert found[2] == found[5] == [("+0.100", "3e-4"), ("+0.150", "1e-3")]
    assert found[3] == [("+0.111", "3e-4"), ("+0.161", "1e-3")]


@pytest.mark.parametrize("head", drawn.HEADS)
@pytest.mark.parametrize("line", range(6))
def test_every_claim_can_fail(line, head):
    """Where one of the heads is worse in one writing."""
    by_seed = seeds_that_agree()
    reference = list(drawn.REFERENCES)[line // 3]
    place = line % 3
    # As it is trained, it is worse in all writings, and loses the same in the others.
    worse_in = two_names.WRITINGS if place == 0 else [two_names.WRITINGS[place]]
    for rows in by_seed:
        for writing in worse_in:
            rows[reference][head][writing]["true_order"] -= 0.3
    assert not_held(token_cues.verdict(by_seed)) == {line: NO}


def test_within_two_standard_errors_is_no_difference():
    by_seed = seeds_that_agree()
    by_seed[0]["two_names"]["head_3e-4"]["mixed"]["true_order"] += 0.3
    assert not_held(token_cues.verdict(by_seed)) == {2: UNDECIDED}


def test_bars_are_the_means_of_the_table():
    by_seed = seeds_that_agree()
    heights = []
    for ax in drawn.figure_of(by_seed).axes:
        heights.append([bar.get_height() for bar in ax.patches])
        places = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
        assert places == pytest.approx([-0.27, 0.73, 1.73, 0, 1, 2, 0.27, 1.27, 2.27])  # none hides another
    assert heights[0] == pytest.approx([0.799, 0.6989, 0.5988, 0.9, 0.85, 0.8, 0.95, 0.925, 0.9])
    assert heights[1] == pytest.approx([0.799, 0.6989, 0.5988, 0.91, 0.86, 0.81, 0.96, 0.935, 0.91])
    rows = [row.split(" | ")[1:] for row in drawn.table_of(by_seed).splitlines()]
    assert rows[2] == ["implicit reward of DPO", "0.799 ± 0.001", "0.699 ± 0.001", "0.599 ± 0.001 |"]
    assert rows[7] == ["scalar head at rate 1e-3", "0.960", "0.935", "0.910 |"]


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    model = ["--n-layer", 1, "--n-embd", 16, "--n-head", 1, "--rows", 500, "--steps", 60, "--lr", 2e-2]
    for name, value in {"SFT": model, "PAIRS": 40, "TEST_PAIRS": 30}.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(pairs, "CHUNK", 32)
    quick = {}
    for name, command in token_cues.REWARDS.items():
        quick[name] = command + (["--steps", 2] if name == "implicit" else ["--reward-epochs", 1])
    for name, value in {"REWARDS": quick, "DEMONSTRATIONS": 500, "run_phases": run_phases}.items():
        monkeypatch.setattr(token_cues, name, value)
    token_cues.main(["--seeds", "5", "--out", str(tmp_path)])
    folder = tmp_path / "token_cues"
    written = json.loads((folder / "results.json").read_text())
    assert written["seeds"] == [5] and len(written["verdict"]) == 6
    assert "</svg>" in (folder / "figure.svg").read_text()
    assert (folder / "table.md").read_text() in capsys.readouterr().out

    # All reward models start from their own reference, and have the main world's pairs. The numbers
    # again, from the files that the commands left; NaN where all true rewards are equal.
    (found,) = written["by_seed"]
    main_pairs = tmp_path / "seed5/sft/pairs.jsonl"
    test = read_jsonl(main_pairs.with_name("pairs_test.jsonl"))
    for reference, known in two_names.KNOWN.items():
        runs = tmp_path / "seed5" / reference
        assert read_jsonl(runs / "demonstrations.jsonl") == two_names.demonstrations(known, 500, 5)
        encoding = tokenizer.get(str(runs / "tokenizer"))
        sft = load_policy(runs / "sft")
        assert sft.config.vocab_size == 146
        rates = []
        for name in drawn.LABELS:
            if name == "implicit":
                run = runs / name
                measures = token_cues.measure(load_policy(run), sft, test, encoding, 5)
            else:
                run = runs / name / "reward"
                measures = token_cues.measure(load_reward_model(run), None, test, encoding, 5)
            flags = json.loads((run / "config.json").read_text())["args"]
            assert flags["init"] == str(runs / "sft") and flags["data"] == str(main_pairs)
            rates.append(flags["lr"])
            for writing, values in measures.items():
                assert found[reference][name][writing] == pytest.approx(values, nan_ok=True)
        assert rates == [1e-4, 3e-4, 1e-3]
