"""Softmax attention on a CPU, for heads as narrow as E-MMDiT's (32), by two matrix products.

torch's fused kernel takes about twice their time (docs/speed.md). But the scores (B, H, N, N) of plain matrix
products leave the cache, and training would keep them: 7 MB per block and image at 512 px, 64 MB at 1024 px.
So they are computed a chunk at a time in one buffer. Training keeps them where they are few, and computes
them again in the backward pass where they are many.

It is one operator of torch's registry, so torch.compile sees one node. Like the fused kernels it has first
gradients only. For jvp, vmap and second derivatives `layers.attend` takes plain attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

# bytes of scores at a time, so that they stay in the caches
CHUNK_BYTES = 4 << 20
# bytes of attention weights that one block may keep for its backward pass
KEEP_BYTES = 32 << 20


@torch.library.custom_op("nitro_e::attend_in_chunks", mutates_args=())
def attend_in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Optional[Tensor],  # noqa: UP045
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, and its weights (B H, N, N) if `training` should keep them, else an empty tensor.

    q, k, v: (B, H, N, K); visible: (B, N) over keys, bool (True = attended to) or added to their scores; None for all.
    """
    flat_q, flat_k, flat_v = _flat(q), _flat(k), _flat(v)
    out, kept, buffer = torch.empty_like(flat_q), _empty_weights(q, training), _buffer(flat_q)
    with torch.autocast("cpu", enabled=False):
        for rows, queries in _chunks(flat_q):
            chunk = flat_q[rows, queries]
            weights = kept[rows, queries] if kept.numel() else _part(buffer, chunk)
            _weigh(chunk, flat_k[rows], _of_heads(visible, rows, q.shape[1]), weights)
            torch.bmm(weights, flat_v[rows], out=out[rows, queries])
    return out.view(q.shape), kept


@torch.library.custom_op("nitro_e::attend_in_chunks_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Optional[Tensor],  # noqa: UP045
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, flat_q, flat_k, flat_v = _flat(gradient), _flat(q), _flat(k), _flat(v)
    d_q, d_k, d_v = (torch.empty_like(x) for x in (flat_q, flat_k, flat_v))
    buffer, d_buffer = _buffer(flat_q), _buffer(flat_q)
    with torch.autocast("cpu", enabled=False):
        for rows, queries in _chunks(flat_q):
            chunk, incoming = flat_q[rows, queries], gradient[rows, queries]
            weights = kept[rows, queries] if kept.numel() else _part(buffer, chunk)
            if not kept.numel():
                _weigh(chunk, flat_k[rows], _of_heads(visible, rows, q.shape[1]), weights)
            added = float(queries.start > 0)  # 1: to the gradients that earlier queries gave
            d_v[rows].baddbmm_(weights.transpose(1, 2), incoming, beta=added)
            d_scores = torch.bmm(incoming, flat_v[rows].transpose(1, 2), out=_part(d_buffer, chunk))
            torch.ops.aten._softmax_backward_data(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
            torch.bmm(d_scores, flat_k[rows], out=d_q[rows, queries])
            d_k[rows].baddbmm_(d_scores.transpose(1, 2), chunk, beta=added)
    scale = q.shape[-1] ** -0.5
    return d_q.mul_(scale).view(q.shape), d_k.mul_(scale).view(k.shape), d_v.view(v.shape)


def _weigh(q: Tensor, k: Tensor, visible: Tensor | None, out: Tensor) -> None:
    """Write the softmax of the scores to `out` (rows, queries, N). visible: (rows, 1, N) or None."""
    torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2), out=out)
    if visible is not None and visible.dtype == torch.bool:
        out.masked_fill_(~visible, float("-inf"))
    elif visible is not None:
        out.add_(visible)
    torch.softmax(out, -1, out=out)


def _flat(x: Tensor) -> Tensor:
    """Join batch and heads: (B, H, N, K) -> (B H, N, K), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _chunk_shape(q: Tensor) -> tuple[int, int]:
    """Count the rows of q (B H, N, K), and the queries of each, that have CHUNK_BYTES of scores."""
    rows, tokens, _ = q.shape
    queries = max(CHUNK_BYTES // (q.element_size() * tokens), 1)
    return min(max(queries // tokens, 1), rows), min(queries, tokens)


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    rows, queries = _chunk_shape(q)
    for row in range(0, q.shape[0], rows):
        for query in range(0, q.shape[1], queries):
            yield slice(row, row + rows), slice(query, query + queries)


def _buffer(q: Tensor) -> Tensor:
    return q.new_empty(*_chunk_shape(q), q.shape[1])


def _part(buffer: Tensor, chunk: Tensor) -> Tensor:
    """View as much of the buffer as the (last, smaller) chunk needs, contiguous."""
    rows, queries, _ = chunk.shape
    return buffer.flatten()[: rows * queries * buffer.shape[2]].view(rows, queries, -1)


def _empty_weights(q: Tensor, training: bool) -> Tensor:
    batch, heads, tokens, _ = q.shape
    keep = training and batch * heads * tokens**2 * q.element_size() <= KEEP_BYTES
    return q.new_empty(batch * heads if keep else 0, tokens, tokens)


def _of_heads(visible: Tensor | None, rows: slice, heads: int) -> Tensor | None:
    """Repeat `visible` (B, N) for the heads, and take these rows of it: (rows, 1, N)."""
    return None if visible is None else visible.repeat_interleave(heads, 0)[rows, None]


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    q, k, v, visible, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, visible, output[1])


def _differentiate(ctx, gradient: Tensor, _) -> tuple[Tensor | None, ...]:
    if forward_ad.unpack_dual(gradient).tangent is not None:
        raise NotImplementedError(
            "a gradient with a tangent reached attention that was computed without; take torch.func.jvp of "
            "torch.func.grad, which computes both with plain attention"
        )
    return (*_backward(gradient, *ctx.saved_tensors), None, None)


def _differentiate_twice(ctx, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "attention on a CPU has no second derivative by backward(); take it with torch.func (grad, jvp, hessian), "
        "which computes plain attention"
    )


attend_in_chunks.register_fake(
    lambda q, k, v, visible, training: (q.new_empty(q.shape), _empty_weights(q, training))
)
_backward.register_fake(
    lambda gradient, q, k, v, visible, kept: tuple(x.new_empty(x.shape) for x in (q, k, v))
)
attend_in_chunks.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_differentiate_twice)
