"""Networks, weights and images that ship with the package.

The images are the 10,000 Fashion-MNIST test images; the networks were trained on its 60,000
training images by ``examples/train.py``. Each network takes raw images, float32 ``[N, 1, 28, 28]``
in ``[0, 1]``: its first module, `Normalize`, does the scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_count, nearest
from pyablate.io.idx import read_idx

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.11

CLASSES: tuple[str, ...] = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Mean and deviation of the 60,000 training images, scaled to [0, 1].
_MEAN, _DEVIATION = 0.2860, 0.3530


class Normalize(nn.Module):
    """Subtract a mean and divide by a deviation, both held as buffers of shape ``[1, C, 1, 1]``.

    Parameters
    ----------
    mean, deviation : sequence of float
        One figure per channel.

    Examples
    --------
    >>> float(pa.demo.Normalize()(torch.tensor(0.2860)).abs().max()) < 1e-6
    True
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        mean: tuple[float, ...] = (_MEAN,),
        deviation: tuple[float, ...] = (_DEVIATION,),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).reshape(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images, same shape."""
        return (images - self.mean) / self.deviation


class AlexNet(nn.Module):
    """Plain ReLU network: five convolutions, three fully connected layers.

    Parameters
    ----------
    dropout : float
        Rate of the dropout before each of the first two fully connected layers; with 0 the
        network has no dropout modules.
    batch_norm : bool
        Batch norm between every convolution or fully connected layer and its ReLU.

    Examples
    --------
    >>> pa.demo.AlexNet(dropout=0.5)(images[:2]).shape
    torch.Size([2, 10])
    """

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.normalize = Normalize()
        features: list[nn.Module] = []
        sizes = ((1, 24, 5), (24, 48, 3), (48, 64, 3), (64, 64, 3), (64, 48, 3))
        for number, (inputs, outputs, kernel) in enumerate(sizes):
            features.append(
                nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not batch_norm)
            )
            features += [nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()]
            if number in (0, 1, 4):
                features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.flatten = nn.Flatten()
        layers: list[nn.Module] = []
        for inputs in (48 * 3 * 3, 256):
            if dropout:
                layers.append(nn.Dropout(dropout))
            layers.append(nn.Linear(inputs, 256, bias=not batch_norm))
            layers += [nn.BatchNorm1d(256), nn.ReLU()] if batch_norm else [nn.ReLU()]
        self.classifier = nn.Sequential(*layers, nn.Linear(256, len(CLASSES)))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[N, 10]``."""
        features = self.features(self.normalize(images))
        return self.classifier(self.flatten(features))  # type: ignore[no-any-return]


class VGG(nn.Module):
    """Five conv3x3 - batch norm - ReLU steps on 28, 14 and 7 pixels, global pooling, one linear.

    Examples
    --------
    >>> pa.demo.VGG().eval()(images[:2]).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.features = nn.Sequential(
            *_conv_bn_relu(1, 32),
            nn.MaxPool2d(2),
            *_conv_bn_relu(32, 64),
            *_conv_bn_relu(64, 64),
            nn.MaxPool2d(2),
            *_conv_bn_relu(64, 128),
            *_conv_bn_relu(128, 128),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(128, len(CLASSES))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[N, 10]``."""
        features = self.features(self.normalize(images))
        return self.classifier(self.flatten(self.pool(features)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two conv3x3 with batch norm and a shortcut, projected where the shape changes.

    Parameters
    ----------
    inputs, outputs : int
        Number of channels.
    stride : int
        Stride of the first convolution and of the projection.

    Examples
    --------
    >>> pa.demo.BasicBlock(16, 32, stride=2)(torch.zeros(2, 16, 28, 28)).shape
    torch.Size([2, 32, 14, 14])
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``[N, outputs, H / stride, W / stride]``."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stem of 16 channels, then three stages of two basic blocks with 16, 32 and 64 channels.

    Examples
    --------
    >>> pa.demo.ResNet().eval()(images[:2]).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.stem = nn.Sequential(*_conv_bn_relu(1, 16))
        self.stage1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))
        self.stage2 = nn.Sequential(BasicBlock(16, 32, stride=2), BasicBlock(32, 32))
        self.stage3 = nn.Sequential(BasicBlock(32, 64, stride=2), BasicBlock(64, 64))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, len(CLASSES))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[N, 10]``."""
        x = self.stem(self.normalize(images))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention: every token reads from all tokens.

    Parameters
    ----------
    width : int
        Number of features of a token, a multiple of `heads`.
    heads : int
        Number of heads.

    Examples
    --------
    >>> pa.demo.Attention(64, heads=4)(torch.zeros(2, 49, 64)).shape
    torch.Size([2, 49, 64])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the heads read, projected, same shape."""
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # [N, T, 3, heads, features]
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind()
        read = functional.scaled_dot_product_attention(queries, keys, values)
        return self.proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and a GELU network of one hidden layer, each behind a layer norm and added.

    Parameters
    ----------
    width, heads : int
        As of `Attention`; the hidden layer is twice as wide.

    Examples
    --------
    >>> pa.demo.TransformerBlock(64, heads=4)(torch.zeros(2, 49, 64)).shape
    torch.Size([2, 49, 64])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the block's output, same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Vision transformer: 49 overlapping patches of 7 x 7 pixels, three blocks, mean over patches.

    After Dosovitskiy et al., *An Image is Worth 16x16 Words*, 2021,
    `arXiv:2010.11929 <https://arxiv.org/abs/2010.11929>`_.

    Examples
    --------
    >>> pa.demo.ViT()(images[:2]).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.normalize = Normalize()
        self.patches = nn.Conv2d(1, width, 7, stride=4, padding=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads=4) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[N, 10]``."""
        tokens = self.patches(self.normalize(images)).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))  # type: ignore[no-any-return]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a feature map.

    Examples
    --------
    >>> pa.demo.ChannelNorm(32)(torch.zeros(2, 32, 14, 14)).shape
    torch.Size([2, 32, 14, 14])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised map ``[N, C, H, W]``, same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise conv5x5, layer norm, a GELU network at each position, scaled and added.

    Parameters
    ----------
    channels : int
        Number of channels; the hidden layer has four times as many.

    Examples
    --------
    >>> pa.demo.ConvNeXtBlock(32)(torch.zeros(2, 32, 14, 14)).shape
    torch.Size([2, 32, 14, 14])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.scale = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, same shape."""
        inner = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * inner).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ConvNeXt(nn.Module):
    """One block of 32 channels on 14 pixels, three of 64 on 7; layer norm and no batch norm.

    After Liu et al., *A ConvNet for the 2020s*, 2022,
    `arXiv:2201.03545 <https://arxiv.org/abs/2201.03545>`_.

    Examples
    --------
    >>> pa.demo.ConvNeXt()(images[:2]).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), ChannelNorm(32))
        self.stage1 = nn.Sequential(ConvNeXtBlock(32))
        self.downsample = nn.Sequential(ChannelNorm(32), nn.Conv2d(32, 64, 3, stride=2, padding=1))
        self.stage2 = nn.Sequential(*(ConvNeXtBlock(64) for _ in range(3)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[N, 10]``."""
        x = self.stage1(self.stem(self.normalize(images)))
        x = self.stage2(self.downsample(x))
        return self.head(self.norm(self.flatten(self.pool(x))))  # type: ignore[no-any-return]


_FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "alexnet": AlexNet,
    "alexnet_dropout": lambda: AlexNet(dropout=0.5),
    "alexnet_bn": lambda: AlexNet(batch_norm=True),
    "vgg_bn": VGG,
    "resnet": ResNet,
    "vit": ViT,
    "convnext": ConvNeXt,
}
NETWORKS: tuple[str, ...] = tuple(_FACTORIES)


def build(name: str) -> nn.Module:
    """Return the network `name` with fresh random weights, in training mode.

    Raises
    ------
    ValueError
        `name` is not one of `NETWORKS`.

    Examples
    --------
    >>> pa.demo.build("resnet").training
    True
    """
    if name not in _FACTORIES:
        raise ValueError(
            f"name: expected one of the shipped networks, got {name!r}{nearest(name, NETWORKS)}"
        )
    return _FACTORIES[name]()


def network(name: str) -> nn.Module:
    """Return the network `name` with its shipped weights, in evaluation mode.

    Raises
    ------
    ValueError
        `name` is not one of `NETWORKS`.

    Examples
    --------
    >>> pa.demo.network("resnet")(images[:2]).argmax(dim=1).tolist() == labels[:2].tolist()
    True
    """
    model = build(name)
    weights = _data("networks", f"{name}.safetensors").read_bytes()
    model.load_state_dict(load_safetensors(weights))
    return model.eval()


def images(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first `limit` shipped test images and their labels, all 10,000 by default.

    Returns
    -------
    images : Tensor
        float32 ``[N, 1, 28, 28]`` in ``[0, 1]``.
    labels : Tensor
        int64 ``[N]``, indices into `CLASSES`.

    Raises
    ------
    ValueError
        `limit` is not a positive integer.

    Examples
    --------
    >>> pixels, classes = pa.demo.images(limit=3)
    >>> pixels.shape, [pa.demo.CLASSES[k] for k in classes]
    (torch.Size([3, 1, 28, 28]), ['Ankle boot', 'Pullover', 'Trouser'])
    """
    if limit is not None:
        check_count("limit", limit)
    pixels = read_idx(_data("fashion_mnist", "t10k-images-idx3-ubyte.gz"))[:limit]
    labels = read_idx(_data("fashion_mnist", "t10k-labels-idx1-ubyte.gz"))[:limit]
    return torch.from_numpy(pixels).unsqueeze(1) / 255, torch.from_numpy(labels).long()


def load(name: str, *, limit: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a shipped network in evaluation mode, test images and labels.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.
    limit : int, optional
        Number of images, from the first; all 10,000 by default.

    Returns
    -------
    model : torch.nn.Module
        Takes the images as they are, returns logits ``[N, 10]``.
    images : Tensor
        float32 ``[N, 1, 28, 28]`` in ``[0, 1]``.
    labels : Tensor
        int64 ``[N]``, indices into `CLASSES`.

    Raises
    ------
    ValueError
        `name` is not one of `NETWORKS`, or `limit` is not a positive integer.

    Examples
    --------
    >>> network, pixels, classes = pa.demo.load("alexnet", limit=3)
    >>> network(pixels).shape
    torch.Size([3, 10])
    """
    return network(name), *images(limit)


def _data(folder: str, name: str) -> Traversable:
    return resources.files("pyablate") / "demo" / folder / name


def _conv_bn_relu(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def _initialise(model: nn.Module) -> None:
    # He initialisation: PyTorch's default shrinks the signal of a ReLU network layer by layer.
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
