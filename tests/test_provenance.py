"""What a result was made with: claimed once, compared ever after."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from alignkit.errors import ResumeError
from alignkit.provenance import dump, fingerprint, without_defaults, write_resolved


@dataclass
class Section:
    rate: float = 0.1
    hub_token: str | None = None


@dataclass
class Job:
    out: Path = Path("runs")
    train: Section = field(default_factory=Section)
    names: tuple[str, ...] = ("a", "b")


def test_a_folder_keeps_the_config_it_was_made_with(tmp_path):
    write_resolved(tmp_path / "run", Job())
    (tmp_path / "run" / "result").write_bytes(b"x")
    write_resolved(tmp_path / "run", Job())
    with pytest.raises(ResumeError, match=r"train\.rate: 0\.1 -> 0\.2"):
        write_resolved(tmp_path / "run", Job(train=Section(rate=0.2)))
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert stored == {"out": "runs", "train": {"rate": 0.1}, "names": ["a", "b"]}


def test_sections_that_nothing_was_made_with_may_change(tmp_path):
    write_resolved(tmp_path, Job())
    (tmp_path / "result").write_bytes(b"x")
    write_resolved(tmp_path, Job(train=Section(rate=0.2)), free={"train"})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["train"]["rate"] == 0.2
    with pytest.raises(ResumeError, match="names"):
        write_resolved(tmp_path, Job(names=("a",)), free={"train"})
    assert "rate: 0.2" in (tmp_path / "config.yaml").read_text(encoding="utf-8")


@dataclass
class Newer(Job):
    """`Job` of a later version: with new keys in all places."""

    @dataclass
    class Source(Section):
        steps: int = 8

    limit: int = 3
    sources: list[Source] = field(default_factory=list)
    by_name: dict[str, Source] = field(default_factory=dict)


def test_new_keys_at_their_defaults_do_not_refuse_an_earlier_folder(tmp_path):
    made = Newer(sources=[Newer.Source()], by_name={"one": Newer.Source()})
    write_resolved(tmp_path, made)
    (tmp_path / "result").write_bytes(b"x")
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    config = record["config"]
    for section, key in ((config, "limit"), (config["sources"][0], "steps"), (config["by_name"]["one"], "steps")):
        del section[key]
    earlier = json.dumps(record)
    (tmp_path / "run.json").write_text(earlier, encoding="utf-8")
    write_resolved(tmp_path, made)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["config"]["limit"] == 3
    for changed in (replace(made, limit=4), replace(made, sources=[Newer.Source(steps=9)])):
        (tmp_path / "run.json").write_text(earlier, encoding="utf-8")
        with pytest.raises(ResumeError, match=r"(limit: null -> 4|sources\[0\].steps: null -> 9)"):
            write_resolved(tmp_path, changed)


def test_a_trainers_defaults_are_left_out_and_the_state_of_a_training_stays(tmp_path):
    """Also values that the config derives from its defaults, such as sections and enumerations."""
    from accelerate import PartialState

    from alignkit.trainers.sft import SFTConfig

    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=0.5, eval_strategy="steps", eval_steps=3)
    PartialState._shared_state["mark"] = "of a training"
    shown = without_defaults(config)
    assert PartialState._shared_state.pop("mark", None) == "of a training"
    assert shown.keys() - {"use_cpu", "bf16", "dataloader_pin_memory"} == {
        "output_dir",
        "learning_rate",
        "eval_strategy",
        "eval_steps",
        "do_eval",
    }
    assert (shown["learning_rate"], shown["eval_strategy"]) == (0.5, "steps")
    assert without_defaults(Job(train=Section(rate=0.2))) == {
        "out": "runs",
        "train": {"rate": 0.2},
        "names": ["a", "b"],
    }


def test_secrets_are_never_written():
    assert "token" not in dump(Job(train=Section(hub_token="hf_secret")))


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_fingerprint_sees_every_label_of_a_large_table(tmp_path, ending):
    """One label of one row among others of 400 kB; the file keeps its size."""
    source = np.random.default_rng(0)
    rows = [{"prompt": str(row), "media": source.bytes(200_000).hex(), "labels": [1, -1]} for row in range(12)]
    found = []
    for row in (None, 3, 7):
        told = [{**own, "labels": [-1, 1] if number == row else [1, -1]} for number, own in enumerate(rows)]
        if ending == "jsonl":
            (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, told)), encoding="utf-8")
        else:
            table = pa.Table.from_pylist(told)
            parquet.write_table(table, tmp_path / "rows.parquet", compression="none", row_group_size=1)
        found.append(((tmp_path / f"rows.{ending}").stat().st_size, fingerprint(tmp_path)))
    sizes, prints = zip(*found, strict=True)
    assert len(set(sizes)) == 1 < sizes[0] / 2**20
    assert len(set(prints)) == 3


def test_a_damaged_table_has_a_fingerprint(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(2**21))
    first = fingerprint(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(2**21 - 1) + b"1")
    assert fingerprint(tmp_path) != first


def test_a_fingerprint_leaves_out_the_card(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"w")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("a card", encoding="utf-8")
    (tmp_path / "examples" / "0.png").write_bytes(b"p")
    assert fingerprint(tmp_path) == first
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert fingerprint(tmp_path) != first
