"""Cached latents and keyed draws; rows that cannot be used are named."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from draw_plans import plan
from PIL import Image
from torch.utils.data import DataLoader

from alignkit.errors import DataError
from alignkit.media import decode_image, to_pixels
from alignkit.trainers import content, latents
from alignkit.trainers.buckets import Sizes
from alignkit.trainers.data import collate
from alignkit.trainers.latents import conditioning, encode_rows
from alignkit.trainers.rankdpo import keep_best_and_worst
from alignkit.trainers.store import pack, unpack


def picture(size=(16, 16), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def dataset(load, ranked_rows, tmp_path):
    return encode_rows(load("flow"), ranked_rows(6), plan(), tmp_path)


def test_draws_do_not_depend_on_batch_order_or_workers(dataset):
    """Also with workers that outlive an epoch and hold their own copy of the dataset."""
    order, workers = [4, 0, 2, 1, 5, 3], {"num_workers": 2, "persistent_workers": True}

    def collected(epoch, loader, of):
        dataset.epoch = epoch
        rows = {key: torch.cat([batch[key] for batch in loader]) for key in ("t", "noise", "dropped")}
        return {key: value[torch.tensor(of).argsort()] for key, value in rows.items()}

    loaders = [
        (DataLoader(dataset, batch_size=1, collate_fn=collate), range(6)),
        (DataLoader(dataset, batch_size=4, sampler=order, collate_fn=collate), order),
        (DataLoader(dataset, batch_size=2, sampler=order, collate_fn=collate, **workers), order),
    ]
    first = [[collected(epoch, loader, list(of)) for epoch in (0, 1)] for loader, of in loaders]
    for other in first[1:]:
        for epoch in (0, 1):
            assert all(torch.equal(first[0][epoch][key], other[epoch][key]) for key in ("t", "noise", "dropped"))
    assert not torch.equal(first[0][0]["t"], first[0][1]["t"])


def test_pairs_of_one_caption_have_their_own_draws(load, ranked_rows, tmp_path):
    """Pick-a-Pic has many pairs a caption; rows of equal prompt ids must not share noise."""
    rows = ranked_rows(3)
    same = rows.remove_columns("prompt_id").add_column("prompt_id", ["a", "b", "a"])
    encoded = encode_rows(load("flow"), same, plan(), tmp_path)
    noises = [encoded[index]["noise"][0] for index in range(3)]
    assert not torch.equal(noises[0], noises[2])
    assert torch.equal(noises[0], plan().draw("a", 0, encoded[0]["latents"].shape).noise[0])
    keep_best_and_worst(encoded)
    assert encoded.draw_ids == ["a", "b", "a-1"]


def test_one_caption_draw_a_prompt(make, batch_of):
    """A dropped prompt is the null condition for all its candidates, a kept one for none."""
    trainer = make("flow", caption_dropout=0.5)
    batch = batch_of(trainer, 4)
    batch["dropped"] = torch.tensor([True, False, False, True])
    seen = []

    def note(module, arguments, named):
        seen.append(named["pooled_projections"])

    trainer.generator.net.register_forward_pre_hook(note, with_kwargs=True)
    trainer.method_loss(trainer.model, batch)
    null = trainer.null["pooled_projections"]
    for rows in seen:  # reference and policy
        is_null = (rows == null).all(-1).reshape(4, 4)
        assert is_null.tolist() == [[True] * 4, [False] * 4, [False] * 4, [True] * 4]
    assert len(seen) == 2


def test_each_epoch_has_its_own_draws(make):
    """What the trainer hands to the loss is the plan's draw of this epoch, for every row of it."""
    trainer = make("flow", max_steps=6, per_device_train_batch_size=2)
    seen, real = [], trainer.method_loss
    trainer.method_loss = lambda model, batch: (seen.append(batch["t"][:, 0]), real(model, batch))[1]
    trainer.train()
    dataset = trainer.train_dataset
    for epoch in range(3):
        drawn = torch.cat(seen[2 * epoch : 2 * epoch + 2]).sort().values
        wanted = [dataset.plan.draw(name, epoch, (4, 4, 8, 8)).t[0] for name in dataset.draw_ids]
        assert torch.equal(drawn, torch.stack(wanted).sort().values)


# --- the cache ------------------------------------------------------------------------------------------------------


