"""Cached latents and keyed draws; rows that cannot be used are named."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from alignkit.errors import DataError
from alignkit.media import decode_image, to_pixels
from alignkit.trainers import latents
from alignkit.trainers.data import collate
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.latents import conditioning, encode_rows
from alignkit.trainers.rankdpo import keep_best_and_worst


def plan(**changes):
    def sample_t(n, generator):
        return torch.rand(n, generator=generator)

    return DrawPlan(**{"sample_t": sample_t, "noise_seed": 0, "caption_dropout": 0.5, **changes})


def picture(size=(16, 16), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def dataset(load, ranked_rows, tmp_path):
    return encode_rows(load("flow"), ranked_rows(6), plan(), tmp_path)


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("share_timestep", [True, False])
def test_what_candidates_share(share_noise, share_timestep):
    draws = plan(share_noise=share_noise, share_timestep=share_timestep).draw("id", 0, (4, 2, 3, 3))
    assert draws.noise.shape == (4, 2, 3, 3)
    assert len({value.item() for value in draws.t}) == (1 if share_timestep else 4)
    assert len({value.sum().item() for value in draws.noise}) == (1 if share_noise else 4)


def test_draws_are_keyed():
    """The same for the same key; others for another prompt, epoch or noise seed."""
    keys = [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1)]
    drawn = [plan(noise_seed=seed).draw(name, epoch, (1, 8)).noise for name, epoch, seed in keys]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == 4
    torch.manual_seed(3)
    assert torch.equal(drawn[0], plan().draw("a", 0, (1, 8)).noise)


def test_noise_is_normal_and_dropout_has_its_share():
    draws = [plan(caption_dropout=0.2).draw(str(i), 0, (1, 4, 4, 4)) for i in range(2000)]
    noise = torch.stack([draw.noise for draw in draws])
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert sum(draw.dropped for draw in draws) / 2000 == pytest.approx(0.2, abs=0.045)
    assert not any(plan(caption_dropout=0.0).draw(str(i), 0, (1, 2)).dropped for i in range(50))
    assert all(plan(caption_dropout=1.0).draw(str(i), 0, (1, 2)).dropped for i in range(50))


def test_low_times_are_left_out():
    """Uniform times become uniform on [t_min, 1]; the noise stays what it was."""
    all_times, high = plan(), plan(t_min=0.6)
    for name in map(str, range(50)):
        before, after = all_times.draw(name, 0, (2, 3)), high.draw(name, 0, (2, 3))
        torch.testing.assert_close(after.t, 0.6 + 0.4 * before.t)
        assert torch.equal(before.noise, after.noise)


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
        ids = [row["prompt_id"] for row in dataset.rows]
        wanted = [dataset.plan.draw(name, epoch, (4, 4, 8, 8)).t[0] for name in ids]
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


def test_a_second_run_encodes_nothing(load, ranked_rows, tmp_path, monkeypatch):
    """Nor do other labels, another noise seed or other LoRA weights; another codec or one changed picture does."""
    generator = load("flow")
    encode_rows(generator, ranked_rows(4), plan(), tmp_path)
    monkeypatch.setattr(latents.Encoder, "__call__", None)
    again = encode_rows(generator, ranked_rows(4, [(0.1, 0.2, 0.3, 0.4)]), plan(noise_seed=5), tmp_path)
    assert again.targets["phi"][0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len(list(tmp_path.glob("latents-*.arrow"))) == 1
    key = latents.cache_key(generator, ranked_rows(4))
    generator.add_lora(2, None, None, 0.0)
    assert latents.cache_key(generator, ranked_rows(4)) == key
    edited = ranked_rows(4).to_list()
    edited[3]["images"][2] = edited[0]["images"][0]
    changed = datasets.Dataset.from_list(edited, features=ranked_rows(4).features)
    assert latents.cache_key(generator, changed) != key
    generator.pipeline.vae.register_to_config(scaling_factor=0.71)
    assert latents.cache_key(generator, ranked_rows(4)) != key
    other = load("flow")
    with torch.no_grad():
        next(other.pipeline.vae.parameters())[0] += 1e-3
    assert latents.cache_key(other, ranked_rows(4)) != key


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
    with pytest.raises(DataError, match="has no row"):
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
