"""report.html as text: every verdict and number of the report, nothing from outside, what its map is of."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.made_up_report import HOSTILE, MARKDOWN, draw_figure, made_up_routes

from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.report import measures, page
from nanoroads.report.drawing import COLOURS, INK
from nanoroads.text import tokenizer
from nanoroads.world.roadmap import true_reward


class Elements(HTMLParser):
    """The elements of a page: (tag, {attribute: value}) in `found`, and the text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.text = ""
        self.tag = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tag not in ("script", "style"):
            self.text += data


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("routes", [None, made_up_routes()])
def test_every_verdict_and_every_cell_is_on_the_page(routes, figures_folder):
    text = page.report_page(MARKDOWN, figures_folder, routes)
    assert "<title>All roads</title>" in text and "<h1>All roads</h1>" in text
    assert re.findall("<h2>(.*?)</h2>", text) == ["Policies", "Seconds"]
    assert '<p class="verdict yes"><b class="yes">yes</b> RLHF is ahead (by +0.100 ± 0.014).</p>' in text
    assert '<p class="verdict NO"><b class="NO">NO</b> the gap is closed (by +0.020).</p>' in text
    assert "<li>Best first: global, dpo.</li>" in text and "<code>code</code>" in text
    assert '<tr><td>sft</td><td class="number">0.186 ± 0.003</td><td></td></tr>' in text
    assert '<th>policy</th><th class="number">reward</th>' in text
    assert "<blockquote>What somebody wrote.</blockquote>" in text
    for i in range(20):  # a long table begins closed
        assert f'<td>seed{i}/sft</td><td class="number">{100 + i}</td>' in text
    assert text.count("<details><summary>20 rows</summary>") == text.count("<details>") == 1
    # The map shows what the figure of the routes shows.
    assert (">routes</text>" in text) == (routes is None) and ">rewards</text>" in text
    assert ('<section id="map">' in text) == (routes is not None)
    assert text == page.report_page(MARKDOWN, figures_folder, routes)


def test_nothing_comes_from_outside(figures_folder):
    text = page.report_page(MARKDOWN, figures_folder, made_up_routes())
    links = []
    for tag, attributes in Elements(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                links.append((tag, value))
    outside = [(tag, value) for tag, value in links if not value.startswith("#")]
    assert outside == [("a", "https://arxiv.org/abs/2503.01067")]  # a link to read, which loads nothing
    assert "@import" not in text and all(url == "#" for url in re.findall(r"url\((.)", text))
    assert "default-src 'none'" in text


def test_what_comes_from_data_is_text(tmp_path):
    """Also where a text looks like a gap of the template."""
    folder = tmp_path / 'x"><i>'
    folder.mkdir()
    text = f"| {HOSTILE} |\n| --- |\n| {HOSTILE} |\n\nNO: {HOSTILE}\n\n{HOSTILE}\n"
    (folder / "table.md").write_text(text)
    (folder / "results.json").write_text(json.dumps({"claim": HOSTILE}))
    draw_figure(tmp_path / "figure.svg")
    draw_figure(folder / "figure.svg")
    routes = made_up_routes()
    routes["prompts"][0]["policies"]["sft"]["greedy"] = [HOSTILE, 0.0]
    markdown = f"# {HOSTILE}\n\n- {HOSTILE}\n\n> {HOSTILE}\n\n## {HOSTILE}\n\n![{HOSTILE}](figure.svg)\n"
    pages = [page.experiments_page(tmp_path), page.report_page(markdown, tmp_path, routes)]
    # Each in its place; a claim stands in the list of contents, too.
    for text, times, label in zip(pages, (6, 5), ("figure", HOSTILE), strict=True):
        elements = Elements(text)
        assert elements.text.count(HOSTILE) == times
        tags = Counter(tag for tag, _ in elements.found)
        assert tags["script"] == 2 and tags["i"] == 0
        labels = [attributes["aria-label"] for tag, attributes in elements.found if tag == "svg"]
        assert labels == [label]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', pages[1])[1]
    assert json.loads(data)["routes"] == routes


def test_figures_have_the_colours_of_the_page_and_ids_of_their_own(figures_folder):
    text = page.report_page(MARKDOWN, figures_folder, None)
    figures = "".join(re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL))
    assert figures.count("<svg") == 2 and INK not in figures and COLOURS["dpo"] not in figures
    assert "currentColor" in figures and "var(--dpo)" in figures
    assert "<metadata" not in figures and "<style" not in figures
    assert not re.search(r'(width|height)="[\d.]+pt"', figures)
    found = Elements(figures).found
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(set(ids)) == len(ids) > 20
    used = [attributes["xlink:href"] for _, attributes in found if "xlink:href" in attributes]
    used += re.findall(r"url\((#[^)]+)\)", figures)
    assert used and {name.removeprefix("#") for name in used} <= set(ids)
    assert 'aria-label="rewards"' in figures


