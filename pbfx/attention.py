"""Multi-head attention between its projections, as graphs hold it once these carry dendrites.

    q, k, v = W_in x + b_in        a = softmax(q kᵀ / sqrt(d) + mask) v        out = W_out a + b_out

`nn.MultiheadAttention` evaluates all of it in one call and reads its weights itself. Here is what
lies between the linear maps, in the order of torch's, so that the result is the same bit for bit as
that of its ordinary path. (Its fused path for inference rounds otherwise.)

Shapes: L target positions, S source positions, B batch, E embedding, H heads.

Source: Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762; torch.nn.MultiheadAttention
for masks, layouts and what is returned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_first(x: Tensor, batch_first: bool) -> Tensor:
    """Return (L, B, E) from (B, L, E), (L, B, E), or (L, E) without a batch."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    return x.transpose(1, 0) if batch_first else x


def split_projection(projection: Tensor, parts: int) -> Tensor:
    """Return (parts, L, B, E) from a packed projection (L, B, parts * E)."""
    width = projection.shape[-1] // parts
    return projection.unflatten(-1, (parts, width)).permute(2, 0, 1, 3).contiguous()


def project_apart(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Project a query that is not the key, by the rows of the packed weight (3 * E, E).

    Args:
        query: (L, B, E).
        key: (S, B, E).
        value: (S, B, E).
        weight: the packed weight.
        bias: (3 * E,), or None.
        shared: whether key and value are the same tensor, whose projection is then one product.
    """
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    if not shared:
        rows = zip((query, key, value), weight.chunk(3), biases, strict=True)
        q, k, v = (F.linear(x, w, b) for x, w, b in rows)
        return q, k, v
    width = query.shape[-1]
    q = F.linear(query, weight[:width], biases[0])
    both = F.linear(key, weight[width:], None if bias is None else bias[width:])
    k, v = split_projection(both, 2)
    return q, k, v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    query: Tensor,
    training: bool,
    heads: int,
    dropout: float,
    need_weights: bool,
    average_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Let every target position attend to the source positions.

    Args:
        q: (L, B, E).
        k: (S, B, E).
        v: (S, B, E).
        key_padding_mask: (B, S) or (S,), boolean (True is left out) or added to the scores.
        attn_mask: (L, S) or (B * H, L, S), likewise.
        query: what the layer was given, for its dtype and number of axes.
        training: whether dropout is active.
        heads: H.
        dropout: probability that an attention weight is dropped.
        need_weights: whether to return the attention weights.
        average_weights: over the heads.
        is_causal: a hint that `attn_mask` is causal.

    Returns:
        What goes into the output projection, (L * B, E), and the attention weights (B, L, S), or
        (B, H, L, S) not averaged, or None.
    """
    length, batch, width = q.shape
    source, size = k.shape[0], width // heads
    probability = dropout if training else 0.0
    mask: Tensor | None = None
    # Where the hint says it all, the mask is not read.
    if not (is_causal and key_padding_mask is None and not need_weights):
        mask = _addend(attn_mask, query.dtype)
        mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 2 else mask
    padding = _addend(key_padding_mask, query.dtype)
    if padding is not None:
        padding = padding.view(batch, 1, 1, source).expand(-1, heads, -1, -1)
        padding = padding.reshape(batch * heads, 1, source)
        mask = padding if mask is None else mask + padding
        is_causal = False
    q = q.view(length, batch * heads, size).transpose(0, 1)
    k = k.view(source, batch * heads, size).transpose(0, 1)
    v = v.view(source, batch * heads, size).transpose(0, 1)
    if not need_weights:
        if mask is not None:
            shared = mask.shape[0] == 1
            mask = mask.unsqueeze(0) if shared else mask.view(batch, heads, -1, source)
        q = q.view(batch, heads, length, size)
        k, v = (x.view(batch, heads, source, size) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, probability, is_causal)
        return mixed.permute(2, 0, 1, 3).reshape(batch * length, width), None
    scaled = q * math.sqrt(1.0 / float(size))
    turned = k.transpose(-2, -1)
    scores = torch.bmm(scaled, turned) if mask is None else torch.baddbmm(mask, scaled, turned)
    weights = scores.softmax(-1)
    if probability > 0.0:
        weights = F.dropout(weights, probability)
    mixed = torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, width)
    weights = weights.view(batch, heads, length, source)
    weights = weights.mean(1) if average_weights else weights
    return mixed, weights if query.dim() == 3 else weights.squeeze(0)


def sequence_back(
    projected: Tensor, weights: Tensor | None, query: Tensor, batch_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Give what the output projection made, (L * B, E), the axes of `query`.

    Returns:
        Output and attention weights, as `nn.MultiheadAttention` returns them.
    """
    if query.dim() == 2:
        return projected, weights
    length, batch = (query.shape[1], query.shape[0]) if batch_first else query.shape[:2]
    out = projected.view(length, batch, projected.shape[1])
    return out.transpose(1, 0) if batch_first else out, weights


def _addend(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as what is added to the scores: minus infinity where True."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
