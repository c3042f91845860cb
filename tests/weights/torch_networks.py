# SPDX-License-Identifier: Apache-2.0
"""Networks of PyTorch, with the usual names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Basic(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, features: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample: Any = None
        if stride > 1 or inputs != features:
            conv = nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(features))

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, features in enumerate((64, 128, 256, 512)):
            blocks = [Basic(inputs, features, 1 if stage == 0 else 2), Basic(features, features)]
            setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))
            inputs = features
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Any) -> Any:
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(4):
            x = getattr(self, f'layer{stage + 1}')(x)
        return self.fc(x.mean((2, 3)))


class Flat(nn.Module):
    """A dense layer after a convolution, flattened in the order of PyTorch."""

    def __init__(self, height: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.fc = nn.Linear(5 * height * 4, 2)

    def forward(self, x: Any) -> Any:
        return self.fc(self.conv(x).flatten(1))


def encoder_layer(norm_first: bool) -> nn.Module:
    """A layer of a transformer."""
    return nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, activation='gelu', batch_first=True, norm_first=norm_first
    )
