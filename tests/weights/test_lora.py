"""Adapters: what they compute and train, and the same in PEFT and in the sampler."""

import json

import pytest
import torch
from helpers.tiny import tiny

from nanoroads.batch import pack
from nanoroads.generate import generate_with_logps
from nanoroads.model import GPT
from nanoroads.weights import checkpoint, packed
from nanoroads.weights.files import read_safetensors
from nanoroads.weights.lora import ALPHA, adapters, add_adapters, merge
from nanoroads.weights.peft import save_peft

RANK = 3
SCALE = ALPHA / RANK
PROMPTS = [[1, 2, 3], [4, 5]]
RESPONSES = [[[6, 7], [8, 9, 10]], [[11], [12, 13]]]


def batch():
    return pack(PROMPTS, RESPONSES)


def with_changes(model, rank=RANK):
    """The model with adapters whose B is not zero."""
    torch.manual_seed(5)
    policy = add_adapters(model, rank)
    for adapted in adapters(policy).values():
        torch.nn.init.normal_(adapted.lora_B, std=0.05)
    return policy


def dense_twin(model, policy):
    """The model with W + (alpha / rank) B A of q, k, v and all others, written out part by part."""
    tensors = dict(model.state_dict())
    parts = {}  # {name of W: [(rows, A, B)]}
    for name, adapted in adapters(policy).items():
        rank = adapted.lora_B.shape[1]
        count = adapted.lora_A.shape[0] // rank
        starts = [0, adapted.weight.shape[0]]
        if count == 3:
            c = model.config
            q, kv = c.n_head * c.head_size, c.n_kv_head * c.head_size
            starts = [0, q, q + kv, q + 2 * kv]
        parts[f"{name}.weight"] = []
        whole = tensors[f"{name}.weight"].clone()
        for i in range(count):
            rows = slice(starts[i], starts[i + 1])
            a, b = adapted.lora_A[i * rank : (i + 1) * rank], adapted.lora_B[rows]
            whole[rows] += ALPHA / rank * (b @ a).detach()
            parts[f"{name}.weight"].append((rows, i, a, b))
        tensors[f"{name}.weight"] = whole
    dense = GPT(model.config).double()
    dense.load_state_dict(tensors)
    return dense, parts


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("kind", ["learned", "neox", "gqa"])
def test_a_new_adapter_changes_no_bit(kind):
    model = tiny(kind)
    before = model(batch())
    policy = add_adapters(model, RANK)
    after = policy(batch())
    assert torch.equal(after.sequence, before.sequence) and torch.equal(after.token, before.token)
    for adapted in adapters(policy).values():
        bound = adapted.weight.shape[1] ** -0.5  # Kaiming's with PEFT's slope, sqrt(5)
        assert 0.5 * bound < adapted.lora_A.abs().max() <= bound
        assert not adapted.lora_B.any()