def test_cached_values_are_the_codecs(dataset, load, ranked_rows):
    generator, rows = load("flow"), ranked_rows(6)
    with torch.no_grad():
        for index in (0, 5):
            pixels = to_pixels(np.stack([decode_image(image, "here") for image in rows[index]["images"]]))
            item = dataset[index]
            torch.testing.assert_close(item["latents"], generator.encode(pixels), rtol=0, atol=1e-5)
            cond = generator.encode_prompts([rows[index]["prompt"]])
            for name, tensor in cond.tensors.items():
                torch.testing.assert_close(item[f"cond.{name}"], tensor[0], rtol=0, atol=1e-5)
            assert item["phi"].tolist() == pytest.approx(rows[index]["phi"])
    batch = collate([dataset[0], dataset[1]])
    batch["dropped"] = torch.zeros(2, dtype=torch.bool)
    null = generator.encode_prompts([""]).null
    assert torch.equal(conditioning(batch, null).tensors["pooled_projections"], batch["cond.pooled_projections"])


class Counts:
    """Notes the pixels [B, 3, H, W] of each call of a VAE, and how many prompts a generator encodes."""

    def __init__(self, generator, monkeypatch):
        self.images, self.prompts = [], []
        codec, texts = generator.pipeline.vae.encode, generator.encode_prompts
        monkeypatch.setattr(
            generator.pipeline.vae, "encode", lambda x: (self.images.append(tuple(x.shape)), codec(x))[1]
        )
        monkeypatch.setattr(generator, "encode_prompts", lambda x: (self.prompts.append(len(x)), texts(x))[1])


def files(folder, kind):
    return sorted(folder.glob(f"{kind}-*/*.arrow"))


def test_a_second_run_encodes_nothing(load, ranked_rows, tmp_path, monkeypatch):
    """Nor do other labels, another noise seed or order, or other LoRA weights."""
    generator = load("flow")
    first = encode_rows(generator, ranked_rows(4), plan(), tmp_path)
    counts = Counts(generator, monkeypatch)
    generator.add_lora(2, None, None, 0.0)
    again = encode_rows(generator, ranked_rows(4, [(0.1, 0.2, 0.3, 0.4)]), plan(noise_seed=5), tmp_path)
    assert again.targets["phi"][0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    turned = encode_rows(generator, ranked_rows(4).select([3, 1]), plan(), tmp_path)
    for row, of in ((0, 3), (1, 1)):
        assert torch.equal(turned[row]["latents"], first[of]["latents"])
        assert torch.equal(turned[row]["cond.pooled_projections"], first[of]["cond.pooled_projections"])
    assert (counts.images, counts.prompts) == ([], [])
    assert first.key == again.key != turned.key


def test_new_rows_alone_are_encoded(load, ranked_rows, tmp_path, monkeypatch):
    """One new row among known ones; its prompt is known."""
    generator = load("flow")
    encode_rows(generator, ranked_rows(5).select([0, 1, 2, 4]), plan(), tmp_path)
    counts = Counts(generator, monkeypatch)
    dataset = encode_rows(generator, ranked_rows(5), plan(), tmp_path)
    assert sum(shape[0] for shape in counts.images) == 4
    assert sum(counts.prompts) == len(set(ranked_rows(5)["prompt"][:]) - set(ranked_rows(3)["prompt"][:]))
    monkeypatch.undo()
    fresh = encode_rows(generator, ranked_rows(5), plan(), tmp_path / "fresh")
    for row in range(5):
        assert torch.equal(dataset[row]["latents"], fresh[row]["latents"])


def test_another_codec_encoder_tokenizer_or_size_has_a_cache_of_its_own(load):
    keys = [content.latents_key(load("flow")), content.latents_key(load("flow"), Sizes(16))]
    generator, other = load("flow"), load("flow")
    generator.pipeline.vae.register_to_config(scaling_factor=0.71)
    with torch.no_grad():
        next(other.pipeline.vae.parameters())[0] += 1e-3
    keys += [content.latents_key(generator), content.latents_key(other)]
    assert len(set(keys)) == 4
    texts = [content.conditioning_key(load("flow"))]
    with torch.no_grad():
        next(other.pipeline.text_encoder_3.parameters())[0] += 1e-3
    generator._tokens -= 1
    texts += [content.conditioning_key(generator), content.conditioning_key(other)]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PNG"])
def test_one_other_pixel_is_another_image(load, ranked_rows, tmp_path, form):
    """Also in files of equal length and equal last bytes, embedded or on disk."""

    def encoded(value):
        image = Image.new("RGB", (16, 16), (200, 30, 90))
        image.putpixel((2, 3), (value, 0, 0))
        buffer = io.BytesIO()
        image.save(buffer, form)
        return buffer.getvalue()

    generator, file = load("flow"), tmp_path / "image"
    kinds = {"image": datasets.Image(decode=False), "prompt": datasets.Value("string")}
    for cell in (lambda data: {"bytes": data, "path": None}, lambda _: {"bytes": None, "path": str(file)}):
        found = []
        for value in (0, 255):
            file.write_bytes(encoded(value))
            os.utime(file, (1, 1))
            rows = [{"image": cell(encoded(value)), "prompt": "a ring"}]
            data = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
            found.append(encode_rows(generator, data, plan(), tmp_path / "cache")[0]["latents"])
        assert not torch.equal(*found)


@pytest.mark.parametrize("kind", ["latents", "conditioning"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-200], lambda raw: bytes([raw[0] ^ 1]) + raw[1:], lambda raw: b""])
def test_a_damaged_cache_is_made_again(load, ranked_rows, tmp_path, kind, damage, caplog):
    """Truncated, flipped in any byte, or empty; and the run after that finds it whole."""
    generator = load("flow")
    expected = encode_rows(generator, ranked_rows(3), plan(), tmp_path)[1]
    (file,) = files(tmp_path, kind)
    good = file.read_bytes()
    file.write_bytes(damage(good))
    for warnings in (1, 1):
        item = encode_rows(generator, ranked_rows(3), plan(), tmp_path)[1]
        assert all(torch.equal(value, item[name]) for name, value in expected.items())
        assert len([record for record in caplog.records if "is damaged" in record.getMessage()]) == warnings
    assert file.read_bytes() == good


