"""report.html: every verdict and number of the report, nothing from outside, and a map to click on."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.browser import CHROMIUM, Browser

from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.report import measures, page
from nanoroads.report.drawing import COLOURS, INK, new_figure, save
from nanoroads.text import tokenizer
from nanoroads.world.optimum import optimal_reward
from nanoroads.world.roadmap import NEIGHBOURS, true_reward

HOSTILE = "<img src=x onerror='hacked=1'></script><script>hacked=1</script>&{{data}}\""
MARKDOWN = """# All roads

Seeds [0], `code`, ± is one standard error.

- yes: RLHF is ahead (by +0.100 ± 0.014).
- NO: the gap is closed (by +0.020).
- Best first: global, dpo.

## Policies

| policy | reward | note |
| --- | --- | --- |
| sft | 0.186 ± 0.003 | |
| dpo | -0.402 | a cell that is so long that a phone has no room for it |

![rewards](rewards.svg)

![routes](routes.svg)

## Seconds

1705 in all.

> What somebody wrote.

| phase | s |
| --- | --- |
"""
MARKDOWN += "".join(f"| seed{i}/sft | {100 + i} |\n" for i in range(20))


def answers(greedy, samples, choosing, prompt):
    """What routes.json says of a policy and a prompt. samples: {route: how often}."""
    routes = [route for route, times in samples.items() for _ in range(times)]
    return {
        "greedy": [greedy, true_reward(prompt, greedy)],
        "samples": [[route, true_reward(prompt, route)] for route in routes],
        "choosing": choosing,
    }


def made_up_routes():
    """Three prompts; on WA>CA: SFT fails, on ME>FL: DPO is ahead, on WA>NV: there is no difference."""
    table = {
        "WA>CA:": [(">NV", {">NV>CA": 7, ">OR>OR>CA": 1}, 0.1), (">OR>CA", {">OR>CA": 8}, 0.2)],
        "ME>FL:": [("", {">NH": 8}, 0.1), (">NH>MA", {">NH>MA": 8}, 0.9)],
        "WA>NV:": [(">OR>NV", {">OR>NV": 8}, 0.5), (">OR>NV", {">OR>NV": 8}, 0.5)],
    }
    rlhf = {
        "WA>CA:": (">OR>CA", {">OR>CA": 2, ">OR>NV>CA": 5, ">ID>TX": 1}, 1.0),
        "ME>FL:": ("", {">NH": 8}, 0.3),
        "WA>NV:": (">OR>NV", {">OR>NV": 8}, 0.5),
    }
    rows = []
    for prompt, of_policies in table.items():
        policies = {}
        for name, values in zip(measures.ROADS, [*of_policies, rlhf[prompt]], strict=True):
            policies[name] = answers(*values, prompt)
        rows.append({"prompt": prompt, "best": optimal_reward(prompt), "policies": policies})
    return {"rule": f"A rule {HOSTILE}", "prompts": rows}


def draw(path, text="a line"):
    fig, ax = new_figure(3, 2)
    ax.plot([0, 1], [0, 1], "o-", label=text, color=COLOURS["dpo"])
    ax.text(0.5, 0.2, "black", color="black")  # Matplotlib writes no colour for black
    ax.legend()
    save(fig, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with figures."""
    path = tmp_path_factory.mktemp("figures")
    for name in ("rewards", "routes"):
        draw(path / f"{name}.svg", name)
    (path / "figure.png").write_bytes(b"\x89PNG")
    return path


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
def test_every_verdict_and_every_cell_is_on_the_page(routes, folder):
    text = page.report_page(MARKDOWN, folder, routes)
    assert "<title>All roads</title>" in text and "<h1>All roads</h1>" in text
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
    assert text == page.report_page(MARKDOWN, folder, routes)