def test_by_day_the_roads_have_their_colours_by_night_others():
    style = page.TEMPLATE.read_text()
    by_day, by_night = style.split("@media (prefers-color-scheme: dark)")[:2]
    for road in ("sft", "dpo", "rlhf_local", "rlhf_global"):
        assert f"--{road}: {COLOURS[road]};" in by_day
        assert f"--{road}: #" in by_night and f"--{road}: {COLOURS[road]};" not in by_night


def test_the_template_is_installed_with_the_package():
    assert '"nanoroads.report" = ["page.html"]' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_negative_numbers_stand_at_the_right_and_only_long_tables_begin_closed(tmp_path):
    rows = "| -0.4 |\n" + "| none |\n" * 15
    text = page.report_page("# a\n\n| gain |\n| --- |\n" + rows, tmp_path, None)
    assert '<th class="number">gain</th>' in text and '<td class="number">-0.4</td>' in text
    assert '<td class="number">none</td>' in text and "<details>" not in text


def test_figures_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.md").write_text(f"# {name}\n\n![a](figure.svg)\n\n## Part\n")
        draw_figure(tmp_path / name / "figure.svg")
    found = Elements(page.experiments_page(tmp_path)).found
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(set(ids)) == len(ids) > 20


# ---------------------------------------------------------------- the experiments


@pytest.fixture
def experiments(tmp_path):
    """A folder with four experiments and a README that speaks of three."""
    for name, claim in {"first": "One claim.", "second_try": "Another.", "aside": "An aside."}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.md").write_text(f"| a |\n| --- |\n| of {name} |\n\nNO: not {name}\n")
        (tmp_path / name / "results.json").write_text(json.dumps({"claim": claim}))
        draw_figure(tmp_path / name / "figure.svg")
    with (tmp_path / "second_try/table.md").open("a") as table:
        table.write("\nNO, undecided: who knows\n")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/report.md").write_text("# A whole report\n\n## Part\n\n- yes: so\n")
    (tmp_path / "README.md").write_text(
        "whole/ is [this](whole/report.md)\n`first.py`: x\nsecond_try.py, first/\n"
    )
    return tmp_path


def test_the_experiments_stand_in_the_order_of_the_readme(experiments):
    text = page.experiments_page(experiments)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    # What the README does not speak of comes last.
    assert titles == ["A whole report", "One claim.", "Another.", "An aside."]
    contents = re.findall(r'<li><a href="#(\w+)">(.*?)</a> (<b.*?</b>)</li>', text)
    assert [title for _, title, _ in contents] == titles
    no, undecided = '<b class="NO">NO</b>', '<b class="undecided">NO</b>'
    assert [words for _, _, words in contents] == ['<b class="yes">yes</b>', no, f"{no} {undecided}", no]
    assert f'<p class="verdict NO">{undecided} undecided: who knows</p>' in text
    assert [name for name, _, _ in contents] == re.findall(r'<article id="(\w+)">', text)
    first = text[text.index("<h2>One claim.") : text.index("<h2>Another.")]
    # The verdict, the figure, the table.
    assert 0 < first.index("not first") < first.index("<svg") < first.index("of first") and "<h3>Part" in text
    assert "<section" not in text


def test_a_verdict_that_is_neither_yes_nor_no_stands_below_the_table(experiments):
    path = experiments / "first/table.md"
    path.write_text(path.read_text() + "\nNot known: no claim.\n\nyes: it ends\n")
    text = page.experiments_page(experiments)
    first = text[text.index("<h2>One claim.") : text.index("<h2>Another.")]
    places = [
        first.index(words) for words in ("not first", "it ends", "of first", "<p>Not known: no claim.</p>")
    ]
    assert places == sorted(places)