def test_one_flipped_bit_of_the_values_is_noticed(load, ranked_rows, tmp_path):
    """The file stays a readable one, so a checksum alone tells."""
    generator = load("flow")
    expected = encode_rows(generator, ranked_rows(3), plan(), tmp_path)
    (file,) = files(tmp_path, "latents")
    raw, values = file.read_bytes(), expected.rows[1]["latents"]
    place = raw.index(values) + 5
    file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    again = encode_rows(generator, ranked_rows(3), plan(), tmp_path)
    assert again.rows[1]["latents"] == values


def test_what_was_encoded_before_a_damaged_row_is_kept(load, ranked_rows, tmp_path, monkeypatch):
    generator = load("flow")
    with pytest.raises(DataError, match="row 19"):
        encode_rows(generator, altered(ranked_rows(20), 19, _set_image(1, b"")), plan(), tmp_path)
    counts = Counts(generator, monkeypatch)
    encode_rows(generator, ranked_rows(20), plan(), tmp_path)
    assert sum(shape[0] for shape in counts.images) == 4 * 4  # the batch of rows 16 to 19


def test_a_start_makes_few_calls_a_row(load, random_png, tmp_path):
    """Of rows in another order than on disk, which `datasets` would gather one by one; the rows are the same."""
    generator = load("flow")
    kinds = {"image": datasets.Image(decode=False), "prompt": datasets.Value("string")}
    items = [{"image": {"bytes": random_png(16, 16, row), "path": None}, "prompt": f"{row % 5}"} for row in range(90)]
    data = datasets.Dataset.from_list(items, features=datasets.Features(kinds))
    plain = encode_rows(generator, data, plan(), tmp_path)
    calls = []
    for count in (30, 90):
        noted = []
        turned = data.select(range(count - 1, -1, -1))
        sys.setprofile(lambda _frame, event, _value, noted=noted: noted.append(event) if "call" in event else None)
        try:
            encoded = encode_rows(generator, turned, plan(), tmp_path)
        finally:
            sys.setprofile(None)
        calls.append(len(noted))
        assert torch.equal(encoded[2]["latents"], plain[count - 3]["latents"])
    assert (calls[1] - calls[0]) / 60 < 15


def test_conditioning_is_stored_once_a_prompt(load, ranked_rows, tmp_path, monkeypatch):
    generator, rows = load("flow"), ranked_rows(8)
    counts = Counts(generator, monkeypatch)
    one = rows.remove_columns("prompt").add_column("prompt", ["a red ring"] * 8)
    dataset = encode_rows(generator, one, plan(), tmp_path)
    (file,) = files(tmp_path, "conditioning")
    assert counts.prompts == [1]
    assert len(datasets.Dataset.from_file(str(file))) == 1
    assert torch.equal(dataset[0]["cond.encoder_hidden_states"], dataset[7]["cond.encoder_hidden_states"])


def test_padding_with_zeros_takes_no_space():
    tokens = torch.zeros(512, 64)
    tokens[:9] = torch.randn(9, 64)
    raw, name = pack(tokens, torch.float32)
    assert len(raw) < 1.3 * 9 * 64 * 4
    assert torch.equal(unpack(raw, tokens.shape, name), tokens)


