"""Pairing, resume, reuse of the base side, and what the folder holds."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignkit.errors import ConfigError, DataError, NumericsError, ResumeError, UnknownNameError
from alignkit.evaluation.paired import EvaluateConfig, evaluate
from alignkit.evaluation.results import part_files, read_evaluation, read_pairs
from alignkit.provenance import fingerprint
from alignkit.records import Prompt, Sampling
from alignkit.seeds import derive_seed


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_sides_see_the_same_prompts_and_seeds_and_every_gain_is_the_shift(world, tmp_path):
    base, tuned = world.source("base"), world.source("tuned", world.shift)
    result = evaluate(base, tuned, world.prompts, world.config, tmp_path, rewards=world.rewards(), gold="gold")
    expected = [(p.text, derive_seed(5, p.id, k)) for p in world.prompts for k in range(3)]
    assert base.drawn == tuned.drawn == expected
    shifts = [world.shift(text, seed) for text, seed in expected]
    assert read_pairs(tmp_path).gain("grey").tolist() == shifts
    assert result.result("grey").overall.gain.mean == pytest.approx(sum(shifts) / len(shifts))
    greys = [world.level(text, seed) for text, seed in expected]
    assert result.result("grey").overall.base.mean == pytest.approx(sum(greys) / len(greys))


def test_gold_comes_first_and_categories_are_told_apart(world, finished):
    result = read_evaluation(finished)
    assert [r.reward for r in result.results] == ["gold", "grey"]
    assert result.gold.is_gold
    odd, even = (result.result("grey").categories[name] for name in ("odd", "even"))
    assert odd.gain.mean > 0 > even.gain.mean
    assert odd.win_rate.mean == 1.0
    assert odd.prompts == even.prompts == 4


def test_sampler_settings_stand_beside_every_number(world, finished):
    plain = json.loads((finished / "evaluation.json").read_text())
    assert plain["sampling"] == world.config.sampling.plain()
    assert all(result["sampling"] == plain["sampling"] for result in plain["results"])


def test_the_record_survives_the_file(world, tmp_path):
    result = world.run(tmp_path, prompts=world.prompts[:1])
    again = read_evaluation(tmp_path)
    assert math.isnan(again.gold.overall.gain.low)
    assert repr(again) == repr(result)


def test_killed_and_run_again_only_the_missing_parts_are_drawn_and_the_bytes_are_equal(world, finished, tmp_path):
    dying = world.source("tuned", world.shift, dies_after=8)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            world.source("base"), dying, world.prompts, world.config, tmp_path, rewards=world.rewards(), gold="gold"
        )
    assert not (tmp_path / "evaluation.json").exists()
    base, tuned = world.source("base"), world.source("tuned", world.shift)
    evaluate(base, tuned, world.prompts, world.config, tmp_path, rewards=world.rewards(), gold="gold")
    assert (len(base.drawn), len(tuned.drawn)) == (0, 16)
    assert _files(tmp_path) == _files(finished)


def test_a_damaged_part_is_named_and_redrawn(world, tmp_path, caplog):
    world.run(tmp_path)
    whole = _files(tmp_path)
    victim = part_files(tmp_path / "base")[2]
    data = bytearray(victim.read_bytes())
    data[60] ^= 0xFF
    victim.write_bytes(data)
    world.run(tmp_path)
    assert "00002 is rebuilt" in caplog.text
    assert _files(tmp_path) == whole


def test_the_base_side_is_drawn_once_for_many_adapters(world, tmp_path):
    base = world.source("base")
    cache = {"inputs": {"base": "weights-1"}, "base_cache": tmp_path / "cache"}
    gold = {"rewards": world.rewards(), "gold": "gold"}
    for k in range(3):
        tuned = world.source(f"tuned {k}", lambda text, seed, k=k: k)
        result = evaluate(base, tuned, world.prompts, world.config, tmp_path / str(k), **cache, **gold)
        assert result.result("grey").overall.gain.mean == pytest.approx(k)
    assert len(base.drawn) == 24
    other = cache | {"inputs": {"base": "weights-2"}}
    evaluate(base, world.source("tuned"), world.prompts, world.config, tmp_path / "x", **other, **gold)
    assert len(base.drawn) == 48


def test_processes_that_share_a_base_side_generate_different_parts_first(world, tmp_path):
    """In one order all of them would generate the same part at the same time."""
    config, drawn, scores = dataclasses.replace(world.config, batch_size=2), [], []
    for k in range(4):
        base, out = world.source("base"), tmp_path / f"out-{k}"
        shared = {"inputs": {"base": "weights-1"}, "base_cache": tmp_path / f"cache-{k}"}
        evaluate(
            base, world.source("tuned"), world.prompts, config, out, rewards=world.rewards(), gold="gold", **shared
        )
        drawn.append(base.drawn)
        scores.append(read_pairs(out).base["grey"].tolist())
    assert any(order != drawn[0] for order in drawn[1:])
    assert all(sorted(order) == sorted(drawn[0]) for order in drawn)
    assert all(score == scores[0] for score in scores)


@pytest.mark.parametrize("change", [{"seed": 6}, {"seeds_per_prompt": 2}, {"sampling": Sampling(3, 1.0, 8, 8)}])
def test_a_cached_base_is_not_reused_for_other_settings(world, tmp_path, change):
    base, cache = world.source("base"), {"inputs": {"base": "weights-1"}, "base_cache": tmp_path / "cache"}
    for out, config in (("a", world.config), ("b", dataclasses.replace(world.config, **change))):
        tuned = world.source("tuned")
        rewards = world.rewards()
        evaluate(base, tuned, world.prompts, config, tmp_path / out, rewards=rewards, gold=None, **cache)
    assert len(base.drawn) == 24 + 8 * dataclasses.replace(world.config, **change).seeds_per_prompt


def test_the_folder_is_whole_without_the_cache(world, tmp_path):
    cache = {"inputs": {"base": "weights-1"}, "base_cache": tmp_path / "cache"}
    base, tuned, out = world.source("base"), world.source("tuned"), tmp_path / "out"
    evaluate(base, tuned, world.prompts, world.config, out, rewards=world.rewards(), gold="gold", **cache)
    for path in sorted((tmp_path / "cache").rglob("*.parquet")):
        path.unlink()
    assert len(read_pairs(out).media("base", [0, 23])) == 2


def test_another_evaluation_in_the_same_folder_is_refused_with_the_difference(world, tmp_path):
    world.run(tmp_path)
    before = _files(tmp_path)
    config = dataclasses.replace(world.config, seed=6)
    args = (world.source("base"), world.source("tuned"), world.prompts, config, tmp_path)
    with pytest.raises(ResumeError, match=r"evaluation\.run_seed: 5 -> 6"):
        evaluate(*args, rewards=world.rewards(), gold="gold")
    with pytest.raises(ResumeError, match=r'inputs\.tuned: null -> "retrained"'):
        evaluate(*args[:3], world.config, tmp_path, rewards=world.rewards(), gold=None, inputs={"tuned": "retrained"})
    assert _files(tmp_path) == before


def test_other_intervals_need_no_new_pictures(world, tmp_path):
    world.run(tmp_path)
    base, tuned = world.source("base"), world.source("tuned", world.shift)
    config = dataclasses.replace(world.config, bootstrap_samples=50, confidence=0.5)
    evaluate(base, tuned, world.prompts, config, tmp_path, rewards=world.rewards(), gold="gold")
    assert base.drawn == tuned.drawn == []


def test_scores_are_those_of_the_stored_picture(world, finished):
    pairs = read_pairs(finished)
    for side, scores in (("base", pairs.base), ("tuned", pairs.tuned)):
        for row, png in pairs.media(side, range(24)).items():
            with Image.open(io.BytesIO(png)) as image:
                assert np.asarray(image).mean() == scores["grey"][row]


def test_parts_are_plain_parquet_that_say_what_they_hold(finished):
    table = pq.read_table(part_files(finished / "tuned")[0])
    columns = ["prompt_id", "prompt", "category", "seed", "image", "score/grey", "score/gold"]
    assert table.column_names == columns
    assert table["category"].to_pylist() == ["even"] * 3 + ["odd"]


def test_a_few_scores_that_are_not_finite_are_dropped_and_counted_many_stop(world, tmp_path):
    def broken(texts):
        return world.reader("broken", lambda grey, prompt: math.nan if prompt.text in texts else 1.0)

    prompts = [Prompt.from_text(f"p {k}") for k in range(40)]
    config = EvaluateConfig(seeds_per_prompt=1, batch_size=8, sampling=world.config.sampling)
    sources = (world.source("base"), world.source("tuned"))
    few = evaluate(*sources, prompts, config, tmp_path / "few", rewards={"broken": broken({"p 3"})}, gold=None)
    assert (few.results[0].overall.dropped, few.results[0].overall.pairs) == (1, 39)
    many = {"broken": broken({"p 3", "p 9", "p 11"})}
    with pytest.raises(NumericsError, match=r"'broken' is NaN or infinite on 3 items"):
        evaluate(*sources, prompts, config, tmp_path / "many", rewards=many, gold=None)


def test_bad_input_is_refused_before_anything_is_drawn(world, tmp_path):
    base = world.source("base")
    same = (base, world.source("tuned"))
    rewards = world.rewards()
    with pytest.raises(DataError, match="no prompts"):
        evaluate(*same, [], world.config, tmp_path, rewards=rewards, gold="gold")
    with pytest.raises(DataError, match="prompt 8 repeats prompt 0, 'prompt 0'"):
        evaluate(*same, [*world.prompts, world.prompts[0]], world.config, tmp_path, rewards=rewards, gold="gold")
    with pytest.raises(UnknownNameError, match=r"gold 'golf'.*'gold'"):
        evaluate(*same, world.prompts, world.config, tmp_path, rewards=rewards, gold="golf")
    with pytest.raises(ConfigError, match="no rewards"):
        evaluate(*same, world.prompts, world.config, tmp_path, rewards={}, gold=None)
    with pytest.raises(ConfigError, match="identity"):
        evaluate(*same, world.prompts, world.config, tmp_path, rewards=rewards, gold=None, base_cache=tmp_path)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        EvaluateConfig(batch_size=0)
    assert base.drawn == []


def test_a_source_out_of_range_is_refused(world, tmp_path, monkeypatch):
    source = world.source("base")
    generate = source.generate
    monkeypatch.setattr(source, "generate", lambda *given: 255 * generate(*given))
    with pytest.raises(DataError, match=r"generator 'base' returned float32 pixels from \S+ to \S+, expected float"):
        evaluate(
            source, world.source("tuned"), world.prompts, world.config, tmp_path, rewards=world.rewards(), gold="gold"
        )


def test_a_fingerprint_follows_names_and_bytes(tmp_path):
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "w.safetensors"
    weights.write_bytes(b"a")
    first = fingerprint(tmp_path)
    weights.write_bytes(b"b")
    assert fingerprint(tmp_path) != first
    weights.write_bytes(b"a")
    assert fingerprint(tmp_path) == first
    weights.rename(tmp_path / "unet" / "v.safetensors")
    assert fingerprint(tmp_path) != first


def test_a_fingerprint_samples_large_files_from_end_to_end(tmp_path):
    weights = tmp_path / "w.safetensors"
    seen = set()
    for place in (0, 1_370_000, 2_999_999):
        content = bytearray(3_000_000)
        content[place] = 1
        weights.write_bytes(content)
        seen.add(fingerprint(weights))
    weights.write_bytes(bytes(3_000_000))
    assert len(seen | {fingerprint(weights)}) == 4


def test_a_part_that_is_removed_while_the_evaluation_runs_is_named(world, tmp_path):
    out = tmp_path / "e"

    def remove(text, seed):
        (out / "base" / "00001.parquet").unlink(missing_ok=True)
        return 0

    sides = (world.source("base"), world.source("tuned", remove))
    with pytest.raises(DataError, match=r"base/00001\.parquet' was removed while the evaluation ran"):
        evaluate(*sides, world.prompts, world.config, out, rewards=world.rewards(), gold="gold")
    assert not (out / "evaluation.json").exists()
    again = (world.source("base"), world.source("tuned", lambda text, seed: 0))
    evaluate(*again, world.prompts, world.config, out, rewards=world.rewards(), gold="gold")
    assert len(again[0].drawn) == world.config.batch_size
    assert again[1].drawn == []


@pytest.mark.parametrize("form", ["list", "array", "tensor"])
def test_a_reward_that_returns_plain_numbers_is_read_everywhere(world, finished, tmp_path, form):
    """The scores are those of the reward that returns `Scores`."""
    read = world.reader("grey")

    def plain(media, prompts):
        total = read(media, prompts).total
        return {"list": total.tolist(), "array": total.numpy(), "tensor": total}[form]

    rewards = {"grey": dataclasses.make_dataclass("Plain", [], namespace=_facts(read, plain))()}
    sides = (world.source("base"), world.source("tuned", world.shift))
    evaluate(*sides, world.prompts, world.config, tmp_path, rewards=rewards, gold=None)
    assert read_pairs(tmp_path).tuned["grey"].tolist() == read_pairs(finished).tuned["grey"].tolist()


def _facts(reward, call):
    return dataclasses.asdict(reward) | {"__call__": lambda _, media, prompts: call(media, prompts)}
