"""What is best on the map: shortest routes, and exactly the soft optimum that both roads aim at."""

import torch

from nanoroads.errors import InputError
from nanoroads.world.roadmap import INDEX, NEIGHBOURS, World, distances, ends, route, true_reward

MOST_MOVES = 5  # of worlds whose routes with a reward can be listed

# ---------------------------------------------------------------- routes


def moves_apart(prompt: str) -> int:
    """The number of moves from a prompt's start to its goal on a shortest route."""
    start, goal = ends(prompt)
    return int(distances()[INDEX[start], INDEX[goal]])


def routes_within(here: str, goal: str, moves: int) -> list[list[str]]:
    """Every list of at most `moves` moves by road that ends in goal, passing through it or not."""
    found = []
    for there in NEIGHBOURS[here]:
        if there == goal:
            found.append([there])
        if moves > 1 and distances()[INDEX[there], INDEX[goal]] <= moves - 1:
            for rest in routes_within(there, goal, moves - 1):
                found.append([there] + rest)
    return found


def shortest_routes(prompt: str) -> list[str]:
    """All shortest routes of a prompt, as text."""
    start, goal = ends(prompt)
    return [route(states) for states in routes_within(start, goal, moves_apart(prompt))]


def optimal_reward(prompt: str) -> float:
    """The largest r* that a response to the prompt can have, in any world but the hidden one."""
    return true_reward(prompt, shortest_routes(prompt)[0])


def rewarded_routes(world: World, prompt: str) -> list[str]:
    """All responses with r* > 0, as text.

    Raises InputError where they are too many to list: beyond 5 moves, or in the hidden world."""
    if world.hidden or world.max_moves > MOST_MOVES:
        raise InputError(f"world {world.name}: the responses with a reward are too many to enumerate")
    start, goal = ends(prompt)
    return [route(states) for states in routes_within(start, goal, world.max_moves)]


# ---------------------------------------------------------------- the soft optimum


def soft_optimum(ref_logp, reward, beta: float) -> torch.Tensor:
    """log pi* of the policy that maximises E[r] - beta KL(pi || pi_ref): pi_ref e^(r / beta) / Z.

    ref_logp, reward (..., R): of all R responses that there are, or that have any probability."""
    return torch.log_softmax(ref_logp + reward / beta, -1)


def exact_optimum(ref_logp, reward, beta: float) -> dict[str, torch.Tensor]:
    """The policy pi* that maximises E[r] - beta KL(pi || pi_ref), exactly.

    ref_logp, reward (P, R): for P prompts, the reference's sequence log-probs (EOS included) and
    the rewards r of all responses with r > 0; pad ref_logp with -inf, reward with 0. Every other
    response has r = 0, so its share of Z is its share of pi_ref:

        pi* = pi_ref e^(r/beta) / Z
        Z = sum pi_ref e^(r/beta) + (1 - sum pi_ref)            sums over the R responses
        E_pi*[r] = sum pi_ref r e^(r/beta) / Z
        KL(pi* || pi_ref) = E_pi*[r] / beta - log Z

    Returns fp64 tensors (P,): {"log_z", "reward", "kl_to_ref"}, in nats. Raises InputError:
    beta <= 0, or probabilities that sum to more than 1."""
    if not beta > 0:
        raise InputError(f"beta is {beta}, not a positive number")
    ref_logp = torch.as_tensor(ref_logp).double()
    reward = torch.as_tensor(reward).double()
    rest = 1 - ref_logp.exp().sum(-1, keepdim=True)  # (P, 1): the mass of all other responses
    if not (rest > -1e-4).all():  # rounding may take a sum a little beyond 1
        raise InputError(f"ref_logp: the probabilities of a prompt's responses sum to {1 - rest.min():.4f}")
    terms = torch.cat([ref_logp + reward / beta, rest.clamp(min=0).log()], -1)  # (P, R + 1)
    log_z = terms.logsumexp(-1)
    optimum = (terms[..., :-1] - log_z[..., None]).exp()  # (P, R): pi* of each response
    expected = (optimum * reward).sum(-1)
    return {"log_z": log_z, "reward": expected, "kl_to_ref": expected / beta - log_z}


def kl_to_optimum(kl_to_ref, reward, log_z, beta: float):
    """KL(pi || pi*) = KL(pi || pi_ref) - E_pi[r] / beta + log Z, for any policy pi.

    Of a single sample it is log pi/pi*, from its log pi/pi_ref and its reward r."""
    return kl_to_ref - reward / beta + log_z