@pytest.mark.parametrize("kind, of_qkv", [("learned", 1), ("neox", 1), ("gqa", 3)])
def test_log_probs_and_gradients_are_those_of_the_sum_written_out(kind, of_qkv):
    model = tiny(kind)
    policy = with_changes(model)
    dense, parts = dense_twin(model, policy)
    assert len(parts["blocks.0.attention.qkv.weight"]) == of_qkv
    logp, expected = policy(batch()).sequence, dense(batch()).sequence
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-11)
    assert (logp - model(batch()).sequence).abs().min() > 1e-3
    weight = torch.arange(1.0, len(logp) + 1).double()
    (logp * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, adapted in adapters(policy).items():
        d_whole = dense.get_parameter(f"{name}.weight").grad
        for rows, i, a, b in parts[f"{name}.weight"]:  # of scale B A: dA = scale B' dW, dB = scale dW A'
            d_a = adapted.lora_A.grad[i * RANK : (i + 1) * RANK]
            torch.testing.assert_close(d_a, SCALE * b.T @ d_whole[rows], rtol=1e-9, atol=1e-9)
            d_b = adapted.lora_B.grad[rows]
            torch.testing.assert_close(d_b, SCALE * d_whole[rows] @ a.T, rtol=1e-9, atol=1e-9)


def test_the_reference_is_the_same_memory_and_is_not_trained():
    model = tiny("gqa")
    policy = add_adapters(model, RANK)
    before = model(batch()).sequence
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        policy(batch()).sequence.sum().backward()
        optimizer.step()
    assert torch.equal(model(batch()).sequence, before)
    assert not torch.allclose(policy(batch()).sequence, before)
    assert policy.embedding.weight is model.embedding.weight is policy.lm_head.weight
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if "lora_" not in name:
            assert parameter is model.get_parameter(name) and parameter.grad is None


def test_how_many_parameters_are_trained():
    # By hand, for D = 32, 4 heads of 12, of these 2 of keys and values, and an MLP of 128: q, k, v, out,
    # gate, up, down have an A of (rank, in) and a B of (out, rank) each.
    layer = (32 + 48) + (32 + 24) + (32 + 24) + (48 + 32) + (32 + 128) + (32 + 128) + (128 + 32)
    policy = add_adapters(tiny("gqa"), RANK)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trained == 2 * RANK * layer


@pytest.mark.parametrize("kind", ["learned", "gqa"])
def test_merged_is_the_same_policy_and_leaves_the_reference(kind):
    model = tiny(kind)
    before = model(batch()).sequence.detach()
    policy = with_changes(model)
    expected = policy(batch()).sequence.detach()
    merged = merge(policy)
    assert not adapters(merged)
    torch.testing.assert_close(merged(batch()).sequence, expected, rtol=0, atol=1e-11)
    assert torch.equal(model(batch()).sequence, before)


# ---------------------------------------------------------------- the sampler


@pytest.mark.parametrize("dtype, gap", [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_the_sampler_has_the_adapters(dtype, gap, monkeypatch):
    """Whatever twin decodes, the tokens' log-probs are those of the policy that is trained."""
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 0)
    model = tiny("gqa").float()
    policy = with_changes(model)
    policy.compute_dtype = model.compute_dtype = dtype
    responses, logps = generate_with_logps(policy, PROMPTS, 2, 5, seed=1)
    drawn = torch.tensor([logp for group in logps for row in group for logp in row])
    with torch.no_grad():
        expected = policy(pack(PROMPTS, responses)).token
        without = model(pack(PROMPTS, responses)).token
    assert (drawn - expected).abs().max() < gap
    assert (drawn - without).abs().max() > 10 * gap


def test_the_twin_for_cuda_has_the_adapters():
    model = tiny("gqa").float()
    policy = with_changes(model)
    twin = packed.cast_twin(policy, torch.float32)
    tokens = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(twin.logits(tokens), policy.logits(tokens))
    assert not adapters(twin)


def test_a_small_change_is_not_rounded_away_in_bf16(monkeypatch):
    """W + B A in bf16 would be W again, where B A is far below a step of bf16."""
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 0)
    model = tiny("gqa").float()
    model.blocks.to(torch.bfloat16).float()
    policy = add_adapters(model, RANK)
    for adapted in adapters(policy).values():
        torch.nn.init.constant_(adapted.lora_B, 1e-5)
        whole = adapted.merged()
        torch.testing.assert_close(whole - adapted.weight, torch.zeros_like(whole), rtol=0, atol=1e-3)
    linear = adapters(policy)["blocks.0.mlp.up"]
    if not packed.can_pack(torch.bfloat16):
        pytest.skip("this processor does not multiply bf16")
    twin = packed.PackedLinear(linear, torch.bfloat16, 2, torch.bfloat16)
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(twin.adapter.change(x), linear.change(x)) and linear.change(x).any()


# ---------------------------------------------------------------- frozen matrices in bf16


def test_matrices_held_in_bf16_change_no_product(tmp_path):
    """Autocast rounds fp32 weights to bf16 anyway; only embeddings that bf16 cannot hold would change."""
    model = tiny("gqa").float()
    model.embedding.weight.data = model.embedding.weight.data.bfloat16().float()
    model.save_pretrained(tmp_path)
    options = {"compute_dtype": torch.bfloat16}
    whole = checkpoint.load_policy(tmp_path, **options)
    held = checkpoint.load_policy(tmp_path, matrix_dtype=torch.bfloat16, **options)
    dtypes = {name: p.dtype for name, p in held.named_parameters()}
    assert dtypes["embedding.weight"] == dtypes["blocks.1.mlp.down.weight"] == torch.bfloat16
    assert dtypes["blocks.0.norm1.weight"] == dtypes["norm.weight"] == torch.float32
    logp, expected = held(batch()).token, whole(batch()).token
    assert torch.equal(logp, expected) and logp.dtype == torch.float32
    policy = add_adapters(held, RANK)
    assert torch.equal(policy(batch()).token, expected)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


# ---------------------------------------------------------------- PEFT's format


def test_names_and_shapes_are_pefts(tmp_path):
    policy = with_changes(tiny("gqa"), rank=4)
    save_peft(tmp_path, policy, "hf:org/name")
    tensors, _ = read_safetensors(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1"
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if name.startswith(layer)}
    sizes = {"self_attn.q_proj": (32, 48), "self_attn.k_proj": (32, 24), "self_attn.v_proj": (32, 24)}
    sizes |= {"self_attn.o_proj": (48, 32), "mlp.gate_proj": (32, 128), "mlp.up_proj": (32, 128)}
    sizes |= {"mlp.down_proj": (128, 32)}
    expected = {}
    for name, (inputs, outputs) in sizes.items():
        expected[f"{layer}.{name}.lora_A.weight"] = (4, inputs)
        expected[f"{layer}.{name}.lora_B.weight"] = (outputs, 4)
    assert shapes == expected and len(tensors) == 2 * len(expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == ALPHA and config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "org/name"
    assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in sizes}


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "qwen3", "olmo2", "gpt2", "neox"])
def test_peft_loads_them_with_the_same_log_probs(name, tmp_path):
    peft = pytest.importorskip("peft")
    hf_models = pytest.importorskip("helpers.hf_models")
    theirs = hf_models.make(name)
    theirs.save_pretrained(tmp_path / "base")
    base = checkpoint.load_model(tmp_path / "base", dtype=torch.float64)
    policy = with_changes(base)
    (tmp_path / "adapter").mkdir()
    save_peft(tmp_path / "adapter", policy, tmp_path / "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")  # PEFT mends it with a warning
    tokens = torch.tensor([[1, 5, 9, 13, 2, 40]])
    with torch.no_grad():
        plain = theirs(tokens).logits
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False)
        logits = hf_models.exact(adapted)(tokens).logits
        assert (logits - plain).abs().max() > 1e-2
        torch.testing.assert_close(policy.logits(tokens), logits, rtol=0, atol=1e-9)
