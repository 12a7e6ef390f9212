"""The three training loops written a second time, plainly, to compare the scripts with.

fp64, one sequence after the other: no packing, no cache, no kernel, no micro-batch. A log-prob is
log_softmax(logits / T) of a causal forward pass, the formulas are those of the papers, AdamW and the
clipping are written out. Nothing comes from losses.py, batch.py, score.py or run/optim.py but the
order of the data.
"""

import math
from statistics import fmean

import torch

from nanoroads.run.optim import batch_indices

BETAS, EPSILON = (0.9, 0.95), 1e-8  # of AdamW


def number(tensor):
    return tensor.detach().item()


# ---------------------------------------------------------------- a sequence


def token_logps(model, prompt, response, temperature=1.0):
    """log pi of each response token, (T,); prompt and response as token lists."""
    tokens = torch.tensor([*prompt, *response])[None]  # (1, P + T)
    logits = model.logits(tokens)[0]  # (P + T, V)
    predictors = logits[len(prompt) - 1 : -1]  # (T, V): what comes before each response token
    log_p = torch.log_softmax(predictors / temperature, -1)
    return log_p[torch.arange(len(response)), torch.tensor(response)]


def scalar_reward(model, prompt, response):
    """What the scalar head says at the last token, or of all response tokens together."""
    tokens = torch.tensor([*prompt, *response])[None]  # (1, P + T)
    position = torch.arange(tokens.shape[1])[None]
    hidden = model.trunk(tokens, position)[0]  # (P + T, D)
    head = model.scalar_head.weight[0]  # (D,)
    if model.config.readout == "last":
        return hidden[-1] @ head
    return (hidden[len(prompt) :] @ head).sum()


# ---------------------------------------------------------------- an optimizer step


class Optimizer:
    """AdamW (Loshchilov and Hutter, 1711.05101) after clipping by the global norm, with a linear
    warm-up and half a cosine. It also keeps each step's gradient, before clipping."""

    def __init__(self, model, args, total):
        self.model = model
        self.args = args
        self.total = total
        self.gradients = []  # {parameter's name: gradient} of each step
        self.first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def step(self, loss):
        """One step on the gradient of `loss`, a number -> the gradient's norm."""
        parameters = dict(self.model.named_parameters())
        values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {}
        for (name, parameter), value in zip(parameters.items(), values, strict=True):
            gradients[name] = torch.zeros_like(parameter) if value is None else value
        self.gradients.append(gradients)
        norm = math.sqrt(sum(number((value**2).sum()) for value in gradients.values()))
        shrink = min(1.0, self.args.clip / (norm + 1e-6))

        done = len(self.gradients)
        warm = min(1.0, done / (self.args.warmup + 1))
        lr = self.args.lr * warm * 0.5 * (1 + math.cos(math.pi * (done - 1) / self.total))
        with torch.no_grad():
            for name, parameter in parameters.items():
                gradient = gradients[name] * shrink
                self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * gradient
                self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * gradient**2
                mean = self.first[name] / (1 - BETAS[0] ** done)
                variance = self.second[name] / (1 - BETAS[1] ** done)
                if parameter.ndim > 1:  # biases and norms do not decay
                    parameter -= lr * self.args.weight_decay * parameter
                parameter -= lr * mean / (variance.sqrt() + EPSILON)
        return norm


# ---------------------------------------------------------------- SFT


def sft_loss(model, rows):
    """Negative log-likelihood per response token."""
    tokens = torch.cat([token_logps(model, prompt, response) for prompt, (response,) in rows])
    return -tokens.sum() / len(tokens)


def sft(model, args, train, test, total):
    """Rows are (prompt, [response]) as tokens -> a dict of metrics per step, and the Optimizer."""
    optimizer, log = Optimizer(model, args, total), []
    for step in range(total):
        indices = batch_indices(len(train), args.batch_size, step, args.seed)
        loss = sft_loss(model, [train[i] for i in indices])
        log.append({"loss": number(loss), "grad_norm": optimizer.step(loss)})
        log[-1]["eval_loss"] = number(sft_loss(model, test))
    return log, optimizer


# ---------------------------------------------------------------- pairs


