"""Whole training steps beside TRL's, in one run: DPO, and the two halves of on-policy RL.

    python experiments/bench_step.py                  a small model, two minutes on two CPU cores
    python experiments/bench_step.py --model FOLDER   a Hugging Face model, on a GPU if there is one

    DPO         From token lists to new weights: pack or pad, forward, loss, backward, clip, AdamW.
                The reference's log-probs are known on both sides. TRL: DPOTrainer's own collator
                and compute_loss, with the fastest settings that it documents: SDPA,
                precompute_ref_log_probs, no gradient checkpointing, on CUDA bf16.
    RL, sample  Responses to each prompt. TRL: transformers' generate, as RLOOTrainer calls it.
    RL, update  RLOO's clipped loss on the same samples and advantages, then as in DPO. TRL:
                RLOOTrainer's compute_loss, on tensors that are padded before the clock starts.

Not counted: reading text, the passes of a reward model and of the reference, the disk. What TRL's
losses compute at every step to log it, the entropy among it, is counted. Off CUDA, TRL 1.16
projects every position onto the vocabulary, prompts included; on CUDA those of responses alone.
"TRL, responses only" has it do that here too, and is the better guess at the ratio on a GPU.

All steps are taken in turns, round after round; figures are medians. The learning rate is 0, so
that each round takes step 0 again, whose loss and gradient norm must agree within BOUND. Tokens are
those of all sequences, a prompt once for each of its responses; in sampling the new ones. MFU: the
operations that no exact step can do without (a prompt once, logits of responses only, backward
twice forward), over the time and the GPU's peak; on a CPU, and on a GPU whose peak is not known,
over the rate of a bare matrix product in the same rounds. MiB: the peak beyond weights and moments;
on a CPU, of resident pages.
"""

import importlib.util
import os
import tempfile
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch

from kernels.bench import device_name
from nanoroads import losses, randomness
from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.report.steps import Step, bare_product, measure, peak_rate, row_of, steps_table, steps_verdict
from nanoroads.run.flags import Parser, run_script
from nanoroads.run.optim import adamw, update
from nanoroads.run.run import pick_dtype
from nanoroads.run.speed import training_operations
from nanoroads.score import sequence_logps
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import write_json

