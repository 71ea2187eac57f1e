"""Pictures cut into patches: MLP-Mixer and the vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.member import Member, images
from zoo.mobile import DropPath


class Mlp(nn.Module):
    """Linear, activation, dropout, linear, dropout."""

    def __init__(self, inputs: int, hidden: int, drop: float = 0.1) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, inputs)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PatchEmbed(nn.Module):
    """A strided convolution, its positions in a row."""

    def __init__(self, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.size, self.num_patches = (size, size), (size // patch) ** 2
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        if not torch.jit.is_scripting():
            torch._assert(height == self.size[0], "the height does not match the model's")
            torch._assert(width == self.size[1], "the width does not match the model's")
        return self.proj(x).flatten(2).transpose(1, 2)


class MixerBlock(nn.Module):
    """A perceptron over positions, then one over channels."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp_tokens, self.mlp_channels = Mlp(positions, 6), Mlp(width, 10)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class MlpMixer(nn.Module):
    """Patches, mixer blocks, mean, head."""

    def __init__(self, size: int = 8, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.stem = PatchEmbed(size, 4, width)
        self.blocks = nn.Sequential(*(MixerBlock(width, self.stem.num_patches) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return one vector per patch."""
        return self.norm(self.blocks(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean(dim=1))


class Attention(nn.Module):
    """One matrix for queries, keys and values; fused or written out."""

    def __init__(self, width: int, heads: int, fused: bool, drop: float = 0.1) -> None:
        super().__init__()
        self.heads, self.head_dim, self.fused, self.drop = heads, width // heads, fused, drop
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, width * 3, bias=False), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        rate = self.drop if self.training else 0.0
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate)
        else:
            weight = (q * self.scale) @ k.transpose(-2, -1)
            if attn_mask is not None:
                weight = weight + attn_mask
            x = F.dropout(weight.softmax(dim=-1), rate) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """Attention and perceptron, each normed before, scaled after and sometimes dropped."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, fused), Mlp(width, 2 * width)
        self.ls1 = nn.Parameter(0.5 * torch.ones(width))
        self.drop_path1, self.drop_path2 = DropPath(0.2), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)).mul_(self.ls1))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Class token, learnt positions, blocks, a head over token or mean."""

    def __init__(
        self,
        size: int = 8,
        patch: int = 4,
        width: int = 8,
        depth: int = 2,
        heads: int = 2,
        classes: int = 5,
        global_pool: str = "token",
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.global_pool = width, global_pool
        self.patch_embed = PatchEmbed(size, patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(
            torch.randn(1, 1 + self.patch_embed.num_patches, width) * 0.02
        )
        self.pos_drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Block(width, heads, fused) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes) if classes > 0 else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that an optimizer should not decay."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return normed tokens."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens and classify."""
        x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


_IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
_METHODS = {
    "forward_features": lambda m: m.forward_features(_IMAGE),
    "forward_head": lambda m: m.forward_head(m.forward_features(_IMAGE), pre_logits=True),
    "no_weight_decay": lambda m: sorted(m.no_weight_decay()),
}

MEMBERS = [
    Member(
        "mlp-mixer",
        MlpMixer,
        images(4, 3, 8, 8),
        10,
        rungs="submodule op",
        methods={"forward_features": _METHODS["forward_features"]},
    ),
    Member(
        "vit", VisionTransformer, images(4, 3, 8, 8), 10, rungs="submodule op", methods=_METHODS
    ),
    Member(
        "vit, attention written out",
        lambda: VisionTransformer(global_pool="avg", fused=False),
        images(4, 3, 8, 8),
        10,
        rungs="submodule op",
        methods=_METHODS,
    ),
]
