"""Weight files: where they are looked for, that nothing but tensors is read, and that all of it is used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from alignkit.errors import ConfigError, DataError, MissingFileError
from rewards.models.weights import find_file, load_strictly, read_state, torch_dtype


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "origin"
    folder.mkdir()
    for name, key in (("one.bin", "weight"), ("two.bin", "bias")):
        torch.save({key: torch.full((2, 2) if key == "weight" else (2,), 3.0)}, folder / name)
    weight_map = {"weight": "one.bin", "bias": "two.bin"}
    (folder / "model.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_on_the_hub_brings_its_parts(shards, tmp_path, monkeypatch):
    """The hub's client is replaced by one that copies single files into a cache, as it does."""
    cache = tmp_path / "cache"
    cache.mkdir()

    def cached_file(model, name):
        assert model == "someone/model"
        if not (shards / name).is_file():
            raise OSError(name)
        return shutil.copy(shards / name, cache / name)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    path = find_file("someone/model", ["model.safetensors", "model.index.json"], "get it")
    layer = torch.nn.Linear(2, 2)
    load_strictly(layer, read_state(path, owner="here"), "here")
    assert layer.weight.eq(3).all()
    assert layer.bias.eq(3).all()


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(DataError, match=r"here: .*holds pickled code, which is not run"):
        read_state(tmp_path / "whole.pt", owner="here")


def test_all_faults_are_named_at_once():
    with pytest.raises(
        DataError, match=r"here: .*1 missing \(bias\); 4 unexpected \(a, b, c, \.\.\.\); 1 of another shape"
    ):
        load_strictly(torch.nn.Linear(2, 2), {"weight": torch.ones(3), **dict.fromkeys("abcd", torch.ones(1))}, "here")


def test_what_is_not_there_comes_with_advice(shards):
    with pytest.raises(MissingFileError, match=r"model\.pt or other\.pt; download it"):
        find_file(str(shards), ["model.pt", "other.pt"], "download it")
    (shards / "two.bin").unlink()
    with pytest.raises(MissingFileError, match=r"two\.bin' is named by its index"):
        read_state(find_file(str(shards), ["model.index.json"], "get it"), owner="here")


def test_dtypes_are_words():
    assert torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype 'nn' is unknown"):
        torch_dtype("nn")
