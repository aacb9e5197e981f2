"""DenseDPO on a tiny Wan: labels of latent frames, comparators as settings, latents of the pairs, and bad rows."""

from __future__ import annotations

import logging
import math

import datasets
import pytest
import torch
from clips import encoded, frames
from safetensors.torch import save
from tiny_families.videos import VIDEOS

from alignkit.adapters.fingerprint import base_of
from alignkit.errors import ConfigError, DataError
from alignkit.losses import dense_dpo, diffusion_dpo
from alignkit.trainers.densedpo import DenseDPOConfig, DenseDPOTrainer
from alignkit.trainers.sft import SFTConfig, SFTTrainer

LABELS = [[1, 0, -1], [-1, -1, 1]]  # of three segments: one latent frame each in clips of 9 frames
SEGMENTS = [[0, 1], [1, 5], [5, 9]]
SETTINGS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "lora_rank": 2,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "caption_dropout": 0.0,
}


@pytest.fixture(scope="module")
def pairs():
    """Two rows of two encoded clips."""
    return [[encoded(frames(9, 16, 16, seed=10 * row + k)) for k in range(2)] for row in range(2)]


@pytest.fixture(scope="module")
def wan(load):
    """One generator for the tests that only read it."""
    return load("wan")


@pytest.fixture
def rows(pairs):
    def make(**columns):
        base = {"prompt": ["a ring", "a cross"], "videos": pairs, "labels": LABELS, "segments": [SEGMENTS] * 2}
        kept = {name: values for name, values in (base | columns).items() if values is not None}
        return datasets.Dataset.from_dict(kept)

    return make


@pytest.fixture
def make(load, rows, tmp_path):
    def build(data=None, *, family="wan", generator=None, **given):
        args = DenseDPOConfig(**SETTINGS | {"output_dir": str(tmp_path / "run")} | given)
        model = load(family) if generator is None else generator
        return DenseDPOTrainer(model, args, rows() if data is None else data)

    return build


def frame_errors(trainer, batch):
    with torch.no_grad():
        return (
            trainer.errors(trainer.model, batch, per="frame"),
            trainer.reference_errors(trainer.model, batch, per="frame"),
        )


def output_of(trainer, batch):
    with torch.no_grad():
        return trainer.method_loss(trainer.model, batch)


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_reads_the_labels_of_latent_frames(make, batch_of, stir):
    trainer = make()
    stir(trainer)
    batch = batch_of(trainer, 2)
    assert batch["labels"].tolist() == LABELS
    assert batch["segments"].tolist() == [[0, 1, 2]] * 2
    output = output_of(trainer, batch)
    expected = dense_dpo(*frame_errors(trainer, batch), torch.tensor(LABELS), beta=500)
    assert (output.loss != 0).tolist() == [[True, False, True], [True] * 3]
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.total_weight() == trainer.loss_weight(batch) == 5


@pytest.mark.parametrize(("reduction", "count"), [("segment", 4), ("sum", 2)])
def test_other_reductions_count_their_own_terms(make, rows, batch_of, reduction, count):
    """Two segments, of one latent frame and of two."""
    trainer = make(rows(segments=[[[0, 1], [1, 9]]] * 2, labels=[[1, -1], [1, 1]]), reduction=reduction)
    batch = batch_of(trainer, 2)
    assert batch["labels"].tolist() == [[1, -1, -1], [1, 1, 1]]
    output = output_of(trainer, batch)
    assert output.total_weight() == trainer.loss_weight(batch) == count
    assert output.loss.flatten().tolist() == pytest.approx([math.log(2)] * count)


@pytest.mark.parametrize("family", [family for family in VIDEOS if family != "wan"])  # `wan` is that of other tests
def test_video_families_train(make, rows, family):
    """Each with its own temporal ratio and layout of latents; the start is log 2."""
    clips = [[encoded(frames(9, 32, 32, seed=10 * row + k)) for k in range(2)] for row in range(2)]
    trainer = make(rows(videos=clips, segments=[[[0, 1], [1, 9]]] * 2, labels=[[1, 0], [0, -1]]), family=family)
    labels = trainer.train_dataset.targets["labels"]
    latent_frames = 1 + 8 // trainer.generator.temporal_ratio
    assert [own.tolist() for own in labels] == [
        [1] + [0] * (latent_frames - 1),
        [0] + [-1] * (latent_frames - 1),
    ]
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entry["health/implicit_accuracy"] == 0.5


