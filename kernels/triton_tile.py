"""A tile of logits on the tensor cores: what the Triton kernels of both directions begin with."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)  # nats -> base 2
LN2 = tl.constexpr(0.6931471805599453)  # base 2 -> nats
LOG_ZERO = tl.constexpr(-1e30)  # stands for log 0: unlike -inf, it can be subtracted from itself
IGNORE = tl.constexpr(-100)
# Arguments that change with the batch: Triton must not specialize on their values.
PER_BATCH = ("N", "stats_stride")
FUSE = {"enable_fp_fusion": True}  # a b + c in one rounding: Triton's default until 3.9


# --- kernels


@triton.jit
def tile_of(program, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """-> row block, column block.

    GROUP row blocks take each block of the weight one after the other, while it is in the L2 cache."""
    row_blocks = tl.cdiv(N, BLOCK_N)
    band = GROUP * tl.cdiv(V, BLOCK_V)  # the programs of a group
    group_start = (program // band) * GROUP
    group_size = min(row_blocks - group_start, GROUP)
    return group_start + (program % band) % group_size, (program % band) // group_size


@triton.jit
def product(
    # pointers, or descriptors for the tensor memory accelerator: x (N, D), w (V, D)
    x, w,
    # the tile's first row and column
    row, col,
    # sizes
    N, V, D,
    # meta-parameters
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x w^T of a tile, in two (BLOCK_N, BLOCK_V / 2) fp32 halves: what follows has few registers.

    A descriptor loads zeros outside x and w. Pointers wrap around to valid rows, whose results are
    masked out later."""
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if not TMA:
        lanes = tl.arange(0, BLOCK_D)
        x += ((row + tl.arange(0, BLOCK_N)) % N).to(tl.int64)[:, None] * D + lanes[None, :]
        w += ((col + tl.arange(0, BLOCK_V)) % V).to(tl.int64)[None, :] * D + lanes[:, None]
    for d in range(0, D, BLOCK_D):
        if TMA:
            z = tl.dot(x.load([row, d]), w.load([col, d]).T, z, input_precision=PRECISION)
        else:
            inside = d + lanes < D
            x_block = tl.load(x + d, mask=inside[None, :], other=0.0)
            w_block = tl.load(w + d, mask=inside[:, None], other=0.0)
            z = tl.dot(x_block, w_block, z, input_precision=PRECISION)
    # columns 0 .. BLOCK_V / 2 - 1, and the rest
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def softcapped(z, softcap):
    """softcap tanh(z / softcap), with a relative error of at most 5e-7.

    tanh(a) = 1 - 2 / (exp(2a) + 1) cancels near 0: by 1e-3 nats at a softcap of 10^4. Where exp(2a) is
    between 1/2 and 2, a series, z (1 - a^2 / 3 + 2 a^4 / 15 - ...), has coefficients good to 4e-8."""
    a2 = z * (2 * LOG2E / softcap)  # exp(2a) = 2^a2
    square = a2 * a2
    series = square * (-0.040036991 + square * (0.0019189699 + square * -8.5321415e-05))
    near_zero = z + z * series  # z itself at a softcap so large that a2 is 0
    elsewhere = softcap * (1 - 2 / (tl.exp2(a2) + 1))
    return tl.where(square < 1.0, near_zero, elsewhere)  # NaN stays NaN


@triton.jit
def logits_of(z, bias, cols, V, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The product of a tile -> its logits z2, in base 2; scale = 1 / (temperature ln 2).

    -inf in columns from V on if there is a bias and no softcap, else anything finite."""
    if BIAS:
        outside = 0.0 if SOFTCAP else -float("inf")  # of which tanh would make a logit
        z += tl.load(bias + cols, mask=cols < V, other=outside).to(tl.float32)[None, :]
    if SOFTCAP:
        z = softcapped(z, softcap)
    return z * scale


# --- what calls the kernels


def aligned(x):
    """x (rows, D), contiguous, base and rows on 16 bytes, as TMA wants.

    D is padded to a multiple of 16: of no other number does Triton know that it is a multiple of 8,
    and without that it loads bf16 by pointers one at a time."""
    x = x.contiguous()
    pad = -x.shape[1] % 16
    if pad:
        return F.pad(x, (0, pad))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def operands(hidden, weight, tile):
    """hidden (N, D) and weight (V, D), both aligned; with TMA, descriptors of their blocks."""
    if not tile["TMA"]:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [tile["BLOCK_N"], tile["BLOCK_D"]]),
        TensorDescriptor.from_tensor(weight, [tile["BLOCK_V"], tile["BLOCK_D"]]),
    )


def precision(dtype):
    """fp32 products in three TF32 ones: within 1e-6 of fp32, on the tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"
