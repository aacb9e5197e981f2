"""Rows of several sizes: their buckets, their pixels, and batches that never mix them."""

from __future__ import annotations

import hashlib
import io

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tiny_families import IMAGES

from alignkit.errors import ConfigError
from alignkit.media import fit, to_pixels
from alignkit.trainers.buckets import BucketBatches, Sizes, buckets

# --- which size -----------------------------------------------------------------------------------------------------


def test_without_a_resolution_a_picture_keeps_its_size():
    assert Sizes().bucket(512, 768, 16) == (512, 768)
    assert Sizes().bucket(527, 783, 16) == (512, 768)
    assert Sizes().bucket(9, 40, 16) == (0, 32)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((512, 512), (512, 512)), ((2000, 2000), (512, 512)), ((720, 1280), (384, 640)), ((100, 900), (256, 1024))],
)
def test_with_a_resolution_it_goes_to_the_nearest_aspect(size, wanted):
    assert Sizes(512).bucket(*size, 8) == wanted


def test_buckets_are_as_large_as_the_area_allows():
    for height, width in buckets(1024, 64):
        assert height % 64 == width % 64 == 0
        assert 1024**2 - 64 * width < height * width <= 1024**2
        assert 1 / 4.3 < width / height < 4.3


def test_steps_are_multiples_of_what_the_network_takes():
    assert {side % 32 for size in buckets(1024, 32) for side in size} == {0}
    assert Sizes(512, bucket_step=20).bucket(500, 900, 16)[1] % 32 == 0
    assert Sizes(16).bucket(16, 16, 4) == (16, 16)
    with pytest.raises(ConfigError, match="resolution 8 is too small for steps of 64 pixels"):
        Sizes(8, bucket_step=64).bucket(8, 8, 8)


# --- which pixels ---------------------------------------------------------------------------------------------------


def test_a_little_too_much_is_cut_off_at_the_edges():
    pixels = np.arange(3 * 19 * 21, dtype=np.uint8).reshape(19, 21, 3)
    assert np.array_equal(fit(pixels[None], (16, 16), 8)[0], pixels[1:17, 2:18])


