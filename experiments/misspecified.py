"""Three responses are enough for each road to lose to the other: which class is too small decides.

Exact examples from the papers that dispute H6, the generation-verification gap (Swamy et al.,
2503.01067).

    python experiments/misspecified.py    about six seconds on one CPU core

One prompt, three responses, a uniform reference, log-linear policies pi ~ exp(features @
theta). Labels are exact probabilities and optima are found in fp64: nothing is sampled, so
there are no seeds and no standard errors.

pairs       Gopalan et al., 2510.20413: DPO projects onto its class with the weights of the
            pairs, so *which pairs are compared* can turn it against the reward. Here more and
            more of the pairs are (y1, y2), which the class can order rightly only by putting y3
            before both.
classes     Shi et al., 2505.19770: RLHF wins if the policy class is too small, DPO if the
            reward class is, online DPO if both are. Their appendix C.3 has the example, the
            numbers are ours. The small class tells y1 from y2 and nothing else.
unseen      Xu et al., 2404.10719, and Razin et al., 2410.08847: DPO may move mass to a response
            that no pair shows (here y3), and does where that one has five times y1's amount of
            the only feature that tells y1 from y2.

All three hold. DPO is below the reference once .908 of the pairs are (y1, y2), while RLHF stays
where it was; but with no other pair at all its reward model knows nothing of y3 either (its
reward of y3 stays at zero, where the search starts), and RLHF falls below the reference, too. Each
road wins one row of Shi's table. After 1,000 steps DPO has .9995 on y3 where responses share
features, and RLHF the same as soon as its reward model has these features (Theorem 2.2 of
2503.01067).

Writes OUT/table.md, OUT/figure.svg and OUT/results.json.
"""

from pathlib import Path

import torch

from nanoroads import losses
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import write_files
from nanoroads.report.write import table, yes_or_no
from nanoroads.run.flags import Parser, run_script

FIRST, SECOND = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])  # the three pairs: 12, 13, 23
REF_LOGP = torch.full((3,), 1 / 3, dtype=torch.float64).log()
OWN_PARAMETERS = torch.eye(3, dtype=torch.float64)  # (3, 3): the class of all policies, or of all rewards
SHARES = [1 / 3, 0.6, 0.8, 0.9, 0.905, 0.91, 0.94, 0.98, 0.99, 1.0]  # of the pairs that are (y1, y2)
LABELS = {"dpo": "DPO", "rlhf": "RLHF", "online": "online DPO", "reference": "reference"}
COLOUR = {
    "dpo": COLOURS["dpo"],
    "rlhf": COLOURS["rlhf_global"],
    "online": COLOURS["rlhf_local"],
    "reference": INK,
}


def fp64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def log_policy(theta, features):
    """theta (D,), features (3, D) -> log pi of the three responses, (3,)."""
    return torch.log_softmax(REF_LOGP + features @ theta, 0)