def test_ties_alone_cost_nothing_and_keep_a_graph(make, batch_of):
    trainer = make()
    batch = batch_of(trainer, 2)
    batch["labels"] = torch.zeros_like(batch["labels"])
    output = trainer.method_loss(trainer.model, batch)
    assert output.total_weight() == trainer.loss_weight(batch) == 0
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == 0
    loss.backward()
    assert all(not p.grad.any() for p in trainer._trainable().values() if p.grad is not None)


@pytest.mark.parametrize("options", [{"low_memory": True}, {"protect_winner": 0.5}])
def test_options_that_leave_the_value(make, batch_of, stir, options):
    losses = []
    for own in ({}, options):
        trainer = make(**own)
        stir(trainer)
        losses.append(output_of(trainer, batch_of(trainer, 2)).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)


def test_protection_changes_the_gradient(make, batch_of, stir):
    """With mu next to 1 the losers pass on almost nothing where they are like the winners."""
    gradients = []
    for mu in (None, 0.99):
        trainer = make(protect_winner=mu)
        stir(trainer)
        trainer.compute_loss(trainer.model, batch_of(trainer, 2)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer._trainable().values()]))
    assert not torch.allclose(*gradients, rtol=1e-2)


@pytest.mark.parametrize("is_shared", [True, False])
def test_both_clips_share_their_draws(make, batch_of, is_shared):
    batch = batch_of(make(share_noise=is_shared, share_timestep=is_shared), 2)
    for name in ("t", "noise"):
        assert torch.equal(batch[name][:, 0], batch[name][:, 1]) == is_shared


# --- comparators ----------------------------------------------------------------------------------------------------


def test_one_label_for_the_clip_is_flow_dpo(make, batch_of, stir):
    """`clip_dpo` on the same rows, whose majorities are the second clip and none: one pair of two trains."""
    trainer = make(loss="clip_dpo")
    stir(trainer)
    assert len(trainer.train_dataset) == 1
    batch = batch_of(trainer, 1)
    with torch.no_grad():
        errors = [
            trainer.errors(trainer.model, batch)[:, [1, 0]],
            trainer.reference_errors(trainer.model, batch)[:, [1, 0]],
        ]
    output = output_of(trainer, batch)
    torch.testing.assert_close(output.loss, diffusion_dpo(*errors, beta=500).loss)
    assert output.total_weight() == trainer.loss_weight(batch) == 1


def test_winners_alone_are_supervised_fine_tuning(make, rows, load, batch_of, stir, tmp_path):
    """The loss of the method sft on ranked rows of the same clips, and no reference is kept."""
    trainer = make(loss="clip_sft", full_finetune=True)
    assert trainer.generator.model._frozen == ()
    ranked = rows(phi=[[0.0, 1.0], [0.0, 1.0]]).select([1])
    other = SFTTrainer(load("wan"), SFTConfig(**SETTINGS | {"output_dir": str(tmp_path / "sft")}), ranked)
    batch = batch_of(trainer, 1)
    torch.testing.assert_close(output_of(trainer, batch).loss, output_of(other, batch | {"phi": ranked_phi()}).loss)


def ranked_phi():
    return torch.tensor([[0.0, 1.0]])