@pytest.mark.parametrize("candidates", [1, 4, 7])
def test_the_codec_encodes_at_most_two_images_at_once(load, tmp_path, candidates, random_png, monkeypatch):
    """Whatever K and batch; the values are those of one call."""
    features = {"images": datasets.List(datasets.Image()), "prompt": datasets.Value("string")}
    pictures = [{"bytes": random_png(16, 16, k), "path": None} for k in range(candidates)]
    rows = [{"images": pictures[k:] + pictures[:k], "prompt": "a ring"} for k in range(3)]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    generator = load("flow")
    counts = Counts(generator, monkeypatch)
    dataset = encode_rows(generator, data, plan(), tmp_path)
    assert max(shape[0] for shape in counts.images) == min(2, candidates)
    assert sum(shape[0] for shape in counts.images) == candidates * min(3, candidates)  # equal rows are encoded once
    with torch.no_grad():
        pixels = torch.stack([to_pixels(decode_image(picture, "here")) for picture in pictures])
        torch.testing.assert_close(dataset[0]["latents"], generator.encode(pixels), rtol=0, atol=1e-5)
    monkeypatch.setattr(latents, "PIXELS_A_CALL", 255)
    counts.images.clear()
    encode_rows(generator, data, plan(), tmp_path / "large")
    assert {shape[0] for shape in counts.images} == {1}


def test_plain_captioned_pictures_need_no_labels(load, ranked_rows, tmp_path):
    """Equal captions still get draws of their own."""
    rows = ranked_rows(5).remove_columns(["phi", "prompt_id"])
    dataset = encode_rows(load("unet"), rows, plan(), tmp_path)
    assert dataset.targets["phi"].shape == (5, 4)
    assert rows[0]["prompt"] == rows[4]["prompt"]
    assert not torch.equal(dataset[0]["noise"], dataset[4]["noise"])


def test_prompts_over_the_limit_are_told_of_once(make, ranked_rows, caplog):
    rows = ranked_rows(4)
    long = [f"{text} {'with a red ring ' * 40}" if row < 2 else text for row, text in enumerate(rows["prompt"])]
    rows = rows.remove_columns("prompt").add_column("prompt", long)
    make("flow", rows=rows, parts={"eval_dataset": rows})
    told = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("2 of 4 prompts are longer than the ")
    assert "'tokenizer_3' of 'flow' reads (beside it tokenizer " in told[0]


# --- rows that cannot be used ---------------------------------------------------------------------------------------


def altered(rows, row, change):
    items = rows.cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
    change(items[row])
    return datasets.Dataset.from_list(items, features=rows.features)


def _set_image(k, data):
    def change(item):
        item["images"][k] = {"bytes": data, "path": None}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set_image(2, picture()[:60]), "row 19, candidate 2: the image cannot be decoded"),
        (_set_image(1, b""), "row 19, candidate 1: the image or video is empty"),
        (_set_image(3, b"no picture at all"), "row 19, candidate 3: the image cannot be decoded"),
        (_set_image(0, picture((24, 3))), "row 19: 24 x 3 pixels, below the 4 that the model needs"),
        (lambda item: item["images"].pop(), "row 19: 3 candidates, row 0 has 4"),
        (lambda item: item["phi"].pop(), r"row 19: phi is .*; it must be 4 finite numbers"),
        (lambda item: item.update(phi=[0.1, 0.2, float("nan"), 0.0]), "row 19: phi is .*nan"),
    ],
)
def test_a_damaged_row_is_named(load, ranked_rows, tmp_path, change, message):
    """Row 19 is in the second batch of sixteen: what is expected comes from row 0, not from its neighbours."""
    with pytest.raises(DataError, match=message):
        encode_rows(load("flow"), altered(ranked_rows(20), 19, change), plan(), tmp_path)


def test_other_unusable_data(load, ranked_rows, tmp_path):
    generator, rows = load("flow"), ranked_rows(2)
    with pytest.raises(DataError, match=r"lacks \['prompt'\]; its columns are"):
        encode_rows(generator, rows.remove_columns("prompt"), plan(), tmp_path)
    with pytest.raises(DataError, match="has no row: check the file"):
        encode_rows(generator, rows.select([]), plan(), tmp_path)
    with pytest.raises(DataError, match="row 0: no image"):
        encode_rows(generator, altered(rows, 0, lambda item: item.update(images=[])), plan(), tmp_path)


def test_pictures_come_in_many_forms(tmp_path):
    expected = torch.tensor([200, 30, 90]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16) / 255
    file = tmp_path / "p.png"
    file.write_bytes(picture())
    for form in (picture(), {"bytes": picture(), "path": None}, {"bytes": None, "path": str(file)}, Image.open(file)):
        assert torch.equal(to_pixels(decode_image(form, "here"))[None], expected)
    grey = Image.new("L", (4, 4), 128)
    assert to_pixels(decode_image(grey, "here")).shape == (3, 4, 4)
    with pytest.raises(DataError, match="here: the image cannot be decoded"):
        decode_image({"bytes": None, "path": str(Path(tmp_path) / "gone.png")}, "here")