PROMPT, RESPONSE = 512, 53  # tokens, as in the paper; of one length each, so that TRL pads nothing
PAIRS = {"cpu": 2, "cuda": 16}  # in DPO; as many sequences in RL
SAMPLES = 4  # of a prompt in RL
ROUNDS = {"cpu": 3, "cuda": 10}
BETA, LR, CLIP = 0.1, 0.0, 1.0
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative to max(1, ours); bf16: TRL's logits are bf16
SMALL = {  # SmolLM2-135M with 6 layers for 30
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


# ---------------------------------------------------------------- the steps


def token_lists(name, rows, length, vocabulary):
    """Random tokens, (rows, length)."""
    return randomness.generator("bench_step", name).integers(3, vocabulary, (rows, length)).tolist()


def operations(model, prompts, k):
    """Of a training step on k responses to each prompt, at the least: see the docstring above."""
    return training_operations(model, [[PROMPT] + k * [RESPONSE]] * prompts)


def finish(loss, model, optimizer):
    """The same for everyone -> (loss, gradient norm)."""
    loss.backward()
    norm = update(model, optimizer, LR, CLIP)
    return loss.item(), norm.item()


def training_steps(name, count, k, ours, theirs, policy, device):
    """One and the same step by us, by TRL and, off CUDA, by TRL on responses only."""
    sequences = 2 * PAIRS[device.type]
    tokens = sequences * (PROMPT + RESPONSE)
    needed = operations(policy, sequences // k, k)

    def responses_only():
        with mock.patch("trl.trainer.utils._use_triton", return_value=True):  # true on CUDA
            return theirs()

    steps = [
        Step(name, "nanoroads", ours, count, tokens, needed),
        Step(name, "TRL", theirs, count, tokens, needed),
    ]
    if device.type != "cuda":
        steps.append(Step(name, "TRL, responses only", responses_only, count, tokens, needed))
    return steps


def dpo_steps(policy, optimizer, trainer, device):
    pairs, vocabulary = PAIRS[device.type], policy.config.vocab_size
    prompts = token_lists("prompts", pairs, PROMPT, vocabulary)
    chosen = token_lists("chosen", pairs, RESPONSE, vocabulary)
    rejected = token_lists("rejected", pairs, RESPONSE, vocabulary)
    responses = [list(pair) for pair in zip(chosen, rejected, strict=True)]
    # A nat away from the policy: at the policy itself the loss is ln 2, whatever the log-probs.
    ref_logp = sequence_logps(policy, prompts, responses, 1) + torch.tensor([-1.0, 1.0])  # (P, 2)
    ref_chosen, ref_rejected = ref_logp.to(device).unbind(1)

    def ours():
        batch = pack(prompts, responses, device=device)
        logp = policy(batch).sequence.view(-1, 2)
        loss = losses.dpo(logp[:, 0], logp[:, 1], ref_chosen, ref_rejected, BETA, 0.0).mean()
        return finish(loss, policy, optimizer)

    model, their_optimizer = trainer.model_wrapped, adamw(trainer.model, LR, weight_decay=0.0)
    examples = []
    for i in range(pairs):
        example = {"prompt_ids": prompts[i], "chosen_ids": chosen[i], "rejected_ids": rejected[i]}
        example["ref_chosen_logps"], example["ref_rejected_logps"] = ref_logp[i].tolist()
        examples.append(example)

    def theirs():
        inputs = {name: tensor.to(device) for name, tensor in trainer.data_collator(examples).items()}
        return finish(trainer.compute_loss(model, inputs), model, their_optimizer)

    return training_steps("DPO", pairs, 2, ours, theirs, policy, device)


def rl_steps(policy, optimizer, trainer, device):
    count = 2 * PAIRS[device.type]  # of samples
    prompts = token_lists("RL prompts", count // SAMPLES, PROMPT, policy.config.vocab_size)
    prompt_ids = torch.tensor(prompts, device=device).repeat_interleave(SAMPLES, 0)  # as TRL repeats them
    prompt_mask = torch.ones_like(prompt_ids)
    model, their_optimizer = trainer.model_wrapped, adamw(trainer.model, LR, weight_decay=0.0)
    model.generation_config.eos_token_id = trainer.generation_config.eos_token_id = None  # none stops early

    def our_samples():
        return generate(policy, prompts, SAMPLES, RESPONSE, eos=None, seed=0)

    @torch.no_grad()
    def their_samples():
        settings = trainer.generation_config
        tokens = model.generate(prompt_ids, attention_mask=prompt_mask, generation_config=settings)
        assert tokens.shape == (count, PROMPT + RESPONSE)

    responses = our_samples()
    # A tenth of a nat away from the policy: where the ratio is 1 the loss is minus the mean advantage.
    old_logp = sequence_logps(policy, prompts, responses, 1).flatten().to(device) - 0.1  # (S,)
    normal = randomness.generator("bench_step", "advantages").normal(size=count)
    advantage = torch.tensor(normal, dtype=torch.float32, device=device)

    def ours():
        batch = pack(prompts, responses, device=device)
        loss, _clipped = losses.clipped_policy_gradient(policy(batch).sequence, old_logp, advantage)
        return finish(loss.mean(), policy, optimizer)

    completion_ids = torch.tensor(responses, device=device).flatten(0, 1)  # (S, RESPONSE)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "old_logps": old_logp,
        "advantages": advantage,
    }

    def theirs():
        return finish(trainer.compute_loss(model, inputs), model, their_optimizer)

    sampling = [
        Step("RL, sample", "nanoroads", our_samples, count, count * RESPONSE),
        Step("RL, sample", "transformers", their_samples, count, count * RESPONSE),
    ]
    return sampling + training_steps("RL, update", count, SAMPLES, ours, theirs, policy, device)


# ---------------------------------------------------------------- TRL


def no_progress_bars():
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # TRL's own
    warnings.simplefilter("ignore", FutureWarning)  # transformers has other names for what TRL sets


def small_model(folder):
    """Random weights, as a Hugging Face folder."""
    import transformers

    randomness.seed_weights("bench_step", 0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


def trl_trainers(folder, device, scratch):
    """TRL's trainers of DPO and RLOO, each on a copy of the weights in `folder`."""
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer, models

    def load():
        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)

    # They insist on a tokenizer and a data set; the steps bring tokens of their own.
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<pad>": 2}, unk_token="a"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}])
    data = {"train_dataset": rows, "processing_class": tokenizer}
    shared = {"bf16": device.type == "cuda", "use_cpu": device.type == "cpu", "gradient_checkpointing": False}
    shared.update(output_dir=str(scratch), report_to="none", disable_tqdm=True)

    config = trl.DPOConfig(precompute_ref_log_probs=True, beta=BETA, max_length=None, **shared)
    dpo = trl.DPOTrainer(load(), args=config, **data)
    samples = {"num_generations": SAMPLES, "per_device_train_batch_size": 2 * PAIRS[device.type]}
    config = trl.RLOOConfig(max_completion_length=RESPONSE, beta=0.0, **samples, **shared)
    rloo = trl.RLOOTrainer(load(), reward_funcs=len, args=config, **data)
    for trainer in (dpo, rloo):
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model).train()  # bf16 on CUDA
    return dpo, rloo


# ---------------------------------------------------------------- the run


def flags(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("the benchmark").add_argument
    out = Path("out/bench_step.json")
    add("--model", type=Path, help="a Hugging Face folder (default: a small one, with random weights)")
    add("--out", type=Path, default=out, help="file for the figures (default: %(default)s)")
    args = parser.parse_args(argv)
    libraries = ("transformers", "trl", "datasets", "tokenizers")
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: not installed; pip install -e '.[parity]'")
    return args


def main(argv=None):
    args = flags(argv)
    no_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute_dtype = pick_dtype("auto", device)  # bf16 on CUDA, None on a CPU
    dtype = compute_dtype or torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or small_model(Path(scratch) / "small")
        policy = load_policy(folder, device, compute_dtype)
        if policy.config.block_size < PROMPT + RESPONSE:
            raise InputError(f"--model {folder}: has fewer than {PROMPT + RESPONSE} positions")
        optimizer = adamw(policy, LR, weight_decay=0.0)
        dpo_trainer, rloo_trainer = trl_trainers(folder, device, scratch)
        steps = dpo_steps(policy, optimizer, dpo_trainer, device)
        steps += rl_steps(policy, optimizer, rloo_trainer, device)
        bare = bare_product(device, dtype)
        measure([bare, *steps], ROUNDS[device.type], device, BOUND[dtype])

    name = device_name(device.type == "cuda")
    peak, source = peak_rate(name, bare)
    rows = [row_of(step, peak) for step in steps]
    versions = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "trl"))
    about = f"{date.today()}, {name}, {dtype}, {versions}; MFU is of {peak / 1e12:.4g} TFLOP/s, {source}"
    print(f"{about}\n\n{steps_table(rows)}\n{steps_verdict(rows)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"about": about, "model": str(args.model or "small"), "rows": rows})
    print(f"{args.out} holds these figures")


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
