"""report.html in a browser: the map to click on, on a phone, by day and by night."""

import re
from collections import Counter

import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.made_up_report import HOSTILE, MARKDOWN, made_up_routes

from nanoroads.report import measures, page
from nanoroads.report.write import table
from nanoroads.world.roadmap import NEIGHBOURS

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
CARD = {name: f"document.querySelector('.card.{name}')" for name in measures.SHOWN_POLICIES}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def show(browser, figures_folder):
    """show(width=1200): the page of made-up results in a browser, which is then asked and clicked."""
    path = figures_folder / "report.html"
    path.write_text(page.report_page(MARKDOWN, figures_folder, made_up_routes()))

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
def test_a_table_of_many_columns_scrolls_and_the_page_does_not(browser, tmp_path):
    cells = [f"column {i}" for i in range(30)]
    path = tmp_path / "report.html"
    path.write_text(page.report_page("# Wide\n\n" + table(cells, [cells]), tmp_path, None))
    browser.open(path, 360, mobile=True)
    assert browser.ask("document.documentElement.scrollWidth") == 360
    last = "document.querySelector('tr:last-child td:last-child')"
    assert browser.ask(f"{last}.getBoundingClientRect().left") > 360
    browser.ask(f"{last}.scrollIntoView({{inline: 'end'}})")
    assert browser.ask(f"{last}.getBoundingClientRect().right") <= 360


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
