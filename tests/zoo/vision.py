"""Networks for dense outputs, points, time series and several tasks at once."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo.member import Arguments, Member, images


class DoubleConv(nn.Sequential):
    """Conv, norm and relu, twice."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.InstanceNorm2d(outputs, affine=True),
            nn.LeakyReLU(0.1, inplace=True),
        )


class Up(nn.Module):
    """Double the size, pad to the skip connection's, join, convolve."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(inputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """Two levels down, two up; odd sizes work."""

    def __init__(self, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.inc = DoubleConv(channels, 4)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(w, 2 * w)) for w in (4, 8)
        )
        self.ups = nn.ModuleList([Up(16, 8), Up(8, 4)])
        self.outc = nn.Conv2d(4, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.outc(x)


class Chomp(nn.Module):
    """Cut the end of a sequence off."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions; the second has a weight norm."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        padding = 2 * dilation
        plain = nn.Conv1d(inputs, outputs, 3, padding=padding, dilation=dilation)
        normed = weight_norm(nn.Conv1d(outputs, outputs, 3, padding=padding, dilation=dilation))
        self.net = nn.Sequential(
            *(plain, Chomp(padding), nn.ReLU(), nn.Dropout(0.1)),
            *(normed, Chomp(padding), nn.ReLU(), nn.Dropout(0.1)),
        )
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        return F.relu(self.net(x) + residual)


class TCN(nn.Module):
    """Temporal blocks with growing dilation; classifies the last step."""

    def __init__(self, channels: tuple[int, ...] = (4, 4)) -> None:
        super().__init__()
        widths = [3, *channels]
        self.tcn = nn.Sequential(
            *(TemporalBlock(widths[i], widths[i + 1], 2**i) for i in range(len(channels)))
        )
        self.linear = nn.Linear(channels[-1], 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Take inputs of shape (batch, channels, length)."""
        return F.log_softmax(self.linear(self.tcn(inputs)[:, :, -1]), dim=1)


class TNet(nn.Module):
    """A k × k matrix for each cloud of points, near the identity."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.conv1, self.conv2 = nn.Conv1d(k, 4, 1), nn.Conv1d(4, 6, 1)
        self.fc1, self.fc2 = nn.Linear(6, 4), nn.Linear(4, k * k)
        self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 6)
        x = self.fc2(F.relu(self.fc1(x)))
        identity = torch.eye(self.k, device=x.device).flatten().repeat(batch, 1)
        return (x + identity).view(-1, self.k, self.k)


class PointNet(nn.Module):
    """Clouds of points, turned by learnt matrices and pooled by their maximum."""

    def __init__(self, classes: int = 5, feature_transform: bool = True) -> None:
        super().__init__()
        self.feature_transform = feature_transform
        self.stn, self.fstn = TNet(3), TNet(4)
        self.conv1, self.conv2 = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 8, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, classes)
        self.dropout = nn.Dropout(p=0.3)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, _, count = points.shape
        turned = torch.bmm(points.transpose(2, 1), self.stn(points)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(turned)))
        matrix = None
        if self.feature_transform:
            matrix = self.fstn(x)
            x = torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)
        x = self.bn2(self.conv2(x)).reshape(batch, -1, count).amax(dim=-1)
        return self.fc(self.dropout(x)), matrix


class FeaturePyramid(nn.Module):
    """Maps of three sizes, the coarse ones added into the finer ones; a dict in, a dict out."""

    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Conv2d(w, channels, 1) for w in widths)
        self.layer_blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in widths)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        names, values = list(maps.keys()), list(maps.values())
        last = self.inner_blocks[-1](values[-1])
        results = [self.layer_blocks[-1](last)]
        for i in range(len(values) - 2, -1, -1):
            lateral = self.inner_blocks[i](values[i])
            last = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
            results.insert(0, self.layer_blocks[i](last))
        return OrderedDict(zip(names, results, strict=True))