def preference_loss(args, policy, reference, lengths, baselines):
    """The loss of one pair. policy, reference: sums of log-probs, (chosen, rejected).

    baselines: KTO's for the chosen and for the rejected response."""
    win = policy[0] - reference[0]  # log pi / pi_ref
    lose = policy[1] - reference[1]
    beta = args.beta
    if args.loss == "dpo":  # Rafailov et al., eq. 7
        return -log_sigmoid(beta * win - beta * lose)
    if args.loss == "cdpo":  # Mitchell, 2023: labels are wrong with this probability
        wrong = args.label_smoothing
        right_label, wrong_label = log_sigmoid(beta * (win - lose)), log_sigmoid(beta * (lose - win))
        return -(1 - wrong) * right_label - wrong * wrong_label
    if args.loss == "ipo":  # Azar et al., eq. 17
        return (win - lose - 1 / (2 * beta)) ** 2
    if args.loss == "hinge":  # Zhao et al., normalised as in Liu et al., 2309.06657
        return torch.clamp(1 - beta * (win - lose), min=0)
    if args.loss == "simpo":  # Meng et al., eq. 6
        means = policy[0] / lengths[0], policy[1] / lengths[1]
        return -log_sigmoid(beta * means[0] - beta * means[1] - args.gamma)
    if args.loss == "dpo-norm":  # Lambert et al., 2411.15124
        return -log_sigmoid(beta * (win / lengths[0] - lose / lengths[1]))
    if args.loss == "rpo":  # Pang et al., 2404.19733
        return -log_sigmoid(beta * (win - lose)) - args.nll_weight * policy[0] / lengths[0]
    if args.loss == "apo-zero":  # D'Oosterlinck et al., 2408.06266, eq. 7
        return 1 - sigmoid(beta * win) + sigmoid(beta * lose)
    if args.loss == "apo-down":  # the same, eq. 8
        return 1 + sigmoid(beta * win) - sigmoid(beta * (win - lose))
    if args.loss == "kto":  # Ethayarajh et al., 2402.01306, eq. 7
        desirable = 1 - sigmoid(beta * (win - baselines[0]))
        undesirable = 1 - sigmoid(beta * (baselines[1] - lose))
        return 0.5 * desirable + 0.5 * undesirable
    if args.loss == "orpo":  # Hong et al., 2403.07691
        p = [torch.exp(policy[i] / lengths[i]) for i in (0, 1)]
        odds_ratio = p[0] / (1 - p[0]) / (p[1] / (1 - p[1]))
        return -torch.log(p[0]) - args.odds_weight * log_sigmoid(torch.log(odds_ratio))
    assert args.loss == "reference-free"  # Swamy et al., section 2
    return -log_sigmoid(beta * (policy[0] - policy[1]))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def kto_baselines(scored):
    """KTO's points of reference: of the chosen responses the mean log-ratio of the rejected ones, and the
    other way round, at least 0. scored: (policy, reference, lengths) of each pair of the step."""
    win = fmean(number(policy[0] - reference[0]) for policy, reference, _ in scored)
    lose = fmean(number(policy[1] - reference[1]) for policy, reference, _ in scored)
    return max(0.0, lose), max(0.0, win)


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def accuracy(margin):
    if abs(margin) < 1e-5:  # a tie
        return 0.5
    return float(margin > 0)


def dpo_pairs(model, reference, args, pairs):
    """pairs: (prompt, [chosen, rejected]) -> the mean loss, and the means that are logged."""
    losses, rows, scored = [], [], []
    for prompt, (chosen, rejected) in pairs:
        policy = token_logps(model, prompt, chosen).sum(), token_logps(model, prompt, rejected).sum()
        with torch.no_grad():
            ref = token_logps(reference, prompt, chosen).sum(), token_logps(reference, prompt, rejected).sum()
        scored.append((policy, ref, (len(chosen), len(rejected))))
    for policy, ref, lengths in scored:
        losses.append(preference_loss(args, policy, ref, lengths, kto_baselines(scored)))
        win, lose = number(policy[0] - ref[0]), number(policy[1] - ref[1])  # log pi / pi_ref
        margin = args.beta * (win - lose)
        rows.append(
            {
                "loss": number(losses[-1]),
                "accuracy": accuracy(margin),
                "margin": margin,
                "chosen_logp": number(policy[0]),
                "rejected_logp": number(policy[1]),
                "kl_ref_policy": -(win + lose) / 2,
            }
        )
    means = {}
    for name in rows[0]:
        means[name] = fmean(row[name] for row in rows)
    return torch.stack(losses).mean(), means


