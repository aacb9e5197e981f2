"""Work is shared by the processes of a job; the cache takes no more space, and the accelerator no more, than needed."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from two_processes import run_two

from alignkit.errors import DataError
from alignkit.records import Prompt, Sampling, Scores
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.latents import encode_rows
from alignkit.trainers.sharding import Ranks
from alignkit.trainers.store import Store, pack, share_of, unpack
from alignkit.trainers.validation import Validation

SETTINGS = {
    "max_steps": 1,
    "per_device_train_batch_size": 3,
    "lora_rank": 2,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "precompute_reference": True,
    "metric_for_best_model": "reward/brightness",
    "load_best_model_at_end": True,
}
IMAGES = 4  # candidates of a row


def plan():
    return DrawPlan(lambda count, source: torch.rand(count, generator=source), 0, 0.0)


def said(tmp_path, rank):
    *_, best, counts = (tmp_path / f"out-{rank}.txt").read_text().strip().splitlines()
    return best, json.loads(counts)


# --- over processes -------------------------------------------------------------------------------------------------


def test_two_processes_do_half_each(tmp_path, model_folders, ranked_rows, worker):
    """20 rows are two batches of the encoder (16 and 4) and seven of the reference (the last has 2 rows)."""
    ranked_rows(20).save_to_disk(tmp_path / "rows")
    settings = SETTINGS | {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "two")}
    job = {"model": str(model_folders["flow"]), "rows": str(tmp_path / "rows"), "settings": settings, "validate": 4}
    history = run_two(tmp_path, job | {"settings": settings | {"ddp_backend": "gloo"}})
    (best, first), (other_best, second) = (said(tmp_path, rank) for rank in range(2))
    assert (first["encoded"], second["encoded"]) == (16 * IMAGES, 4 * IMAGES)
    assert (first["generated"], second["generated"]) == (2, 2)
    assert (first["reference"], second["reference"]) == ((3 + 3 + 3 + 2) * IMAGES, (3 + 3 + 3) * IMAGES)
    assert best == other_best
    assert "checkpoint-1" in best
    # One process finds everything in the cache, and what it computes itself is the same.
    before = dict(worker["COUNTS"])
    reused = worker["build"](job | {"settings": settings | {"output_dir": str(tmp_path / "reused")}})
    assert worker["COUNTS"] == before
    alone = {"output_dir": str(tmp_path / "one"), "cache_dir": str(tmp_path / "other")}
    alone["per_device_train_batch_size"] = 6
    one = worker["build"](job | {"settings": settings | alone})
    for row in (0, 15, 16, 19):
        ours, theirs = (trainer.train_dataset[row] for trainer in (one, reused))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if name != "reference_err")
        torch.testing.assert_close(ours["reference_err"], theirs["reference_err"], rtol=1e-5, atol=1e-6)
    one.train()
    name = "eval_reward/brightness"
    (found,), (expected,) = ([log[name] for log in logs if name in log] for logs in (history, one.state.log_history))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("count", "batch", "world"), [(20, 16, 2), (7, 1, 3), (1, 16, 4), (33, 4, 4)])
def test_shares_are_whole_batches_and_cover_all_rows(count, batch, world):
    shares = [share_of(count, batch, Ranks(rank, world)) for rank in range(world)]
    assert [row for start, stop in shares for row in range(start, stop)] == list(range(count))
    assert all(start % batch == 0 or start == count for start, _ in shares)
    sizes = [-(-(stop - start) // batch) for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


class Quiet(Ranks):
    """A process that waits for no other and has what rank 0 has."""

    def wait(self):
        pass

    def broadcast(self, value):
        return value


def test_parts_in_another_folder_are_named(tmp_path):
    """Two nodes without a common folder: neither sees the other's part, and no training starts."""
    keys = list("abcd")

    def make(numbers):
        return [{"y": 10 * number} for number in numbers]

    for rank in (0, 1):
        with pytest.raises(DataError, match=f"lacks rows that another process made, as seen by process {rank}"):
            Store(tmp_path / str(rank), Quiet(rank, 2)).rows(keys, make, 1)
    found = Store(tmp_path / "1", Ranks()).rows(keys, make, 1)
    assert found["y"][:] == [0, 10, 20, 30]


class Painter:
    """Images of one grey level, the seed's last digit; notes how many it holds at once."""

    name = "painter"

    def __init__(self):
        self.calls = []

    def generate(self, prompts, seeds, sampling):
        self.calls.append(len(prompts))
        return torch.stack([torch.full((3, 4, 4), seed % 10 / 10) for seed in seeds])


class Level:
    """Scores an image by its grey level; refuses larger batches than it is told."""

    def __init__(self, most):
        self.most = most

    def __call__(self, media, prompts):
        assert len(media) == len(prompts) <= self.most
        return Scores(media.mean((1, 2, 3)))


def test_validation_goes_batch_by_batch(tmp_path):
    from PIL import Image

    from alignkit.seeds import derive_seed

    prompts = [Prompt.from_text(f"prompt {number}") for number in range(7)]
    painter = Painter()
    validation = Validation(prompts, Sampling(), {"level": Level(3)}, seed=5, batch_size=3, shown=2)
    means = validation.run(painter, tmp_path / "grid.png")
    levels = [derive_seed(5, prompt.id, 0) % 10 / 10 for prompt in prompts]
    assert painter.calls == [3, 3, 1]
    assert means == {"reward/level": pytest.approx(sum(levels) / 7, rel=1e-6)}
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (8, 4)
    assert [grid.getpixel((4 * column, 0))[0] for column in range(2)] == [round(255 * level) for level in levels[:2]]


