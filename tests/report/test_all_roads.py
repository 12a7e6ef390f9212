"""all_roads.py: its measures against enumeration and hand arithmetic, its schedule, its report."""

import html
import json
import math
from pathlib import Path

import pytest
import torch

import all_roads
from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.report import measures, on_map, phases, write
from nanoroads.report.phases import Phase, Starter, by_critical_path, lock_folder, run_phases, start
from nanoroads.run import lock
from nanoroads.text import tokenizer
from nanoroads.world import optimum, roadmap
from tests.helpers.verdicts import NO, UNDECIDED, outcomes

ENCODING = tokenizer.get("roadmap")
PROMPTS = roadmap.prompts(roadmap.WORLDS["roadmap"], "test")[:6]


def policy(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=ENCODING.n_vocab, n_layer=1, n_embd=16, block_size=32, tied=False))


# ---------------------------------------------------------------- measures


def test_best_of_n_is_the_truth_at_the_favourite():
    value = torch.zeros(2, 16)
    value[0, 3], value[1, 10] = 1.0, 1.0
    true = torch.arange(32.0).view(2, 16)
    rows = measures.best_of_n(value, true)
    assert rows["16"] == (3 + 26) / 2
    assert rows["1"] == true.mean().item()  # every sample counts once
    # blocks of 8: (0..7 -> 3), (8..15 -> 8, a tie: the first), (16..23 -> 16), (24..31 -> 26)
    assert rows["8"] == (3 + 8 + 16 + 26) / 4
    assert list(rows) == ["1", "2", "4", "8", "16"]


def test_combine_takes_means_and_errors_over_seeds():
    rows = [
        {"a": {"mean": m, "se": 9.0, "kl_to_optimum": 2 * m}, "n": {"nll": m}, "routes": "x"}
        for m in (1.0, 3.0)
    ]
    assert measures.combine(rows[:1]) == rows[0]
    both = measures.combine(rows)
    assert both["a"] == {"mean": 2.0, "se": 1.0, "kl_to_optimum": 4.0}
    assert both["n"] == {"nll": 2.0} and both["routes"] == "x"


def test_the_optimum_is_the_reference_on_shortest_routes():
    """KL(pi* || pi_ref) = -log of pi_ref's mass on them, since pi* = pi_ref / mass there."""
    ref = policy()
    row = measures.optimum_row(ref, PROMPTS)
    kls = []
    for prompt in PROMPTS:
        logp = on_map.route_logps(ref, {prompt: optimum.shortest_routes(prompt)})[prompt]
        best = (logp - logp.logsumexp(0)).exp()
        kls.append((best * (best.log() - logp)).sum().item())
    assert row["kl_to_ref"]["mean"] == pytest.approx(sum(kls) / len(kls), rel=1e-5)
    assert row["reward"]["mean"] == pytest.approx(sum(map(optimum.optimal_reward, PROMPTS)) / len(PROMPTS))


def test_errors_are_over_prompts_not_samples():
    row = on_map.over_prompts([1.0, 3.0, 5.0, 7.0], ["p", "q"])
    assert row["mean"] == 4.0 and row["se"] == pytest.approx(math.sqrt(8 / 2))


def test_the_prompts_that_are_shown_are_those_on_which_the_policies_differ_most(monkeypatch):
    """Computed again from policies whose rewards are known: the rule looks at no policy's name."""
    prompts = [f"{a}>{b}:" for a, b in zip("WA OR CA NV".split(), "OR CA NV UT".split(), strict=True)]
    # The share of samples that go straight to the goal, which earns 1; the others earn 0.
    share = {
        "sft": dict(zip(prompts, (0.5, 1.0, 0.0, 0.25), strict=True)),
        "dpo": dict(zip(prompts, (0.5, 0.0, 0.25, 0.25), strict=True)),
        "rlhf_global": dict(zip(prompts, (0.75, 0.5, 0.75, 0.5), strict=True)),
    }
    asked = []

    def drawn(policy, of, k, purpose):
        asked.append((policy, k, purpose))
        texts = []
        for prompt in of:
            straight = round(share[policy][prompt] * k)
            texts.append([prompt[2:5]] * straight + [">ME"] * (k - straight))
        return texts

    monkeypatch.setattr(measures, "load_policy", lambda folder: folder.name)
    monkeypatch.setattr(measures, "drawn", drawn)
    shown = measures.shown_routes(Path("x"), prompts)
    # Spreads: 0.25, 1, 0.75, 0.25; the first of equals stands first.
    assert [row["prompt"] for row in shown["prompts"]] == [prompts[1], prompts[2], prompts[0]]
    assert shown["prompts"][0]["samples"]["rlhf_global"] == {">CA": 32, ">ME": 32}
    assert f"3 of {len(prompts)}" in shown["rule"]
    purposes = {purpose for _, _, purpose in asked}
    assert len(purposes) == 2  # the samples that are shown did not choose the prompts