def minimise(loss_of, size):
    """The theta (size,) where loss_of(theta) is least."""
    theta = beside_zero(size).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(theta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach()


def beside_zero(size):
    """Where a search starts, (size,): in `classes` zero itself is a saddle, by symmetry."""
    theta = torch.zeros(size, dtype=torch.float64)
    theta[0] = 0.01
    return theta


# ---------------------------------------------------------------- the roads


def dpo(reward, weights, features, beta):
    """Road 1, in expectation over pairs drawn with weights (3,) and over their labels -> log pi, (3,)."""
    second_wins = torch.sigmoid(reward[SECOND] - reward[FIRST])  # how often: label smoothing of each pair

    def loss_of(theta):
        logp = log_policy(theta, features)
        loss = losses.dpo(logp[FIRST], logp[SECOND], REF_LOGP[FIRST], REF_LOGP[SECOND], beta, second_wins)
        return (weights * loss).sum()

    return log_policy(minimise(loss_of, features.shape[1]), features)


def fit_reward(reward, weights, features):
    """Stage 1 of road 2, a Bradley-Terry fit within the class features @ w -> reward model, (3,)."""
    first_wins = torch.sigmoid(reward[FIRST] - reward[SECOND])  # how often

    def loss_of(w):
        score = features @ w
        loss_if_first = losses.bradley_terry(score[FIRST], score[SECOND])
        loss_if_second = losses.bradley_terry(score[SECOND], score[FIRST])
        loss = first_wins * loss_if_first + (1 - first_wins) * loss_if_second
        return (weights * loss).sum()

    return features @ minimise(loss_of, features.shape[1])


def best_policy(reward_model, features, beta):
    """Stage 2 of road 2, RL without noise: the best E[r] - beta KL of the class -> log pi, (3,)."""

    def loss_of(theta):
        logp = log_policy(theta, features)
        return -value(logp, reward_model, beta)

    return log_policy(minimise(loss_of, features.shape[1]), features)


def online_dpo(reward, features, beta, rounds=40):
    """DPO again and again, each time on pairs of the last policy's samples."""
    logp = log_policy(beside_zero(features.shape[1]), features)
    for _ in range(rounds):
        weights = (logp[FIRST] + logp[SECOND]).exp()
        logp = dpo(reward, weights / weights.sum(), features, beta)
    return logp


def value(logp, reward, beta=0.0):
    """E_pi[r] - beta KL(pi || pi_ref)."""
    return (logp.exp() * (reward - beta * losses.kl_k1(logp, REF_LOGP))).sum()


# ---------------------------------------------------------------- the three examples


def compare_pairs(beta=0.5):
    """{share of pairs that are (y1, y2): {road: E[r]}}, the other two pairs sharing the rest."""
    reward = fp64(1, 0.5, -1)
    features = fp64(0.5, 1, -1)[:, None]  # (3, 1): theta > 0 is y2 > y1 > y3, theta < 0 is y3 > y1 > y2
    rows = {}
    for share in SHARES:
        weights = fp64(share, (1 - share) / 2, (1 - share) / 2)
        reward_model = fit_reward(reward, weights, OWN_PARAMETERS)
        rows[f"{share:.3f}"] = {
            "dpo": value(dpo(reward, weights, features, beta), reward).item(),
            "rlhf": value(best_policy(reward_model, features, beta), reward).item(),
            "reference": value(REF_LOGP, reward).item(),
        }
    return rows


def compare_classes(beta=0.2):
    """{which class is too small: {road: E[r] - beta KL}}. From beta 1/3 on the small class stays
    at the reference."""
    reward = fp64(0, 0, -1)
    small = fp64(1, -1, 0)[:, None]  # (3, 1)
    weights = fp64(1, 1, 1) / 3
    too_small = {"neither": [], "policy": ["policy"], "reward": ["reward"], "both": ["policy", "reward"]}
    rows = {}
    for name, classes in too_small.items():
        policies = small if "policy" in classes else OWN_PARAMETERS
        rewards = small if "reward" in classes else OWN_PARAMETERS
        reward_model = fit_reward(reward, weights, rewards)
        rows[name] = {
            "dpo": value(dpo(reward, weights, policies, beta), reward, beta).item(),
            "rlhf": value(best_policy(reward_model, policies, beta), reward, beta).item(),
            "online": value(online_dpo(reward, policies, beta), reward, beta).item(),
            "reference": value(REF_LOGP, reward, beta).item(),
        }
    return rows


def compare_unseen(steps=1000, lr=0.2):
    """{whose class has shared features: {road: E[r]}}. y1 beats y2 for certain, and no pair shows y3.

    beta is 1 and the reference uniform, so Bradley-Terry's loss of features @ theta is DPO's loss too
    (Theorem 2.2), and the same descent gives a reward model and a policy."""
    reward = fp64(1, 0, -1)
    shared = torch.stack([fp64(1, 0.2), fp64(1, 0), fp64(0, 1)])  # (3, 2): y1 and y2 are alike
    models = {}
    mass = {}
    for name, features in {"own": OWN_PARAMETERS, "shared": shared}.items():
        theta = torch.zeros(features.shape[1], dtype=torch.float64)
        mass[name] = []
        for step in range(1, steps + 1):
            theta.requires_grad_()
            score = features @ theta
            (gradient,) = torch.autograd.grad(losses.bradley_terry(score[0], score[1]), theta)
            theta = theta.detach() - lr * gradient
            if step % 10 == 0:
                mass[name].append(round(log_policy(theta, features)[2].exp().item(), 6))
        models[name] = features @ theta
    # (whose class has shared features, the policy's features, the reward model's)
    cases = [("nobody", "own", "own"), ("policy", "shared", "own"), ("both", "shared", "shared")]
    rows = {}
    for case, policy, model in cases:
        policies = shared if policy == "shared" else OWN_PARAMETERS
        rows[case] = {
            "dpo": value(torch.log_softmax(REF_LOGP + models[policy], 0), reward).item(),
            "rlhf": value(best_policy(models[model], policies, 1.0), reward).item(),
            "reference": value(REF_LOGP, reward).item(),
            "dpo_mass_on_y3": mass[policy],
        }
    return rows


# ---------------------------------------------------------------- the report


def verdict(results, close=1e-6):
    """A line for each claim. close: of values that are to be equal."""
    rows = dict(results["pairs"])
    alone = rows.pop("1.000")  # y3 is in no pair
    moved = max(row["rlhf"] for row in rows.values()) - min(row["rlhf"] for row in rows.values())
    below = [share for share, row in rows.items() if row["dpo"] < row["reference"]]
    decides = bool(below) and moved < close
    first = f"from a share of {below[0]} on" if below else "at no share"

    rows = results["classes"]
    lead = {name: row["rlhf"] - row["dpo"] for name, row in rows.items()}
    online = rows["both"]["online"] - max(rows["both"]["dpo"], rows["both"]["rlhf"])
    level = abs(lead["neither"]) < close and abs(lead["both"]) < close
    depends = level and lead["policy"] > close and lead["reward"] < -close and online > close

    rows = results["unseen"]
    mass = {name: row["dpo_mass_on_y3"][-1] for name, row in rows.items()}
    moves = mass["nobody"] < 1 / 3 < mass["policy"]
    return [
        f"{yes_or_no(decides)}: which pairs are compared decides about DPO (Gopalan): it is below the "
        f"reference {first}. RLHF moves by {moved:.0e}, as long as any pair shows y3; if none does, it "
        f"has {alone['rlhf']:+.3f}, DPO {alone['dpo']:+.3f}, the reference {alone['reference']:+.3f}.",
        f"{yes_or_no(depends)}: which road wins depends on which class is too small (Shi): RLHF leads DPO by "
        f"{lead['neither']:+.4f} if neither is, {lead['policy']:+.4f} if the policy's, {lead['reward']:+.4f} "
        f"if the reward's, {lead['both']:+.4f} if both; there online DPO leads both by {online:+.4f}.",
        f"{yes_or_no(moves)}: DPO moves mass to a response that no pair shows, if the shown ones share "
        f"features (Xu, Razin): pi(y3) {mass['policy']:.4f}, {mass['nobody']:.4f} if they share none. "
        f"E[r] {rows['policy']['dpo']:+.3f}, where RLHF has {rows['policy']['rlhf']:+.3f}; but "
        f"{rows['both']['rlhf']:+.3f} if its reward model shares them too.",
    ]


def table_of(results):
    """The three examples as one Markdown table."""
    lines = []
    for example, measure in (("pairs", "E[r]"), ("classes", "E[r] - 0.2 KL"), ("unseen", "E[r]")):
        for name, row in results[example].items():
            cells = [f"{row[road]:+.4f}" if road in row else "-" for road in LABELS]
            lines.append([example, name, measure, *cells])
    return table(["example", "case", "measure", *LABELS.values()], lines)


def figure_of(results):
    """One panel an example."""
    fig, (pairs, classes, unseen) = new_figure(13, 3.8, ncols=3)
    shares = [float(share) for share in results["pairs"]]
    for road in ("dpo", "rlhf", "reference"):
        heights = [row[road] for row in results["pairs"].values()]
        pairs.plot(shares, heights, "o-", color=COLOUR[road], ms=3, label=LABELS[road])
    pairs.set(title="pairs: which are compared", xlabel="share of pairs (y1, y2)", ylabel="E[r]")
    for place, road in enumerate(("dpo", "rlhf", "online")):
        heights = [row[road] - row["reference"] for row in results["classes"].values()]
        left = [case + 0.27 * (place - 1) for case in range(4)]
        classes.bar(left, heights, 0.25, color=COLOUR[road], label=LABELS[road])
    classes.set_xticks(range(4), list(results["classes"]))
    classes.set(
        title="classes: which is too small", ylabel="E[r] - 0.2 KL, above the reference", ylim=(0, 0.4)
    )
    for case, style, label in (("policy", "-", "y1, y2 share features"), ("nobody", "--", "they share none")):
        mass = results["unseen"][case]["dpo_mass_on_y3"]
        unseen.plot(
            range(10, 10 * len(mass) + 1, 10), mass, style, color=COLOUR["dpo"], label=f"DPO, {label}"
        )
    unseen.set(title="unseen: mass on y3", xlabel="gradient step", ylabel="pi(y3)", ylim=(-0.03, 1.03))
    for ax in (pairs, classes, unseen):
        ax.legend()
    return fig


def main(argv=None):
    """The three examples, their table, figure and verdict."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("the results").add_argument
    folder = Path("out/experiments/misspecified")
    add("--out", type=Path, default=folder, help="their folder (default: %(default)s)")
    args = parser.parse_args(argv)
    results = {"pairs": compare_pairs(), "classes": compare_classes(), "unseen": compare_unseen()}
    write_files(args.out, __doc__, results, table_of(results), verdict(results), figure_of(results))


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