def test_nothing_comes_from_outside(folder):
    text = page.report_page(MARKDOWN + "\n![a](figure.png)\n", folder, made_up_routes())
    links = []
    for tag, attributes in Elements(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                links.append((tag, value))
    outside = [(tag, value) for tag, value in links if not value.startswith(("#", "data:image/png;base64,"))]
    assert outside == [("a", "https://arxiv.org/abs/2503.01067")]  # a link to read, which loads nothing
    assert ("img", "data:image/png;base64,iVBORw==") in links
    assert "@import" not in text and all(url == "#" for url in re.findall(r"url\((.)", text))
    assert "default-src 'none'" in text


def test_what_comes_from_data_is_text(tmp_path):
    """Also where a text looks like a gap of the template."""
    folder = tmp_path / 'x"><i>'
    folder.mkdir()
    text = f"| {HOSTILE} |\n| --- |\n| {HOSTILE} |\n\nNO: {HOSTILE}\n\n{HOSTILE}\n"
    (folder / "table.md").write_text(text)
    (folder / "results.json").write_text(json.dumps({"claim": HOSTILE}))
    (tmp_path / "figure.png").write_bytes(b"\x89PNG")
    routes = made_up_routes()
    routes["prompts"][0]["policies"]["sft"]["greedy"] = [HOSTILE, 0.0]
    markdown = f"# {HOSTILE}\n\n- {HOSTILE}\n\n> {HOSTILE}\n\n## {HOSTILE}\n\n![{HOSTILE}](figure.png)\n"
    pages = [page.experiments_page(tmp_path), page.report_page(markdown, tmp_path, routes)]
    # Each in its place; a claim stands in the list of contents, too.
    for text, times, images in zip(pages, (6, 5), ([], [HOSTILE]), strict=True):
        elements = Elements(text)
        assert elements.text.count(HOSTILE) == times
        tags = Counter(tag for tag, _ in elements.found)
        assert tags["script"] == 2 and tags["i"] == 0
        assert [attributes["alt"] for tag, attributes in elements.found if tag == "img"] == images
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', pages[1])[1]
    assert json.loads(data)["routes"] == routes


def test_figures_have_the_colours_of_the_page_and_ids_of_their_own(folder):
    text = page.report_page(MARKDOWN, folder, None)
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


# ---------------------------------------------------------------- the experiments


@pytest.fixture
def experiments(tmp_path):
    """A folder with four experiments and a README that speaks of three."""
    for name, claim in {"first": "One claim.", "second_try": None, "aside": "An aside."}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.md").write_text(f"| a |\n| --- |\n| of {name} |\n\nNO: not {name}\n")
        results = {"seeds": [0]} if claim is None else {"claim": claim}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    draw(tmp_path / "first/figure.svg")
    (tmp_path / "second_try/figure.png").write_bytes(b"\x89PNG")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/report.md").write_text("# A whole report\n\n## Part\n\n- yes: so\n")
    (tmp_path / "README.md").write_text(
        "whole/ is [this](whole/report.md)\n`first.py`: x\nsecond_try.py, first/\n"
    )
    return tmp_path


def test_the_experiments_stand_in_the_order_of_the_readme(experiments):
    text = page.experiments_page(experiments)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    # What the README does not speak of comes last; what has no claim yet has its name.
    assert titles == ["A whole report", "One claim.", "second try", "An aside."]
    contents = re.findall(r'<li><a href="#(\w+)">(.*?)</a> <b class="\w+">(\w+)</b></li>', text)
    assert [title for _, title, _ in contents] == titles
    assert [word for _, _, word in contents] == ["yes", "NO", "NO", "NO"]
    assert [name for name, _, _ in contents] == re.findall(r'<article id="(\w+)">', text)
    first = text[text.index("<h2>One claim.") : text.index("<h2>second try")]
    # The verdict, the figure, the table.
    assert 0 < first.index("not first") < first.index("<svg") < first.index("of first") and "<h3>Part" in text
    assert "data:image/png" in text and "<section" not in text


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
    for seed, name in enumerate(measures.ROADS):
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


# ---------------------------------------------------------------- in a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
CARD = {name: f"document.querySelector('.card.{name}')" for name in measures.ROADS}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def show(browser, folder):
    """show(width=1200): the page of made-up results in a browser, which is then asked and clicked."""
    path = folder / "report.html"
    path.write_text(page.report_page(MARKDOWN, folder, made_up_routes()))

    def open_page(width=1200, **options):
        browser.open(path, width, **options)
        return browser

    browser.errors.clear()
    browser.requests.clear()
    yield open_page
    assert browser.errors == []  # nothing in the console, nothing raised
    assert set(browser.requests) == {path.as_uri()}


def hops(browser, name):
    """What a policy's map shows: [(kind, "legal" or "illegal")] of its hops, as often as they are drawn."""
    lines = f"[...{CARD[name]}.querySelectorAll('.hop')]"
    return browser.ask(f"{lines}.map(hop => [hop.classList[1], hop.firstChild.className.baseVal])")


def dashes(browser, name):
    """Whether each line of a policy's map is dashed, as it is drawn."""
    lines = f"[...{CARD[name]}.querySelectorAll('.hop line')]"
    return browser.ask(f"{lines}.map(line => getComputedStyle(line).strokeDasharray !== 'none')")


def heading(browser):
    return browser.ask("document.querySelector('.bar strong').textContent")


def listed(browser):
    return browser.ask("[...document.querySelectorAll('.prompts button')].map(b => b.value)")


@needs_chromium
def test_the_map_shows_each_road_of_each_route(show):
    browser = show()
    assert heading(browser) == "WA → CA"  # the policies differ most there
    # SFT: greedy WA>NV, no road; seven times WA>NV>CA; once WA>OR>OR>CA, whose second hop has no length.
    expected = [["fails", "illegal"], ["fails", "legal"], ["fails", "legal"], ["fails", "legal"]]
    assert sorted(hops(browser, "sft")) == sorted([*expected, ["greedy", "illegal"]])
    assert dashes(browser, "sft") == [kind == "illegal" for _, kind in hops(browser, "sft")]
    assert hops(browser, "dpo") == [["earns", "legal"]] * 2 + [["greedy", "legal"]] * 2
    # RLHF: >OR>CA twice, >OR>NV>CA five times, so three hops from and to OR; WA>ID>TX fails.
    kinds = Counter(map(tuple, hops(browser, "rlhf_global")))
    assert kinds == {
        ("earns", "legal"): 4,
        ("greedy", "legal"): 2,
        ("fails", "legal"): 1,
        ("fails", "illegal"): 1,
    }
    widths = (
        "[...document.querySelectorAll('.rlhf_global .earns line')].map(l => l.getAttribute('stroke-width'))"
    )
    wide = [0.14 + 0.7 * count / 8 for count in (7, 5, 5, 2)]
    assert sorted(map(float, browser.ask(widths)), reverse=True) == pytest.approx(wide)
    numbers = browser.ask(f"{CARD['rlhf_global']}.querySelector('p').textContent")
    assert numbers == "samples earn 0.80, greedy 0.95, at best 0.95"  # (2 * .95 + 5 * .9) / 8
    rows = browser.ask(
        f"[...{CARD['rlhf_global']}.querySelectorAll('.routes button')].map(b => b.textContent)"
    )
    assert rows == [
        "greedy0.95WA → OR → CA",
        "2 ×0.95WA → OR → CA",
        "5 ×0.90WA → OR → NV → CA",
        "0.00WA → ID ⇢ TX (no road)",
    ]
    roads = browser.ask("document.querySelectorAll('.card.dpo line.road').length")
    assert roads == sum(map(len, NEIGHBOURS.values())) / 2 == 105


@needs_chromium
def test_a_click_on_the_list_changes_the_routes(show):
    browser = show()
    before = hops(browser, "dpo")
    browser.click("document.querySelector('.prompts button[value=\"ME>FL:\"]')")
    assert heading(browser) == "ME → FL" and browser.ask("location.hash") == "#ME-FL"
    assert hops(browser, "dpo") != before and len(hops(browser, "sft")) == 1
    why = browser.ask(f"[...{CARD['dpo']}.querySelectorAll('.why')].map(e => e.textContent)")
    assert why == [" (does not arrive)"] * 2
    browser.click("document.querySelector('[aria-label=\"the next prompt\"]')")
    assert heading(browser) == "WA → NV"


@needs_chromium
def test_two_clicks_on_a_map_choose_a_start_and_a_goal(show):
    browser = show(width=360, mobile=True)
    state = "document.querySelector('.card.dpo [data-state={}]')"
    browser.click(state.format("WA"))
    assert heading(browser) == "WA → ? (2 goals among these prompts)"
    goals = "[...document.querySelectorAll('.card.sft .candidate')].map(g => g.dataset.state)"
    assert browser.ask(goals) == ["CA", "NV"]
    browser.click(state.format("NV"))
    assert heading(browser) == "WA → NV"
    classes = browser.ask(f"[...{state.format('NV')}.classList, ...{state.format('WA')}.classList]")
    assert "goal" in classes and "start" in classes and browser.ask(goals) == []


@needs_chromium
def test_the_list_is_ordered_by_how_far_the_roads_are_apart(show):
    browser = show()
    orders = browser.ask("[...document.querySelectorAll('option')].map(o => o.textContent)")

    def order(text):
        choose = f"s.value = {orders.index(text)}; s.dispatchEvent(new Event('change'))"
        browser.ask(f"(s => {{{choose}}})(document.querySelector('select'))")
        return listed(browser)

    assert order("where the three differ most") == ["WA>CA:", "ME>FL:", "WA>NV:"]
    assert order("where DPO is furthest ahead of RLHF") == ["ME>FL:", "WA>NV:", "WA>CA:"]
    assert heading(browser) == "ME → FL"
    assert order("where RLHF is furthest ahead of DPO") == ["WA>CA:", "WA>NV:", "ME>FL:"]
    assert order("shortest ways first") == ["WA>CA:", "WA>NV:", "ME>FL:"]
    assert order("by name") == ["ME>FL:", "WA>CA:", "WA>NV:"]


@needs_chromium
def test_a_route_that_is_pointed_at_is_shown_alone(show):
    browser = show()
    everything = hops(browser, "rlhf_global")
    row = CARD["rlhf_global"] + ".querySelectorAll('.routes button')[2]"
    browser.point_at(row)
    assert hops(browser, "rlhf_global") == [["earns", "legal"]] * 3
    browser.point_at("document.querySelector('h1')")
    assert hops(browser, "rlhf_global") == everything
    browser.click(row)
    browser.point_at("document.querySelector('h1')")
    assert hops(browser, "rlhf_global") == [["earns", "legal"]] * 3  # a click keeps it
    browser.click(row)
    browser.point_at("document.querySelector('h1')")
    assert hops(browser, "rlhf_global") == everything


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_on_a_phone_by_day_and_by_night(dark, show):
    browser = show(width=360, mobile=True, dark=dark)
    assert browser.ask("document.documentElement.scrollWidth") == 360
    colours = browser.ask(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " getComputedStyle([...document.querySelectorAll('text')].find(t => t.textContent === 'black')).fill]"
    )
    ground, ink, figure_ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (ground < 150 and ink > 600) if dark else (ground > 700 and ink < 200)
    assert figure_ink == ink


@needs_chromium
def test_hostile_text_is_shown_and_not_run(browser, tmp_path):
    routes = made_up_routes()
    for answer in (HOSTILE, ">constructor>__proto__>toString", ">" + HOSTILE):
        routes["prompts"][0]["policies"]["sft"]["samples"][0] = [answer, 0.0]
        path = tmp_path / "report.html"
        path.write_text(page.report_page(f"# {HOSTILE}\n", tmp_path, routes))
        browser.errors.clear()
        browser.open(path, 1200)
        assert browser.errors == [] and browser.ask("window.hacked") is None
        assert browser.ask("document.querySelectorAll('img').length") == 0
        assert HOSTILE in browser.ask("document.body.textContent")
        assert browser.ask("document.querySelectorAll('.card').length") == 3
