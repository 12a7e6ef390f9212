"""Models that are too large for one GPU: FSDP, PyTorch's fully_shard.

Each rank holds some rows of every tensor, of its gradient and of its moments; a layer is gathered when a
pass comes to it, and let go behind it. Such a tensor is a DTensor. It is told by the name of its class,
because importing torch.distributed.tensor takes half a second, which only those should pay who use it.
"""

import warnings

import torch
from torch import nn

from nanoroads.model import GPT


def shard(model, device, ranks):
    """Spread a model over the ranks -> the same model. All of them make its passes together from now on.

    device: of this rank; the model may still be on the CPU, and is moved layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # It says that a pass returns a view, which nobody may change in place; nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (ranks,))
    # The matrices of a block are gathered in the dtype in which they are multiplied: half the traffic, and
    # the bits that autocast would make of them. All else, such as the norms, is gathered as it is.
    matrices = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=model.norm.weight.dtype, cast_forward_inputs=False
    )
    for block in model.blocks:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        fully_shard(linears, mesh=mesh, mp_policy=matrices)
    others = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=others, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums of gradients, where FSDP would take their mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(tensor):
    """Whether a tensor is spread over the ranks."""
    return type(tensor).__name__ == "DTensor"


def gathered(tensor):
    """The whole tensor. Of a sharded one all ranks have to ask for it, in the same order."""
    if is_sharded(tensor):
        return tensor.full_tensor()
    return tensor


def sharded_as(tensor, like):
    """A tensor that every rank has whole -> on the device of `like`, and sharded if that is, and of its
    shape."""
    if is_sharded(like) and tensor.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        whole = tensor.to(like.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def whole_model(model):
    """A plain GPT with the weights of a sharded one, to sample from; a model that is whole as it is.

    To gather each layer for each token would take far too long. The copy has its matrices in the compute
    dtype, in which they are multiplied anyway. All ranks have to ask for it."""
    if not is_sharded(model.norm.weight):
        return model
    with torch.device("meta"):
        whole = GPT(model.config, model.compute_dtype)
    is_tied = model.config.tied and model.config.head == "lm"
    weights = {}
    for name, tensor in model.state_dict().items():
        if is_tied and name == "lm_head.weight":  # it is the embedding's
            continue
        weights[name] = gathered(tensor).detach()
        if model.compute_dtype and name.startswith("blocks.") and tensor.ndim == 2:
            weights[name] = weights[name].to(model.compute_dtype)
    whole.load_state_dict(weights, assign=True, strict=not is_tied)
    if is_tied:
        whole.lm_head.weight = whole.embedding.weight
    return whole.requires_grad_(False)


def help_to_save(model, optimizer=None):
    """What the other ranks do while rank 0 saves a sharded model, and the optimizer's moments.

    They ask for the tensors that it asks for, in the same order, and keep none."""
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tied:
            gathered(tensor)
    for parameter in model.parameters():
        if optimizer is not None:
            for value in optimizer.state.get(parameter, {}).values():
                gathered(value)
