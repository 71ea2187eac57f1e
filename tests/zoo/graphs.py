"""Networks whose data are graphs, and networks that choose their path by the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.member import Arguments, Member, images


class GraphConv(nn.Module):
    """Sums over neighbours, scaled by both degrees; messages pass by index_add."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        degree = x.new_zeros(x.size(0)).index_add_(
            0, target, torch.ones_like(target, dtype=x.dtype)
        )
        scale = degree.clamp(min=1).rsqrt()
        messages = self.lin(x)[source] * (scale[source] * scale[target]).unsqueeze(-1)
        return torch.zeros_like(self.lin(x)).index_add(0, target, messages) + self.bias


class GraphAttention(nn.Module):
    """Neighbours weighted by a softmax over each node's incoming edges, by scatter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)
        self.att = nn.Linear(2 * outputs, 1, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index[0], edge_index[1]
        hidden = self.lin(x)
        score = F.leaky_relu(self.att(torch.cat([hidden[source], hidden[target]], -1))).squeeze(-1)
        top = x.new_full((x.shape[0],), -1e9).scatter_reduce(0, target, score, "amax")
        weight = (score - top[target]).exp()
        total = x.new_zeros(x.shape[0]).scatter_add(0, target, weight)
        alpha = weight / (total[target] + 1e-12)
        index = target.unsqueeze(-1).expand(-1, hidden.shape[-1])
        return torch.zeros_like(hidden).scatter_add(0, index, alpha.unsqueeze(-1) * hidden[source])


class GraphNet(nn.Module):
    """Node features to one answer per graph of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GraphConv(3, 6), GraphAttention(6, 6)
        self.norm = nn.LayerNorm(6)
        self.classifier = nn.Linear(6, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        x = F.relu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.2, training=self.training)
        x = self.norm(self.conv2(x, edge_index))
        if batch is None:
            batch = x.new_zeros(x.size(0), dtype=torch.long)
        graphs = int(batch.max()) + 1
        pooled = x.new_zeros(graphs, x.size(1)).index_add_(0, batch, x)
        return self.classifier(pooled)


class Expert(nn.Module):
    """A gated perceptron."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMixture(nn.Module):
    """Each token goes to its two best experts; an expert without tokens does not run."""

    def __init__(self, width: int = 4, experts: int = 3, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, 6) for _ in range(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        tokens = x.view(-1, width)
        logits = self.gate(tokens)
        weights, chosen = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slot, None])
        return out.view(batch, length, width), logits


class MixtureOfExperts(nn.Module):
    """A residual sparse mixture between two linear layers, with a balancing loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 4), nn.RMSNorm(4)
        self.moe, self.head = SparseMixture(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embed(x)
        mixed, router_logits = self.moe(self.norm(x))
        load = router_logits.softmax(-1).mean(0)
        return {"logits": self.head(x + mixed), "aux_loss": (load * load).sum() * len(load)}


def _graphs(generator: torch.Generator) -> Arguments:
    x = torch.randn(7, 3, generator=generator)
    edges = torch.randint(0, 7, (2, 16), generator=generator)
    return (x, edges), {"batch": torch.tensor([0, 0, 0, 1, 1, 1, 1])}


def _one_graph(generator: torch.Generator) -> Arguments:
    return _graphs(generator)[0], {}


MEMBERS = [
    Member("graph network", GraphNet, _graphs, 4, rungs="submodule op", eval_inputs=_one_graph),
    Member("mixture of experts", MixtureOfExperts, images(2, 5, 5), 12, rungs="submodule op"),
]
