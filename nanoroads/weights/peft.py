"""The adapters of a run in PEFT's format, for whoever reads that: PEFT, transformers, vLLM.

peft.PeftModel.from_pretrained(base model, folder) reads adapter_config.json and
adapter_model.safetensors. In that format each matrix A and B has the name of the layer it belongs to
in its Hugging Face family, so where q, k and v are apart there, they are apart here.
"""

from pathlib import Path

from nanoroads.weights.files import write_json, write_safetensors
from nanoroads.weights.hf import relayout, their_names
from nanoroads.weights.hf_config import nearest_family
from nanoroads.weights.lora import adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(folder, model, base):
    """Write both files. base: the folder, or hf:org/name, that has the model's other weights."""
    kind = nearest_family(model.config)
    tensors, targets = {}, []
    all_adapters = adapters(model)
    first = next(iter(all_adapters.values()))  # all have one rank and one alpha
    for name, adapted in all_adapters.items():
        b = adapted.lora_B.detach()
        if kind == "gpt_neox":  # whose qkv has its rows in another order
            b = relayout(b, f"{name}.lora_B", kind, (3, model.config.n_head))
        parts_a = adapted.lora_A.detach().chunk(len(adapted.sizes))
        parts_b = b.split(adapted.sizes)
        for i, layer in enumerate(their_names(f"{name}.weight", kind)):
            layer = layer.removesuffix(".weight")
            targets.append(layer.rpartition(".")[2])
            tensors[f"base_model.model.{layer}.lora_A.weight"] = parts_a[i].cpu().contiguous()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = parts_b[i].cpu().contiguous()
    is_reward_model = model.config.head == "scalar"
    if is_reward_model:  # of transformers' ...ForSequenceClassification, whose head is `score`
        tensors["base_model.model.score.weight"] = model.scalar_head.weight.detach().cpu().contiguous()
    path = str(Path(base).resolve())
    if str(base).startswith("hf:"):
        path = str(base).removeprefix("hf:")
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        "modules_to_save": ["score"] if is_reward_model else None,
        "base_model_name_or_path": path,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(set(targets)),
        "fan_in_fan_out": kind == "gpt2",  # its Conv1D keeps (in, out)
        "inference_mode": True,
    }
    write_safetensors(Path(folder) / WEIGHTS, tensors, {"format": "pt"}, hashed=False)
    write_json(Path(folder) / CONFIG, config)
