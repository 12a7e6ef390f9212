"""TRL's own trainers against ours: same weights, same pairs; losses, gradients and twenty optimizer steps."""

from argparse import Namespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is missing: pip install -e '.[parity]'")
pytest.importorskip("transformers")
import transformers
from datasets import Dataset
from helpers.hf_models import make
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

import train_dpo
from nanoroads import common, losses
from nanoroads.batch import pack
from nanoroads.weights.checkpoint import load_model
from nanoroads.weights.hf import relayout, their_names

KINDS = {"gpt2": "gpt2", "neox": "gpt_neox", "llama-gqa": "llama"}  # name in hf_models: model_type
LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge"}  # our name: TRL's
PAD, EOS, BETA, LR, STEPS = 0, 60, 0.5, 1e-3, 20
SETTINGS = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
SETTINGS |= {"per_device_train_batch_size": 8, "max_steps": STEPS, "lr_scheduler_type": "constant", "adam_beta2": 0.95}
SETTINGS |= {"learning_rate": LR, "max_grad_norm": 1.0, "weight_decay": 0.0, "save_strategy": "no", "max_length": None}


def pairs(n=8):
    """Prompts and (chosen, rejected) of different lengths: their order and their padding must not matter."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high, n=1: torch.randint(low, high, (n,), generator=generator).tolist()  # noqa: E731
    some = lambda low, high: draw(PAD + 1, EOS, *draw(low, high))  # noqa: E731
    return [some(2, 9) for _ in range(n)], [[[*some(1, 12), EOS] for _ in range(2)] for _ in range(n)]


PROMPTS, PAIRS = pairs()


def dataset():
    """The same pairs as text, one word a token, so that TRL tokenises, pads and masks them itself."""
    text = lambda ids: "".join(f" {i:02d}" for i in ids)  # noqa: E731
    rows = zip(PROMPTS, PAIRS, strict=True)
    return Dataset.from_list([{"prompt": text(p), "chosen": text(c), "rejected": text(r)} for p, (c, r) in rows])


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"{i:02d}": i for i in range(EOS + 1)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"{EOS:02d}", pad_token=f"{PAD:02d}")


def theirs(name, seed, **options):
    """A Hugging Face model, dropout off. It is trained in fp64: fp32's own rounding is 1e-6 on some processors."""
    dropout = {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")} if name == "gpt2" else {}
    model = make(name, seed=seed, **dropout, **options).float()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.2 if p.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="module", params=KINDS)
def models_(request, tmp_path_factory):
    """(name, folder of the policy, folder of the reference)."""
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp(f"{request.param}-{seed}"))
        theirs(request.param, seed).save_pretrained(folders[-1])
    return request.param, *folders


def load_theirs(folder, kind="CausalLM", **options):
    load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
    return load(folder, dtype=torch.float64, attn_implementation="sdpa", **options)


def first_loss_and_gradients(trainer):
    """Their loss of all pairs, and the gradients by their names."""
    model = trainer.model.train()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PROMPTS))])
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients


def train(trainer):
    """The losses of TRL's own training loop. One batch holds all pairs, so its shuffling changes only their order."""
    values, compute = [], trainer.compute_loss

    def recorded(*args, **kwargs):
        loss = compute(*args, **kwargs)
        values.append(loss.item())
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    return values


def train_ours(model, loss_of):
    """Twenty steps with the scripts' optimizer, clipping and learning rate. Returns losses and the first step's gradients."""
    args = Namespace(lr=LR, weight_decay=0.0, clip=1.0, schedule="constant", warmup=0)
    optimizer, values, first = common.make_optimizer(args, model), [], None
    for step in range(STEPS):
        loss = loss_of(model).mean()
        loss.backward()
        values.append(loss.item())
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        common.update(args, model, optimizer, step, STEPS)
    return values, first


def compare_gradients(model, ours, gradients, kind):
    """Largest difference in any element, tensors matched by name."""
    worst, gradients = 0.0, gradients | {"embed_out.weight": gradients.get("lm_head.weight")}  # NeoX: its name in files
    for name, gradient in ours.items():
        if name == "scalar_head.weight":
            wanted = gradients["score.weight"]
        else:
            parts = [gradients[n] for n in their_names(name, kind)]
            wanted = relayout(torch.cat(parts), name, kind, (model.config.n_head, 3))
        worst = max(worst, (gradient - wanted).abs().max().item())
    return worst


def assert_same(ours, trl, steps=1e-4):
    apart = [abs(a - b) for a, b in zip(ours, trl, strict=True)]
    assert max(apart) < steps, apart
    assert abs(trl[-1] - trl[0]) > 100 * steps  # the steps have moved


@pytest.mark.parametrize("loss", LOSSES)
def test_preference_losses(loss, models_, tmp_path):
    name, policy, reference = models_
    config = DPOConfig(str(tmp_path), loss_type=[LOSSES[loss]], beta=BETA, **SETTINGS)
    models = load_theirs(policy), load_theirs(reference)
    trainer = DPOTrainer(*models, config, train_dataset=dataset(), processing_class=word_tokenizer())
    wanted, gradients = first_loss_and_gradients(trainer)

    model, batch = load_model(policy, dtype=torch.float64), pack(PROMPTS, PAIRS)
    lengths = batch.lengths.view(-1, 2)
    per = lengths if loss == "ipo" else 1  # TRL and IPO's authors average over tokens: losses.ipo says how
    with torch.no_grad():
        ref_logp = load_model(reference, dtype=torch.float64)(batch)[0].view(-1, 2)
    args = Namespace(loss=loss, beta=BETA, label_smoothing=0.0)
    loss_of = lambda m: train_dpo.preference_loss(args, m(batch)[0].view(-1, 2) / per, ref_logp / per, lengths)  # noqa: E731
    ours, first = train_ours(model, loss_of)
    assert abs(ours[0] - wanted) < 1e-6
    assert compare_gradients(model, first, gradients, KINDS[name]) < 1e-6
    assert_same(ours, train(trainer))


def test_reward_model(models_, tmp_path):
    name, policy, _ = models_
    torch.manual_seed(0)
    model, batch = load_model(policy, dtype=torch.float64, head="scalar"), pack(PROMPTS, PAIRS)
    reward = load_theirs(policy, "SequenceClassification", num_labels=1)
    reward.score.weight.data.copy_(model.scalar_head.weight)
    settings = RewardConfig(str(tmp_path), **SETTINGS)
    trainer = RewardTrainer(reward, settings, train_dataset=dataset(), processing_class=word_tokenizer())
    wanted, gradients = first_loss_and_gradients(trainer)
    ours, first = train_ours(model, lambda m: losses.bradley_terry(*m(batch).view(-1, 2).unbind(1)))
    assert abs(ours[0] - wanted) < 1e-6
    assert compare_gradients(model, first, gradients, KINDS[name]) < 1e-6
    assert_same(ours, train(trainer))
