"""Networks that step through time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.member import Arguments, Member, images


class CellNet(nn.Module):
    """Two LSTM cells under a Python loop over time steps."""

    def __init__(self, inputs: int = 3, hidden: int = 5) -> None:
        super().__init__()
        self.hidden = hidden
        self.lstm1, self.lstm2 = nn.LSTMCell(inputs, hidden), nn.LSTMCell(hidden, hidden)
        self.linear = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, future: int = 0) -> Tensor:
        batch, steps, _ = x.size()
        h1 = c1 = h2 = c2 = torch.zeros(batch, self.hidden, dtype=x.dtype, device=x.device)
        outputs = []
        for t in range(steps):
            h1, c1 = self.lstm1(x[:, t], (h1, c1))
            h2, c2 = self.lstm2(h1, (h2, c2))
            outputs += [self.linear(h2)]
        return torch.stack(outputs, dim=1)


class LeanGRUCell(nn.Module):
    """A gated cell written out with functions over two stacked matrices."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(3 * hidden, inputs) * 0.3)
        self.weight_hh = nn.Parameter(torch.randn(3 * hidden, hidden) * 0.3)
        self.bias_ih = nn.Parameter(torch.zeros(3 * hidden))
        self.bias_hh = nn.Parameter(torch.zeros(3 * hidden))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        from_input = F.linear(x, self.weight_ih, self.bias_ih).chunk(3, 1)
        from_state = F.linear(state, self.weight_hh, self.bias_hh).chunk(3, 1)
        reset = torch.sigmoid(from_input[0] + from_state[0])
        update = torch.sigmoid(from_input[1] + from_state[1])
        new = torch.tanh(from_input[2] + reset * from_state[2])
        return new + update * (state - new)


class GatedTagger(nn.Module):
    """Embeds tokens, steps a cell of our own over a fixed window, tags every step."""

    def __init__(self, vocabulary: int = 11, window: int = 4) -> None:
        super().__init__()
        self.window = window
        self.embed = nn.Embedding(vocabulary, 4, padding_idx=0)
        self.cell = LeanGRUCell(4, 5)
        self.tag = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        state = x.new_zeros((x.shape[0], 5))
        states = []
        for step in range(self.window):
            state = self.cell(x[:, step], state)
            states.append(state)
        return self.tag(torch.stack(states, 1))


class LanguageLSTM(nn.Module):
    """torch's whole LSTM between linear layers; returns its state for the next call."""

    def __init__(self, vocabulary: int = 11, width: int = 4) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(vocabulary, width)
        self.project = nn.Linear(width, width)
        self.rnn = nn.LSTM(width, width, num_layers=2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(width, vocabulary)

    def init_hidden(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return a state of zeros."""
        weight = next(self.parameters())
        return weight.new_zeros(2, batch, 4), weight.new_zeros(2, batch, 4)

    def forward(
        self, tokens: Tensor, hidden: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = self.project(self.drop(self.encoder(tokens)))
        output, hidden = self.rnn(x, hidden)
        return self.decoder(self.drop(output)), hidden


def _tokens(generator: torch.Generator) -> Arguments:
    return (torch.randint(1, 11, (3, 4), generator=generator),), {}


def _tokens_and_state(generator: torch.Generator) -> Arguments:
    state = tuple(torch.randn(2, 2, 3, 4, generator=generator))
    return _tokens(generator)[0], {"hidden": state}


MEMBERS = [
    Member(
        "lstm cells",
        CellNet,
        images(3, 4, 3),
        5,
        rungs="op",
    ),
    Member("gated tagger", GatedTagger, _tokens, 3),
    Member(
        "lstm language model",
        LanguageLSTM,
        _tokens_and_state,
        2,
        rungs="op",
        reported={"rnn": "LSTM"},
        eval_inputs=_tokens,
        methods={"init_hidden": lambda m: m.init_hidden(2)},
    ),
]
