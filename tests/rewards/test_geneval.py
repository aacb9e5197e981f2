"""GenEval's rules on hand-made boxes, against the published program's in plain loops, and on the sandbox's scenes."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForObjectDetection

from alignkit.errors import DataError, MissingFileError
from alignkit.records import Prompt
from alignkit.sandbox.captions import captions, parse
from alignkit.sandbox.gold import GoldReward, look
from alignkit.sandbox.scenes import CATEGORIES, SHAPES, compose, render
from rewards.geneval import GenEval, relations
from rewards.models import detectors
from rewards.models.detectors import COLORS, ClipColors, Detections, TransformersDetector

LABELS = ("cat", "dog", "cup", "remote")


class Fixed:
    """A detector that finds what it is told, as (label, box, score)."""

    labels = LABELS

    def __init__(self, *pictures):
        self.pictures = pictures

    def __call__(self, media):
        return [
            Detections(torch.tensor([b for _, b, _ in t]), [n for n, *_ in t], torch.tensor([s for *_, s in t]))
            for t in self.pictures
        ]


def name_color(picture, boxes, masks, name):
    """The colour at the middle of each box."""
    at = [((x0 + x1) // 2, (y0 + y1) // 2) for x0, y0, x1, y1 in boxes.int().tolist()]
    return ["red" if picture[0, y, x] > 0.5 else "blue" if picture[2, y, x] > 0.5 else "black" for x, y in at]


@pytest.fixture
def build(monkeypatch):
    """A GenEval on fixed detections."""

    def made(*pictures, **options):
        mine = SimpleNamespace(detector=lambda: Fixed(*pictures), colors=lambda: name_color)
        monkeypatch.setitem(sys.modules, "mine_for_geneval", mine)
        return GenEval("mine_for_geneval:detector", "mine_for_geneval:colors", **options)

    return made


def prompt(*include, exclude=(), tag="x"):
    return Prompt.from_text("a photo", tag=tag, include=list(include), exclude=list(exclude))


def want(name, count=1, **more):
    return {"class": name, "count": count, **more}


def thing(name, x=10, y=10, score=0.95, size=8):
    return (name, [float(x), float(y), float(x + size), float(y + size)], score)


def picture(red=(), blue=()):
    media = torch.zeros(1, 3, 64, 64)
    for channel, boxes in ((0, red), (2, blue)):
        for x, y in boxes:
            media[0, channel, y : y + 8, x : x + 8] = 1
    return media


CAT, DOG, FAINT = thing("cat"), thing("dog", x=40), thing("cat", x=30, score=0.4)
TWO_CATS = [CAT, thing("cat", y=40)]
CASES = {
    "there": ([CAT], [want("cat")], [], ""),
    "absent": ([DOG], [want("cat")], [], "expected cat>=1, found 0"),
    "nothing at all": ([], [want("cat")], [], "expected cat>=1, found 0"),
    "too faint": ([thing("cat", score=0.3)], [want("cat")], [], "expected cat>=1, found 0"),
    "two kinds": ([CAT, DOG], [want("cat"), want("dog")], [], ""),
    "enough": (TWO_CATS, [want("cat", 2)], [want("cat", 3)], ""),
    "too few": ([CAT], [want("cat", 2)], [want("cat", 3)], "expected cat>=2, found 1"),
    "too many": ([*TWO_CATS, FAINT], [want("cat", 2)], [want("cat", 3)], "expected cat<3, found 3"),
    "unwanted": ([CAT, DOG], [want("cat")], [want("dog")], "expected dog<1, found 1"),
    "left": ([CAT, DOG], [want("dog"), want("cat", position=["left of", 0])], [], ""),
    "not right": (
        [CAT, DOG],
        [want("dog"), want("cat", position=["right of", 0])],
        [],
        "expected cat right of target, found left of target",
    ),
    "above": ([CAT, thing("dog", y=50)], [want("dog"), want("cat", position=["above", 0])], [], ""),
    "overlapping": (
        [CAT, thing("dog", x=11)],
        [want("dog"), want("cat", position=["left of", 0])],
        [],
        "expected cat left of target, found neither side of target",
    ),
    "no target": (
        [CAT],
        [want("dog"), want("cat", position=["left of", 0])],
        [],
        "expected dog>=1, found 0\nno target for cat to be left of",
    ),
    "alias": ([thing("remote")], [want("tv remote")], [], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts_and_reasons(case, build):
    things, include, exclude, reason = CASES[case]
    asked = prompt(*include, exclude=exclude)
    (verdict,) = build(things).judge(picture(), [asked])
    assert verdict.reason == reason
    assert verdict.correct == (not reason)
    assert build(things)(picture(), [asked]).total.tolist() == [float(not reason)]


def test_counting_asks_for_surer_detections(build):
    asked = want("cat", 2), [want("cat", 3)]
    for tag, total in (("counting", 1.0), ("two_object", 0.0)):
        assert build([*TWO_CATS, FAINT])(picture(), [prompt(asked[0], exclude=asked[1], tag=tag)]).total.item() == total


def test_colors_are_asked_of_the_surest_things(build):
    """Attribute binding; and the second-best cat, which is red, does not help the best one, which is blue."""
    media = picture(red=[(10, 10)], blue=[(40, 10)])
    bound = prompt(want("cat", color="red"), want("dog", color="blue"))
    swapped = prompt(want("cat", color="blue"), want("dog", color="red"))
    scores = build([CAT, DOG], [CAT, DOG])(media.repeat(2, 1, 1, 1), [bound, swapped])
    assert scores.total.tolist() == [1, 0]
    assert scores.parts["color"].tolist() == [1, 0]
    assert scores.parts["count"].tolist() == [1, 1]
    cats = [thing("cat", score=0.5), thing("cat", x=40, score=0.9)]
    (verdict,) = build(cats).judge(media, [prompt(want("cat", color="red"))])
    assert verdict.reason == "expected red cat>=1, found 1 blue"


def test_a_thing_of_the_wrong_color_is_no_target(build):
    media = picture(blue=[(40, 10)])
    asked = prompt(want("dog", color="red"), want("cat", position=["left of", 0]))
    (verdict,) = build([CAT, DOG]).judge(media, [asked])
    assert verdict.reason.splitlines()[1] == "no target for cat to be left of"
    fractional = build([CAT, DOG], fractional=True)(media, [asked])
    assert fractional.total.tolist() == [0.5]  # dog, red, cat, left of: half of it
    met = {"count": 1, "color": 0, "position": 0, "exclude": 1}
    assert {kind: part.item() for kind, part in fractional.parts.items()} == met


def test_no_more_than_so_many_of_a_class(build):
    crowd = [thing("cat", x=i) for i in range(20)]
    assert "found 16" in build(crowd).judge(picture(), [prompt(want("cat", 17))])[0].reason
    assert "found 20" in build(crowd, max_objects=30).judge(picture(), [prompt(want("cat", 21))])[0].reason


def published_relations(a, b):
    """The published program's rule, with arrays."""
    boxes = np.array([a, b]).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    revised = np.maximum(np.abs(offset) - 0.1 * sizes.sum(0), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in found.items() if holds}