def test_samples_for_another_purpose_are_others():
    one = measures.drawn(policy(), PROMPTS, 8, "choosing")
    assert one == measures.drawn(policy(), PROMPTS, 8, "choosing")
    assert one != measures.drawn(policy(), PROMPTS, 8, "shown")


def test_seeds_that_show_other_prompts_are_combined():
    rows = [{"routes": {"rule": "x", "prompts": [{"prompt": p, "samples": {}}]}} for p in PROMPTS[:2]]
    assert measures.combine(rows) == rows[0]


# ---------------------------------------------------------------- the schedule


def test_every_phase_comes_after_those_it_needs():
    for quick in (True, False):
        earlier = set()
        for world in all_roads.DPO:
            for name, needs, command in all_roads.plan(Path("o/seed0"), 0, world, quick):
                assert set(needs) <= earlier
                assert all(isinstance(word, str) for word in command) and "--out" in command
                earlier.add(name)


@pytest.mark.parametrize("world", ["roadmap-short", "roadmap-2"])
def test_both_roads_aim_at_one_optimum_where_it_is_known(world):
    phases = {phase.name: phase for phase in all_roads.plan(Path("o/seed0"), 0, world, False)}
    folder = f"o/seed0/{world}"
    assert list(phases) == [f"{folder}/{name}" for name in ("sft", "sft/pairs.jsonl", "rlhf_global", "dpo")]

    def flag(name, of):
        command = phases[f"{folder}/{of}"].command
        return command[command.index(name) + 1]

    assert flag("--beta", "dpo") == flag("--kl", "rlhf_global") == "0.5"
    assert flag("--epochs", "dpo") == flag("--reward-epochs", "rlhf_global") == "1"
    assert flag("--n", "sft/pairs.jsonl") == "20000"
    assert phases[f"{folder}/sft"].needs == ["o/seed0/sft"] and flag("--init", "sft") == "o/seed0/sft"
    assert flag("--init", "dpo") == flag("--init", "rlhf_global") == f"{folder}/sft"


def test_device_and_kernel_reach_the_training_scripts():
    machine_flags = ["--device", "cpu", "--kernel", "torch"]
    for _, _, command in all_roads.plan(Path("o"), 0, "roadmap", False, machine_flags):
        assert ("--kernel" in command and "--device" in command) == command[0].startswith("train_")


def phase(tmp_path, name, text, needs=()):
    """A phase that appends a line to a file, through the pairs command's form: -m MODULE ... --out PATH."""
    (tmp_path / "mark.py").write_text(
        "import sys\nopen(sys.argv[2], 'a').write(sys.argv[3] + '\\n')\nsys.exit(sys.argv[3] == 'bad')\n"
    )
    return Phase(name, list(needs), ["-m", "mark", "--out", str(tmp_path / name), text])


def test_finished_phases_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    phases = [phase(tmp_path, "b", "second", ["a"]), phase(tmp_path, "a", "first")]
    seconds = run_phases(phases, tmp_path, 2)
    assert list(seconds) == ["a", "b"] and (tmp_path / "a").read_text() == "first\n"
    stamp = (tmp_path / "a").stat().st_mtime_ns
    assert run_phases(phases, tmp_path, 2).keys() == seconds.keys()
    assert (tmp_path / "a").stat().st_mtime_ns == stamp
    (tmp_path / "a").unlink()  # its result is gone: run it again, and only it
    stamp = (tmp_path / "b").stat().st_mtime_ns
    run_phases(phases, tmp_path, 2)
    assert (tmp_path / "a").read_text() == "first\n" and (tmp_path / "b").stat().st_mtime_ns == stamp
    run_phases([phase(tmp_path, "a", "other")], tmp_path, 2)  # another command
    assert (tmp_path / "a").read_text() == "other\n"
    assert set(json.loads((tmp_path / "phases.json").read_text())) == {"a", "b"}


