"""Log-probs of tokens and sequences without (tokens x vocabulary) logits in memory."""

from kernels.api import BACKENDS, linear_logp, logp_from_logits, pick, segment_sum, sequence_logp, set_backend
from kernels.shards import sharded_logp

__all__ = [
    "BACKENDS",
    "linear_logp",
    "logp_from_logits",
    "pick",
    "segment_sum",
    "sequence_logp",
    "set_backend",
    "sharded_logp",
]