def test_relations_are_the_published_rule():
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 64, (2000, 2, 2, 2)), axis=2).reshape(2000, 2, 4)
    found = [relations(a.tolist(), b.tolist()) for a, b in boxes]
    assert found == [published_relations(a, b) for a, b in boxes]
    kinds = {frozenset(one) for one in found}
    assert {frozenset(), frozenset(["left of", "above"]), frozenset(["below"])} <= kinds
    assert relations([0, 0, 8, 8], [0, 0, 8, 8]) == set()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Prompt.from_text("a cat"), "no `include` and no `exclude`"),
        (prompt(want("unicorn")), "has no class 'unicorn'"),
        (prompt(want("dgo")), "Did you mean 'dog'"),
        (prompt({"class": "cat"}), "`count` a number"),
        (prompt(want("cat", 0)), "`count` a number"),
        (prompt(want("cat", position=["left of", 0])), "earlier clause"),
        (prompt(want("dog"), want("cat", position=["beside", 0])), "one of left of"),
    ],
)
def test_metadata_that_says_nothing_is_refused(asked, told, build):
    with pytest.raises(DataError, match=told):
        build([CAT])(picture(), [asked])


def test_colors_need_a_reader_and_folders_must_be_there(build, monkeypatch):
    build([CAT])
    with pytest.raises(DataError, match="give `colors`"):
        GenEval("mine_for_geneval:detector")(picture(), [prompt(want("cat", color="red"))])
    for make in (TransformersDetector, ClipColors):
        with pytest.raises(MissingFileError, match=r"no/where.*hf download"):
            make("no/where")