def test_a_phase_that_fails_is_named_and_kept_out_of_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="a failed"):
        run_phases([phase(tmp_path, "a", "bad"), phase(tmp_path, "b", "x", ["a"])], tmp_path, 2)
    assert not (tmp_path / "phases.json").exists() and not (tmp_path / "b").exists()


def test_the_longest_chain_of_waiting_phases_goes_first():
    names_and_needs = [("a", []), ("b", []), ("c", ["b"]), ("d", ["c"]), ("e", ["a"]), ("f", [])]
    ordered = by_critical_path([Phase(name, needs, ["x.py"]) for name, needs in names_and_needs])
    assert [phase.name for phase in ordered] == ["b", "a", "c", "d", "e", "f"]


def test_a_child_keeps_the_lock_when_its_parent_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "logs").mkdir()
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(0.5)\n")
    ours = lock_folder(tmp_path)
    job = start(Phase("a", [], ["-m", "wait", "--out", str(tmp_path / "a")]), tmp_path, Starter(1), ours)
    ours.release.detach()
    ours.file.close()  # as when the parent is killed: the file of the lock stays
    lock.held.clear()
    assert job.child.poll() is None
    again = lock_folder(tmp_path)
    assert job.child.wait(timeout=5) == 0
    again.release()
    job.log.close()
    assert "waiting for the phases" in capsys.readouterr().out


# ---------------------------------------------------------------- the report

STEP = {"step": 1, "kl": 1, "true_reward": 0, "reward": 0}  # of RL


def cell(mean):
    return {"mean": mean, "se": 0.01}


def exact_setting(lead, se, distances):
    """A row of gap_closed where the optimum is known."""
    row = {"sft": cell(0.1), "dpo": cell(0.9), "rlhf_global": cell(0.91), "optimum": cell(0.97)}
    for name, distance in zip(("dpo", "rlhf_global"), distances, strict=True):
        row[name]["kl_to_optimum"] = {"mean": distance, "se": 0.04}
    row["rlhf_minus_dpo"] = {"mean": lead, "se": se}
    return row


def two_seeds(rewards, models, truth, kl):
    """by_seed: of two seeds whose RLHF - DPO, DPO - SFT and KL to DPO have errors of .014, .014 and .01."""
    by_seed = []
    for sign in (-1, 1):
        off = {"sft": 0.0141 * sign, "rlhf_global": 0.0141 * sign}
        policies = {}
        for name, reward in rewards.items():
            number = {"mean": reward + off.get(name, 0.0), "se": 9.0}
            policies[name] = {"reward": number, "greedy_reward": number, "kl_to_ref": cell(1)}
        row = {"policies": policies, "reward_models": models, "best_of_n_true_reward": truth}
        row["equivalence"] = {"kl_dpo_rlhf_local": kl + 0.01 * sign, "kl_dpo_sft": 1.0}
        by_seed.append(row)
    return by_seed


def results(sft=0.2, dpo=0.4, rlhf=0.5, short=(0.002, 0.001, (0.2, 0.1)), two=(0.2, 0.01, (3, 2)), kl=0.01):
    rewards = {"sft": sft, "dpo": dpo, "rlhf_global": rlhf, "rlhf_local": dpo, "optimum": 0.8}
    gap = {"short_horizon": exact_setting(*short), "two_moves": exact_setting(*two)}
    hidden = {"sft": cell(0.1), "dpo": cell(0.45), "rlhf_global": cell(0.4), "rlhf_minus_dpo": cell(-0.05)}
    gap["hidden_reference"] = hidden
    best = lambda x: {"1": 0.1, "16": x}  # noqa: E731
    models = {
        "dpo": {"nll": 0.63, "accuracy": 0.6, "best_of_n": best(0.4)},
        "local": {"nll": 0.7, "accuracy": 0.6, "best_of_n": best(0.5)},
        "global": {"nll": 0.6, "accuracy": 0.6, "best_of_n": best(0.55)},
    }
    return {
        "seeds": [0, 1],
        "pairs": 5000,
        "seconds": {"sft": 1.0, "total": 2.0},
        "policies": {
            n: {"reward": cell(r), "greedy_reward": cell(r), "kl_to_ref": cell(1)} for n, r in rewards.items()
        },
        "reward_models": models,
        "best_of_n_true_reward": best(0.6),
        "equivalence": {"kl_dpo_rlhf_local": kl, "kl_dpo_sft": 1.0, "stage_1_weights_apart": 0.0},
        "gap_closed": gap,
        "by_seed": two_seeds(rewards, models, best(0.6), kl),
        "routes": {"rule": "x", "prompts": [{"prompt": "WA>CA:", "samples": {"sft": {">OR>CA": 4}}}]},
    }


