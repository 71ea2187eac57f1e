"""Recurrent cells in two linear maps and a step, as graphs hold them once they carry dendrites.

    i = W_ih x + b_ih      h = W_hh h + b_hh      state' = step(i, h, state)

torch evaluates a cell in one call, inside which nothing can join. These functions make the same
calls in the same order, so that the result is the same bit for bit: on the CPU the maps add their
bias, on a GPU the fused step of torch's adds it, so there the maps leave it out.

Source: Hochreiter and Schmidhuber 1997 (LSTM); Cho et al., arXiv 1406.1078 (GRU); for the order of
the gates torch.nn.LSTMCell, torch.nn.GRUCell and torch.nn.RNNCell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cell_map(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Evaluate one of the linear maps of an LSTM or GRU cell.

    Args:
        input: (B, K).
        weight: (gates * N, K).
        bias: (gates * N,), or None; left out on a GPU, where the step adds it.
    """
    return F.linear(input, weight, None if input.is_cuda else bias)


def cell_input(input: Tensor) -> Tensor:
    """Return a cell's input or state with a batch: (K,) becomes (1, K)."""
    return input if input.dim() == 2 else input[None]


def lstm_state(
    input: Tensor, state: tuple[Tensor, Tensor] | None, size: int
) -> tuple[Tensor, Tensor]:
    """Return the hidden and the cell state of an LSTM, as `cell_state` does for each."""
    hidden, cell = (None, None) if state is None else state
    return cell_state(input, hidden, size), cell_state(input, cell, size)


def cell_state(input: Tensor, state: Tensor | None, size: int) -> Tensor:
    """Return a cell's state (B, N), zeros where the caller gave none.

    Args:
        input: what the cell reads, (B, K) or (K,).
        state: (B, N) or (N,), or None.
        size: N.
    """
    if state is None:
        return cell_input(input).new_zeros(cell_input(input).shape[0], size)
    return state if input.dim() == 2 else state[None]


def lstm_step(
    i: Tensor, h: Tensor, cell: Tensor, bias_i: Tensor | None, bias_h: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next hidden and cell state of an LSTM, each (B, N), or (N,) without a batch.

    Args:
        i: (B, 4 * N), the map of the input, for the input, forget, cell and output gate.
        h: (B, 4 * N), the map of the hidden state.
        cell: (B, N).
        bias_i: (4 * N,), for a GPU's fused step; so is bias_h.
        bias_h: (4 * N,).
        input: what the cell was given, for its number of axes.
    """
    if i.is_cuda:
        hidden, cell, _ = torch.ops.aten._thnn_fused_lstm_cell.default(i, h, cell, bias_i, bias_h)
    else:
        into, forget, new, out = (h + i).chunk(4, 1)
        cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
    return (hidden, cell) if input.dim() == 2 else (hidden[0], cell[0])


def gru_step(
    i: Tensor,
    h: Tensor,
    hidden: Tensor,
    bias_i: Tensor | None,
    bias_h: Tensor | None,
    input: Tensor,
) -> Tensor:
    """Return the next hidden state of a GRU, (B, N), or (N,) without a batch.

    Args:
        i: (B, 3 * N), the map of the input, for the reset, update and new gate.
        h: (B, 3 * N), the map of the hidden state.
        hidden: (B, N).
        bias_i: (3 * N,), for a GPU's fused step; so is bias_h.
        bias_h: (3 * N,).
        input: what the cell was given, for its number of axes.
    """
    if i.is_cuda:
        hidden, _ = torch.ops.aten._thnn_fused_gru_cell.default(i, h, hidden, bias_i, bias_h)
    else:
        size = hidden.shape[1]
        # Both gates in one sum, so that each is a row of a larger matrix as in torch's own step: on
        # the CPU the last bit of a sigmoid depends on where in a row its elements lie.
        reset, update = (gate.sigmoid() for gate in (h + i)[:, : 2 * size].chunk(2, 1))
        new = (i[:, 2 * size :] + h[:, 2 * size :] * reset).tanh()
        hidden = (hidden - new) * update + new
    return hidden if input.dim() == 2 else hidden[0]


def rnn_step(i: Tensor, h: Tensor, activation: str, input: Tensor) -> Tensor:
    """Return the next hidden state of a plain recurrent cell, (B, N), or (N,) without a batch.

    Args:
        i: (B, N), the map of the input.
        h: (B, N), the map of the hidden state.
        activation: tanh or relu.
        input: what the cell was given, for its number of axes.
    """
    hidden = (h + i).tanh() if activation == "tanh" else (h + i).relu()
    return hidden if input.dim() == 2 else hidden[0]
