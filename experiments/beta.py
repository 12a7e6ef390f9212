"""A small beta lets the policy go far from the reference, a large one keeps it there.

    python experiments/beta.py    three seconds on one CPU core

Its direction is the most common mistake: "more beta" is more of the *penalty* on KL, not more of
the reward. The best policy for E_pi[r] - beta KL(pi || pi_ref), which DPO's --beta and RL's --kl
both weigh, is

    pi(y) = pi_ref(y) exp(r(y) / beta) / Z    (Rafailov et al., 2305.18290, eq. 4)

so beta is the reward that one nat of log pi/pi_ref costs. Here are nine responses with rewards
from 0 to 1, of which the reference likes the middle ones. All is exact; nothing is trained.

Result: at beta .01 the best policy is 4.46 nats from the reference and earns 1.000, at .1 1.89 nats
and .847, at 1 .026 nats and .468, at 10 .0003 nats and .420.

Writes OUT/table.md, OUT/figure.svg and OUT/results.json.
"""

from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import colormaps

from nanoroads import losses
from nanoroads.report.cells import claim
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import values_of, write_files
from nanoroads.report.write import table
from nanoroads.run.flags import Parser, run_script
from nanoroads.world.optimum import soft_optimum

REWARD = torch.linspace(0, 1, 9, dtype=torch.float64)  # (9,)
REF_LOGP = torch.log_softmax(-8 * (REWARD - 0.4) ** 2, 0)  # (9,) log pi_ref
BETAS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]  # of the table
MEASURES = {"kl": "KL to the reference, nats", "reward": "expected reward", "entropy": "entropy, nats"}
STAYS = 0.01  # nats from the reference
SHOWN = [0.03, 0.1, 0.3, 1.0, 10.0]  # whose policies are drawn


def measures(beta):
    """The best policy at this beta: what it earns, how far it has gone, how much choice is left."""
    logp = soft_optimum(REF_LOGP, REWARD, beta)
    probability = logp.exp()
    return {
        "reward": (probability * REWARD).sum().item(),
        "kl": (probability * losses.kl_k1(logp, REF_LOGP)).sum().item(),  # nats
        "entropy": -(probability * logp).sum().item(),  # nats
    }


def verdict(rows):
    """rows: {beta: measures}, the smallest beta first."""
    kl = values_of(rows.values(), "kl")
    reward = values_of(rows.values(), "reward")
    falls = all(one > other for measure in (kl, reward) for one, other in pairwise(measure))
    text = f"exact: a smaller beta goes further and earns more, and the largest stays within {STAYS} nats: "
    text += f"KL {kl[0]:.2f} nats at {BETAS[0]}, {kl[-1]:.4f} at {BETAS[-1]}; expected reward "
    return [claim(falls and kl[-1] < STAYS, f"{text}{reward[0]:.3f} and {reward[-1]:.3f}.")]


def figure_of():
    """KL, reward and entropy over beta, and the policies at a few betas."""
    fig, axes = new_figure(13, 3.2, ncols=4, width_ratios=[1, 1, 1, 1.6])
    betas = torch.logspace(-2, 1, 61).tolist()
    rows = [measures(beta) for beta in betas]
    for ax, (name, title) in zip(axes, MEASURES.items(), strict=False):  # the fourth panel has the policies
        ax.plot(betas, values_of(rows, name), color=COLOURS["dpo"])
        ax.set(title=title, xscale="log", xlabel="beta:  <- goes far       stays ->")
    axes[3].plot(REWARD, REF_LOGP.exp(), "--", color=INK, label="reference")
    for i, beta in enumerate(SHOWN):
        colour = colormaps["viridis"](0.22 * i)  # from dark to light
        probability = soft_optimum(REF_LOGP, REWARD, beta).exp()
        axes[3].plot(REWARD, probability, "o-", ms=3, color=colour, label=f"beta {beta}")
    axes[3].set(title="the best policy", xlabel="reward of the response", ylabel="probability")
    axes[3].legend()
    return fig


def main(argv=None):
    """Write the table, the figure and the verdict."""
    parser = Parser(description=__doc__)
    folder = Path("out/experiments/beta")
    add = parser.add_argument_group("the result").add_argument
    add("--out", type=Path, default=folder, help="folder of the results (default: %(default)s)")
    args = parser.parse_args(argv)
    rows = {str(beta): measures(beta) for beta in BETAS}
    lines = [[beta, *(f"{row[name]:.3f}" for name in MEASURES)] for beta, row in rows.items()]
    text = table(["beta", *MEASURES.values()], lines)
    write_files(args.out, __doc__, {"rows": rows}, text, verdict(rows), figure_of())


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