def reward_pairs(model, reference, args, pairs):
    """Bradley-Terry, 1952, of either class of rewards -> the mean loss, and loss and accuracy."""
    losses, right = [], []
    for prompt, responses in pairs:
        rewards = []
        for response in responses:
            if args.reward == "global":
                rewards.append(scalar_reward(model, prompt, response))
                continue
            with torch.no_grad():
                ref = token_logps(reference, prompt, response).sum()
            rewards.append(args.beta * (token_logps(model, prompt, response).sum() - ref))
        losses.append(-log_sigmoid(rewards[0] - rewards[1]))
        right.append(accuracy(rewards[0] - rewards[1]))
    loss = torch.stack(losses).mean()
    return loss, {"loss": number(loss), "accuracy": fmean(right)}


def on_pairs(of_pairs, model, reference, args, train, test, total):
    """of_pairs: dpo_pairs or reward_pairs -> a dict of metrics per step, and the Optimizer."""
    optimizer, log = Optimizer(model, args, total), []
    for step in range(total):
        indices = batch_indices(len(train), args.batch_size, step, args.seed)
        loss, row = of_pairs(model, reference, args, [train[i] for i in indices])
        row["grad_norm"] = optimizer.step(loss)
        with torch.no_grad():
            _, held_out = of_pairs(model, reference, args, test)
        for name, value in held_out.items():
            row[f"eval_{name}"] = value
        log.append(row)
    return log, optimizer


# ---------------------------------------------------------------- RL


def pessimistic(log_ratio, advantage, limits=(0.8, 1.2)):
    """PPO's objective (Schulman et al., 1707.06347, eq. 7), clip 0.2 -> objective, whether clipped."""
    ratio = torch.exp(log_ratio)
    bounded = torch.clamp(ratio, *limits) * advantage
    return torch.minimum(ratio * advantage, bounded), float(bounded < ratio * advantage)


def standardised(rewards):
    """GRPO's advantages (Shao et al., 2402.03300, section 4.1.2); 0 where all rewards are the same."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # std divides by k - 1


def grpo_loss(kl, tokens, old, ref, advantage, limits=(0.8, 1.2), divisor=None):
    """Of one response (Shao et al., eq. 3 and 4), and whether each token was clipped."""
    terms, clipped = [], []
    for now_t, old_t, ref_t in zip(tokens, old, ref, strict=True):
        objective, is_clipped = pessimistic(now_t - old_t, advantage, limits)
        terms.append(objective - kl * k3(now_t, ref_t))
        clipped.append(is_clipped)
    return -torch.stack(terms).sum() / (divisor or len(terms)), clipped


def k3(now, ref):
    ratio = torch.exp(ref - now)
    return ratio - torch.log(ratio) - 1


def gspo_loss(kl, tokens, old, ref, advantage):
    """Of one response (Zheng et al., 2507.18071, eq. 5 and 7), and whether it was clipped."""
    log_ratio = (tokens.sum() - old.sum()) / len(tokens)
    objective, is_clipped = pessimistic(log_ratio, advantage, (1 - 3e-4, 1 + 4e-4))
    return kl * k3(tokens, ref).mean() - objective, [is_clipped]


def cispo_loss(kl, tokens, old, ref, advantage, divisor):
    """Of one response (MiniMax-M1, 2506.13585), and whether each token's weight was limited."""
    weight = torch.exp(tokens.detach() - old)
    limited = torch.clamp(weight, max=5.0)
    loss = kl * k3(tokens, ref) - limited * advantage * tokens
    return loss.sum() / divisor, (weight > 5.0).double().tolist()


def loss_like_grpo(args, kl, of_one, advantage, mean_length):
    """Of one response, of_one = (now, old, ref): the algorithms with GRPO's advantages."""
    if args.algo == "gspo":
        return gspo_loss(kl, *of_one, advantage)
    if args.algo == "cispo":
        return cispo_loss(kl, *of_one, advantage, mean_length)
    if args.algo == "dapo":  # Yu et al., 2503.14476: clip-higher, and a mean over all tokens
        return grpo_loss(kl, *of_one, advantage, (0.8, 1.28), mean_length)
    if args.algo == "dr-grpo":  # Liu et al., 2503.20783
        return grpo_loss(kl, *of_one, advantage, divisor=args.max_new_tokens)
    return grpo_loss(kl, *of_one, advantage)


