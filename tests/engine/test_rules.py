"""Operators between the unit and the logits, one at a time: each must carry a change exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import networks
from support.oracle import check
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate.engine import rule_context, rules

EXPORTS_COMPLEX = torch.__version__ >= "2.7"


def keep_the_largest(y: Tensor) -> Tensor:
    means = y.mean(dim=(2, 3))
    chosen = means.topk(3, dim=1).indices
    return y * torch.zeros_like(means).scatter(1, chosen, 1.0)[:, :, None, None]


def add_what_the_argmax_finds(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    return y + flat.gather(2, flat.argmax(dim=2, keepdim=True)).unsqueeze(-1)


def attend_among_channels(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    weights = torch.einsum("ncl,nkl->nck", flat, flat).softmax(dim=-1)
    return torch.einsum("nck,nkl->ncl", weights, flat).reshape(y.shape)


def zoom_by_content(y: Tensor) -> Tensor:
    matrix = torch.eye(2, 3).to(y).expand(y.shape[0], 2, 3)
    matrix = matrix * (1 + 0.1 * y.mean(dim=(1, 2, 3)))[:, None, None]
    grid = functional.affine_grid(matrix, list(y.shape), align_corners=False)
    return functional.grid_sample(y, grid, align_corners=False)


def write_into_a_slice(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, 0] = z[:, 1] * 2
    z[:, 2:4, 3] += 1
    return z


def pool_and_put_back(y: Tensor) -> Tensor:
    pooled, indices = functional.max_pool2d(y, 2, return_indices=True)
    return functional.max_unpool2d(pooled, indices, 2)


def unfold_and_fold(y: Tensor) -> Tensor:
    columns = functional.unfold(y, 3, padding=1)
    return functional.fold(columns, (12, 12), 3, padding=1) / 9


OPERATORS: dict[str, networks.Operator] = {
    # decisions that depend on the values
    "mask": lambda y: y * (y > 0.3),
    "where": lambda y: torch.where(y > 0.5, y * 2, y - 1),
    "masked_fill": lambda y: y.masked_fill(y < 0.2, -1.0),
    "topk": keep_the_largest,
    "argmax": add_what_the_argmax_finds,
    "sort": lambda y: y.flatten(2).sort(dim=2).values.reshape(y.shape),
    "median": lambda y: y - y.flatten(2).median(dim=2).values[:, :, None, None],
    "count": lambda y: y + (y > 0.5).float().sum(dim=(2, 3), keepdim=True) * 0.01,
    "integers": lambda y: y + (y * 10).long().to(y) * 0.05,
    "sign and round": lambda y: y.sign() + y.round(),
    "maximum": lambda y: torch.maximum(y, y.flip(1)),
    "max along channels": lambda y: y - y.max(dim=1, keepdim=True).values,
    "max unpooling": pool_and_put_back,
    "clamp by a tensor": lambda y: torch.clamp(y, max=y.mean(dim=(1, 2, 3), keepdim=True) + 1),
    # products and quotients of what changes
    "swish": lambda y: y * torch.sigmoid(y),
    "powers": lambda y: y.pow(2) + torch.sqrt(y + 1) + torch.exp(-y),
    "quotient": lambda y: y / (1 + y.mean(dim=1, keepdim=True)),
    "reciprocal": lambda y: 1 / (1 + y),
    "product along channels": lambda y: y * (y + 0.5).prod(dim=1, keepdim=True).clamp(max=1),
    "outer product": lambda y: torch.einsum("nchw,nc->nchw", y, y.amax(dim=(2, 3))),
    "attention among channels": attend_among_channels,
    "distances": lambda y: (
        y + torch.cdist(y.flatten(2), y.flatten(2)).mean(dim=2)[:, :, None, None]
    ),
    "addcmul": lambda y: torch.addcmul(y, y, y, value=0.1),
    "lerp": lambda y: torch.lerp(y, y.flip(2), 0.3),
    "glu": lambda y: functional.glu(torch.cat([y, y.flip(1)], dim=1), dim=1),
    # norms
    "l2": lambda y: functional.normalize(y, dim=1),
    "group norm": lambda y: functional.group_norm(y, 4),
    "instance norm": functional.instance_norm,
    "rms norm": lambda y: functional.rms_norm(y, y.shape[1:]),
    "local response": lambda y: functional.local_response_norm(y, 3),
    "deviation": lambda y: y / (y.std(dim=(2, 3), keepdim=True) + 0.1),
    "logsumexp": lambda y: y - torch.logsumexp(y, dim=1, keepdim=True),
    # linear, but not channel by channel, or elsewhere
    "cumulative sum": lambda y: y.cumsum(2) * 0.1,
    "roll": lambda y: torch.roll(y, (2, 1), (2, 3)),
    "reversed channels": lambda y: y[:, [7, 6, 5, 4, 3, 2, 1, 0]],
    "split": lambda y: torch.cat(y.split([3, 5], dim=1)[::-1], dim=1),
    "unbind": lambda y: torch.stack(y.unbind(1)[::-1], dim=1),
    "the same twice": lambda y: torch.cat([y, y, 2 * y], dim=1)[:, 4:12],
    "pixel shuffle": lambda y: functional.pixel_shuffle(torch.cat([y] * 4, dim=1), 2),
    "interleave": lambda y: torch.stack([y, y * 2], dim=2).flatten(1, 2)[:, ::2],
    "reflect": lambda y: functional.pad(y, (1, 1, 1, 1), mode="reflect"),
    "pad with a constant": lambda y: functional.pad(y, (1, 0, 2, 1), value=0.7),
    "bilinear": lambda y: functional.interpolate(y, scale_factor=1.5, mode="bilinear"),
    "nearest": lambda y: functional.interpolate(y, scale_factor=2),
    "fold": unfold_and_fold,
    "transposed convolution": lambda y: functional.conv_transpose2d(
        y, torch.ones(8, 8, 2, 2).to(y) * 0.05, stride=2
    ),
    "lp pool": lambda y: functional.lp_pool2d(y + 0.01, 2, 2),
    "fourier": lambda y: torch.fft.rfft2(y).abs().mean(dim=(2, 3), keepdim=True) + y,
    "sampling": zoom_by_content,
    "writing into a slice": write_into_a_slice,
    "from a constant": lambda y: 3 - y,
    "constants of its own": lambda y: y + torch.arange(8).to(y)[None, :, None, None] * 0.1,
    "sizes": lambda y: y * (y.shape[2] / 10) + y.shape[0] * 0,
}


def activate_a_chunk(y: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=1)
    return torch.cat([first.relu(), second], dim=1) - 0.5 * y


# Right before the head: tensors that share memory, or that are read several times.
BEHIND: dict[str, networks.Operator] = {
    "hard swish by hand": lambda y: 8 * y * functional.relu6(8 * y + 3) / 6,
    "activation of a copy": lambda y: functional.relu_(y.clone()) - 0.5 * y,
    "activation of a view": lambda y: y.flatten(1).relu().view(y.shape) - 0.5 * y,
    "activation of a chunk": activate_a_chunk,
    "activation of a sum": lambda y: (y + 1).relu() * (y + 1),
    "square": lambda y: y * y,
    "quotient of itself": lambda y: (y / y) + y,
    "matrix product with itself": lambda y: torch.matmul(y, y),
    "a mask alone": lambda y: torch.ones_like(y) * (y > 0.1),
    "complex": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 2.0, s=y.shape[2:]).relu(),
    "minus infinity": lambda y: (
        y.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(3) * y
    ),
    "logarithm of nothing": lambda y: y.relu().log().clamp(min=-3.0),
    "squeeze": lambda y: y.unsqueeze(2).squeeze(),
    "rounding": lambda y: (y.relu() + 3e4) - 3e4,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name):
    images, labels = networks.network("residual", 12)[1:]
    model = networks.made(networks.Between(OPERATORS[name], nn.GELU()), images)
    result = check(model, (images, labels), ["relu", "behind"], ties=0.02)
    assert len(result.flips.image) > 0
    assert (name == "fourier" and not EXPORTS_COMPLEX) or "replay" not in result.strategy.values()


@pytest.mark.usefixtures("exports_kept")
@pytest.mark.parametrize("memory", [None, 16])  # 16 bytes: one pair at a time
@pytest.mark.parametrize("name", BEHIND)
def test_tensors_that_share_memory_or_repeat(name, memory):
    images, labels = networks.network("residual", 7)[1:]
    model = networks.made(networks.Between(behind=BEHIND[name]), images)
    model.known_as = name
    result = pa.ablate(model, (images, labels), "relu", memory=memory, audit=20)
    agreement = pa.reference.compare(result, model, (images, labels), "relu")
    assert agreement.mismatches == 0, agreement
    assert len(result.flips.image) > 0
    replayed = name == "complex" and not EXPORTS_COMPLEX
    jumps = name == "a mask alone"
    expected = "replay" if replayed else "delta (float64)" if jumps else "delta"
    assert result.strategy == {"relu": expected}


class PoolsOverUnits(nn.Module):
    def __init__(self, pool: networks.Operator, flat: bool) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(2, 8, 3, padding=1), nn.ReLU()
        self.pool, self.flat = pool, flat
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y = self.pool(y.mean(dim=(2, 3)) if self.flat else y.flatten(2))
        return self.head(y if self.flat else y.mean(dim=2))


@pytest.mark.parametrize(
    ("pool", "flat"),
    [
        (lambda y: functional.max_pool2d(y, 3, 1, 1), False),
        (lambda y: functional.avg_pool2d(y, 3, 1, 1), False),
        (lambda y: functional.avg_pool1d(y, 3, 1, 1), True),
    ],
)
def test_pools_over_units(pool, flat):
    images, labels = networks.network("residual", 17)[1:]
    check(networks.made(PoolsOverUnits(pool, flat), images), (images, labels))


class OneMapForAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(2, 1, 3, padding=1), nn.ReLU()
        self.conv2 = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv1(x))
        return self.head((self.conv2(y) + y).relu().mean(dim=(2, 3)))


def test_one_map_added_to_all_channels():
    images, labels = networks.network("residual", 17)[1:]
    check(networks.made(OneMapForAll(), images), (images, labels), "relu")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 8)
        self.relu = nn.ReLU()
        self.recurrent = kind(8, 8, batch_first=True)
        self.mid = nn.Linear(8, 8)
        self.tanh = nn.Tanh()
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.relu(self.embed(x.permute(0, 2, 1, 3).flatten(2)))
        return self.head(self.tanh(self.mid(self.recurrent(rows)[0][:, -1])))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(kind):
    images, labels = networks.network("residual", 12)[1:]
    check(networks.made(Recurrent(kind), images), (images, labels))


@torch.library.custom_op("pyablate_tests::turned", mutates_args=())
def turned(y: Tensor) -> Tensor:
    return y.transpose(0, 1).clone()


@turned.register_fake
def _(y: Tensor) -> Tensor:
    return torch.empty_like(y)


def test_an_operator_that_gives_another_shape_than_it_promises_runs_by_replay():
    images, labels = networks.network("residual", 12)[1:]
    model = networks.made(networks.Between(lambda y: turned(turned(y)), nn.GELU()), images)
    result = check(model, (images, labels), ["relu"], ties=0.02)
    assert set(result.strategy.values()) == {"replay"}


OUTPUTS: dict[str, networks.Operator] = {
    "softmax": lambda z: z.softmax(dim=1),
    "log softmax": lambda z: z.log_softmax(dim=1),
    "huge": lambda z: z * 1e6,
    "tiny": lambda z: z * 1e-6,
    "all negative": lambda z: -z.abs() - 1,
    "cosine": lambda z: functional.normalize(z, dim=1),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_the_network_puts_out(name):
    inner, images, labels = networks.network("residual", 12)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return OUTPUTS[name](self.inner(x))

    check(Outer().eval(), (images, labels), ["inner.body.2", "inner.body.4"], ties=0.02)


def one_pass_and_several(monkeypatch, run):
    """Return results with intact rows read where they lie, and with rows gathered beforehand."""
    one = run()
    calls = []
    monkeypatch.setattr(rule_context, "in_one_pass", lambda *_: calls.append(1))
    several = run()
    assert calls
    return one, several


@pytest.mark.parametrize("name", ["group norm", "logsumexp", "median"])
def test_the_general_rule_in_one_pass(monkeypatch, name):
    """Maps keep their layout, so that sums are taken in another order."""
    images, labels = networks.network("residual", 12)[1:]
    model = networks.made(networks.Between(OPERATORS[name], nn.GELU()), images)

    def run():
        options = {"measures": ["loss"], "precision": "fp32", "audit": 0, "progress": False}
        return pa.ablate(model, (images, labels), ["relu"], **options)

    one, several = one_pass_and_several(monkeypatch, run)
    assert (one.predictions() == several.predictions()).all()
    np.testing.assert_allclose(one.loss_change, several.loss_change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_transformer_in_one_pass_changes_no_bit(monkeypatch, precision):
    model, images, labels = pa.demo.load("vit", limit=8)

    def run():
        options = {"precision": precision, "audit": 0, "progress": False}
        return pa.ablate(model, (images, labels), ["blocks.1.mlp.1"], **options)

    one, several = one_pass_and_several(monkeypatch, run)
    assert (one.predictions() == several.predictions()).all()
    assert one.effort.error_bounds == several.effort.error_bounds
    assert one.effort.pairs_by_precision == several.effort.pairs_by_precision


def test_a_product_of_changes_is_no_difference(monkeypatch):
    """Gates of squeeze and excite, and x * sigmoid(x)."""
    images, labels = networks.network("residual", 12)[1:]
    monkeypatch.setattr(rules, "difference", lambda *_: pytest.fail("a difference"))

    def gated(y: Tensor) -> Tensor:
        return y * torch.sigmoid(y.mean((2, 3), keepdim=True)) * torch.sigmoid(y)

    model = networks.made(networks.Between(gated), images)
    check(model, (images, labels), ["relu"])
