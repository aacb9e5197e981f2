"""How the sandbox's vision-language model learns: interviews about scenes and clips, many questions at one look.

Trained under plain `transformers.Trainer`; `alignkit sandbox train vlm` repeats it, `accuracy` says how well it went.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, set_seed

from alignkit.sandbox import questions
from alignkit.sandbox.clips import Motion, at, covers, film, move
from alignkit.sandbox.questions import HEADS, MEANT, NOUNS, Question, Subject, meanings, phrases, whereabouts
from alignkit.sandbox.recipes import Recipe, fit
from alignkit.sandbox.scenes import PALETTE, SHAPES, Scene, render
from alignkit.sandbox.vlm import MERGE, PATCH, TEMPORAL, TOKENS_PER_SECOND, save, tokenizer, vlm
from alignkit.sandbox.worlds import to_tensor
from alignkit.seeds import derive_seed

OPENING, VISION = "<|im_start|>user\n", ("<|vision_start|>", "<|vision_end|>")
CAPTIONED = ("caption", "pair")  # kinds of question with a caption in them
CLOSING, END = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Stage(Recipe):
    """`count`: questions at one look at most, none while only the eyes learn; `near` as in `questions.Subject`.

    `judged`: kinds of question whose words say below the last layer whether they are true.
    """

    count: int = 4
    near: float = 0.5
    judged: tuple[str, ...] = CAPTIONED


# First the eyes, then the tongue: words teach shapes slowly, names of patches teach them fast. While the tongue learns,
# the eyes are left alone: pulled at by its first, blind steps they forget, and no yes or no is learnt. Captions and
# pairs are judged only after the learning rate has been restarted, and whose colour is whose only when nearly all wrong
# colours are another object's: before, "is the circle red?" was answered as "is anything red?".
STAGES = (
    Stage(steps=900, batch=48, learning_rate=1.5e-3, seed=111, count=0),
    Stage(steps=1500, batch=32, learning_rate=1.5e-3, seed=112),
    Stage(steps=1200, batch=32, learning_rate=1e-3, seed=113),
    Stage(
        steps=660,
        batch=32,
        learning_rate=1e-3,
        seed=116,
        count=10,
        near=0.9,
        judged=(*CAPTIONED, "color", "object"),
    ),
)
CLASSES = {kind: number for number, kind in enumerate(((s, c) for s in SHAPES for c in PALETTE), start=1)}
FACTS = {"object": 1 + len(CLASSES), "side": HEADS["side"], "way": HEADS["way"]}
MEDIA = 2  # at most in a row

Patchify = Callable[[Tensor], tuple[Tensor, Tensor]]


class Interviews(Dataset[dict[str, Any]]):
    """`size` subjects with up to `count` questions each: of every twenty a pair of images thrice, a clip four times.

    A row: media, a list of [3, 64, 64] images or one clip [F, 3, 64, 64]; for each of them `facts`, what its patches
    show, `meant`, what words mean in it (`meanings`), and `shown`, which `phrases` of the caption it shows; questions;
    `interval`, steps of time from one pair of frames to the next.
    """

    def __init__(self, size: int, seed: int, count: int = 4, near: float = 0.5) -> None:
        self.size, self.seed, self.count, self.near = size, seed, count, near

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed("interview", self.seed, index))
        kind = int(rng.integers(20))
        if kind < 3:
            return _pair_row(rng)
        about = questions.subject(rng, self.near)
        return (_clip_row if kind < 7 else _scene_row)(about, rng, self.count)


def _pair_row(rng: np.random.Generator) -> dict[str, Any]:
    *scenes, caption, question = questions.pair(rng)
    return {
        "media": [worn(render(scene, rng), rng) for scene in scenes],
        "interval": 1,
        "facts": [facts(scene)[None] for scene in scenes],
        "questions": [question],
        "meant": [meanings(scene) for scene in scenes],
        "shown": [phrases(caption, scene) for scene in scenes],
    }


def _clip_row(about: Subject, rng: np.random.Generator, count: int) -> dict[str, Any]:
    scene, motion = move(about.scene, rng)
    about = replace(about, scene=scene, motion=motion)
    frames = int(rng.choice([4, 6, 8]))
    clip = torch.stack([to_tensor(frame) for frame in film(scene, motion, rng, frames=frames)])
    shares = np.linspace(0, 1, frames).reshape(-1, TEMPORAL).mean(1)
    told = torch.stack([facts(at(scene, motion, float(share)), motion) for share in shares])
    return {
        "media": [clip],
        "facts": [told],
        "interval": int(rng.choice([1, 2, 4])),
        "questions": questions.ask(about, rng, count),
        "meant": [meanings(scene, motion)],
        "shown": [phrases(about.caption, scene)],
    }


def _scene_row(about: Subject, rng: np.random.Generator, count: int) -> dict[str, Any]:
    return {
        "questions": questions.ask(about, rng, count),
        "media": [worn(render(about.scene, rng), rng)],
        "interval": 1,
        "facts": [facts(about.scene)[None]],
        "meant": [meanings(about.scene)],
        "shown": [phrases(about.caption, about.scene)],
    }


def facts(scene: Scene, motion: Motion | None = None) -> Tensor:
    """What each patch [8, 8] shows, in the order of FACTS: its object (0 is the ground), side and way, -100 is none."""
    told = torch.full((1 + len(scene.things), len(FACTS)), -100)
    told[0, 0] = 0
    for row, thing in enumerate(scene.things, start=1):
        place = whereabouts(scene, thing, motion)
        told[row, 0] = CLASSES[thing.shape, thing.color]
        told[row, 1:] = torch.tensor([place.get("side", -100), place.get("way", -100)])
    return told[torch.from_numpy(covers(scene, PATCH))]


def worn(picture: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A trace of noise on half of all images, as generated ones carry."""
    noise = rng.normal(0, 0.02, picture.shape) if rng.random() < 0.5 else 0.0
    return to_tensor(np.clip(picture + noise, 0, 1).astype(np.float32))