def test_prompts_come_from_the_benchmark_s_file(tmp_path, build):
    from data_pipelines.prompts import read_prompts

    row = {"tag": "counting", "include": [want("cat", 2)], "exclude": [want("cat", 3)], "prompt": "a photo of two cats"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    prompts = read_prompts(tmp_path / "evaluation_metadata.jsonl")
    assert build(TWO_CATS)(picture(), prompts).total.tolist() == [1]


# --- real models, tiny and random -----------------------------------------------------------------------------------


def yolos(names):
    """Softmax over the classes and, last, nothing."""
    from transformers import YolosConfig, YolosImageProcessorPil

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    places = {"image_size": [32, 48], "num_detection_tokens": 5, "use_mid_position_embeddings": False}
    return YolosConfig(**small, **places, **names), YolosImageProcessorPil(
        size={"shortest_edge": 32, "longest_edge": 64}
    )


def rt_detr(names):
    """A sigmoid a class."""
    from transformers import RTDetrConfig, RTDetrImageProcessorPil, RTDetrResNetConfig

    stages = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"]}
    backbone = RTDetrResNetConfig(embedding_size=8, layer_type="basic", **stages)
    widths = {"encoder_in_channels": [8] * 3, "decoder_in_channels": [16] * 3, "d_model": 16, "num_queries": 5}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    dims = {"encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = RTDetrConfig(backbone_config=backbone, **widths, **heads, **dims, **names)
    return config, RTDetrImageProcessorPil(size={"height": 64, "width": 64})


@pytest.mark.parametrize("family", [yolos, rt_detr])
def test_a_real_detector_finds_what_the_library_finds(family, tmp_path):
    config, processor = family({"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}})
    processor.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path)
    media = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(1))
    found = TransformersDetector(str(tmp_path))(media)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    image = (media[1] * 255).round().byte().permute(1, 2, 0).numpy()
    with torch.no_grad():
        output = model(**processor(images=[image], return_tensors="pt"))
    logits, centred = output.logits[0], output.pred_boxes[0]
    scores = logits.softmax(-1)[:, :-1].amax(1) if family is yolos else logits.sigmoid().flatten().topk(5).values
    torch.testing.assert_close(found[1].scores.sort().values, scores.sort().values, rtol=1e-4, atol=1e-5)
    if family is yolos:
        x, y, w, h = (centred * torch.tensor([60, 40, 60, 40])).unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        torch.testing.assert_close(found[1].boxes, corners, rtol=1e-3, atol=1e-3)
    assert set(found[1].labels) <= set(LABELS)
    verdict = GenEval(str(tmp_path), threshold=0.0)(media, [prompt(want("cup")), prompt(exclude=[want("dog", 99)])])
    assert verdict.total.tolist() == [float("cup" in found[0].labels), 1]


def test_clip_names_the_color_of_its_own_formula(clip_folder):
    """Zero-shot by hand: a crop, three templates a colour, the nearest mean direction."""
    from transformers import AutoTokenizer, CLIPModel

    clip, tokens = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    length, side = clip.config.text_config.max_position_embeddings, clip.config.vision_config.image_size
    media = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(4))
    boxes = torch.tensor([[4.2, 3.0, 4 + side, 3 + side], [10, 20, 10 + side, 20 + side]])
    named = ClipColors(str(clip_folder))(media, boxes, None, "cup")

    def unit(texts):
        inputs = tokens(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        features = clip.get_text_features(**inputs).pooler_output
        return features / features.norm(dim=1, keepdim=True)

    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    with torch.no_grad():
        colors = [
            unit([f"a photo of a {c} cup", f"a photo of a {c}-colored cup", f"a photo of a {c} object"]) for c in COLORS
        ]
        directions = torch.stack([color.mean(0) / color.mean(0).norm() for color in colors])
        for (left, top), name in zip(((4, 3), (10, 20)), named, strict=True):
            crop = media[:, top : top + side, left : left + side]
            seen = clip.get_image_features(pixel_values=((crop - mean) / std)[None]).pooler_output
            assert name == COLORS[int((directions @ seen[0]).argmax())]


def test_a_thing_s_colors_are_read_once(clip_folder, monkeypatch):
    calls, colors = [], ClipColors(str(clip_folder))
    made = colors._colors
    monkeypatch.setattr(colors, "_colors", lambda name: calls.append(name) or made(name))
    for name in ("cup", "dog", "cup"):
        colors(torch.rand(3, 20, 20), torch.tensor([[0.0, 0, 9, 9]]), None, name)
    assert calls == ["cup", "dog"]


@pytest.mark.parametrize(
    ("make", "lost"), [(TransformersDetector, "bbox_predictor"), (ClipColors, "visual_projection")]
)
def test_folders_are_loaded_strictly(make, lost, clip_folder, tmp_path):
    """But for positions, which old files store."""
    folder = shutil.copytree(clip_folder, tmp_path / "folder")
    if make is TransformersDetector:
        config, processor = yolos({"id2label": dict(enumerate(LABELS))})
        AutoModelForObjectDetection.from_config(config).save_pretrained(folder)
        processor.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file(state | positions, folder / "model.safetensors", {"format": "pt"})
    make(str(folder))
    kept = {name: value for name, value in state.items() if not name.startswith(lost)}
    save_file(kept | {"other": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=rf"geneval: .*missing \({lost}.*1 unexpected \(other\)"):
        make(str(folder))


def test_half_precision_pictures_score_in_float32(build):
    media = picture(red=[(10, 10)]).bfloat16()
    scores = build([thing("cup")])(media, [prompt(want("cup", color="red"))])
    assert scores.total.dtype == scores.parts["count"].dtype == torch.float32
    assert scores.total.item() == 1


def test_crops_stay_in_the_picture_and_masks_hide_the_rest():
    media = torch.rand(3, 10, 12)
    assert detectors._cut(media, torch.tensor([-5.0, -5, 40, 40]), None).shape == (3, 10, 12)
    assert detectors._cut(media, torch.tensor([11.9, 9.8, 11.9, 9.8]), None).shape == (3, 1, 1)
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[2, 3] = True
    cut = detectors._cut(media, torch.tensor([2.0, 1, 6, 5]), mask)
    assert torch.equal(cut[:, 1, 1], media[:, 2, 3])
    assert (cut.flatten(1) == 0.6).sum().item() == 3 * 15


# --- the sandbox's scenes -------------------------------------------------------------------------------------------


class Gold:
    """The sandbox's reader of pictures as a detector; what it takes for a thing it is sure of."""

    labels = SHAPES

    def seen(self, picture):
        return look(picture.permute(1, 2, 0).numpy())

    def __call__(self, media):
        found = []
        for things in map(self.seen, media):
            boxes = [[t.x - 1, t.y - 1, t.x + 1, t.y + 1] for t in things]
            names = [t.shape or "unknown" for t in things]
            found.append(Detections(torch.tensor(boxes).reshape(-1, 4), names, torch.ones(len(things))))
        return found


def gold_colors(picture, boxes, masks, name):
    things = Gold().seen(picture)
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()
    return [min(things, key=lambda t: abs(t.x - x) + abs(t.y - y)).color for x, y in centres]


def metadata(spec):
    """A caption's meaning as GenEval writes it, with nothing else allowed in the picture."""
    shapes, colors = [shape for shape, _ in spec.kinds], dict(spec.kinds)
    wanted = [
        want(shape, shapes.count(shape), **({"color": colors[shape]} if colors[shape] else {})) for shape in colors
    ]
    if spec.relation:
        wanted = [wanted[1], wanted[0] | {"position": [spec.relation, 0]}]
    return {"include": wanted, "exclude": [want(shape, shapes.count(shape) + 1) for shape in SHAPES]}


@pytest.mark.parametrize("category", CATEGORIES)
def test_scenes_get_the_verdicts_of_gold(category, monkeypatch):
    """GenEval's rules on gold's eyes agree with gold, on right captions and on those of the next picture.

    They may differ on a position: GenEval lets a diagonal be both, gold asks that one axis dominates. None here does.
    """
    mine = SimpleNamespace(detector=Gold, colors=lambda: gold_colors)
    monkeypatch.setitem(sys.modules, "mine_for_geneval", mine)
    reward, rng = GenEval("mine_for_geneval:detector", "mine_for_geneval:colors"), np.random.default_rng(0)
    texts = rng.choice(captions(category), 12).tolist()
    media = torch.from_numpy(np.stack([render(compose(parse(text), rng), rng) for text in texts])).permute(0, 3, 1, 2)
    for told in (texts, texts[1:] + texts[:1]):
        prompts = [Prompt.from_text(text, **metadata(parse(text))) for text in told]
        truth = GoldReward()(media, prompts).total
        assert torch.equal(reward(media, prompts).total, truth)
        assert truth.all() or told is not texts
