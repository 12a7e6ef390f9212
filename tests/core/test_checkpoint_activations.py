"""checkpoint_activations: less is kept for the backward pass, and the gradients are the same."""

import pytest
import torch
from helpers.tiny import tiny

from nanoroads.batch import pack
from nanoroads.weights.lora import add_adapters

BATCH = pack([[1, 2, 3], [4, 5]], [[[6, 7], [8, 9, 10]], [[11], [12, 13]]])


def gradients(model, recompute):
    """Gradients of a model's parameters, and how often its blocks were computed."""
    calls = []
    handles = [block.mlp.up.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    model.checkpoint_activations = recompute
    model.zero_grad()
    model(BATCH).sequence.sum().backward()
    for handle in handles:
        handle.remove()
    return [p.grad for p in model.parameters() if p.requires_grad], len(calls)


@pytest.mark.parametrize("kind", ["learned", "neox", "gqa"])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_the_same_bits_in_fp64(kind, lora):
    model = tiny(kind)
    if lora:
        model = add_adapters(model, 2)
    plain, calls = gradients(model, recompute=False)
    again, calls_again = gradients(model, recompute=True)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    assert calls == 2 and calls_again == 4  # two blocks, each computed again in the backward pass


def test_gradients_under_autocast_are_the_same():
    model = tiny("gqa").float()
    model.compute_dtype = torch.bfloat16
    plain, _ = gradients(model, recompute=False)
    again, _ = gradients(model, recompute=True)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_only_the_inputs_of_blocks_are_kept():
    """What autograd keeps of four blocks more: an input of each, and not some thirty tensors."""

    def kept(layers, recompute):
        model = tiny("gqa", n_layer=layers)
        model.checkpoint_activations = recompute
        sizes = {}  # by address: the same tensor may be kept by several operations

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        weights = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logp = model(BATCH).sequence
        logp.sum().backward()
        return sum(size for address, size in sizes.items() if address not in weights)

    one_input = BATCH.tokens.numel() * 32
    assert kept(6, recompute=True) - kept(2, recompute=True) <= 4 * one_input
    assert kept(6, recompute=False) - kept(2, recompute=False) > 40 * one_input


def test_nothing_is_recomputed_without_gradients():
    model = tiny("gqa")
    model.checkpoint_activations = True
    with torch.no_grad():
        assert not model(BATCH).sequence.requires_grad