def test_the_command(experiments, capsys):
    page.main(["--folder", str(experiments)])
    path = experiments / "report.html"
    assert path.read_text() == page.experiments_page(experiments) and str(path) in capsys.readouterr().out
    page.main(["--folder", str(experiments)])  # its own page may be written again
    path.write_text("<html>mine")
    with pytest.raises(InputError, match="report.html: exists, and is no page of this command"):
        page.main(["--folder", str(experiments)])
    assert path.read_text() == "<html>mine"


def test_a_folder_without_experiments_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder in it holds a table.md"):
        page.main(["--folder", str(tmp_path)])


# ---------------------------------------------------------------- routes.json


def test_routes_are_what_the_policies_do_and_earn(monkeypatch):
    encoding = tokenizer.get("roadmap")
    policies = {}
    for seed, name in enumerate(measures.SHOWN_POLICIES):
        torch.manual_seed(seed)
        config = GPTConfig(vocab_size=encoding.n_vocab, n_layer=1, n_embd=16, block_size=32, tied=False)
        policies[name] = GPT(config)
    monkeypatch.setattr(measures, "load_policy", lambda folder: policies[folder.name])
    prompts = ["WA>CA:", "ME>NH:"]
    routes = measures.map_routes(Path("x"), prompts)
    assert routes == measures.map_routes(Path("x"), prompts) and json.loads(json.dumps(routes)) == routes
    assert [row["prompt"] for row in routes["prompts"]] == prompts
    assert [row["best"] for row in routes["prompts"]] == [0.95, 1.0]
    for name, policy in policies.items():
        others = measures.drawn(policy, prompts, measures.CHOOSING, "choosing")
        for row, other in zip(routes["prompts"], others, strict=True):
            found = row["policies"][name]
            assert len(found["samples"]) == 8
            for route, reward in [found["greedy"], *found["samples"]]:
                assert reward == pytest.approx(true_reward(row["prompt"], route))
            texts = [route for route, _ in found["samples"]]
            assert texts != other[:8]  # those that order the list are others
            mean = sum(true_reward(row["prompt"], route) for route in other) / len(other)
            assert found["choosing"] == pytest.approx(mean, abs=1e-4)
    # Each policy has its own, whose order of size is not that of the names.
    right = {"sft": 8, "dpo": 0, "rlhf_global": 4}

    def drawn(policy, prompts, k, purpose):
        name = next(name for name in policies if policies[name] is policy)
        return [[">NH"] * (right[name] * k // 8) + [">VT"] * (k - right[name] * k // 8) for _ in prompts]

    monkeypatch.setattr(measures, "drawn", drawn)
    row = measures.map_routes(Path("x"), prompts)["prompts"][1]["policies"]
    for name, times in right.items():
        assert row[name]["samples"] == [[">NH", 1.0]] * times + [[">VT", 0.0]] * (8 - times)
        assert row[name]["choosing"] == times / 8


def test_each_prompt_and_each_policy_has_routes_of_its_own(monkeypatch):
    """The greedy one is the likeliest, and the samples of the page are not those that order it."""
    greedy = {"WA>CA:": ">OR>CA", "ME>NH:": ">NH"}
    asked = set()

    def drawn(policy, prompts, k, purpose):
        asked.add((policy, k, purpose))
        return [[f"{policy} {prompt} {purpose} {i}" for i in range(k)] for prompt in prompts]

    def sample_routes(policy, world, encoding, prompts, k, temperature):
        assert (k, temperature) == (1, 0)
        return None, [[greedy[prompt]] for prompt in prompts]

    monkeypatch.setattr(measures, "load_policy", lambda folder: folder.name)
    monkeypatch.setattr(measures, "drawn", drawn)
    monkeypatch.setattr(measures, "sample_routes", sample_routes)
    monkeypatch.setattr(measures.tokenizer, "decode_all", lambda encoding, texts: texts)
    for row in measures.map_routes(Path("x"), list(greedy))["prompts"]:
        prompt = row["prompt"]
        for name in measures.SHOWN_POLICIES:
            found = row["policies"][name]
            assert found["greedy"] == [greedy[prompt], {"WA>CA:": 0.95, "ME>NH:": 1.0}[prompt]]
            assert found["samples"] == [[f"{name} {prompt} page {i}", 0.0] for i in range(8)]
    purposes = {(16, "choosing"), (8, "page")}
    assert asked == {(name, *purpose) for name in measures.SHOWN_POLICIES for purpose in purposes}