class Interview:
    """Collates rows: all questions about one subject in one sequence, none of which sees another.

    A mask lets every question see the media and itself alone, and its positions start where the media end, so each is
    answered exactly as if it had been asked by itself: one look at the image, many questions.
    """

    def __init__(
        self,
        words: Qwen2Tokenizer,
        model: Qwen2_5_VLForConditionalGeneration,
        patchify: Patchify,
        judged: Collection[str] = CAPTIONED,
    ) -> None:
        self.words, self.patchify, self.judged = words, patchify, judged
        self.ids = {"image": model.config.image_token_id, "video": model.config.video_token_id}
        self.place = model.model.get_rope_index
        self.spelled = {words.convert_tokens_to_ids(f"Ġ{word}"): word for word in (*MEANT, *NOUNS)}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [self._sequence(row) for row in rows]
        length = max(len(sequence["ids"]) for sequence in sequences)
        batch = {name: torch.full((len(rows), length), fill) for name, fill in _FILLS.items()}
        batch["positions"] = torch.zeros(3, len(rows), length, dtype=torch.long)
        batch["weights"] = torch.zeros(len(rows), length)
        batch["meant"] = torch.full((MEDIA * len(HEADS), len(rows), length), -100)
        batch["shown"] = torch.full((MEDIA, len(rows), length), -100)
        for row, sequence in enumerate(sequences):
            for name, values in sequence.items():
                batch[name][..., row, : values.shape[-1]] = values
        patches, grids = zip(*(self.patchify(medium[None]) for row in rows for medium in row["media"]), strict=True)
        told = torch.cat([by_squares(facts) for row in rows for facts in row["facts"]])
        return batch | {"patches": torch.cat(patches), "grids": torch.cat(grids), "facts": told}

    def _encode(self, text: str) -> list[int]:
        return self.words(text, add_special_tokens=False).input_ids

    def _sequence(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        """Token ids, group (0 media, else the question's number), targets, weights and positions of one row."""
        ids = self._encode(OPENING)
        kinds = [0] * len(ids)
        grids: dict[int, list[list[int]]] = {1: [], 2: []}
        for medium in row["media"]:
            frames = len(medium) if medium.dim() == 4 else 1
            time, kind = -(-frames // TEMPORAL), 2 if medium.dim() == 4 else 1
            side = medium.shape[-1] // PATCH
            grids[kind].append([time, side, side])
            pads = [self.ids["video" if kind == 2 else "image"]] * (time * (side // MERGE) ** 2)
            ids += [*self._encode(VISION[0]), *pads, *self._encode(VISION[1])]
            kinds += [0, *([kind] * len(pads)), 0]
        start = self._places(ids, kinds, grids, row["interval"])
        nothing = torch.full((MEDIA * len(HEADS), len(ids)), -100)
        pieces = [(torch.tensor(ids), start, nothing[0], torch.zeros(len(ids)), nothing, nothing[:MEDIA])]
        groups = [0] * len(ids)
        for number, question in enumerate(row["questions"], start=1):
            asked, answer = self._encode(question.text + CLOSING), self._encode(question.answer + END)
            line = torch.tensor([*asked, *answer])
            places = start[0, -1] + 1 + torch.arange(len(line))  # the last token before is text
            targets = torch.full((len(line),), -100)
            targets[len(asked) - 1 : -1] = torch.tensor(answer)
            weights = (targets >= 0) / len(answer)
            told = self._known(row, question, asked, len(line))
            pieces.append((line, places.expand(3, -1), targets, weights, *told))
            groups += [number] * len(line)
        names = ("ids", "positions", "targets", "weights", "meant", "shown")
        joined = {name: torch.cat(parts, -1) for name, parts in zip(names, zip(*pieces, strict=True), strict=True)}
        return joined | {"groups": torch.tensor(groups)}

    def _known(
        self, row: Mapping[str, Any], question: Question, asked: list[int], length: int
    ) -> tuple[Tensor, Tensor]:
        """What the question's words mean [MEDIA * heads, L], and whether what they say is shown [MEDIA, L].

        Of a caption every noun knows that of its phrase, of "Is the circle red?" the last word does.
        """
        spelled = [self.spelled.get(token, "") for token in asked]
        meant, shown = torch.full((MEDIA, len(HEADS), length), -100), torch.full((MEDIA, length), -100)
        nouns = [place for place, word in enumerate(spelled) if word in NOUNS]
        for medium, (known, truths) in enumerate(zip(row["meant"], row["shown"], strict=True)):
            for place, word in enumerate(spelled):
                if word in known:
                    meant[medium, :, place] = torch.tensor([known[word].get(head, -100) for head in HEADS])
            if question.kind in self.judged:
                is_claim = question.kind not in CAPTIONED
                places = [max(place for place, word in enumerate(spelled) if word)] if is_claim else nouns
                shown[medium, places] = torch.tensor([int(question.answer == "Yes")] if is_claim else truths)
        return meant.flatten(0, 1), shown

    def _places(self, ids: list[int], kinds: list[int], grids: Mapping[int, list[list[int]]], interval: int) -> Tensor:
        """Positions [3, L] of the part before the questions, by the model's own rule."""
        image, video = (torch.tensor(grids[kind]) if grids[kind] else None for kind in (1, 2))
        seconds = torch.full((len(grids[2]),), interval / TOKENS_PER_SECOND)
        positions, _ = self.place(
            torch.tensor([ids]),
            torch.tensor([kinds]),
            image_grid_thw=image,
            video_grid_thw=video,
            second_per_grid_ts=seconds,
        )
        return positions[:, 0]


def by_squares(told: Tensor) -> Tensor:
    """Facts [T, 8, 8, kinds] as [T * 64, kinds] in the tower's order, in which merged squares come together."""
    squares = told.unflatten(2, (-1, MERGE)).unflatten(1, (-1, MERGE))  # time, row, in square, column, in square, kind
    return squares.transpose(2, 3).flatten(0, 4)


_FILLS = {"ids": 0, "groups": -1, "targets": -100}


def see_only_own(groups: Tensor) -> Tensor:
    """Additive mask [B, 1, L, L]: causal, within one's own question and the media (group 0)."""
    length = groups.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    same = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == 0)
    mask = torch.zeros(groups.shape[0], 1, length, length, device=groups.device)
    return mask.masked_fill(~(same & causal)[:, None], torch.finfo(torch.float32).min)


class Answering(nn.Module):
    """Cross-entropy of the answers, each question counting once, and of what every patch shows.

    What a patch shows is asked twice: of the eyes, by heads that are thrown away, and of what they hand on, in the
    language's own words, so that a word and the image of it meet in one space. What a word means is asked as well,
    half-way up, and a layer below the last which phrases of a caption are true, as of readers who mark words (arXiv
    2312.10240): from answers alone nothing was bound to anything, and without the phrases no caption was judged.
    """

    _keys_to_ignore_on_save = None

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, words: Qwen2Tokenizer) -> None:
        super().__init__()
        self.vlm = model
        self._shapes, self._colors = (
            words.convert_tokens_to_ids([f"Ġ{name}" for name in names]) for names in (SHAPES, PALETTE)
        )
        self.facts = nn.Linear(model.config.vision_config.hidden_size, sum(FACTS.values()))
        self.meanings = nn.Linear(model.config.text_config.hidden_size, MEDIA * sum(HEADS.values()))
        self.phrases = nn.Linear(model.config.text_config.hidden_size, MEDIA * 2)
        self.only_eyes = False

    def forward(
        self,
        *,
        patches: Tensor,
        grids: Tensor,
        facts: Tensor,
        ids: Tensor,
        groups: Tensor,
        positions: Tensor,
        targets: Tensor,
        weights: Tensor,
        meant: Tensor,
        shown: Tensor,
    ) -> dict[str, Tensor]:
        seen = self.vlm.model.visual(patches, grid_thw=grids)
        known = _told(self.facts(seen.last_hidden_state), facts.T, list(FACTS.values()))
        if self.only_eyes:
            return {"loss": known}
        states = read(self.vlm, seen.pooler_output, ids, groups, positions)
        hidden, half = states[-1], states[len(states) // 2]
        wanted = targets >= 0
        answered = functional.cross_entropy(self.vlm.lm_head(hidden[wanted]).float(), targets[wanted], reduction="none")
        helped = known + self._speaking(seen.pooler_output, facts[:, 0])
        helped = helped + _told(self.meanings(half), meant, MEDIA * list(HEADS.values()))
        helped = helped + _told(self.phrases(states[-2]), shown, MEDIA * [2])
        return {"loss": (answered * weights[wanted]).sum() / weights.sum() + 0.3 * helped}

    def _speaking(self, merged: Tensor, objects: Tensor) -> Tensor:
        """Merged patches with an object in them: its shape's and its colour's word are nearest of their kind."""
        shown = objects.unflatten(0, (-1, MERGE**2)).amax(1)
        tokens, kinds = merged[shown > 0], shown[shown > 0] - 1
        words = self.vlm.get_input_embeddings().weight
        parts = ((self._shapes, kinds // len(PALETTE)), (self._colors, kinds % len(PALETTE)))
        losses = [functional.cross_entropy((tokens @ words[ids].T).float(), kind) for ids, kind in parts]
        return torch.stack(losses).sum()


def _told(logits: Tensor, wanted: Tensor, sizes: list[int]) -> Tensor:
    """Sum over heads of the cross-entropy of `logits` [..., sum of sizes] where `wanted` [heads, ...] has an answer."""
    losses = [
        functional.cross_entropy(said[answer >= 0], answer[answer >= 0])
        for said, answer in zip(logits.float().split(sizes, dim=-1), wanted, strict=True)
        if (answer >= 0).any()
    ]
    return torch.stack([logits.new_zeros(()), *losses]).sum()


def read(
    model: Qwen2_5_VLForConditionalGeneration, seen: Tensor, ids: Tensor, groups: Tensor, positions: Tensor
) -> tuple[Tensor, ...]:
    """States [B, L, width] below, between and above all layers of packed interviews, merged patches `seen` in place."""
    embedded = model.get_input_embeddings()(ids)
    pads = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    embedded = embedded.masked_scatter(pads[..., None], seen.to(embedded.dtype))
    mask = see_only_own(groups).to(embedded.dtype)
    given = {"inputs_embeds": embedded, "position_ids": positions, "attention_mask": mask}
    return model.model.language_model(**given, output_hidden_states=True).hidden_states


def train_vlm(
    patchify: Patchify, out: Path, work: Path, stages: Sequence[Stage] = STAGES
) -> Qwen2_5_VLForConditionalGeneration:
    """Train the eyes on what patches show, then the rest on answers, and save the model with its tokenizer.

    `patchify` cuts media into patches; it comes in as an argument because `rewards` stands outside this package.
    """
    set_seed(stages[0].seed)
    words = tokenizer()
    model = vlm(words)
    objective = Answering(model, words)
    for number, stage in enumerate(stages, start=1):
        objective.only_eyes = stage.count == 0
        for part in (model.model.visual.patch_embed, model.model.visual.blocks, objective.facts):
            part.requires_grad_(objective.only_eyes)
        rows = Interviews(stage.scenes, stage.seed, stage.count, stage.near)
        fit(objective, rows, stage, work / f"stage-{number}", Interview(words, model, patchify, stage.judged))
    save(model, words, out)
    return model


@torch.no_grad()
def accuracy(
    model: Qwen2_5_VLForConditionalGeneration,
    words: Qwen2Tokenizer,
    patchify: Patchify,
    *,
    subjects: int = 600,
    seed: int = 999,
) -> dict[str, tuple[float, int]]:
    """(share of right answers, number asked) per kind of question on held-out scenes and clips, greedy answers.

    An answer is right when every token of it is the likeliest after the right ones before: for answers of one word
    this is greedy generation, for longer ones it is stricter on none and kinder to what follows a slip.
    """
    rows, collate = Interviews(subjects, seed, count=10), Interview(words, model, patchify)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, subjects, 50):
        chosen = [rows[index] for index in range(start, min(start + 50, subjects))]
        batch = collate(chosen)
        seen = model.model.visual(batch["patches"], grid_thw=batch["grids"]).pooler_output
        hidden = read(model, seen, batch["ids"], batch["groups"], batch["positions"])[-1]
        hits = model.lm_head(hidden).argmax(-1) == batch["targets"]
        for row, groups, hit, targets in zip(chosen, batch["groups"], hits, batch["targets"], strict=True):
            for number, question in enumerate(row["questions"], start=1):
                own = (groups == number) & (targets >= 0)
                right[question.kind].append(bool(hit[own].all()))
    return {kind: (sum(hits) / len(hits), len(hits)) for kind, hits in sorted(right.items())}
