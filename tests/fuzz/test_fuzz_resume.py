"""An unfinished run whose files were damaged: finished with the same result, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import networks
from support.fuzzing.budget import settings_for
from support.fuzzing.damage import damage
from support.runs import same

import pyablate as pa

pytestmark = pytest.mark.usefixtures("exports_kept")

MODEL, IMAGES, LABELS = networks.network("mlp")
OPTIONS = {"intervention": "mean", "batch_size": 6, "audit": 20, "progress": False}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def expected() -> pa.AblationResult:
    return pa.ablate(MODEL, (IMAGES, LABELS), **OPTIONS)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after two of its four blocks, and somewhere in the third."""
    store = tmp_path_factory.mktemp("unfinished") / "run.zarr"

    def report(done: int, total: int, layer: str) -> None:
        if done > 0.55 * total:
            raise Stop

    with pytest.raises(Stop):
        pa.ablate(MODEL, (IMAGES, LABELS), **{**OPTIONS, "progress": report}, output=store)
    return store


def test_damaged_unfinished_runs(unfinished, expected, tmp_path_factory):
    store = tmp_path_factory.mktemp("resumed") / "run.zarr"
    files = sorted(str(p.relative_to(unfinished)) for p in unfinished.rglob("*") if p.is_file())
    assert len(files) > 3

    @settings_for(12)
    @given(st.sampled_from(files), st.none() | damage())
    def check(name: str, change: Callable[[bytes], bytes] | None) -> None:
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(unfinished, store)
        path = store / name
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        try:
            result = pa.ablate(MODEL, (IMAGES, LABELS), **OPTIONS, output=store)
        except (ValueError, OSError) as error:
            said = str(error)
        else:
            said = ""
            assert same(result, expected)
        assert "run.zarr" in said or not said

    check()
