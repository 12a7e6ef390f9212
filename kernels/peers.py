"""Other implementations of linear_logp, as bench calls them.

Each function imports its library and returns f(hidden (N, D), weight (V, D), target (N,)) ->
log-probs (N,), or their sum if the library gives no more. It raises whatever the import raises.

    trl                 trl/kernels/chunked_logprob.py                           1.16
    liger               liger_kernel/ops/cutedsl/ops/...scaled_cross_entropy...  0.8.2 and 0.8.5
    cut_cross_entropy   cut_cross_entropy/linear_cross_entropy.py                25.1.1 and 25.6.4
    quack               quack/linear_cross_entropy.py                            0.6.5
    verl                verl/utils/kernel/linear_cross_entropy.py                0.9.1

Left out: LigerFusedLinearCrossEntropyFunction, Liger's older Triton kernel, takes 3.3 times as long as
logits in memory (192 ms against 59 at 8192 x 4096 x 151936 on an H100, by huggingface/trl#7244).
LigerFusedLinearScaledCrossEntropyFunction uses plain PyTorch off Hopper without a word; on Hopper it
calls the kernel that `liger` calls directly. LigerFusedLinearScaledCrossEntropyTPFunction is
for several GPUs and needs NVSHMEM, set up once a process for one shape.
"""

import inspect

# What others measured at one shape, to hold a run of that shape against.
PARITY_SHAPE = (8192, 4096, 131072)
PARITY = """for comparison, measured by others, in ms:
  12.3 forward, 50.4 with backward: Liger's CuTe kernels, which compute the logits twice, on an H100
       (README of Liger-Kernel 0.8.2, "Fused Scaled Cross Entropy")
and computed from a rate that was measured:
  35   forward and backward without computing the logits twice, at the 763 TFLOP/s that the backward of
       Liger's native kernels reaches on an H200 (linkedin/Liger-Kernel, #1422)"""


def trl():
    """Takes 9 arguments and returns 5 tensors in TRL 1.16, 7 and 4 in another version of that file."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    values = {
        "bias": None,
        "temperature": 1.0,
        "chunk_size": 32768,
        "final_logit_softcapping": None,
        "logit_scale": 1.0,
        "outputs": (),  # nothing but the log-probs
    }
    names = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:]  # the first is ctx
    unknown = set(names) - set(values) - {"hidden", "weight", "targets"}
    if unknown:
        raise TypeError(f"ChunkedLogProbFunction has arguments unknown here: {', '.join(sorted(unknown))}")

    def logp(hidden, weight, target):
        inputs = values | {"hidden": hidden, "weight": weight, "targets": target}
        arguments = [inputs[name] for name in names]
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return logp


def liger():
    """bf16 on compute capability 9.0 only."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
        LigerFusedScaledCrossEntropySM90Function,
    )

    def logp(hidden, weight, target):
        temperature = 1.0
        return -LigerFusedScaledCrossEntropySM90Function.apply(hidden, weight, target, temperature)

    return logp


def cut_cross_entropy():
    """Without its filter, which leaves out small gradients; and with fp32 sums where it has them."""
    from cut_cross_entropy import linear_cross_entropy

    exact = {"filter_eps": None}
    if "accum_e_fp32" in inspect.signature(linear_cross_entropy).parameters:  # not in 25.1.1
        exact = {"impl": "cce_exact"}

    def logp(hidden, weight, target):
        return -linear_cross_entropy(hidden, weight, target, reduction="none", **exact)

    return logp


def quack():
    """Its forward computes the gradients as well, which takes a scalar loss: forward_ms has that work."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def sum_of_logp(hidden, weight, target):
        return -chunked_linear_cross_entropy(hidden, weight, target, reduction="sum")

    return sum_of_logp


def verl():
    """Computes the entropy as well, always; takes D that are multiples of 128."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def logp(hidden, weight, target):
        temperature = 1.0
        logps, _entropy = linear_cross_entropy(hidden, weight, target, temperature, "none")
        return logps

    return logp


PEERS = {
    "trl": trl,
    "liger-kernel": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "quack-kernels": quack,
    "verl": verl,
}
NEED_CUDA = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