def test_several_losses_are_means_of_each_pair(make, batch_of, stir):
    """The sum that LocalDPO has, on segments of time: by frame and by clip, preference and winner's error."""
    names, weights = ["dense_dpo", "clip_dpo", "clip_sft", "dense_sft"], [1.0, 1.0, 0.1, 0.1]
    trainer = make(loss=names, loss_weights=weights)
    stir(trainer)
    batch = batch_of(trainer, 2)
    policy, reference = frame_errors(trainer, batch)
    labels = torch.tensor(LABELS)
    frame = dense_dpo(policy, reference, labels, beta=500).loss.sum(1) / torch.tensor([2, 3])
    clip = torch.zeros(2)
    clip[1] = diffusion_dpo(policy.mean(-1)[1:, [1, 0]], reference.mean(-1)[1:, [1, 0]], beta=500).loss
    winner = torch.tensor([0.0, policy[1, 1].mean()])
    dense = torch.stack([(policy[0, 0, 0] + policy[0, 1, 2]) / 2, (policy[1, 1, :2].sum() + policy[1, 0, 2]) / 3])
    output = output_of(trainer, batch)
    torch.testing.assert_close(output.loss, frame + clip + 0.1 * winner + 0.1 * dense, rtol=1e-4, atol=0)
    assert output.total_weight() == trainer.loss_weight(batch) == 2
    assert output.metrics["loss_clip_dpo"].item() == pytest.approx(clip.mean().item(), rel=1e-4)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_pairs_with_unequal_starts_are_named(make, rows, caplog):
    with caplog.at_level(logging.WARNING):
        make(rows(etas=[[0.7, 0.7], [0.0, 0.7]]))
    assert "in 1 of 2 pairs the clips started at different noise levels (column 'etas')" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make(rows(etas=[[0.7, 0.7], [0.8, 0.8]]))
    assert "noise levels" not in caplog.text


def test_pairs_with_too_few_labels_are_left_out(make, rows, caplog):
    few = rows(labels=[[1, 0, 0], []])
    with caplog.at_level(logging.WARNING):
        trainer = make(few)
    assert "1 of 2 pairs are left out: no labels, or too many ties (least_labelled 0.2)" in caplog.text
    assert [own.tolist() for own in trainer.train_dataset.targets["labels"]] == [[1, 0, 0]]
    with pytest.raises(DataError, match="of 2 rows none is left"):
        make(few, least_labelled=0.5)


def test_another_frame_rate_and_fewer_frames_shift_the_labels(make, rows):
    """Clips at 8 frames a second: at 4, five frames are left, which show frames 0, 2, 4, 6 and 8."""
    data = rows(fps=[8.0, 8.0], segments=[[[0, 3], [3, 5], [5, 9]]] * 2)
    assert [own.tolist() for own in make(data, fps=4.0).train_dataset.targets["labels"]] == [[1, -1], [-1, 1]]
    cut = make(data, num_frames=5, least_labelled=0.0).train_dataset
    assert [own.tolist() for own in cut.targets["labels"]] == [[1, 1], [-1, -1]]


@pytest.mark.parametrize(
    ("segments", "labels", "expected"),
    [([[0, 5], [5, 7], [7, 9]], [1, -1, -1], [1, 1]), ([[0, 1], [1, 5], [5, 9]], [0, 1, -1], [0, 1])],
)
def test_segments_behind_the_last_frame_have_no_vote(make, rows, segments, labels, expected):
    """Segments of the first five frames alone decide about the clip, and whether enough of it is labelled."""
    data = rows(segments=[segments] * 2, labels=[labels, [0, 0, 1]])
    cut = make(data, num_frames=5, loss="clip_dpo", least_labelled=0.5).train_dataset
    assert [own.tolist() for own in cut.targets["labels"]] == [expected]
    assert cut.targets["clip_label"].tolist() == [1]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"labels": [[1, 0, -1], [1, 0, 3]]}, {}, "row 1: label 2 is 3; labels are 1"),
        ({"labels": [[1, 0, -1], [1, 0]]}, {}, r"row 1: 2 labels \[1, 0\] for 3 segments"),
        ({"segments": None}, {}, r"rows of labelled segments lack \['segments'\]"),
        ({}, {"fps": 4.0}, r"rows of labelled segments lack \['fps'\]"),
    ],
)
def test_rows_that_are_refused(make, rows, wan, columns, options, message):
    with pytest.raises(DataError, match=message):
        make(rows(**columns), generator=wan, **options)


def test_a_row_holds_two_clips(make, rows, wan, pairs):
    with pytest.raises(DataError, match="row 0 has 1 clips; a row of labelled segments has two"):
        make(rows(videos=[clips[:1] for clips in pairs]), generator=wan)


def test_images_have_no_segments(make, ranked_rows):
    with pytest.raises(ConfigError, match="'flow' makes images; segments are those of videos"):
        make(ranked_rows(1), family="flow")


# --- latents of the pairs -------------------------------------------------------------------------------------------


