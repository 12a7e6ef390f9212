"""A report.md, routes.json and figures that nothing was trained for, for the tests of report.html."""

from nanoroads.report import measures
from nanoroads.report.drawing import COLOURS, new_figure, save
from nanoroads.world.optimum import optimal_reward
from nanoroads.world.roadmap import true_reward

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
        for name, values in zip(measures.SHOWN_POLICIES, [*of_policies, rlhf[prompt]], strict=True):
            policies[name] = answers(*values, prompt)
        rows.append({"prompt": prompt, "best": optimal_reward(prompt), "policies": policies})
    return {"rule": f"A rule {HOSTILE}", "prompts": rows}


def draw_figure(path, text="a line"):
    """A figure of one line, which is named `text` in its legend."""
    fig, ax = new_figure(3, 2)
    ax.plot([0, 1], [0, 1], "o-", label=text, color=COLOURS["dpo"])
    ax.text(0.5, 0.2, "black", color="black")  # Matplotlib writes no colour for black
    ax.legend()
    save(fig, path)
