"""The loop of sampling: a token more for every row, until all are finished."""

from typing import NamedTuple

import torch

from nanoroads.cache import FixedCache, KVCache
from nanoroads.randomness import uniform
from nanoroads.sampling import choose, refuse_not_finite, refuse_unless
from nanoroads.weights.packed import decoding_twin

CHECK_EVERY = 8  # steps between two checks for the end; for each a GPU has to be waited for


class Step(NamedTuple):
    """The newest token of all N = P*k rows. A finished row goes on with the token that it ended with."""

    tokens: torch.Tensor  # (N,) int64
    logps: torch.Tensor  # (N,) the token's log-prob, see `choose`; of no meaning once a row has ended
    finished: torch.Tensor  # (N,) bool, this token included


def uses_cuda_graph(model):
    """Whether a step is recorded as a CUDA graph and played back: to launch its many small kernels one by
    one takes longer than to run them. A trunk that was compiled is called as it is."""
    return model.embedding.weight.device.type == "cuda" and not model.trunk_is_compiled


def decode(model, prompts, k, max_new_tokens, stop, settings, seed):
    """Yields a Step per token for P*k rows; row p*k + i is sample i of prompt p.

    stop: the ids that end a row, on the model's device. settings: (temperature, top_k, top_p)."""
    dtype = model.compute_dtype or model.embedding.weight.dtype
    has_fixed_shapes = uses_cuda_graph(model)
    device = model.embedding.weight.device
    model = decoding_twin(model, dtype, len(prompts) * k)  # the same model with faster matrices
    cache_kind = FixedCache if has_fixed_shapes else KVCache
    cache = cache_kind(model.config, prompts, max_new_tokens, device, dtype)
    with model.autocast():
        hidden = cache.read_prompts(model)  # (P, D)
        head = model.sampling_head()
    if k > 1:  # from here on each sample is a row
        cache.repeat(k)
        hidden = hidden.repeat_interleave(k, dim=0)
    # After the cache, which takes the most memory: where there is too little, that is known at once.
    u = torch.tensor(uniform(prompts, k, max_new_tokens, seed))  # (P*k, max_new_tokens) fp64
    if device.type == "mps":  # it has no fp64, and in fp32 a number just below 1 may round to 1
        u = u.float().clamp(max=1 - 2**-24)
    u = u.to(device)
    loop = fixed_steps if has_fixed_shapes else shrinking_steps
    yield from loop(model, head, cache, hidden, u, stop, settings)


def shrinking_steps(model, head, cache, hidden, u, stop, settings):
    """Rows that are finished are dropped: each step costs what the others need."""
    n, length = u.shape
    attend = cache.attend
    if model.trunk_is_compiled:  # leave it out: the number of columns is new in every step
        attend = torch.compiler.disable(attend)
    index = torch.arange(n, device=u.device)  # (M,) the rows that are still being written
    tokens = torch.zeros(n, dtype=torch.int64, device=u.device)
    logps = torch.zeros(n, dtype=u.dtype, device=u.device)
    finished = torch.zeros(n, dtype=torch.bool, device=u.device)
    for step in range(length):
        with model.autocast():
            logits = head(hidden)  # (M, V)
        drawn, drawn_logps = choose(logits, u[index, step], *settings)  # (M,) each
        refuse_not_finite(drawn_logps)
        # Rows that have finished but are not dropped yet are drawn, too; they keep their EOS.
        tokens = torch.where(finished, tokens, tokens.index_copy(0, index, drawn))
        logps = logps.index_copy(0, index, drawn_logps)
        finished = finished | is_one_of(tokens, stop)
        yield Step(tokens, logps, finished)

        unfinished = (~finished[index]).nonzero().squeeze(1)
        if step + 1 == length or len(unfinished) == 0:
            return
        # Drop finished rows once a quarter are done; earlier, copying the cache costs more than it saves.
        if len(unfinished) <= 0.75 * len(index):
            cache.keep(unfinished)
            index = index[unfinished]
        position = cache.next_position()  # (M,)
        with model.autocast():
            hidden = model.trunk(tokens[index], position, attend)  # (M, D)


def fixed_steps(model, head, cache, hidden, u, stop, settings):
    """The same steps without a shape that changes and without waiting for the device, but for a look at it
    every few steps. Finished rows are carried along."""
    n, length = u.shape
    tokens = torch.zeros(n, dtype=torch.int64, device=u.device)
    logps = torch.zeros(n, dtype=u.dtype, device=u.device)
    finished = torch.zeros(n, dtype=torch.bool, device=u.device)
    all_finite = torch.ones((), dtype=torch.bool, device=u.device)
    place = torch.zeros(1, dtype=torch.int64, device=u.device)  # of the token that is drawn next

    def draw(hidden):
        drawn, drawn_logps = choose(head(hidden), u.index_select(1, place).squeeze(1), *settings)
        tokens.copy_(torch.where(finished, tokens, drawn))
        logps.copy_(drawn_logps)
        finished.logical_or_(is_one_of(tokens, stop))
        all_finite.logical_and_(torch.isfinite(drawn_logps).all())
        place.add_(1)

    def step():
        with model.autocast():
            draw(model.trunk(tokens, cache.next_position(), cache.attend))

    with model.autocast():
        draw(hidden)
    advance = step
    for done in range(1, length + 1):  # tokens that were drawn
        yield Step(tokens.clone(), logps.clone(), finished.clone())
        is_last = done == length
        if is_last or done % CHECK_EVERY == 0:
            refuse_unless(all_finite)
            if is_last or finished.all():
                return
        if done == 2 and u.is_cuda:  # the step before this one was not recorded: it warmed up
            advance = recorded(step, u.device)
        advance()


def recorded(step, device):
    """One call of `step` as a CUDA graph -> a function that plays it back."""
    graph = torch.cuda.CUDAGraph()
    mode = "global"
    if torch.distributed.is_initialized():  # a thread of NCCL's asks how far the device is, meanwhile
        mode = "thread_local"
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        step()  # what it launches is recorded, and not run

    def replay():
        with torch.cuda.device(device):
            graph.replay()

    return replay


def is_one_of(tokens, stop):
    """tokens (N,), stop (E,) -> (N,) bool. torch.isin may sort, and wait for the device."""
    return (tokens[:, None] == stop).any(1)