def test_validation_refuses_pixels_out_of_range(monkeypatch):
    painter = Painter()
    generate = painter.generate
    monkeypatch.setattr(painter, "generate", lambda *given: 255 * generate(*given))
    validation = Validation([Prompt.from_text("a ring"), Prompt.from_text("a cross")], Sampling(), {"level": Level(2)})
    with pytest.raises(
        DataError, match=r"validation: generator 'painter' returned float32 pixels from \S+ to \S+, exp"
    ):
        validation.run(painter, None)


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_values_come_back_exactly(dtype):
    values = torch.randn(5, 3).to(dtype)
    raw, name = pack(values, dtype)
    again = unpack(raw, (5, 3), name)
    assert again.dtype == dtype
    assert torch.equal(again, values)
    assert len(raw) == values.numel() * values.element_size()


def test_nothing_is_rounded():
    """A value that half precision cannot hold stays float32, whatever the encoder's weights are in."""
    values = torch.tensor([1.0, 1.0 + 2**-20])
    raw, name = pack(values, torch.bfloat16)
    assert name == "float32"
    assert torch.equal(unpack(raw, (2,), name), values)


def test_a_half_precision_encoder_takes_half_the_space(load, ranked_rows, tmp_path):
    generator = load("flow", dtype=torch.bfloat16)
    dataset = encode_rows(generator, ranked_rows(1), plan(), tmp_path)
    row, item = {**dataset.rows[0], **dataset.conditioning[0]}, dataset[0]
    names = [name for name in row if f"{name}.dtype" in row]
    assert set(names) == {"latents", "cond.encoder_hidden_states", "cond.pooled_projections"}
    for name in names:
        assert row[f"{name}.dtype"] == "bfloat16"
        assert len(row[name]) <= 2 * item[name].numel()
        assert item[name].dtype == torch.float32  # the loss's arithmetic
    with torch.no_grad():
        cond = generator.encode_prompts(ranked_rows(1)["prompt"][:])
    for name, tensor in cond.tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(item[f"cond.{name}"], tensor[0].float())


def test_latents_in_the_data_are_not_encoded(load, ranked_rows, tmp_path, monkeypatch):
    generator = load("flow")
    plain = encode_rows(generator, ranked_rows(3), plan(), tmp_path / "plain")
    latents = [plain[row]["latents"].tolist() for row in range(3)]
    ready = ranked_rows(3).remove_columns("images").add_column("latents", latents)
    monkeypatch.setattr(generator, "encode", None)  # any call would fail
    dataset = encode_rows(generator, ready, plan(), tmp_path / "ready")
    for row in range(3):
        assert all(torch.equal(value, plain[row][name]) for name, value in dataset[row].items())
    other = ready.remove_columns("latents").add_column("latents", [latents[0], latents[2], latents[1]])
    assert torch.equal(encode_rows(generator, other, plan(), tmp_path / "ready")[1]["latents"], plain[2]["latents"])
    for wrong, message in (([[[[0.0]]]], r"row 0: latents of shape \[1, 1, 1, 1\]"), ([[0.0]], r"shape \[1, 1\]")):
        bad = ranked_rows(1, [(1.0,)]).remove_columns("images").add_column("latents", [wrong])
        with pytest.raises(DataError, match=message):
            encode_rows(generator, bad, plan(), tmp_path / "bad")


# --- the accelerator ------------------------------------------------------------------------------------------------


class Moves:
    """Stands in for a component's `to`: notes where it was sent."""

    def __init__(self):
        self.places = []

    def __call__(self, place):
        self.places.append(str(place))


def watched(trainer, monkeypatch):
    moves = {}
    for name, part in trainer.generator.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            moves[name] = Moves()
            monkeypatch.setattr(part, "to", moves[name])
    return moves


def test_what_is_not_trained_goes_and_comes_back(make, monkeypatch):
    trainer = make("unet")
    moves = watched(trainer, monkeypatch)
    with trainer.components_on("meta"):
        assert {name: move.places for name, move in moves.items()} == {
            "unet": [],
            "vae": ["meta"],
            "text_encoder": ["meta"],
        }
    assert moves["vae"].places == moves["text_encoder"].places == ["meta", "cpu"]
    learning = make("unet", train_text_encoder=True)
    moves = watched(learning, monkeypatch)
    with learning.components_on("meta"):
        assert [name for name, move in moves.items() if move.places] == ["vae"]


def test_training_parks_them_and_validation_brings_them_back(make, monkeypatch):
    """The order of a training with one validation; methods on prompts keep all where it is."""
    validation = Validation([Prompt.from_text("a ring")], Sampling(2, 2.0, 16, 16), {"level": Level(1)})
    trainer = make("flow", max_steps=1, eval_strategy="steps", eval_steps=1, parts={"validation": validation})
    seen = []

    @contextmanager
    def components_on(device):
        seen.append(("to", str(device)))
        yield
        seen.append(("back from", str(device)))

    monkeypatch.setattr(trainer, "components_on", components_on)
    generate = trainer.generator.generate
    monkeypatch.setattr(trainer.generator, "generate", lambda *a: (seen.append(("generate", "")), generate(*a))[1])
    home = str(trainer.args.device)
    monkeypatch.setattr(trainer, "parking", "the host")
    trainer.train()
    assert seen == [("to", "the host"), ("to", home), ("generate", ""), ("back from", home), ("back from", "the host")]
