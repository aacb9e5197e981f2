"""What a folder was made with: compared key by key once there are results, by content and not by place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from alignkit import claims, storage
from alignkit.commands.specs import GeneratorSpec, PromptsConfig, RewardSpec
from alignkit.errors import ResumeError
from alignkit.provenance import comparable, content, fingerprint, write_resolved


def make_result(folder: Path) -> None:
    (folder / "result.parquet").write_bytes(b"x")


def test_other_config_is_refused_key_by_key(tmp_path: Path) -> None:
    record = {"config": {"seed": 1, "sources": [{"name": "a", "seeds": 2}], "same": 0}}
    claims.claim(tmp_path, record)
    make_result(tmp_path)
    claims.claim(tmp_path, record)
    with pytest.raises(ResumeError) as caught:
        claims.claim(tmp_path, {"config": {"seed": 2, "sources": [{"name": "a", "seeds": 3}], "same": 0}})
    message = str(caught.value)
    assert "config.seed: 1 -> 2" in message
    assert "config.sources[0].seeds: 2 -> 3" in message
    assert "same" not in message
    assert claims.claimed(tmp_path) == record


def test_sections_are_claimed_one_after_the_other(tmp_path: Path) -> None:
    assert claims.claimed(tmp_path) == {}
    claims.claim(tmp_path, {"config": {"seed": 1}})
    make_result(tmp_path)
    claims.claim(tmp_path, {"inputs": {"policy": "m 1", "data": "d"}})
    claims.claim(tmp_path, {"inputs": {"data": "d", "policy": "m 1"}})
    with pytest.raises(ResumeError, match=r'inputs\.policy: "m 1" -> "m 2"'):
        claims.claim(tmp_path, {"inputs": {"policy": "m 2", "data": "d"}})
    assert claims.claimed(tmp_path) == {"config": {"seed": 1}, "inputs": {"policy": "m 1", "data": "d"}}


def test_free_keys_are_replaced_and_the_others_compared(tmp_path: Path) -> None:
    claims.claim(tmp_path, {"config": {"train": {"rate": 1}, "seed": 1}})
    make_result(tmp_path)
    claims.claim(tmp_path, {"config": {"train": {"rate": 2}, "seed": 1}}, free={"config.train"})
    assert claims.claimed(tmp_path) == {"config": {"train": {"rate": 2}, "seed": 1}}
    with pytest.raises(ResumeError, match=r"config\.seed: 1 -> 2"):
        claims.claim(tmp_path, {"config": {"train": {"rate": 3}, "seed": 2}}, free={"config.train"})
    with pytest.raises(ResumeError, match=r"config\.train\.rate: 2 -> 3"):
        claims.claim(tmp_path, {"config": {"train": {"rate": 3}, "seed": 1}})


def test_differences_name_leaves() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert claims.differences(old, new) == ["a.c: 2 -> 4", "d: 3 -> null", "e: null -> 5"]
    assert claims.differences(old, new, free={"a", "e"}) == ["d: 3 -> null"]


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ResumeError, match=r"README\.md but no run\.json"):
        claims.claim(tmp_path, {"stage": "rank"}, writes=storage.STAGE_FILES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", claims.EARLIER_RECORDS)
def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ResumeError, match=rf"{name} but no run\.json.*can be read.*another folder"):
        claims.claim(tmp_path, {"config": {}})


def test_versions_are_noted_and_never_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    claims.claim(tmp_path, {"config": {}})
    storage.write_json(tmp_path / "versions.json", storage.read_json(tmp_path / "versions.json") | {"torch": "0.1"})
    claims.claim(tmp_path, {"config": {}})
    assert 'torch: "0.1" -> ' in caplog.text


@pytest.mark.parametrize(
    "name",
    ["run.json", "versions.json", "config.yaml", "lock.json", "_cache/a.arrow", "runs/log.0", ".x.h-1.tmp", "log.txt"],
)
def test_records_logs_and_caches_are_no_results(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert not claims.holds_results(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    assert not claims.holds_results(tmp_path)
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    assert claims.holds_results(tmp_path)


def test_a_first_attempt_that_made_nothing_may_be_corrected(tmp_path: Path) -> None:
    claims.claim(tmp_path, {"config": {"rate": "wrong", "gone": 1}, "inputs": {"data": "a"}})
    claims.claim(tmp_path, {"config": {"rate": 1}})
    claims.claim(tmp_path, {"inputs": {"data": "b"}})
    assert claims.claimed(tmp_path) == {"config": {"rate": 1}, "inputs": {"data": "b"}}
    make_result(tmp_path)
    with pytest.raises(ResumeError, match=r"config\.rate: 1 -> 2"):
        claims.claim(tmp_path, {"config": {"rate": 2}})


def test_a_changed_value_names_the_way_on(tmp_path: Path) -> None:
    advice = {"config.max_steps": "Start from its adapter.", "config.seed": "Never shown."}
    claims.claim(tmp_path, {"config": {"max_steps": 5, "seed": 1}}, advice=advice)
    make_result(tmp_path)
    with pytest.raises(ResumeError, match=r"config\.max_steps: 5 -> 9\n.*another folder\.\nStart from its adapter\.$"):
        claims.claim(tmp_path, {"config": {"max_steps": 9, "seed": 1}}, advice=advice)


# --- places are no differences --------------------------------------------------------------------------------------


@dataclass
class Trainer:
    output_dir: str
    logging_steps: int = 5
    max_steps: int = 5
    resume_from_checkpoint: str | None = None


@dataclass
class Job:
    out: Path
    generator: GeneratorSpec
    prompts: PromptsConfig
    train: Trainer
    rewards: dict[str, RewardSpec] = field(default_factory=dict)


def job(base: Path, out: str, **trainer: int) -> Job:
    (base / "model").mkdir(parents=True, exist_ok=True)
    (base / "model" / "weights.safetensors").write_bytes(b"w")
    (base / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    reward = RewardSpec(reward="aesthetic", options={"head": str(base / "model" / "weights.safetensors"), "k": 2})
    return Job(
        out=Path(out),
        generator=GeneratorSpec(model=str(base / "model")),
        prompts=PromptsConfig(file=base / "prompts.txt"),
        train=Trainer(output_dir=out, **trainer),
        rewards={"a": reward},
    )


def test_a_moved_run_a_moved_model_and_a_relative_path_are_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the record, nor for what stands for models."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    first = job(tmp_path / "here", "run")
    write_resolved(out, first)
    make_result(out)
    others = [job(Path("here"), str(out)), job(tmp_path / "there", "moved", logging_steps=1)]
    moved = out.rename(tmp_path / "moved")
    for other in others:
        write_resolved(moved, other)
        assert other.generator.identity == first.generator.identity
        assert other.rewards["a"].identity == first.rewards["a"].identity


def test_other_content_under_the_same_path_is_a_difference(tmp_path: Path) -> None:
    made = job(tmp_path, "out")
    before = (comparable(made), made.generator.identity, made.rewards["a"].identity)
    (tmp_path / "prompts.txt").write_text("a dog\n", encoding="utf-8")
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"v")
    after = (comparable(made), made.generator.identity, made.rewards["a"].identity)
    assert all(first != second for first, second in zip(before, after, strict=True))
    write_resolved(tmp_path / "out", made)
    make_result(tmp_path / "out")
    (tmp_path / "prompts.txt").write_text("a bird\n", encoding="utf-8")
    with pytest.raises(ResumeError, match=r"config\.prompts\.file: \"content [0-9a-f]{16}\" -> \"content "):
        write_resolved(tmp_path / "out", made)


def test_hub_ids_and_what_is_no_file_stand_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert GeneratorSpec(model="org/name").identity == "org/name"
    assert GeneratorSpec(model="org/name", dtype="bfloat16").identity != "org/name"
    assert comparable(GeneratorSpec(model="org/name"))["model"] == "org/name"
    before = comparable(PromptsConfig(file=tmp_path / "later"))
    Path("later").mkdir()
    assert comparable(PromptsConfig(file=tmp_path / "later")) == before
    Path("rate").write_text("x", encoding="utf-8")
    assert comparable(Trainer(output_dir="o")) == {"max_steps": 5}
    assert content({"a": ["rate", "other", 3]}) == {"a": [f"content {fingerprint(Path('rate'))}", "other", 3]}
