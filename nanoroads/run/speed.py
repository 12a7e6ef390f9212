"""How fast a run trains: tokens and pairs or samples a second, peak memory and, on CUDA, the MFU.

With torchrun the former are of all processes, memory and MFU of the first."""

import sys
import time

import torch

from nanoroads.run.distributed import all_ranks

try:
    import resource
except ImportError:  # Windows
    resource = None

# Dense bf16 TFLOP/s by NVIDIA's data sheets. The first name that is part of the device's counts.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}
PAIR_STAGES = ("dpo", "reward")  # whose groups are pairs; in the others each response counts


class Speed:
    """Counts what is trained between two logged steps, and the seconds that it takes.

    model: the one that is trained. Evaluations and checkpoints are no training: the clock stands
    still between `stop` and `start`."""

    def __init__(self, model, device: torch.device, stage: str):
        self.model = model
        self.device = device
        self.unit = "pairs" if stage in PAIR_STAGES else "samples"
        self.peak = peak_operations(device)
        self.group_lengths = []  # of every batch since the last logged step, see Batch
        self.seconds = 0.0
        self.begin = None  # when the clock was started; None while it stands still
        self.start()

    def start(self):
        """The clock runs."""
        self.begin = time.perf_counter()

    def stop(self):
        """The clock stands still. On CUDA this waits until all that was launched is done."""
        if self.begin is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - self.begin
        self.begin = None

    def count(self, group_lengths: list[list[int]]):
        """A batch was trained on. Its lengths are lists on the CPU, so nothing waits for the device."""
        self.group_lengths += group_lengths

    def take_row(self) -> dict[str, float]:
        """The speed since the last call, for a line of speed.jsonl; {} if nothing was counted.

        tokens: each that the model reads, a group's prompt once. mfu: training_operations a second
        over the GPU's peak. In RL the seconds of sampling and scoring count, their operations do not."""
        groups, seconds = self.group_lengths, self.seconds
        self.group_lengths = []
        self.seconds = 0.0
        tokens = sum(sum(lengths) for lengths in groups)
        responses = sum(len(lengths) - 1 for lengths in groups)
        trained = len(groups) if self.unit == "pairs" else responses
        totals = all_ranks({"tokens": tokens, "trained": trained})  # each rank has a share
        if totals["tokens"] == 0:
            return {}
        row = {
            "seconds": seconds,
            "tokens_per_second": totals["tokens"] / seconds,
            f"{self.unit}_per_second": totals["trained"] / seconds,
        }
        peak = peak_mib(self.device)
        if peak is not None:
            row["peak_mib"] = peak
        if self.peak is not None:
            row["mfu"] = training_operations(self.model, groups) / seconds / self.peak
        return {name: float(f"{value:.6g}") for name, value in row.items()}


def words(row: dict[str, float]) -> list[str]:
    """A row of Speed, for the status line."""
    parts = []
    for name, value in row.items():
        if name.endswith("_per_second"):
            digits = 0 if value >= 100 else 2
            parts.append(f"{value:,.{digits}f} {name.removesuffix('_per_second')}/s")
    if "peak_mib" in row:
        parts.append(f"peak {row['peak_mib']:,.0f} MiB")
    if "mfu" in row:
        parts.append(f"MFU {100 * row['mfu']:.0f} %")
    return parts


# ---------------------------------------------------------------- the machine


def peak_operations(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a GPU in PEAKS; None for every other device."""
    if device.type != "cuda":
        return None
    for name, tflops in PEAKS.items():
        if name in torch.cuda.get_device_name(device):
            return 1e12 * tflops
    return None


def peak_mib(device: torch.device) -> float | None:
    """The most memory so far, in MiB: of CUDA's tensors, or of this process. None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type != "cpu":
        return None
    return host_peak_mib()


def host_peak_mib(of_children: bool = False) -> float | None:
    """The most memory that this process has held so far, in MiB; None on Windows, which does not say.

    of_children: the most that one of its child processes has held, of those that have ended."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS has bytes, Linux KiB


# ---------------------------------------------------------------- operations


def training_operations(model, group_lengths: list[list[int]]) -> int:
    """Floating-point operations of a forward and a backward pass that no exact step can do without.

    6 for each weight and each token that it multiplies, of which 2 forward, and 12 for each layer, head,
    channel of a head and pair of a query and a key: PaLM (Chowdhery et al., 2204.02311), appendix
    B, 6 N + 12 L H Q T a token. N is here what multiplies a token: the blocks' matrices, and the
    vocabulary projection of response tokens alone. T is here the keys that a token sees. A frozen
    weight has no gradient of its own, so 4 for 6. Norms and look-ups are left out, and what
    is computed a second time to save memory.

    group_lengths: of each group its prompt's length, then those of its responses, see Batch."""
    c = model.config
    tokens, response_tokens, seen = 0, 0, 0  # seen: pairs of a query and a key
    for prompt, *responses in group_lengths:
        tokens += prompt + sum(responses)
        response_tokens += sum(responses)
        seen += prompt * (prompt + 1) // 2
        for response in responses:
            seen += response * prompt + response * (response + 1) // 2
    operations = 12 * c.n_layer * c.n_head * c.head_size * seen
    for weight in model.blocks.parameters():
        if weight.ndim == 2:
            operations += operations_per_product(weight) * weight.numel() * tokens
    if c.head == "lm":
        operations += operations_per_product(model.lm_head.weight) * c.n_embd * c.vocab_size * response_tokens
    return operations


def operations_per_product(weight) -> int:
    """Of one weight and one token: 2 forward, 2 for the token's gradient, 2 for the weight's."""
    return 6 if weight.requires_grad else 4
