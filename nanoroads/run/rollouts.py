"""What on-policy RL draws and scores before an optimizer step: sample, score -> Rollouts.

train_rlhf.py has the loop around it, and the losses."""

from dataclasses import dataclass
from itertools import chain

import torch

from nanoroads.batch import Batch, pack, upload
from nanoroads.generate import generate_with_logps
from nanoroads.losses import kl_k1
from nanoroads.model import LogProbs
from nanoroads.progress import tracked
from nanoroads.run.distributed import all_means, matched
from nanoroads.run.optim import chunks
from nanoroads.run.torchrun import ranks
from nanoroads.weights.sharded import whole_model


@dataclass
class Rollout:
    """Samples of a micro-batch, k per prompt, and what the losses need. S = prompts x k."""

    batch: Batch  # S responses with R tokens
    # (R,) of the policy that sampled, as it drew each token. No loss reads it: the metric sampling_gap does.
    drawn_logp: torch.Tensor
    ref: LogProbs  # of the reference
    reward: torch.Tensor  # (S,)
    cut: torch.Tensor  # (S,) 1 where a response has no EOS, since it reached --max-new-tokens, else 0
    step_length: float  # the mean length of all responses of the step, not of these S alone
    # Of the policy that sampled, pi_old, from the forward pass of the first update, which is still that
    # policy's. All --updates on these samples read it. None before.
    old: LogProbs | None = None

    @property
    def kl(self) -> torch.Tensor:
        """(S,) log(pi_old/pi_ref) of the responses: the estimator k1 of KL(pi_old || pi_ref), in nats."""
        return kl_k1(self.old.sequence, self.ref.sequence)


def sample_responses(args, policy, batch_rows, max_new_tokens, eos, seed):
    """P lists of k responses, as lists of tokens, and the log-probs of these tokens in lists of the same
    form.

    batch_rows: this rank's share of the step's prompts. Eight micro-batches at a time, to bound the KV
    cache. The random numbers depend on neither, see randomness.py."""
    policy = whole_model(policy)  # once, since ranks may have unequally many parts
    size = 8 * args.micro_batch_size if args.micro_batch_size else None
    k, temperature = args.samples, args.temperature
    responses, logps = [], []
    for chunk in tracked(chunks(batch_rows.prompts, size), "sampling", "part"):
        drawn = generate_with_logps(policy, chunk, k, max_new_tokens, temperature, eos=eos, seed=seed)
        responses += drawn[0]
        logps += drawn[1]
    return responses, logps


@torch.no_grad()
def score_responses(args, reference, judge, batch_rows, responses, logps, eos):
    """Score what was drawn for each prompt of batch_rows (data Rows) -> one Rollout per micro-batch.

    eos: the ids that end a response."""
    device = reference.embedding.weight.device
    step_length = mean_length(responses)
    rollouts = []
    for chunk in matched(chunks(range(len(batch_rows)), args.micro_batch_size), reference):
        prompts = [batch_rows.prompts[i] for i in chunk]
        groups = [responses[i] for i in chunk]
        batch = pack(prompts, groups, device=device)
        ref = reference(batch, args.temperature)  # at the temperature of the samples
        prompt_texts = []  # S strings
        response_tokens = []  # S token lists
        token_logps = []  # R numbers
        for i in chunk:
            prompt_texts += args.samples * [batch_rows.texts[i]]
            response_tokens += responses[i]
            token_logps += chain.from_iterable(logps[i])
        reward = judge(batch, ref, prompt_texts, response_tokens)
        drawn_logp = upload(torch.tensor(token_logps), device)  # (R,)
        cut = upload(torch.tensor([float(tokens[-1] not in eos) for tokens in response_tokens]), device)
        rollouts.append(Rollout(batch, drawn_logp, ref, reward, cut, step_length))
    return rollouts


def mean_length(responses):
    """The mean length of a step's responses, in tokens, those of all ranks."""
    lengths = []
    for group in responses:
        lengths += map(len, group)
    return float(all_means({"length": sum(lengths)}, {"length": len(lengths)})["length"])


def true_reward(task, batch_rows, responses, encoding):
    """{"true_reward": its mean over the samples of all ranks}; {} where it is not known."""
    means = {}
    if len(batch_rows) > 0:  # a small step leaves some ranks without prompts
        means = task.true_reward(batch_rows.texts, responses, encoding)
    if ranks() == 1:
        return means
    sums = {name: mean * len(batch_rows) for name, mean in means.items()}
    return all_means(sums, dict.fromkeys(means, len(batch_rows)))