def test_the_verdict_can_go_either_way():
    words = lambda **r: outcomes(write.verdict(results(**r))[:5])  # noqa: E731
    assert words() == ["yes", "yes", "yes", "yes", NO]
    assert words(rlhf=0.35) == [NO, "yes", "yes", "yes", NO]
    assert words(rlhf=0.42) == [UNDECIDED, "yes", "yes", "yes", NO]  # ahead, but within two standard errors
    assert words(rlhf=0.39) == [UNDECIDED, "yes", "yes", "yes", NO]
    assert words(dpo=0.1) == ["yes", NO, "yes", "yes", NO]
    assert words(dpo=0.22) == ["yes", UNDECIDED, "yes", "yes", NO]  # so is DPO here
    assert "by +0.100 ± 0.014, 7.1 standard errors)." in write.verdict(results())[0]
    assert "by +0.020 ± 0.014, 1.4 standard errors)." in write.verdict(results(rlhf=0.42))[0]
    assert len(write.verdict(results())) == 6  # the order of reward models stands below their table
    order = "the best first, by held-out likelihood: global, dpo, local; by best of 16: global, local, dpo."
    assert order in write.report_text(results())


@pytest.mark.parametrize(("kl", "word"), [(0.22, "yes"), (0.24, UNDECIDED), (0.26, UNDECIDED), (0.28, NO)])
def test_to_come_back_three_quarters_of_the_kl_must_go(kl, word):
    said = write.verdict(results(kl=kl))[2]
    kls = f"three quarters of the KL are gone: 1.000 nats before, {kl:.3f} ± 0.010 after; "
    kls += f"this less a quarter of before: {kl - 0.25:+.3f} ± 0.010, "
    assert outcomes([said]) == [word] and kls in said


def test_of_one_seed_the_number_decides_alone():
    one = results(rlhf=0.42)
    one.update(seeds=[1], by_seed=one["by_seed"][1:])
    line = "yes: RLHF on the global reward beats DPO in true reward (by +0.034, no error)."
    assert write.verdict(one)[0] == line
    assert "Seed by seed" not in write.report_text(one)
    # Nor do errors over prompts decide: of several seeds neither of these is shown.
    for lead, word in ((0.002, "yes"), (0.011, NO)):
        several = results(short=(lead, 0.02, (0.2, 0.1)))
        said = write.verdict({**several, "by_seed": several["by_seed"][1:]})[3]
        assert outcomes(write.verdict(several))[3] == UNDECIDED
        assert outcomes([said]) == [word] and said.count("no error") == 3 and "±" not in said


def test_the_report_has_each_seed():
    text = write.report_text(results(kl=0.02))
    assert "| 0 | 0.186 | 0.400 | 0.486 | 0.186 | 0.400 | 0.486 | 1.000 | 1.000 | 0.600 | 0.010 |" in text
    assert "| 1 | 0.214 | 0.400 | 0.514 | 0.214 | 0.400 | 0.514 | 1.000 | 1.000 | 0.600 | 0.030 |" in text
    assert "KL(DPO || SFT) 1.000, KL(DPO || RLHF-local) 0.020 ± 0.010 nats." in text


@pytest.mark.parametrize(
    "setting, finding",
    [
        ((0.002, 0.0, (0.2, 0.1)), "closed"),
        ((-0.007, 0.001, (0.21, 0.21)), "closed"),  # within .01, and within .3 nats, by two standard errors
        ((-0.009, 0.001, (0.2, 0.1)), "undecided"),  # within .01, but not by two standard errors
        ((0.002, 0.005, (0.2, 0.1)), "undecided"),
        ((0.03, 0.02, (0.2, 0.1)), "undecided"),  # within two standard errors of 0, which shows nothing
        ((0.002, 0.001, (0.23, 0.1)), "undecided"),  # within .3 nats, but not by two standard errors
        ((0.002, 0.001, (0.1, 0.37)), "undecided"),
        ((0.04, 0.01, (0.2, 0.1)), "open"),  # apart
        ((-0.04, 0.01, (0.2, 0.1)), "open"),
        ((0.002, 0.001, (0.39, 0.1)), "open"),  # equal, but one of them is nowhere near the optimum
        ((0.002, 0.001, (0.1, 0.39)), "open"),
        ((0.002, 0.005, (0.1, 0.39)), "open"),
    ],
)
def test_the_gap_is_closed_where_both_are_one_and_near_the_optimum(setting, finding):
    begins = {"closed": "yes: ", "undecided": "NO, undecided: ", "open": "NO: "}
    for name, line in (("short", 3), ("two", 4)):
        said = write.verdict(results(**{name: setting}))[line]
        assert said.startswith(begins[finding]) and "the gap is closed: " in said
        assert f"RLHF - DPO is {setting[0]:+.3f}" in said
        assert f"DPO is {setting[2][0]:.2f} ± 0.04 nats away, " in said
        assert f", RLHF {setting[2][1]:.2f} ± 0.04, " in said