class Detector(nn.Module):
    """A one-stage detector: losses in training, boxes per image in evaluation."""

    def __init__(self, classes: int = 3, score_threshold: float = 0.3) -> None:
        super().__init__()
        self.score_threshold = score_threshold
        self.backbone = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.ReLU()),
                "body": nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.GroupNorm(2, 6), nn.ReLU()),
            }
        )
        self.fpn = FeaturePyramid([4, 6], 4)
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.cls_logits = nn.Conv2d(4, classes, 1)
        self.bbox_pred = nn.Conv2d(4, 4, 1)

    def head(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scores (B, boxes, classes) and boxes (B, boxes, 4), with one tower for all."""
        scores, boxes = [], []
        for features in maps:
            hidden = self.tower(features)
            scores.append(self.cls_logits(hidden).flatten(2).transpose(1, 2))
            boxes.append(self.bbox_pred(hidden).exp().flatten(2).transpose(1, 2))
        return torch.cat(scores, 1), torch.cat(boxes, 1)

    def postprocess(self, scores: Tensor, boxes: Tensor) -> list[dict[str, Tensor]]:
        """Keep what scores above the threshold; each image has its own number of boxes."""
        results = []
        for image_scores, image_boxes in zip(scores.sigmoid(), boxes, strict=True):
            best, labels = image_scores.max(-1)
            keep = torch.where(best > self.score_threshold)[0]
            results.append(
                {"boxes": image_boxes[keep], "scores": best[keep], "labels": labels[keep]}
            )
        return results

    def forward(
        self, images: Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if self.training and targets is None:
            raise ValueError("targets are needed in training")
        c1 = self.backbone["stem"](images)
        maps = self.fpn({"0": c1, "1": self.backbone["body"](c1)})
        scores, boxes = self.head(list(maps.values()))
        if not self.training:
            return self.postprocess(scores, boxes)
        wanted = torch.stack([t["labels"].float() for t in targets])[:, None].expand_as(scores)
        centres = torch.stack([t["boxes"] for t in targets])[:, None].expand_as(boxes)
        return {
            "classification": F.binary_cross_entropy_with_logits(scores, wanted),
            "bbox_regression": F.smooth_l1_loss(boxes, centres),
        }


class Siamese(nn.Module):
    """One embedding network for two inputs, and a distance."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.PReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)
        )
        self.scale = nn.Parameter(torch.tensor(1.5))

    def get_embedding(self, x: Tensor) -> Tensor:
        """Return one unit vector per image."""
        return F.normalize(self.embedding_net(x), dim=-1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.scale * F.pairwise_distance(
            self.get_embedding(first), self.get_embedding(second)
        )


def _pair(generator: torch.Generator) -> Arguments:
    return tuple(torch.randn(2, 3, 1, 8, 8, generator=generator)), {}


def _labelled(generator: torch.Generator) -> Arguments:
    pictures = torch.randn(2, 3, 8, 8, generator=generator)
    targets = [
        {
            "labels": torch.randint(0, 2, (3,), generator=generator),
            "boxes": torch.rand(4, generator=generator),
        }
        for _ in pictures
    ]
    return (pictures,), {"targets": targets}


MEMBERS = [
    Member("unet", UNet, images(2, 1, 9, 11), 13),
    Member("tcn", TCN, images(3, 3, 7), 6),
    Member("pointnet", PointNet, images(3, 3, 9), 11),
    Member(
        "detector",
        Detector,
        _labelled,
        9,
        rungs="submodule op",
        eval_inputs=images(2, 3, 8, 8),
        methods={"head": lambda m: m.head([torch.linspace(-1, 1, 36).view(1, 4, 3, 3)])},
    ),
    Member(
        "siamese",
        Siamese,
        _pair,
        2,
        rungs="submodule",
        methods={
            "get_embedding": lambda m: m.get_embedding(torch.linspace(-1, 1, 64).view(1, 1, 8, 8))
        },
    ),
]
