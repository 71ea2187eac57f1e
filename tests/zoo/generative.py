"""Generators: adversarial, autoencoding, diffusing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.member import Arguments, Member, images


class Generator(nn.Module):
    """Noise to pictures by transposed convolutions; a spectral norm on the last one."""

    def __init__(self, noise: int = 6, width: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.noise = noise
        self.main = nn.Sequential(
            nn.ConvTranspose2d(noise, 2 * width, 4, 1, 0, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, channels, 3, 2, 1, output_padding=1),
            nn.Tanh(),
        )
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.2)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw pictures."""
        return self(torch.randn(count, self.noise, 1, 1, generator=generator))

    def forward(self, noise: Tensor) -> Tensor:
        return self.main(noise)


class Discriminator(nn.Module):
    """Strided convolutions with spectral norms, reflecting at the edges."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.conv = nn.Conv2d(3, 4, 4, 2, 1, padding_mode="reflect")
        self.normed = norm(nn.Conv2d(4, 6, 4, 2, 1))
        self.last = nn.Conv2d(6, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(x), 0.2, inplace=True)
        x = F.leaky_relu(self.normed(x), 0.2, inplace=True)
        return self.last(x).view(-1, 1).squeeze(1)


class Autoencoder(nn.Module):
    """A code between two perceptrons; scripts call `encode` and `decode`."""

    def __init__(self, inputs: int = 10, code: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 7), nn.ELU(), nn.Linear(7, code))
        self.decoder = nn.Sequential(nn.Linear(code, 7), nn.ELU(), nn.Linear(7, inputs))

    def encode(self, x: Tensor) -> Tensor:
        """Return the code."""
        return self.encoder(x)

    def decode(self, code: Tensor) -> Tensor:
        """Return what the code stands for."""
        return torch.sigmoid(self.decoder(code))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class VariationalAutoencoder(nn.Module):
    """Two heads for mean and spread, a draw between encoder and decoder, three outputs."""

    def __init__(self, code: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.fc_mu, self.fc_var = nn.Linear(64, code), nn.Linear(64, code)
        self.decoder_input = nn.Linear(code, 64)
        self.deconv = nn.ConvTranspose2d(4, 1, 3, stride=2, padding=1, output_padding=1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return mean and log variance of the code."""
        hidden = torch.flatten(F.leaky_relu(self.conv(x)), start_dim=1)
        return [self.fc_mu(hidden), self.fc_var(hidden)]

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """Draw a code."""
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std if self.training else mu

    def decode(self, code: Tensor) -> Tensor:
        """Return the picture of a code."""
        hidden = self.decoder_input(code).view(-1, 4, 4, 4)
        return self.deconv(F.leaky_relu(hidden))

    def forward(self, x: Tensor, **kwargs: object) -> list[Tensor]:
        mu, logvar = self.encode(x)
        return [self.decode(self.reparameterize(mu, logvar)), x, mu, logvar]


class TimeEmbedding(nn.Module):
    """Sines and cosines of the step, then a perceptron."""

    def __init__(self, dim: int, wide: int) -> None:
        super().__init__()
        half = dim // 2
        rates = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
        self.register_buffer("rates", rates, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, wide), nn.SiLU(), nn.Linear(wide, wide))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.rates[None]
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class TimedResidual(nn.Module):
    """A residual block whose maps are scaled and shifted by the time embedding."""

    def __init__(self, inputs: int, outputs: int, time: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time_proj = nn.Linear(time, 2 * outputs)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time_proj(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm2(hidden) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(hidden)))


class SpatialAttention(nn.Module):
    """Every position reads every other."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(2, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        flat = self.norm(x).reshape(b, c, -1)
        q, k, v = self.qkv(flat).reshape(b * self.heads, -1, flat.shape[-1]).chunk(3, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1])
        mixed = torch.einsum("bts,bcs->bct", weight.softmax(-1), v)
        return x + self.proj(mixed.reshape(b, c, -1)).reshape(b, c, *spatial)


class DiffusionUNet(nn.Module):
    """Predicts the noise in a picture at a step; a class label is optional."""

    def __init__(self, channels: int = 2, width: int = 4, classes: int | None = 3) -> None:
        super().__init__()
        time = 2 * width
        self.time_embed = TimeEmbedding(width, time)
        self.label_emb = nn.Embedding(classes, time) if classes is not None else None
        self.input_conv = nn.Conv2d(channels, width, 3, padding=1)
        self.down_block = TimedResidual(width, width, time)
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(
            [
                TimedResidual(width, 2 * width, time),
                SpatialAttention(2 * width),
                TimedResidual(2 * width, width, time),
            ]
        )
        self.upsample = nn.Conv2d(width, width, 3, padding=1)
        self.up_block = TimedResidual(2 * width, width, time)
        self.out = nn.Sequential(
            nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timesteps)
        if y is not None:
            assert self.label_emb is not None, "this model has no classes"
            emb = emb + self.label_emb(y)
        x = self.input_conv(x)
        skip = self.down_block(x, emb)
        hidden = self.downsample(skip)
        for layer in self.middle:
            hidden = layer(hidden, emb) if isinstance(layer, TimedResidual) else layer(hidden)
        hidden = self.upsample(F.interpolate(hidden, scale_factor=2, mode="nearest"))
        return self.out(self.up_block(torch.cat([hidden, skip], dim=1), emb))


def _noisy(generator: torch.Generator) -> Arguments:
    x = torch.randn(2, 2, 6, 6, generator=generator)
    return (x, torch.randint(0, 50, (2,), generator=generator)), {"y": torch.tensor([0, 2])}


def _noisy_unlabelled(generator: torch.Generator) -> Arguments:
    x = torch.randn(2, 2, 6, 6, generator=generator)
    return (x, torch.randint(0, 50, (2,), generator=generator)), {}


MEMBERS = [
    Member(
        "gan generator",
        Generator,
        images(3, 6, 1, 1),
        3,
        rungs="submodule",
        methods={"sample": lambda m: m.sample(2, torch.Generator().manual_seed(5))},
    ),
    Member("gan discriminator", Discriminator, images(3, 3, 12, 12), 3),
    Member(
        "autoencoder",
        Autoencoder,
        images(4, 10),
        4,
        rungs="submodule",
        methods={
            "encode": lambda m: m.encode(torch.linspace(-1, 1, 10)),
            "decode": lambda m: m.decode(torch.tensor([[0.1, -0.2, 0.3]])),
        },
    ),
    Member(
        "variational autoencoder",
        VariationalAutoencoder,
        images(3, 1, 8, 8),
        5,
        rungs="op",
        methods={
            "encode": lambda m: m.encode(torch.linspace(-1, 1, 64).view(1, 1, 8, 8)),
            "decode": lambda m: m.decode(torch.tensor([[0.1, -0.2]])),
        },
    ),
    Member(
        "diffusion unet",
        DiffusionUNet,
        _noisy,
        23,
        rungs="submodule op",
        eval_inputs=_noisy_unlabelled,
    ),
]