def online_dpo_loss(beta, sums, ref_sums, rewards):
    """Of one prompt: the best response against the worst (Guo et al., 2402.04792)."""
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    margin = beta * (sums[best] - ref_sums[best]) - beta * (sums[worst] - ref_sums[worst])
    if rewards[best] == rewards[worst]:  # says nothing
        return 0 * margin
    return -log_sigmoid(margin)


def rebel_loss(now, old, rewards):
    """Of two responses to a prompt, eta = 1 (Gao et al., 2404.16767, algorithm 1)."""
    difference = (now[0] - old[0]) - (now[1] - old[1])
    return (difference - (rewards[0] - rewards[1])) ** 2


def rl_losses(args, kl, now, old, ref, rewards):
    """The losses of the step, whose mean is minimised, and 1 or 0 for what was clipped.

    now, old, ref: a tensor of token log-probs for each response, k in a row for each prompt.
    rewards: numbers."""
    k = args.samples
    sums = [tokens.sum() for tokens in now]
    old_sums = [number(tokens.sum()) for tokens in old]
    ref_sums = [number(tokens.sum()) for tokens in ref]
    regularised = []
    for reward_of_one, old_sum, ref_sum in zip(rewards, old_sums, ref_sums, strict=True):
        regularised.append(reward_of_one - kl * (old_sum - ref_sum))
    mean_length = fmean(len(tokens) for tokens in now)  # over the whole step
    losses, clipped = [], []
    for first in range(0, len(rewards), k):
        group = slice(first, first + k)
        if args.algo == "online-dpo":
            losses.append(online_dpo_loss(kl, sums[group], ref_sums[group], rewards[group]))
        elif args.algo == "rebel":
            for start in range(first, first + k, 2):
                pair = slice(start, start + 2)
                losses.append(rebel_loss(sums[pair], old_sums[pair], regularised[pair]))
        elif args.algo in ("grpo", "dr-grpo", "dapo", "gspo", "cispo"):
            advantages = standardised(rewards[group])
            if args.algo == "dr-grpo":  # no standard deviation
                advantages = [reward - fmean(rewards[group]) for reward in rewards[group]]
            for i in range(k):
                of_one = now[first + i], old[first + i], ref[first + i]
                loss, of_tokens = loss_like_grpo(args, kl, of_one, advantages[i], mean_length)
                losses.append(loss)
                clipped += of_tokens
        else:
            for i in range(first, first + k):
                if args.algo == "rloo":  # Kool et al., 2019: the mean of the prompt's other responses
                    baseline = (sum(regularised[group]) - regularised[i]) / (k - 1)
                else:  # reinforce, Williams, 1992: of the whole batch
                    baseline = fmean(regularised)
                advantage = regularised[i] - baseline
                if args.updates == 1:
                    losses.append(-advantage * sums[i])
                    continue
                objective, is_clipped = pessimistic(sums[i] - old_sums[i], advantage)
                losses.append(-objective)
                clipped.append(is_clipped)
    return losses, clipped or [0.0]


def rl(policy, reference, judge, args, kl, batches, total, eos):
    """batches: [(prompts, k responses to each)], as many as are sampled; judge: a function of
    (prompt, response) as tokens -> reward; eos: the token that ends a response. -> a dict of metrics
    per step, and the Optimizer."""
    optimizer, log = Optimizer(policy, args, total), []
    for step in range(total):
        samples = []  # (prompt, response)
        for prompt, responses in zip(*batches[step // args.updates], strict=True):
            for response in responses:
                samples.append((prompt, response))
        now = [token_logps(policy, *sample, args.temperature) for sample in samples]
        if step % args.updates == 0:  # the policy that sampled; its KL and entropy are logged
            old = [tokens.detach() for tokens in now]
            with torch.no_grad():
                ref = [token_logps(reference, *sample, args.temperature) for sample in samples]
                rewards = [float(judge(*sample)) for sample in samples]
        losses, clipped = rl_losses(args, kl, now, old, ref, rewards)
        loss = torch.stack(losses).mean()
        row = {"loss": number(loss), "reward": fmean(rewards), "clip_fraction": fmean(clipped)}
        row["kl"] = number(torch.cat(old).sum() - torch.cat(ref).sum()) / len(samples)
        row["entropy"] = -number(torch.cat(old).mean())
        row["length"] = len(torch.cat(old)) / len(samples)
        row["cut"] = fmean(response[-1] != eos for _, response in samples)
        row["grad_norm"] = optimizer.step(loss)
        log.append(row)
    return log, optimizer
