"""TRL's own loss code against ours on made-up log-probs: the trainers' methods, called without a trainer.

test_trl_parity.py has the whole way from tokens to weights, for the main losses."""

import inspect
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is missing: pip install -e '.[parity]'")
from trl import DPOTrainer, GRPOTrainer, KTOTrainer

from nanoroads import loss_variants, losses

LENGTHS = torch.tensor([3, 1, 4, 2, 5, 2])  # of six responses; of pairs, the chosen ones first
LONGEST = 6
BETA = 0.3
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    sync_gradients=True,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def made_up(seed):
    """Log-probs of the tokens of six responses, padded with 0, (6, LONGEST) fp64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = -torch.rand(6, LONGEST, dtype=torch.float64, generator=generator)
    return (drawn * mask()).requires_grad_()


def mask():
    return (torch.arange(LONGEST) < LENGTHS[:, None]).long()


def model_of(by_key):
    """A model for TRL that says by_key[the first token of its input]."""

    def model(input_ids, **_):
        logp = by_key[input_ids[0, 0].item()]
        nothing = torch.zeros_like(logp)
        return SimpleNamespace(log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    return model


def inputs_of(key):
    """Six rows of a prompt of one token, `key`, and a response."""
    tokens = torch.full((6, 1 + LONGEST), key)
    of_response = torch.cat([torch.zeros(6, 1, dtype=torch.long), mask()], dim=1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": of_response}


def trainer_of(**fields):
    metrics = {"train": defaultdict(list)}
    common = {"accelerator": ACCELERATOR, "aux_loss_enabled": False, "beta": BETA, "_metrics": metrics}
    return SimpleNamespace(**common, **fields)


def assert_same(ours, theirs, logp):
    """The values, and the gradients with respect to the log-probs of tokens that are no padding."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logp, retain_graph=True)[0] * mask() for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[0].any()


# ---------------------------------------------------------------- pairs


def trl_dpo(kinds, weights, logp, ref_logp):
    model = model_of({0: logp})
    model.training = True
    fields = {"loss_types": kinds, "loss_weights": weights, "f_divergence_type": "reverse_kl"}
    fields.update(ld_alpha=None, precompute_ref_logps=False, use_weighting=False, _total_train_tokens=0)
    fields.update(args=SimpleNamespace(gradient_checkpointing_kwargs=None), _tp_size=1)
    ref_model = model_of({0: ref_logp})
    trainer = trainer_of(model=FakeModule(), ref_model=ref_model, **fields)
    return DPOTrainer._compute_loss(trainer, model, inputs_of(0), return_outputs=False)


class FakeModule(torch.nn.Module):
    """What TRL asks whether it is training and whether it saves activations."""

    is_gradient_checkpointing = False


def of_pairs(name, logp, ref_logp, nll_weight=1.0):
    """Ours, of sums: rows 0 to 2 are chosen, 3 to 5 rejected."""
    sums = [x.sum(1).view(2, 3).T for x in (logp, ref_logp)]  # (3, 2) each
    return loss_variants.of_pairs(name, *sums, LENGTHS.view(2, 3).T, BETA, nll_weight, 0.1)


@pytest.mark.parametrize(
    "name, theirs", [("dpo-norm", "sigmoid_norm"), ("apo-zero", "apo_zero"), ("apo-down", "apo_down")]
)
def test_pair_losses(name, theirs):
    logp, ref_logp = made_up(0), made_up(1).detach()
    assert_same(of_pairs(name, logp, ref_logp).mean(), trl_dpo([theirs], [1.0], logp, ref_logp), logp)


def test_rpo_where_the_chosen_responses_are_equally_long(monkeypatch):
    """TRL's second term is a mean over all tokens, ours over the pairs."""
    monkeypatch.setitem(globals(), "LENGTHS", torch.tensor([4, 4, 4, 2, 5, 2]))
    logp, ref_logp = made_up(0), made_up(1).detach()
    theirs = trl_dpo(["sigmoid", "sft"], [1.0, 0.4], logp, ref_logp)
    assert_same(of_pairs("rpo", logp, ref_logp, nll_weight=0.4).mean(), theirs, logp)


