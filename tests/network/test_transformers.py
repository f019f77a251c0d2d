"""Attention heads, queries, keys and values as units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import networks
from support.idioms import IDIOMS, Last, ThreeMaps, Tokens, TorchBlock, Tuples, Windows, made
from support.oracle import check
from torch import Tensor, nn

import pyablate as pa
from pyablate import reference
from pyablate.network.sites import select, surveyed

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "softmax": IDIOMS["vit"].build,
    "channels": IDIOMS["xcit"].build,
    "maps": made(lambda: Tokens(ThreeMaps(16, 2, fused=True), ThreeMaps(16, 4, fused=False))),
    "weights": made(lambda: Tokens(TorchBlock(16, 4, need_weights=True))),
    "encoder": made(
        lambda: Tokens(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True))
    ),
    "sequence_first": made(
        lambda: Tokens(nn.TransformerEncoderLayer(16, 2, 24), sequence_first=True)
    ),
    "windows": made(lambda: Tokens(Windows(16, 2, 2))),
    "tuples": made(lambda: Tokens(Tuples(16, 2, windows=True), Last())),
}

HEADS = {
    "softmax": "blocks.0.heads:2x8",
    "channels": "blocks.0.heads:2x8",
    "maps": "blocks.0.heads:2x8 blocks.1.heads:4x4",
    "weights": "blocks.0.attention.heads:4x4",
    "encoder": "blocks.0.self_attn.heads:2x8",
    "sequence_first": "blocks.0.self_attn.heads:2x8",
    "windows": "blocks.0.heads:2x8",
    "tuples": "blocks.0.attention.heads:2x8",
}
"""Layers of heads, with their number and the features of each."""

PARTS = {
    "softmax": "blocks.0.q:16 blocks.0.k:16 blocks.0.v:16",
    "channels": "blocks.0.q:16 blocks.0.k:16 blocks.0.v:16",
    "maps": "",  # which are modules by themselves
    "weights": "blocks.0.attention.q:16 blocks.0.attention.k:16 blocks.0.attention.v:16",
    "encoder": "blocks.0.self_attn.q:16 blocks.0.self_attn.k:16 blocks.0.self_attn.v:16",
    "sequence_first": "blocks.0.self_attn.q:16 blocks.0.self_attn.k:16 blocks.0.self_attn.v:16",
    "windows": "blocks.0.q:16 blocks.0.k:16 blocks.0.v:16",
    "tuples": "blocks.0.attention.q:16 blocks.0.attention.k:16 blocks.0.attention.v:16",
}


def data(count: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(count) % 4


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_queries_keys_and_values_are_found(name: str) -> None:
    seen = surveyed(NETWORKS[name](), data(1)[0])
    heads = [site for site in seen.sites if site.kind == "heads"]
    parts = [one for one in seen.sites if one.kind == "part" and one.name[-2:-1] == "."]
    assert [f"{one.name}:{one.channels}x{one.width}" for one in heads] == HEADS[name].split()
    assert [f"{one.name}:{one.channels}" for one in parts] == PARTS[name].split()
    assert not {"heads", "part"} & {site.kind for site in select(seen.sites)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("intervention", ["zero", "mean"])
def test_predictions_are_the_oracles(name: str, intervention: str) -> None:
    model = NETWORKS[name]()
    parts = [part.partition(":")[0] + ":3" for part in PARTS[name].split()]
    result = check(model, data(), ["*.heads", *parts], intervention=intervention)
    assert "replay" not in result.strategy.values()
    layer, heads = HEADS[name].split()[0].rsplit(":", 1)
    rows = result.units[result.units["layer"] == layer]
    assert rows["label"].tolist() == [f"{layer}:{unit}" for unit in range(int(heads[0]))]
    assert rows["unit"].tolist() == list(range(int(heads[0])))


@pytest.mark.parametrize(
    "intervention", ["class_mean", "constant:0.5", "resample", "noise", "direction"]
)
def test_other_interventions(intervention: str) -> None:
    result = check(NETWORKS["softmax"](), data(), ["blocks.0.heads"], intervention=intervention)
    assert len(result.units) == (16 if intervention == "direction" else 2)


@pytest.mark.parametrize("name", ["softmax", "weights"])
@pytest.mark.parametrize("intervention", ["zero", "mean"])
def test_a_head_is_its_slice_in_front_of_the_projection(name: str, intervention: str) -> None:
    """By a hook on the projection, or by its weights: what the oracle takes for the head."""
    model, (x, labels) = NETWORKS[name](), data()
    model = model.double()
    x = x.double()
    layer = HEADS[name].partition(":")[0]
    width = int(HEADS[name].partition("x")[2])
    at = slice(width, 2 * width)
    rows = dict(reference.logits(model, (x, labels), [layer], intervention=intervention))
    if name == "softmax":
        model.blocks[0].proj.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        seen: list[Tensor] = []
        model(x)
        shift = seen[0][:, :, at].mean((0, 1)) if intervention == "mean" else torch.zeros(width)
        projection = model.blocks[0].proj
    else:
        block = model.blocks[0]
        h, attention = block_input(model, x), block.attention
        q, k, v = (h @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
        q, k, v = (one.unflatten(2, (4, 4)).transpose(1, 2) for one in (q, k, v))
        mixed = ((q @ k.transpose(2, 3) / 2).softmax(3) @ v).transpose(1, 2).flatten(2)
        shift = mixed[:, :, at].mean((0, 1)) if intervention == "mean" else torch.zeros(width)
        projection = attention.out_proj
    with torch.no_grad():
        projection.bias += projection.weight[:, at] @ shift.double()
        projection.weight[:, at] = 0
        torch.testing.assert_close(rows[1], model(x))


def block_input(model: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["softmax", "encoder"])
def test_the_parts_of_a_map_are_its_units(name: str) -> None:
    model, some = NETWORKS[name](), data()
    layer = PARTS[name].split()[2].partition(":")[0]
    rows = list(reference.logits(model, some, [f"{layer}:5"]))
    if name == "softmax":
        same = reference.logits(model, some, ["blocks.0.qkv:37"])
        torch.testing.assert_close(rows[1][1], list(same)[1][1])
    with torch.no_grad():
        attention = model.blocks[0] if name == "softmax" else model.blocks[0].self_attn
        weight, bias = (
            (attention.qkv.weight, attention.qkv.bias)
            if name == "softmax"
            else (attention.in_proj_weight, attention.in_proj_bias)
        )
        weight[37], bias[37] = 0, 0
    _, silenced = next(reference.logits(model, some, [f"{layer}:5"]))
    torch.testing.assert_close(rows[1][1], silenced)


def test_the_stream_between_attention_and_mlp() -> None:
    model, images, labels = networks.network("vit", 20)
    found = {site.name: site for site in pa.sites(model, images[:1])}
    assert [name for name in found if "stream" in name] == [
        f"blocks.{at}.stream" for at in range(3)
    ]
    assert (found["blocks.1.stream"].channels, found["blocks.1.stream"].axis) == (8, 2)
    check(model, (images, labels), ["blocks.1.stream"], intervention="mean")


def test_heads_are_ablated_together_in_groups_and_by_replay() -> None:
    options: dict[str, Any] = {"groups": [["blocks.0.heads:0", "blocks.1.heads:3"]]}
    result = check(NETWORKS["maps"](), data(), **options)
    assert result.units["label"].tolist() == ["blocks.0.heads:0+blocks.1.heads:3"]
    model = NETWORKS["windows"]()
    result = pa.ablate(model, data(), ["blocks.0.heads"], strategy="replay", audit=0)
    assert reference.compare(result, model, data(), ["blocks.0.heads"]).mismatches == 0


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_every_precision(precision: str) -> None:
    model, images, labels = networks.network("vit", 40)
    check(model, (images, labels), ["blocks.*.attention.heads"], precision=precision)


def test_a_glob_finds_heads_only_where_nothing_else_fits() -> None:
    model, images, _ = networks.network("vit")
    found = pa.sites(model, images[:1])
    names = [site.name for site in select(found, "blocks.1.attention.*")]
    assert names == ["blocks.1.attention.qkv", "blocks.1.attention.out"]
    assert [site.name for site in select(found, "*.1.*.heads")] == ["blocks.1.attention.heads"]
    assert [site.name[-1] for site in select(found, "*.1.*.[qkv]")] == ["q", "k", "v"]


def test_attributes_are_of_single_features() -> None:
    model = NETWORKS["softmax"]()
    with pytest.raises(ValueError, match=r"layers: 'blocks\.0\.heads' holds attention heads, 8"):
        pa.attributes(model, data(), ["blocks.0.heads"])
    found = pa.attributes(model, data(), ["blocks.0.k"], which=["mean", "taylor"])
    whole = pa.attributes(model, data(), ["blocks.0.qkv"], which=["mean", "taylor"])
    for name in ("mean", "taylor"):
        assert found[name].values == pytest.approx(whole[name].values[16:32])


def test_experiments_take_heads() -> None:
    model = NETWORKS["maps"]()
    curve = pa.cumulative(model, data(), ["*.heads"], steps=[1, 2])
    assert sorted(set(curve.to_dataframe()["removed"])) == [0, 1, 2, 6]


class Cut(nn.Module):
    """Attention whose queries, keys and values are cut out of one map in an unusual way."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], width: int) -> None:
        super().__init__()
        self.cut, self.qkv, self.proj = cut, nn.Linear(16, width), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.cut(self.qkv(x)))
        y = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).flatten(2))


def _strided(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z[..., 0::3], z[..., 1::3], z[..., 2::3]


def _summed(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, w = z.chunk(4, -1)
    return q, k, 0.5 * w + v


@pytest.mark.parametrize(("cut", "width", "found"), [(_strided, 48, ""), (_summed, 64, "q k")])
def test_parts_are_runs_of_what_one_map_returns(cut: Any, width: int, found: str) -> None:
    model = made(lambda: Tokens(Cut(cut, width)))()
    parts = [site.name for site in pa.sites(model, data(2)[0]) if site.kind == "part"]
    named = [name.removeprefix("blocks.0.") for name in parts if "stream" not in name]
    assert named == found.split()


def test_heads_have_the_axis_that_the_network_gives_them() -> None:
    layer = "blocks.0.heads"
    with pytest.raises(ValueError, match=f"axis: '{layer}' holds heads"):
        pa.ablate(NETWORKS["softmax"](), data(), layer, axis={layer: 1})
