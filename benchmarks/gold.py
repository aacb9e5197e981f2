"""How far the gold verifier can be trusted, and how good the generators are by it. One JSON line a question.

Usage::

    python benchmarks/gold.py renders                  right on rendered scenes, by category (accepts and rejections)
    python benchmarks/gold.py generator FOLDER         gold accuracy of a generator, by category
    python benchmarks/gold.py sheet FOLDER SHEET.png   200 generated images with captions and verdicts, for the eye
    python benchmarks/gold.py labels RANKED            how often phi and the rewards prefer what gold accepts
    python benchmarks/gold.py faults EVALUATION ...    what is wrong with the images before and after a training
    python benchmarks/gold.py strip SHEET.png EVALUATION ...   images from the same noise: base and trained models
    python benchmarks/gold.py clips                    the verifier of clips on rendered clips, by kind and fault
    python benchmarks/gold.py codec FOLDER             the same after a round trip through a VAE; its PSNR
    python benchmarks/gold.py video FOLDER             what it finds in a video generator's clips
    python benchmarks/gold.py clip_sheet FOLDER SHEET.png   generated clips with verdicts of segments, for the eye
    python benchmarks/gold.py pairs FOLDER [ETA ...]   labels of pairs that start from rendered clips (default .65, .8)
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image, ImageDraw
from tqdm import tqdm

from alignkit.evaluation.results import read_pairs
from alignkit.generators import load_generator, wrap
from alignkit.generators.pairs import RolloutPairs
from alignkit.pairs import PairRequest
from alignkit.records import Prompt, Sampling, texts
from alignkit.sandbox import film_captions, film_gold, film_models, films
from alignkit.sandbox.captions import bodies, parse, prompts
from alignkit.sandbox.gold import FAULTS, GoldReward, fault, look, shows
from alignkit.sandbox.scenes import CATEGORIES, compose, contradict, render
from alignkit.seeds import derive_seed
from alignkit.segments import LEAST_LABELLED
from data_pipelines.importers import load_ranked

TIE = 0.05  # difference of graded scores up to which a segment is a tie
CLIP = {"height": films.SIZE, "width": films.SIZE, "num_frames": films.FRAMES}


def renders(count: int) -> dict[str, object]:
    """Share of true scenes accepted and of contradicting scenes rejected, by category, `count` of each."""
    result: dict[str, object] = {"question": "gold on rendered scenes", "scenes_per_category": count}
    for category in CATEGORIES:
        rng = np.random.default_rng(derive_seed("gold-renders", category))
        pool = bodies(category)
        accepted = rejected = 0
        for _ in tqdm(range(count), desc=category):
            spec = parse(pool[int(rng.integers(len(pool)))])
            wrong = contradict(spec, rng)
            accepted += shows(look(render(compose(spec, rng), rng)), spec)
            rejected += not shows(look(render(compose(wrong, rng), rng)), spec)
        result[category] = {"accepts": accepted / count, "rejects": rejected / count}
    return result


def _shown(category: str, count: int) -> Iterator[tuple[films.FilmSpec, films.Film, np.random.Generator]]:
    """`count` meanings of a category of clips, each with a film that shows it."""
    rng = np.random.default_rng(derive_seed("gold-clips", category))
    pairs, still = float(category.startswith("two")), float(category.endswith("still"))
    for _ in tqdm(range(count), desc=category):
        spec = film_captions.random_spec(rng, pairs, still)
        yield spec, films.compose(spec, rng), rng


def clips(count: int) -> dict[str, object]:
    """Share of right verdicts on clips that show their caption, contradict it or have faults, `count` of each.

    `frames`: share of the frames of faulty clips whose verdict is right; a frame is faulty if it differs from that of
    the clip without faults. `segments`: the same of segments, faulty with at least two such frames.
    """
    result: dict[str, object] = {"question": "gold on rendered clips", "clips_per_kind": count}
    for category in film_captions.CATEGORIES:
        found: dict[str, list[float]] = defaultdict(list)
        for spec, film, rng in _shown(category, count):
            light = int(rng.integers(2**31))
            clean, faulty = (
                films.render(shown, np.random.default_rng(light)) for shown in (film, films.glitch(film, 2, rng))
            )
            reading = film_gold.read(clean, spec)
            found["accepts"].append(reading.is_right)
            wrong = films.contradict(spec, rng)
            found["rejects"].append(not film_gold.read(clean, wrong).is_right)
            differs = (clean != faulty).any((1, 2, 3))
            spoilt = np.array([differs[start:end].sum() >= 2 for start, end in films.SEGMENTS])
            reading = film_gold.read(faulty, spec)
            found["faulty_clips"].append(reading.is_right != differs.any())
            found["frames"].append(float((reading.is_faulty == differs).mean()))
            found["segments"].append(float((reading.segment_is_right != spoilt).mean()))
        result[category] = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
    return result


def codec(folder: str, count: int) -> dict[str, object]:
    """PSNR of rendered clips after encoding and decoding, and what gold then says of clips that show their caption."""
    if (Path(folder) / "model_index.json").is_file():
        generator = load_generator(folder, dtype=torch.float32)
    else:  # the autoencoder alone
        vae = AutoencoderKLWan.from_pretrained(folder, dtype=torch.float32)
        generator = wrap(film_models.pipeline(vae), name="film")
    psnr, found = [], defaultdict(list)
    for category in film_captions.CATEGORIES:
        for spec, film, rng in _shown(category, count // len(film_captions.CATEGORIES)):
            pixels = torch.from_numpy(films.render(film, rng)).permute(0, 3, 1, 2)[None]
            with torch.no_grad():
                decoded = generator.decode(generator.encode(pixels))
            psnr.append(float(-10 * (decoded - pixels).square().mean().log10()))
            reading = film_gold.read(decoded[0].permute(0, 2, 3, 1).numpy(), spec)
            found["clips"].append(reading.is_right)
            found["frames"].append(1 - float(reading.is_faulty.mean()))
            found["raw_frames"].append(float((reading.overlap.min(0) >= film_gold.RIGHT).mean()))
            found["segments"].append(float(reading.segment_is_right.mean()))
            found["graded"].append(float(reading.scores.mean()))
    shares = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
    return {"question": "gold after the codec", "model": folder, "psnr": round(float(np.mean(psnr)), 2), **shares}


def video(folder: str, count: int, sampling: Sampling, adapter: str | None) -> dict[str, object]:
    """Means of the verdict and its parts over `count` prompts, and three figures that are no parts of it.

    `color_in_frames`: share of the wanted objects and frames in which an object of the colour is seen;
    `shape_in_frames`: in which its shape is the wanted one. `path`: length of the motion in the wanted direction over
    that of rendered clips of the same captions.
    """
    asked = film_captions.prompts(count, seed=77)
    drawn = draw(folder, asked, sampling, adapter)
    scores = film_gold.FilmGoldReward()(drawn, asked)
    means = {name: values.numpy() for name, values in {"gold": scores.total, **scores.parts}.items()}
    found: dict[str, list[float]] = defaultdict(list)
    made, wanted = [], []
    rng = np.random.default_rng(derive_seed("gold-video"))
    for prompt, clip in zip(asked, drawn.permute(0, 1, 3, 4, 2).numpy(), strict=True):
        spec = film_captions.parse(prompt.text)
        reading = film_gold.read(clip, spec)
        found["color_in_frames"].append(float((reading.overlap > 0).mean()))
        found["shape_in_frames"].append(float(reading.fits.mean()))
        if spec.direction is not None:
            rendered = film_gold.read(films.render(films.compose(spec, rng), rng), spec)
            made.append(reading.path[0])
            wanted.append(rendered.path[0])
    path = round(float(np.nanmean(made) / np.mean(wanted)), 4) if np.isfinite(made).any() else None
    shares = {name: round(float(np.mean(values)), 4) for name, values in {**means, **found}.items()}
    settings = sampling.to_json()
    return {"question": "gold of a video generator", "model": folder, **shares, "path": path, "sampling": settings}


def video_pairs(folder: str, count: int, sampling: Sampling, eta: float) -> dict[str, object]:
    """Pairs of `count` rendered clips, noised at `eta` and denoised, by gold's verdicts and graded scores of segments.

    `segments`: share of segments that differ. `labelled`: at least a fifth of a pair's segments do. `mixed`: each copy
    is better in some segment, of all pairs.
    `faulty`: copies with a fault; `partly`: of these, with at least one segment that is right.
    """
    maker = RolloutPairs(load_generator(folder, dtype=torch.float32), sampling)
    rng = np.random.default_rng(derive_seed("gold-pairs"))
    found: dict[str, list[float]] = defaultdict(list)
    for number in tqdm(range(count), desc=f"eta {eta}"):
        spec = film_captions.random_spec(rng)
        clip = (films.render(films.compose(spec, rng), rng) * 255).round().astype(np.uint8)
        prompt, seeds = film_captions.word(spec, rng), (2 * number, 2 * number + 1)
        pair = maker.make(PairRequest(prompt, seeds, (eta, eta)), clip)
        readings = [film_gold.read(copy.astype(np.float32) / 255, spec) for copy in maker.decode(pair.latents)]
        right = [reading.segment_is_right for reading in readings]
        graded = readings[0].segment_scores - readings[1].segment_scores
        for name, labels in {
            "binary": right[0].astype(int) - right[1].astype(int),
            "graded": np.sign(graded) * (np.abs(graded) > TIE),
        }.items():
            found[f"{name}_segments"].append((labels != 0).mean())
            found[f"{name}_labelled"].append((labels != 0).mean() >= LEAST_LABELLED)
            found[f"{name}_mixed"].append(set(labels) >= {1, -1})
        for reading in readings:
            found["faulty"].append(reading.is_faulty.any())
            found["direction"].append(reading.has_direction)
            if reading.is_faulty.any():
                found["partly"].append(reading.segment_is_right.any())
    shares = {name: round(float(np.mean(values)), 3) for name, values in found.items()}
    return {"question": "gold of pairs", "model": folder, "eta": eta, "pairs": count, **shares}


def draw(folder: str, asked: list[Prompt], sampling: Sampling, adapter: str | None) -> torch.Tensor:
    """One image a prompt."""
    generator = load_generator(folder, adapter=adapter)
    batches = [asked[i : i + 32] for i in range(0, len(asked), 32)]
    seeds = [[derive_seed("gold", prompt.id) for prompt in batch] for batch in batches]
    pairs = tqdm(list(zip(batches, seeds, strict=True)), desc=folder)
    return torch.cat([generator.generate(texts(batch), own, sampling) for batch, own in pairs])


def accuracy(folder: str, count: int, sampling: Sampling, adapter: str | None) -> dict[str, object]:
    """Gold accuracy over `count` prompts, all and by category."""
    asked = prompts(count, seed=77)
    verdicts = GoldReward()(draw(folder, asked, sampling, adapter), asked).total.tolist()
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt, verdict in zip(asked, verdicts, strict=True):
        groups[str(prompt.metadata["category"])].append(verdict)
    by_category = {name: round(float(np.mean(groups[name])), 4) for name in CATEGORIES}
    settings = json.loads(sampling.to_json())
    mean = round(float(np.mean(verdicts)), 4)
    return {"question": "gold of a generator", "model": folder, "gold": mean, **by_category, "sampling": settings}


def labels(folder: str, count: int) -> dict[str, object]:
    """On ranked candidates: gold by generator and rank; how often pairs of a right and a wrong one are told apart."""
    gains: dict[str, list[float]] = defaultdict(list)
    agreement: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = load_ranked(folder, "train", held_out=0.0)
    for row in tqdm(rows.select(range(min(count, len(rows)))), desc="labels"):
        spec = parse(row["prompt"])
        gold = [bool(shows(look(np.asarray(image.convert("RGB"), np.float32) / 255), spec)) for image in row["images"]]
        for name, verdict in zip(row["generators"], gold, strict=True):
            gains[name].append(verdict)
        gains["best"].append(gold[int(np.argmax(row["phi"]))])
        gains["worst"].append(gold[int(np.argmin(row["phi"]))])
        for name, values in {"phi": row["phi"], **row["scores"]}.items():
            for right, wrong in itertools.permutations(range(len(gold)), 2):
                if gold[right] and not gold[wrong] and values[right] != values[wrong]:
                    agreement[name][spec.category].append(values[right] > values[wrong])
    shares = {
        name: {
            "all": round(float(np.mean([*itertools.chain.from_iterable(groups.values())])), 3),
            **{category: round(float(np.mean(groups[category])), 3) for category in CATEGORIES if groups[category]},
        }
        for name, groups in agreement.items()
    }
    means = {name: round(float(np.mean(values)), 3) for name, values in gains.items()}
    return {"question": "labels against gold", "rows": min(count, len(rows)), "gold": means, "agreement": shares}


def faults(folders: Sequence[str]) -> dict[str, object]:
    """Shares of the images with each fault, before and after, over the evaluation folders of several runs."""
    shares: dict[str, dict[str, float]] = {}
    for side in ("base", "tuned"):
        found: Counter[str | None] = Counter()
        for folder in folders:
            pairs = read_pairs(Path(folder))
            encoded = pairs.media(side, range(len(pairs.prompts)))
            for row, prompt in enumerate(tqdm(pairs.prompts, desc=f"{side} of {folder}")):
                image = Image.open(io.BytesIO(encoded[row])).convert("RGB")
                found[fault(look(np.asarray(image, np.float32) / 255), parse(prompt.text))] += 1
        shares[side] = {name or "none": round(found[name] / found.total(), 4) for name in (None, *FAULTS)}
    return {"question": "faults", "evaluations": len(folders), "images": found.total(), **shares}


def paste(page: Image.Image, image: Image.Image, place: tuple[int, int], size: int, *, is_right: bool) -> None:
    """Paste `image` at `place` with `size` pixels a side, in a green (right) or red frame."""
    (x, y), color = place, "green" if is_right else "red"
    page.paste(image.resize((size, size), Image.Resampling.NEAREST), place)
    ImageDraw.Draw(page).rectangle((x - 3, y - 3, x + size + 2, y + size + 2), outline=color, width=3)


def sheet(folder: str, target: Path, sampling: Sampling) -> dict[str, object]:
    """A contact sheet of 200 images: number, caption, and a green (shows it) or red (does not) frame."""
    asked = prompts(200, seed=78)
    pictures = draw(folder, asked, sampling, None)
    verdicts = GoldReward()(pictures, asked).total
    columns, cell, caption = 10, 128, 46
    page = Image.new("RGB", (columns * (cell + 12), -(-len(asked) // columns) * (cell + caption)), "white")
    pen = ImageDraw.Draw(page)
    for index, (prompt, picture, verdict) in enumerate(zip(asked, pictures, verdicts, strict=True)):
        x, y = index % columns * (cell + 12) + 6, index // columns * (cell + caption) + 4
        array = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        paste(page, Image.fromarray(array), (x, y), cell, is_right=bool(verdict))
        words, lines = f"{index} {prompt.text}".split(), [""]
        for word in words:
            lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) < 17 else [*lines, word]
        pen.multiline_text((x, y + cell + 4), "\n".join(lines), fill="black", spacing=0, font_size=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target, optimize=True)
    return {"question": "sheet", "model": folder, "accepted": float(verdicts.mean()), "file": str(target)}


def strip(target: Path, folders: Sequence[str], count: int) -> dict[str, object]:
    """The first image of `count` prompts: of the base, then of each evaluation of a ladder; frames as in `sheet`."""
    runs = [read_pairs(Path(folder)) for folder in folders]
    asked, each = runs[0].prompts, runs[0].seeds_per_prompt
    if any(run.prompts != asked or run.seeds != runs[0].seeds for run in runs):
        raise SystemExit("the evaluations differ in prompts or seeds")
    rows = range(0, min(count * each, len(asked)), each)
    columns = {"base": runs[0].media("base", rows)}
    columns |= {Path(folder).parts[-3]: run.media("tuned", rows) for folder, run in zip(folders, runs, strict=True)}
    headings = [textwrap.wrap(name.replace("_", " "), 14) for name in columns]
    cell, left, top = 104, 232, 6 + 16 * max(map(len, headings))
    page = Image.new("RGB", (left + cell * len(columns), top + cell * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for column, (heading, encoded) in enumerate(zip(headings, columns.values(), strict=True)):
        pen.multiline_text((left + column * cell + 4, 4), "\n".join(heading), fill="black", font_size=13)
        for line, row in enumerate(rows):
            image = Image.open(io.BytesIO(encoded[row])).convert("RGB")
            is_right = shows(look(np.asarray(image, np.float32) / 255), parse(asked[row].text))
            paste(page, image, (left + column * cell + 4, top + line * cell + 4), cell - 8, is_right=is_right)
    for line, row in enumerate(rows):
        wrapped = "\n".join(textwrap.wrap(asked[row].text, 30))
        pen.multiline_text((6, top + line * cell + 34), wrapped, fill="black", font_size=13)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target, optimize=True)
    return {"question": "strip", "columns": [*columns], "rows": len(rows), "file": str(target)}


def clip_sheet(folder: str, target: Path, count: int, sampling: Sampling) -> dict[str, object]:
    """A contact sheet of `count` clips, one a row: two frames of each segment, a green or red line under each segment.

    The frame around a row is green where gold accepts the clip.
    """
    asked = film_captions.prompts(count, seed=78)
    drawn = draw(folder, asked, sampling, None)
    cell, caption, accepted = 2 * films.SIZE, 16, 0
    page = Image.new("RGB", (16 * cell + 8, count * (cell + caption + 12)), "white")
    pen = ImageDraw.Draw(page)
    for number, (prompt, clip) in enumerate(zip(asked, drawn.permute(0, 1, 3, 4, 2).numpy(), strict=True)):
        reading, top = film_gold.read(clip, film_captions.parse(prompt.text)), number * (cell + caption + 12)
        accepted += reading.is_right
        pen.text((6, top), f"{number} {prompt.text}", fill="green" if reading.is_right else "red", font_size=12)
        for column, frame in enumerate(at for start, _ in films.SEGMENTS for at in (start + 1, start + 3)):
            picture = Image.fromarray((clip[frame] * 255).round().astype(np.uint8)).resize((cell, cell), 0)
            page.paste(picture, (4 + column * cell, top + caption))
        for segment, is_right in enumerate(reading.segment_is_right):
            left, low = 4 + 2 * cell * segment, top + caption + cell + 3
            pen.line((left + 2, low, left + 2 * cell - 3, low), fill="green" if is_right else "red", width=4)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target, optimize=True)
    return {"question": "sheet of clips", "model": folder, "accepted": accepted / count, "file": str(target)}


QUESTIONS: dict[str, Callable[[argparse.Namespace, Sampling], Sequence[dict[str, object]]]] = {
    "renders": lambda chosen, _: [renders(chosen.count)],
    "generator": lambda chosen, how: [accuracy(chosen.arguments[0], chosen.count, how, chosen.adapter)],
    "sheet": lambda chosen, how: [sheet(chosen.arguments[0], Path(chosen.arguments[1]), how)],
    "labels": lambda chosen, _: [labels(chosen.arguments[0], chosen.count)],
    "faults": lambda chosen, _: [faults(chosen.arguments)],
    "strip": lambda chosen, _: [strip(Path(chosen.arguments[0]), chosen.arguments[1:], min(chosen.count, 24))],
    "clips": lambda chosen, _: [clips(chosen.count)],
    "codec": lambda chosen, _: [codec(chosen.arguments[0], chosen.count)],
    "video": lambda chosen, how: [video(chosen.arguments[0], chosen.count, replace(how, **CLIP), chosen.adapter)],
    "clip_sheet": lambda chosen, how: [
        clip_sheet(chosen.arguments[0], Path(chosen.arguments[1]), min(chosen.count, 60), replace(how, **CLIP))
    ],
    "pairs": lambda chosen, how: [
        video_pairs(chosen.arguments[0], chosen.count, replace(how, **CLIP), eta)
        for eta in map(float, chosen.arguments[1:] or (0.65, 0.8))
    ],
}


def main() -> None:
    """Parse the question and answer it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--adapter")
    chosen = parser.parse_args()
    sampling = Sampling(steps=chosen.steps, guidance_scale=chosen.guidance, height=64, width=64)
    for answer in QUESTIONS[chosen.question](chosen, sampling):
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
