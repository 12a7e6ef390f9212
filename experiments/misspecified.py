"""Three responses are enough for each road to lose to the other: which class is too small decides.

    python experiments/misspecified.py    about six seconds on one CPU core

Exact examples from the papers that dispute H6 of Swamy et al., 2503.01067: one prompt, three
responses, no samples, hence no seeds (nanoroads/experiments/three_responses.py).

pairs    Gopalan et al., 2510.20413: *which pairs are compared* can turn DPO against the reward.
         RLHF stays where it was, as long as any pair shows y3.
classes  Shi et al., 2505.19770: RLHF wins if the policy class is too small, DPO if the reward
         class is, online DPO if both are.
unseen   Xu et al., 2404.10719, and Razin et al., 2410.08847: DPO may move mass to a response that
         no pair shows; so may RLHF, if its reward model has DPO's features (Swamy's Theorem 2.2).

All three hold: DPO is below the reference once .91 of the pairs are (y1, y2) (at .905 not yet),
each road wins a row of Shi's table, and DPO ends with .9995 on y3. Settings: experiments/README.md.
"""

from pathlib import Path

from nanoroads.experiments import three_responses
from nanoroads.experiments.misspecified import figure_of, table_of
from nanoroads.experiments.three_responses import OWN_PARAMETERS, fp64
from nanoroads.report.cells import claim
from nanoroads.report.evidence import write_files
from nanoroads.run.flags import Parser, run_script

SHARES = [1 / 3, 0.6, 0.8, 0.9, 0.905, 0.91, 0.94, 0.98, 0.99, 1.0]  # of the pairs that are (y1, y2)


def compare_pairs(beta=0.5):
    """{share of pairs that are (y1, y2): {road: E[r]}}, the other two pairs sharing the rest."""
    reward = fp64(1, 0.5, -1)
    features = fp64(0.5, 1, -1)[:, None]  # (3, 1): theta > 0 is y2 > y1 > y3, theta < 0 is y3 > y1 > y2
    rows = {}
    for share in SHARES:
        weights = fp64(share, (1 - share) / 2, (1 - share) / 2)
        logps = three_responses.both_roads(reward, weights, features, OWN_PARAMETERS, beta)
        rows[f"{share:.3f}"] = three_responses.values(logps, reward)
    return rows


def compare_classes(beta=0.2):
    """{which class is too small: {road: E[r] - beta KL}}. From beta 1/3 on the small class stays
    at the reference."""
    reward = fp64(0, 0, -1)
    own = OWN_PARAMETERS  # (3, 3)
    small = fp64(1, -1, 0)[:, None]  # (3, 1): it tells y1 from y2 and nothing else
    weights = fp64(1, 1, 1) / 3
    classes = {"neither": (own, own), "policy": (small, own), "reward": (own, small), "both": (small, small)}
    rows = {}
    for name, (policy_class, reward_class) in classes.items():
        logps = three_responses.both_roads(reward, weights, policy_class, reward_class, beta)
        logps["online"] = three_responses.online_dpo(reward, policy_class, beta)
        rows[name] = three_responses.values(logps, reward, beta)
    return rows


def compare_unseen(steps=1000, lr=0.2):
    """{whose class has shared features: {road: E[r]}}. y1 beats y2 for certain, and no pair shows y3."""
    reward = fp64(1, 0, -1)
    # In "shared" only the second feature tells y1 from y2, and y3 has five times as much of it as y1.
    features = {"own": OWN_PARAMETERS, "shared": fp64([1, 0.2], [1, 0], [0, 1])}
    descents = {name: three_responses.descend(matrix, steps, lr) for name, matrix in features.items()}
    cases = {"nobody": ("own", "own"), "policy": ("shared", "own"), "both": ("shared", "shared")}
    rows = {}
    for case, (policy_class, reward_class) in cases.items():
        dpo, _, mass = descents[policy_class]
        _, reward_model, _ = descents[reward_class]
        rlhf = three_responses.best_policy(reward_model, features[policy_class], beta=1.0)
        rows[case] = three_responses.values({"dpo": dpo, "rlhf": rlhf}, reward)
        rows[case]["dpo_mass_on_y3"] = mass
    return rows


def verdict(results, close=1e-6):
    """A line for each claim. close: of values that are to be equal."""
    rows = dict(results["pairs"])
    alone = rows.pop("1.000")  # y3 is in no pair
    moved = max(row["rlhf"] for row in rows.values()) - min(row["rlhf"] for row in rows.values())
    worse = [share for share, row in results["pairs"].items() if row["dpo"] < row["reference"]]
    onwards = worse == list(results["pairs"])[1:][-len(worse) :]  # the largest shares, not all of them
    where = f"from a share of {worse[0]} on" if onwards else f"at {', '.join(worse) or 'no share'}"

    rows = results["classes"]
    lead = {name: row["rlhf"] - row["dpo"] for name, row in rows.items()}
    online = rows["both"]["online"] - max(rows["both"]["dpo"], rows["both"]["rlhf"])
    level = abs(lead["neither"]) < close and abs(lead["both"]) < close
    depends = level and lead["policy"] > close and lead["reward"] < -close and online > close

    rows = results["unseen"]
    mass = {name: row["dpo_mass_on_y3"][-1] for name, row in rows.items()}
    holds = [onwards and moved < close, depends, mass["nobody"] < 1 / 3 < mass["policy"]]
    texts = [
        f"which pairs are compared decides about DPO (Gopalan): it is below the reference {where}. RLHF "
        f"moves by {moved:.0e}, as long as any pair shows y3; if none does, it has {alone['rlhf']:+.3f}, DPO "
        f"{alone['dpo']:+.3f}, the reference {alone['reference']:+.3f}.",
        f"which road wins depends on which class is too small (Shi): RLHF leads DPO by "
        f"{lead['neither']:+.4f} if neither is, {lead['policy']:+.4f} if the policy's, {lead['reward']:+.4f} "
        f"if the reward's, {lead['both']:+.4f} if both; there online DPO leads both by {online:+.4f}.",
        f"DPO moves mass to a response that no pair shows, if the shown ones share features (Xu, Razin): "
        f"pi(y3) {mass['policy']:.4f} > 1/3, else {mass['nobody']:.4f}. E[r] {rows['policy']['dpo']:+.3f}, "
        f"RLHF's {rows['policy']['rlhf']:+.3f}; {rows['both']['rlhf']:+.3f} if its reward model shares them.",
    ]
    return [claim(*line) for line in zip(holds, texts, strict=True)]


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