def test_how_far_each_is_from_its_bound_is_said():
    said = write.verdict(results(short=(-0.004, 0.002, (0.2, 0.4))))[3]
    assert "-0.004 ± 0.002, 3.0 standard errors above -0.01" in said
    assert "0.20 ± 0.04 nats away, 2.5 standard errors below 0.3" in said
    assert "0.40 ± 0.04, 2.5 standard errors above 0.3." in said


def test_the_committed_report_is_what_is_made_of_its_numbers():
    folder = Path(write.__file__).parents[2] / "experiments/all_roads"
    numbers = json.loads((folder / "results.json").read_text())
    assert (folder / "report.md").read_text() == write.report_text(numbers)


def test_nothing_is_claimed_where_the_optimum_is_not_known():
    line = write.verdict(results())[5]
    start = "Against a hidden walk RLHF - DPO is -0.050 ± 0.010, 5.0 standard"
    assert line.startswith(start) and "no claim" in line


def test_the_report_holds_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "read_metrics", lambda run: [STEP])
    write.write_report(results(), tmp_path, tmp_path)
    text = (tmp_path / "report.md").read_text()
    short = "| short horizon | 0.100 ± 0.010 | 0.900 ± 0.010 | 0.910 ± 0.010 | 0.002 ± 0.001 | 0.970 |"
    assert "| rlhf_global | 0.500 ± 0.010 |" in text and short in text
    assert "| 3.00 ± 0.04 | 2.00 ± 0.04 |" in text and "-0.050 ± 0.010 | - | - | - |" in text
    assert "experiments/overoptimisation.py" in text
    assert "| global | 0.600 | 0.600 | 0.100 | 0.550 |" in text
    for name in ("rewards", "best_of_n", "equivalence", "routes"):
        assert f"({name}.svg)" in text and (tmp_path / f"{name}.svg").stat().st_size > 5_000


def test_the_page_holds_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "read_metrics", lambda run: [STEP])
    write.write_report(results(), tmp_path, tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text())
    for line in write.verdict(results()):
        assert line.removeprefix("yes: ").removeprefix("NO, ").removeprefix("NO: ") in page
    cells = 0
    for line in (tmp_path / "report.md").read_text().splitlines():
        if line.startswith("|") and "---" not in line:
            for cell in line[1:-1].split("|"):
                assert f">{cell.strip()}</t" in page
                cells += 1
    assert cells > 50
    assert '"routes":null' in page and '<section id="map">' not in page
    (tmp_path / "routes.json").write_text('{"rule": "of routes.json", "prompts": []}')
    write.write_report(results(), tmp_path, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert '"rule":"of routes.json"' in page and '<section id="map">' in page


def test_seeds_are_a_list_of_seeds():
    seeds = lambda *words: all_roads.parse_flags(["--seeds", *words]).seeds  # noqa: E731
    assert (seeds("3"), seeds("0"), seeds("1"), seeds("4", "7")) == ([3], [0], [1], [4, 7])
    assert seeds("4", "7", "4") == [4, 7]
    assert all_roads.parse_flags([]).seeds == [0]


def test_a_running_phase_says_how_far_it_is(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        job = phases.Job(Phase(f"{tmp_path}/seed0/rlhf", [], []), None, 0.0, log)
        assert phases.how_far(job, tmp_path) == "seed0/rlhf"
        print("rloo: 1,835 prompts x 8\nrlhf: step 40 of 300, reward 1.2, 00:30 left", file=log, flush=True)
        assert phases.how_far(job, tmp_path) == "seed0/rlhf rlhf 40/300"
