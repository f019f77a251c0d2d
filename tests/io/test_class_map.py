"""Lists of classes as people have them, and the folders looked up among them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyablate._validation import check_names
from pyablate.cli.data_specs import load_data
from pyablate.io.class_map import class_map
from pyablate.io.image_folder import ImageFolder

NAMES = ("tench", "goldfish", "great white shark")
IDS = ("n01440764", "n01443537", "n01484850")
KERAS = {str(i): [IDS[i], NAMES[i].replace(" ", "_")] for i in range(3)}
FOLDERS = (["n01484850", "n01440764"], ["Great_white-shark", "tench"], ["2", "0"])


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (KERAS, [0, 1, 2]),
        (list(NAMES), [1, 2]),
        (NAMES, [1, 2]),
        ([list(pair) for pair in zip(IDS, NAMES, strict=True)], [0, 1, 2]),
        ([f"{key} {name}" for key, name in zip(IDS, NAMES, strict=True)], [0, 1, 2]),
        (list(IDS), [0, 2]),
        ({name: i for i, name in enumerate(NAMES)}, [1, 2]),
        ({IDS[2]: 2, IDS[0]: 0, IDS[1]: 1}, [0, 2]),
        ({2: NAMES[2], 0: f"{NAMES[0]}, Tinca tinca", 1: NAMES[1]}, [1, 2]),
        ({"model_type": "vit", "id2label": {str(i): NAMES[i] for i in range(3)}}, [1, 2]),
    ],
)
def test_every_form_of_a_list_of_classes(given: Any, folders: list[int], tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps(given))
    forms = [given, tmp_path / "classes.json"]
    if isinstance(given, list) and isinstance(given[0], str):
        (tmp_path / "classes.txt").write_text("\ufeff" + "\n".join(given) + "\n\n", "utf-8")
        forms.append(str(tmp_path / "classes.txt"))
    for form in forms:
        known = class_map(form)
        assert len(known.names) == 3
        assert [known.match(FOLDERS[number]) for number in folders] == [[2, 0]] * len(folders)


def test_the_name_shown_is_the_class_name() -> None:
    assert class_map(KERAS).names == ("tench", "goldfish", "great_white_shark")
    assert class_map(["n01440764 tench, Tinca tinca"]).names == ("tench, Tinca tinca",)
    assert class_map(list(IDS)).names == IDS


def test_a_shared_name() -> None:
    known = class_map(["crane", "heron, wader", "crane", "wader"])
    assert known.match(["heron", "wader", "0"]) == [1, 3, 0]
    with pytest.raises(ValueError, match="'crane' stands for the outputs 0, 2; use WordNet ids"):
        known.match(["crane"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one class, found none"),
        ({"a": "b"}, "expected numbers from 0 as keys, got 'a'"),
        ({0: "a", 2: "b"}, "expected the numbers 0 to 1, 1 is not among them"),
        ({"a": 0, "b": 2}, "expected the numbers 0 to 1, 1 is not among them"),
        ([1, 2], "expected a name or a list of names for each, got 1"),
        ([[]], r"expected a name or a list of names for each, got \[\]"),
        (7, "expected a file, a list of names or a mapping, got int"),
        ("none.json", "expected 'imagenet' or a file, found none at 'none.json'"),
        ("damaged.json", "cannot read 'damaged.json'"),
        ("bytes.txt", "cannot read 'bytes.txt'"),
    ],
)
def test_what_is_no_list_of_classes(
    given: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.json").write_text('{"0": ')
    Path("bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises((ValueError, TypeError, OSError), match=f"classes: .*{message}"):
        class_map(given)


def _without(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: found)


def test_imagenet_from_timm_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "_info"
    folder.mkdir(parents=True)
    (folder / "imagenet_synsets.txt").write_text("\n".join(IDS))
    lines = [f"{key}\t{name}, fish" for key, name in zip(IDS, NAMES, strict=True)]
    (folder / "imagenet_synset_to_lemma.txt").write_text("\n".join(["n00000001\tx", *lines]))
    _without(monkeypatch, SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    known = class_map("imagenet")
    assert known.names[0] == "tench, fish"
    assert [known.match(names) for names in FOLDERS] == [[2, 0]] * 3


def test_imagenet_from_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="from timm or torchvision, neither can be imported"):
        class_map("imagenet")
    models = ModuleType("torchvision.models")
    weights = SimpleNamespace(meta={"categories": NAMES})
    models.ResNet18_Weights = SimpleNamespace(DEFAULT=weights)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    assert class_map("imagenet").names == NAMES


# --- folders --------------------------------------------------------------------------------------


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("names", FOLDERS)
def test_folders_get_the_number_of_their_output(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_data(_folder(tmp_path, *names), classes=KERAS)
    labels = [int(label) for _, batch in data.batches for label in batch]  # type: ignore[misc]
    assert labels == [0, 0, 2, 2]
    assert data.class_names == ("tench", "goldfish", "great_white_shark")
    assert not caplog.messages  # classes without a folder are nothing to be said


def test_limit_takes_the_folders_in_turn(tmp_path: Path) -> None:
    images = ImageFolder(_folder(tmp_path, *FOLDERS[0]), class_index=KERAS, limit=3)
    assert [(path.parent.name, label) for path, label in images.files] == [
        ("n01440764", 0),
        ("n01440764", 0),
        ("n01484850", 2),
    ]


def test_unknown_folders_are_named_with_what_is_near(tmp_path: Path) -> None:
    _folder(tmp_path, "tench", "gold_fisch")
    with pytest.raises(
        ValueError, match="1 of 2 folders are none of the 3 classes: 'gold_fisch'; nearest: goldf"
    ):
        ImageFolder(tmp_path, class_index=KERAS)


def test_classes_of_other_data_name_the_outputs() -> None:
    assert load_data("demo", limit=2, classes=list("abcdefghij")).class_names == tuple("abcdefghij")


@pytest.mark.parametrize("given", [{0: "a", 1: "b", 2: "c"}, {"2": "c", "0": "a", "1": "b"}])
def test_id2label_as_class_names(given: dict[Any, str]) -> None:
    assert check_names("class_names", given, 3) == ("a", "b", "c")
    with pytest.raises(ValueError, match="class_names: expected 4 names, got 3"):
        check_names("class_names", given, 4)
    with pytest.raises(ValueError, match="class_names: expected numbers from 0 as keys, got 'x'"):
        check_names("class_names", {"x": "a"}, 1)
