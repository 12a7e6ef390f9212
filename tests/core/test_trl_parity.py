"""TRL's own trainers against ours: same weights, same pairs;
losses, gradients and twenty optimizer steps."""

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
from nanoroads import losses
from nanoroads.batch import pack
from nanoroads.run.optim import adamw, update
from nanoroads.weights.checkpoint import load_model
from nanoroads.weights.hf import relayout, their_names

KINDS = {"gpt2": "gpt2", "neox": "gpt_neox", "llama-gqa": "llama"}  # name in hf_models: model_type
LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge"}  # our name: TRL's
PAD, EOS, BETA, LR, STEPS = 0, 60, 0.5, 1e-3, 20
SETTINGS = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
    "max_steps": STEPS,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "learning_rate": LR,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "save_strategy": "no",
    "max_length": None,
}


def pairs(n=8):
    """Prompts and (chosen, rejected) of different lengths: their
    order and their padding must not matter."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, n=1):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    def tokens(shortest, longest):
        length = draw(shortest, longest)[0]
        return draw(PAD + 1, EOS, length)

    prompts = [tokens(2, 9) for _ in range(n)]
    responses = [[tokens(1, 12) + [EOS] for _ in range(2)] for _ in range(n)]
    return prompts, responses


PROMPTS, PAIRS = pairs()


def dataset():
    """The same pairs as text, one word per token, so that TRL
    tokenises, pads and masks them itself."""

    def text(ids):
        return "".join(f" {i:02d}" for i in ids)

    rows = []
    for prompt, (chosen, rejected) in zip(PROMPTS, PAIRS, strict=True):
        rows.append({"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)})
    return Dataset.from_list(rows)


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"{i:02d}": i for i in range(EOS + 1)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": f"{EOS:02d}", "pad_token": f"{PAD:02d}"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def hf_model(name, seed):
    """A Hugging Face model, dropout off. It is trained in fp64: fp32's
    own rounding is 1e-6 on some processors."""
    dropout = {}
    if name == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = make(name, seed=seed, **dropout).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (folder of the policy, folder of the reference)}."""
    paths = {}
    for name in KINDS:
        paths[name] = (
            tmp_path_factory.mktemp(f"{name}-policy"),
            tmp_path_factory.mktemp(f"{name}-reference"),
        )
        for seed, path in enumerate(paths[name]):
            hf_model(name, seed).save_pretrained(path)
    return paths


def load_hf_model(folder, kind="CausalLM", **options):
    load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
    return load(folder, dtype=torch.float64, attn_implementation="sdpa", **options)


def trl_first_step(trainer):
    """TRL's loss of all pairs, and the gradients by its names."""
    model = trainer.model.train()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PROMPTS))])
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients


def trl_losses(trainer):
    """The losses of TRL's own training loop. One batch holds all pairs,
    so its shuffling changes only their order."""
    values, compute = [], trainer.compute_loss

    def recorded(*args, **kwargs):
        loss = compute(*args, **kwargs)
        values.append(loss.item())
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    return values


def train(model, loss_of):
    """Twenty steps with the scripts' optimizer and clipping. Returns
    all losses and the first step's gradients."""
    optimizer, values, first_gradients = adamw(model, LR, weight_decay=0.0), [], None
    for _ in range(STEPS):
        loss = loss_of(model).mean()
        loss.backward()
        values.append(loss.item())
        if first_gradients is None:
            first_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        update(model, optimizer, LR, clip=1.0)  # a constant rate, without warm-up
    return values, first_gradients


def worst_difference(model, gradients, trl_gradients, kind):
    """Largest difference in any element of a gradient, tensors matched by name."""
    # In files the vocabulary projection of NeoX has another name.
    by_name = {**trl_gradients, "embed_out.weight": trl_gradients.get("lm_head.weight")}
    worst = 0.0
    for name, gradient in gradients.items():
        if name == "scalar_head.weight":
            wanted = by_name["score.weight"]
        else:
            parts = [by_name[their_name] for their_name in their_names(name, kind)]
            wanted = relayout(torch.cat(parts), name, kind, (model.config.n_head, 3))
        worst = max(worst, (gradient - wanted).abs().max().item())
    return worst


def assert_same(values, trl_values, tolerance=1e-4):
    apart = [abs(a - b) for a, b in zip(values, trl_values, strict=True)]
    assert max(apart) < tolerance, apart
    assert abs(trl_values[-1] - trl_values[0]) > 100 * tolerance  # the steps have moved


def combinations():
    """Every loss with every kind of model. Quick: each loss once."""
    for name in KINDS:
        for loss in LOSSES:
            is_quick = name == "gpt2"
            yield pytest.param(name, loss, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("name, loss", combinations())
def test_preference_losses(name, loss, folders, tmp_path):
    policy, reference = folders[name]
    config = DPOConfig(str(tmp_path), loss_type=[LOSSES[loss]], beta=BETA, **SETTINGS)
    trainer = DPOTrainer(
        load_hf_model(policy),
        load_hf_model(reference),
        config,
        train_dataset=dataset(),
        processing_class=word_tokenizer(),
    )
    wanted, trl_gradients = trl_first_step(trainer)

    model, batch = load_model(policy, dtype=torch.float64), pack(PROMPTS, PAIRS)
    lengths = batch.lengths.view(-1, 2)
    divisor = 1
    if loss == "ipo":  # TRL and IPO's authors average over tokens: losses.ipo says how
        divisor = lengths
    with torch.no_grad():
        ref_logp = load_model(reference, dtype=torch.float64)(batch).sequence.view(-1, 2) / divisor
    args = train_dpo.flags(["--loss", loss, "--beta", str(BETA)])

    def loss_of(model):
        logp = model(batch).sequence.view(-1, 2) / divisor
        return train_dpo.preference_loss(args, logp, ref_logp, lengths)

    values, gradients = train(model, loss_of)
    assert abs(values[0] - wanted) < 1e-6
    assert worst_difference(model, gradients, trl_gradients, KINDS[name]) < 1e-6
    assert_same(values, trl_losses(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_reward_model(name, folders, tmp_path):
    policy, _ = folders[name]
    torch.manual_seed(0)
    model, batch = load_model(policy, dtype=torch.float64, head="scalar"), pack(PROMPTS, PAIRS)
    trl_model = load_hf_model(policy, "SequenceClassification", num_labels=1)
    trl_model.score.weight.data.copy_(model.scalar_head.weight)
    settings = RewardConfig(str(tmp_path), **SETTINGS)
    trainer = RewardTrainer(trl_model, settings, train_dataset=dataset(), processing_class=word_tokenizer())
    wanted, trl_gradients = trl_first_step(trainer)

    def loss_of(model):
        chosen, rejected = model(batch).view(-1, 2).unbind(1)
        return losses.bradley_terry(chosen, rejected)

    values, gradients = train(model, loss_of)
    assert abs(values[0] - wanted) < 1e-6
    assert worst_difference(model, gradients, trl_gradients, KINDS[name]) < 1e-6
    assert_same(values, trl_losses(trainer))