@pytest.mark.parametrize("mismatched_seed", [2, 3])
def test_kto_with_the_kl_of_mismatched_responses(mismatched_seed):
    """Once the estimate is above 0, once below: then it counts as 0."""
    logp, ref_logp = made_up(0), made_up(1).detach()
    mismatched, ref_mismatched = made_up(mismatched_seed), made_up(5 - mismatched_seed)
    estimate = (mismatched - ref_mismatched).sum(1).mean().detach()
    batch = inputs_of(0) | {"label": torch.tensor([True] * 3 + [False] * 3)}
    batch.update({f"KL_{name}": tensor for name, tensor in inputs_of(1).items()})

    fields = {"model": FakeModule(), "loss_type": "kto", "calculate_KL": True, "precompute_ref_logps": False}
    fields.update(desirable_weight=1.0, undesirable_weight=1.0, _total_train_tokens=0, _tp_size=1)
    fields.update(args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    trainer = trainer_of(ref_model=model_of({0: ref_logp, 1: ref_mismatched}), **fields)
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    model = model_of({0: logp, 1: mismatched})
    theirs = KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)

    sums = logp.sum(1).split(3) + ref_logp.sum(1).split(3)
    assert_same(loss_variants.kto(*sums, BETA, kl=estimate.clamp(min=0)).mean(), theirs, logp)
    assert trainer._metrics["train"]["kl"] == [max(0.0, estimate.item())]


def test_the_odds_ratio_of_orpo():
    """TRL's other term is over the prompt's tokens, too, so it is left out. TRL computes in fp32."""
    orpo_trainer = pytest.importorskip("trl.experimental.orpo", reason="trl has no ORPOTrainer").ORPOTrainer
    chosen, rejected = (made_up(0).sum(1) / LENGTHS).split(3)
    trainer = SimpleNamespace(beta=0.4, accelerator=ACCELERATOR)
    theirs = orpo_trainer.odds_ratio_loss(trainer, chosen, rejected)[0]  # to be subtracted
    length = torch.ones(3)
    ours = loss_variants.orpo(chosen, rejected, length, length, 0.4) + chosen
    torch.testing.assert_close(ours, -theirs.double(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- on-policy

ADVANTAGE = torch.tensor([0.7, -1.3, 0.4, -0.2, 1.1, -0.6], dtype=torch.float64)


def trl_grpo(loss_type, level, low, high, logp, old_logp, ref_logp):
    fields = {"model": FakeModule(), "loss_type": loss_type, "importance_sampling_level": level}
    fields.update(epsilon_low=low, epsilon_high=high, max_completion_length=LONGEST, use_vllm=False)
    fields.update(top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False)
    settings = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    fields.update(args=SimpleNamespace(**settings), current_gradient_accumulation_steps=1)
    trainer = trainer_of(**fields)
    nothing = torch.zeros_like(logp)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, nothing, None)
    prompt = torch.zeros(6, 1, dtype=torch.long)
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": mask(),
        "completion_mask": mask(),
    }
    batch.update(advantages=ADVANTAGE, old_per_token_logps=old_logp, ref_per_token_logps=ref_logp)
    batch["num_items_in_batch"] = LENGTHS.sum()
    return GRPOTrainer._compute_loss(trainer, None, batch)


MEAN_LENGTH = LENGTHS.double().mean().item()
CASES = {  # ours, TRL's loss_type and level, low, high, TRL's high, what else ours takes
    "grpo": (losses.grpo, "grpo", "token", 0.2, 0.2, 0.2, {}),
    "clip-higher": (losses.grpo, "grpo", "token", 0.2, 0.28, 0.28, {}),
    "dr-grpo": (losses.grpo, "dr_grpo", "token", 0.2, 0.2, 0.2, {"divisor": LONGEST}),
    "dapo": (losses.grpo, "dapo", "token", 0.2, 0.28, 0.28, {"divisor": MEAN_LENGTH}),
    "gspo": (loss_variants.gspo, "grpo", "sequence", 0.1, 0.15, 0.15, {}),
    "cispo": (loss_variants.cispo, "cispo", "token", 1.0, 0.3, 1.3, {"divisor": MEAN_LENGTH}),
}


@pytest.mark.parametrize("name", CASES)
def test_on_policy_losses(name):
    ours, loss_type, level, low, high, their_high, more = CASES[name]
    logp, old_logp, ref_logp = made_up(0), made_up(1).detach(), made_up(2).detach()
    theirs = trl_grpo(loss_type, level, low, their_high, logp, old_logp, ref_logp)
    tokens = [x[mask().bool()] for x in (logp, old_logp, ref_logp)]  # (R,) each
    loss, clipped = ours(*tokens, ADVANTAGE, LENGTHS, BETA, low, high, **more)
    assert_same(loss.mean(), theirs, logp)
    assert 0 < clipped.sum() < len(clipped)  # or the test would say nothing of clipping


def test_the_methods_that_are_called_are_those_that_trl_trains_with():
    for trainer in (DPOTrainer, KTOTrainer, GRPOTrainer):
        assert "_compute_loss" in inspect.getsource(trainer.compute_loss)