def cell(latents, name="latents"):
    return {"bytes": save({name: latents}), "path": None}


def latents_of(seed, shape=(4, 3, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def latent_rows(rows, wan):
    """Rows of latents in place of videos; `change` replaces the second row's."""
    codec = base_of(wan.pipeline.vae)

    def make(change=None, **columns):
        cells = [[cell(latents_of(2 * row + k)) for k in range(2)] for row in range(2)]
        if change is not None:
            cells[1] = change
        columns = {"latents": cells, "codec": [codec] * 2, "num_frames": [9, 9]} | columns
        return rows(videos=None, **columns)

    return make


def test_latents_are_trained_on_as_they_are(make, latent_rows, load, monkeypatch):
    generator = load("wan")
    monkeypatch.setattr(type(generator), "encode", None)  # nothing is encoded
    trainer = make(latent_rows(), generator=generator)
    for row in range(2):
        expected = torch.stack([latents_of(2 * row), latents_of(2 * row + 1)])
        assert torch.equal(trainer.train_dataset[row]["latents"], expected)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_latents_in_half_precision_are_exact(make, latent_rows):
    half = latents_of(0).bfloat16()
    trainer = make(latent_rows([cell(half)] * 2))
    assert torch.equal(trainer.train_dataset[1]["latents"], torch.stack([half, half]).float())


def test_latents_of_another_vae_are_refused(make, latent_rows, load):
    generator = load("wan")
    with torch.no_grad():
        next(generator.pipeline.vae.parameters()).add_(1e-3)
    with pytest.raises(DataError, match=r"latents made with the VAE float32:\w{16}; that of 'wan' is float32:\w{16}"):
        make(latent_rows(), generator=generator)


def test_a_vae_that_cannot_be_compared_is_named(make, latent_rows, load, caplog):
    """The latents' VAE is known in float32; the model is loaded in bfloat16."""
    generator = load("wan")
    generator.pipeline.vae.to(torch.bfloat16)
    make(latent_rows(), generator=generator)
    assert "the latents' VAE float32:" in caplog.text
    assert "cannot be compared" in caplog.text


@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        (None, {"codec": None}, r"rows of labelled segments lack \['codec'\]"),
        (None, {"num_frames": [9, 13]}, "row 1: num_frames is 13, and its latents are of 9 frames"),
        ([cell(latents_of(0)), {"bytes": b"broken", "path": None}], {}, "row 1, candidate 1: .* no safetensors file"),
        ([cell(latents_of(0), "x")] * 2, {}, r"row 1, candidate 0: the safetensors file holds \['x'\]"),
        ([cell(latents_of(0, (3, 3, 4, 4)))] * 2, {}, r"row 1: latents of shape \[2, 3, 3, 4, 4\].* C = 4"),
        ([cell(latents_of(0)), cell(latents_of(0, (4, 2, 4, 4)))], {}, "row 1: its latents differ in shape"),
        ([cell(latents_of(0) * torch.inf)] * 2, {}, "row 1: its latents hold NaN or infinite values"),
    ],
)
def test_latents_that_are_refused(make, latent_rows, wan, change, columns, message):
    with pytest.raises(DataError, match=message):
        make(latent_rows(change, **columns), generator=wan)


def test_latents_follow_no_setting_of_videos(make, latent_rows, wan):
    with pytest.raises(ConfigError, match="the data holds latents, which are trained on as they are"):
        make(latent_rows(), generator=wan, num_frames=5)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "diffusion_dpo"}, "loss is 'diffusion_dpo'; use dense_dpo, clip_dpo, dense_sft or clip_sft"),
        ({"loss": []}, "name at least one"),
        ({"loss": ["dense_dpo", "clip_sft"], "loss_weights": [1.0]}, "give one for each"),
        ({"reduction": "mean"}, "reduction is 'mean'; use frame, segment or sum"),
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"least_labelled": 1.5}, "least_labelled is 1.5; it must be at least 0 and at most 1"),
        ({"protect_winner": 0.5, "low_memory": True}, "protect_winner needs a loss of pairs"),
        ({"protect_winner": 0.5, "loss": "clip_sft"}, "protect_winner needs a loss of pairs"),
    ],
)
def test_settings_that_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        DenseDPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