def test_other_sizes_are_resampled_to_cover_the_bucket():
    """A step edge in the middle stays in the middle; a fine checkerboard becomes grey, not stripes."""
    edge = np.zeros((40, 80, 3), np.uint8)
    edge[:, 40:] = 255
    halves = to_pixels(fit(edge[None], (16, 16), 8))[0]
    assert halves[:, :, :7].max() < 0.1
    assert halves[:, :, 9:].min() > 0.9
    board = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * 255
    board = board.astype(np.uint8)[None]
    grey = to_pixels(fit(board, (16, 16), 8))
    assert (grey[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.05
    assert fit(board, (96, 128), 8).shape == (1, 96, 128, 3)


def test_rows_of_all_sizes_are_encoded_each_at_its_own(make, mixed, random_png, caplog):
    """The codec's latents of the very pixels; the K pictures of a row follow the first one."""
    rows = mixed((16, 16), (24, 16), (18, 17), (16, 24))
    items = rows.cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
    items[3]["images"][2] = {"bytes": random_png(64, 96, 7), "path": None}
    trainer = make("flow", rows=datasets.Dataset.from_list(items, features=rows.features))
    dataset, generator = trainer.train_dataset, trainer.generator
    assert [size[-2:] for size in dataset.latent_shapes] == [(8, 8), (8, 12), (8, 8), (12, 8)]
    decoded = [Image.open(io.BytesIO(item["images"][2]["bytes"])) for item in items]
    decoded[2] = decoded[2].crop((1, 0, 17, 16))
    decoded[3] = decoded[3].resize((16, 24), Image.Resampling.LANCZOS)
    for row, image in enumerate(decoded):
        expected = generator.encode(to_pixels(np.asarray(image)[None]))[0]
        torch.testing.assert_close(dataset[row]["latents"][2], expected, rtol=0, atol=1e-5)
    assert "16 images or clips in 3 size buckets, 5 of them resized or cropped; rows in buckets smaller" in caplog.text
    assert caplog.text.count("size buckets") == 1


def test_data_of_one_size_says_nothing(make, caplog):
    make("flow")
    assert "size bucket" not in caplog.text
    assert "transparency" not in caplog.text


def test_images_with_transparency_are_counted_and_said_once_a_run(make, mixed, tmp_path, caplog):
    """Read from the cache as well, also beside files of a version that did not count them."""
    items = mixed((16, 16), (16, 16), (16, 16)).cast_column("images", datasets.List(datasets.Image(decode=False)))
    listed = items.to_list()
    for row, candidate in ((1, 0), (1, 3), (2, 2)):
        with io.BytesIO() as buffer:
            Image.new("RGBA", (16, 16), (200, 0, 0, 100)).save(buffer, "PNG")
            listed[row]["images"][candidate] = {"bytes": buffer.getvalue(), "path": None}
    rows, cache = datasets.Dataset.from_list(listed, features=items.features), tmp_path / "cache"
    make("flow", rows=rows.select([0]), cache_dir=str(cache))
    (earlier,) = cache.glob("latents-*/*.arrow")
    table = datasets.Dataset.from_file(str(earlier)).data.table.drop_columns(["transparent"])
    earlier.unlink()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    (earlier.parent / f"{hashlib.sha256(data).hexdigest()}.arrow").write_bytes(data)
    for _ in range(2):
        caplog.clear()
        make("flow", rows=rows, cache_dir=str(cache))
        assert caplog.text.count("3 of 12 images have transparency; they are composited on white") == 1


def test_resolution_brings_all_to_its_area_and_has_a_cache_of_its_own(make, mixed, tmp_path):
    rows, cache = mixed((48, 48), (30, 30), (24, 16)), tmp_path / "cache"
    small = make("flow", rows=rows, resolution=16, cache_dir=str(cache))
    assert [size[-2:] for size in small.train_dataset.latent_shapes] == [(8, 8), (8, 8), (6, 10)]
    make("flow", rows=rows, resolution=24, cache_dir=str(cache))
    assert len(list(cache.glob("latents-*/*.arrow"))) == 2
    with pytest.raises(ConfigError, match="resolution is 0; it must be positive"):
        make("flow", resolution=0)


# --- batches --------------------------------------------------------------------------------------------------------


SIZES = [(1, size) for size in "aabacbaabaad"]


@pytest.mark.parametrize("seed", [None, 3])
def test_each_row_is_in_one_batch_of_its_size(seed):
    batches = list(BucketBatches(SIZES, 3, seed=seed))
    assert all(len({SIZES[row] for row in batch}) == 1 for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(12))
    assert sorted(map(len, batches)) == [1, 1, 1, 3, 3, 3]
    assert len(BucketBatches(SIZES, 3, seed=seed)) == len(batches)


def test_the_order_is_the_seeds_and_the_epochs():
    def order(seed, epoch):
        return list(BucketBatches(SIZES, 2, epoch=lambda: epoch, seed=seed))

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(5, 1)
    assert order(None, 1) == order(None, 2) == [[0, 1], [3, 6], [7, 9], [10], [2, 5], [8], [4], [11]]


def test_drop_last_leaves_out_what_is_left_over():
    batches = BucketBatches(SIZES, 2, drop_last=True)
    assert len(list(batches)) == len(batches) == 4
    assert all(len(batch) == 2 for batch in batches)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(IMAGES))
def test_every_family_trains_on_mixed_sizes(make, mixed, family):
    """Two steps at other aspects than the tiny network was made for, at the finest sizes it says it takes."""
    trainer = make(family, method="sft", max_steps=2, per_device_train_batch_size=1, rows=mixed((16, 16)))
    side = trainer.generator.pixel_multiple
    rows = mixed((2 * side, 3 * side), (3 * side, 2 * side))
    trainer = make(family, method="sft", max_steps=2, per_device_train_batch_size=1, rows=rows)
    trainer.train()
    seen = {size[-2:] for size in trainer.train_dataset.latent_shapes}
    ratio = trainer.generator.spatial_ratio
    assert seen == {(3 * side // ratio, 2 * side // ratio), (2 * side // ratio, 3 * side // ratio)}


MIXED = ((16, 16), (24, 16), (16, 16), (24, 16), (16, 16))


def test_every_row_is_trained_on_once_an_epoch(make, mixed):
    trainer = make("flow", rows=mixed(*MIXED), max_steps=6)
    seen, real = [], trainer.method_loss
    trainer.method_loss = lambda model, batch: (seen.append(batch), real(model, batch))[1]
    trainer.train()
    assert len(seen) == 6  # two epochs of three batches
    for epoch in (0, 1):
        batches = seen[3 * epoch : 3 * epoch + 3]
        assert sorted(row for batch in batches for row in batch["row"].tolist()) == list(range(5))
        for batch in batches:
            for place, row in enumerate(batch["row"].tolist()):
                trainer.train_dataset.epoch = epoch
                assert torch.equal(batch["noise"][place], trainer.train_dataset[row]["noise"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_the_whole(make, mixed, tmp_path, accumulation):
    options = {"rows": mixed(*MIXED), "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    options |= {"gradient_accumulation_steps": accumulation}
    whole = make("flow", **options, output_dir=str(tmp_path / "whole"))
    whole.train()
    for step in (1, 4):  # within the first epoch and a later one
        resumed = make("flow", **options, output_dir=str(tmp_path / f"resumed-{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        expected = whole._trainable()
        assert all(torch.equal(value, expected[name]) for name, value in resumed._trainable().items())


def test_held_out_loss_and_reference_errors_go_by_row(make, mixed):
    """Precomputed errors are each row's own, whatever batch it was in; the held-out mean counts each row once."""
    rows = mixed(*MIXED)
    options = {"rows": rows, "max_steps": 6, "parts": {"eval_dataset": rows}}
    plain, ahead = make("flow", **options), make("flow", **options, precompute_reference=True)
    assert ahead.train_dataset.reference.shape == (2, 5, 4)
    with torch.no_grad():
        for row in range(5):
            batch = {name: value[None] for name, value in plain.train_dataset[row].items()}
            expected = plain.reference_errors(plain.model, batch)[0]
            torch.testing.assert_close(ahead.train_dataset.reference[0, row], expected, rtol=1e-5, atol=1e-6)
    plain.train()
    with torch.no_grad():
        alone = [
            plain.method_loss(plain.model, {name: value[None] for name, value in plain._held_out[row].items()}).loss
            for row in range(5)
        ]
    assert plain.evaluate()["eval_loss"] == pytest.approx(torch.cat(alone).mean().item(), rel=1e-5)
