"""`alignkit doctor --reward NAME`: try a reward on three shipped photographs, where the right captions must win.

The numbers are printed so that they can be held against those of the reward's original package on the same files.
Not here: how good a reward is; three images only show that weights, tokens and preprocessing fit together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.commands.specs import RewardSpec, build_reward
from alignkit.errors import DataError
from alignkit.protocols import ExampleMaker, as_scores, require_independent
from alignkit.records import Prompt
from rewards import photographs as shipped
from rewards.models.media import quantised, resize

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.protocols import Reward
    from alignkit.records import Scores

CLASSES = {"astronaut": "person", "coffee": "cup", "chelsea": "cat"}  # for rewards that read GenEval's metadata
FRAMES, STEP = 8, 2  # of the clips that a video reward sees: so many, moving by so many pixels


def check(spec: RewardSpec) -> None:
    """Load the reward and print its numbers. Raises DataError where a wrong caption or photograph wins.

    ConfigError for a reward whose rows depend on each other; missing weights, unknown options and whatever the reward
    itself refuses are its own errors.
    """
    reward = build_reward(spec.reward, spec.options)
    require_independent({spec.reward: reward})
    media, prompts = subjects(reward)
    print("\n".join(_headline(reward, prompts)))
    table = score_table(reward, media, prompts)
    print("\n".join(_table_lines(reward, table)))
    print("\n".join(_part_lines(reward, media, prompts)))
    print("\n".join(_precision_lines(reward, media, prompts)))
    if reward.modality == "video":
        print("\n".join(_still_lines(reward, media, prompts)))
    if reward.needs_prompt:
        _judge(reward.name, table)
    if reward.source.startswith("http"):
        print(f"\n{_comparison(reward)}")


def subjects(reward: Reward) -> tuple[dict[str, Tensor], dict[str, Prompt]]:
    """Media [3, H, W], or for a video reward slow pans [F, 3, H, W], and the prompt of each, by the photograph's name.

    A reward that is an `ExampleMaker` changes both to what it can read.
    """
    media: dict[str, Tensor] = {}
    prompts: dict[str, Prompt] = {}
    for name, photograph in shipped.photographs().items():
        metadata = {"tag": "single_object", "include": [{"class": CLASSES[name], "count": 1}]}
        prompt = Prompt.from_text(shipped.CAPTIONS[name], name=name, **metadata)
        if isinstance(reward, ExampleMaker):
            photograph, prompt = reward.example(photograph, prompt)  # noqa: PLW2901
        media[name] = _pan(photograph) if reward.modality == "video" else photograph
        prompts[name] = prompt
    return media, prompts


def score_table(reward: Reward, media: Mapping[str, Tensor], prompts: Mapping[str, Prompt]) -> dict[str, list[float]]:
    """Scores by photograph, one for each prompt in order; of a reward that reads none, one alone."""
    read = list(prompts.values()) if reward.needs_prompt else list(prompts.values())[:1]
    return {name: _scores(reward, item, read).total.tolist() for name, item in media.items()}


def faults(table: Mapping[str, Sequence[float]]) -> list[str]:
    """Where the right one does not win: for a photograph another caption, for a caption another photograph."""
    names, found = list(table), []
    for i, own in enumerate(names):
        for j, other in enumerate(names):
            if i != j and not table[own][i] > table[own][j]:
                found.append(f"{own}.jpg: caption of {other} {table[own][j]:.5g}, its own {table[own][i]:.5g}")
            if i != j and not table[own][i] > table[other][i]:
                found.append(f"caption of {own}: {other}.jpg {table[other][i]:.5g}, its own {table[own][i]:.5g}")
    return found


def _scores(reward: Reward, item: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """One photograph or clip with each of the prompts, refused by name unless there is a number for each."""
    import torch

    with torch.no_grad():
        return as_scores(reward(item.expand(len(prompts), *item.shape), prompts), reward.name, len(prompts))


def _pan(picture: Tensor) -> Tensor:
    """A clip [F, 3, H, W']: a window that moves to the right."""
    import torch

    width = picture.shape[-1] - (FRAMES - 1) * STEP
    return torch.stack([picture[..., STEP * frame : STEP * frame + width] for frame in range(FRAMES)])


def _headline(reward: Reward, prompts: Mapping[str, Prompt]) -> list[str]:
    low, high = reward.native_range
    gradient = "differentiable" if reward.differentiable else "not differentiable"
    lines = [f"{reward.name}: {reward.modality}, {gradient}, range {low:g} to {high:g}"]
    lines += [f"licence: {reward.licence}", f"source: {reward.source}", ""]
    if not reward.needs_prompt:
        return lines
    return [*lines, "captions", *(f"  {name:<12}{prompt.text}" for name, prompt in prompts.items()), ""]


def _row(name: str, values: Sequence[Any]) -> str:
    cells = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
    return f"  {name:<16}" + "".join(f"{cell:>14}" for cell in cells)


def _table_lines(reward: Reward, table: Mapping[str, Sequence[float]]) -> list[str]:
    thing = "photograph" if reward.modality == "image" else f"slow pan over the photograph, {FRAMES} frames"
    title = f"scores, a {thing} a row{', a caption a column' if reward.needs_prompt else ''}"
    rows = [_row(f"{name}.jpg", values) for name, values in table.items()]
    return [title, _row("", list(table) if reward.needs_prompt else ["score"]), *rows]


def _part_lines(reward: Reward, media: Mapping[str, Tensor], prompts: Mapping[str, Prompt]) -> list[str]:
    """The parts of each photograph's score with its own caption."""
    own = {name: _scores(reward, item, [prompts[name]]).parts for name, item in media.items()}
    kinds = list(next(iter(own.values())))
    if not kinds:
        return [""]
    rows = [_row(f"{name}.jpg", [float(parts[kind]) for kind in kinds]) for name, parts in own.items()]
    return ["", f"parts{', with its own caption' if reward.needs_prompt else ''}", _row("", kinds), *rows, ""]


def _precision_lines(reward: Reward, media: Mapping[str, Tensor], prompts: Mapping[str, Prompt]) -> list[str]:
    """What storing an image costs: at 3/4 of the size pixels lie between 8-bit values, as a generator's do."""
    rows = []
    for name, item in media.items():
        height, width = (3 * side // 4 for side in item.shape[-2:])
        small = resize(item.reshape(-1, *item.shape[-3:]), height, width).reshape(*item.shape[:-2], height, width)
        exact, stored = (float(_scores(reward, one, [prompts[name]]).total) for one in (small, quantised(small)))
        rows.append(_row(f"{name}.jpg", [exact, stored, stored - exact]))
    return ["at 3/4 of the size, float pixels and stored in 8 bits", _row("", ["float", "8 bits", "difference"]), *rows]


def _still_lines(reward: Reward, media: Mapping[str, Tensor], prompts: Mapping[str, Prompt]) -> list[str]:
    """Whether a frozen clip pleases more than a moving one."""
    rows = []
    for name, item in media.items():
        clips = (item, item[:1].expand_as(item))
        rows.append(_row(f"{name}.jpg", [float(_scores(reward, clip, [prompts[name]]).total) for clip in clips]))
    return ["", "a slow pan and its first frame frozen", _row("", ["pan", "frozen"]), *rows]


def _judge(name: str, table: Mapping[str, Sequence[float]]) -> None:
    lost = faults(table)
    count = 2 * len(table) * (len(table) - 1)
    if lost:
        examples = "; ".join(lost[:3]) + (" and so on" if len(lost) > 3 else "")
        raise DataError(
            f"reward {name}: not right, {len(lost)} of {count} comparisons are lost: {examples}. Weights, tokenizer or "
            "options are not this reward's, or it is too weak"
        )
    print(f"\nright: all {count} comparisons are won, by its own caption and by its own photograph")


def _comparison(reward: Reward) -> str:
    folder = Path(shipped.__file__).parent
    files = "clips of windows on the files" if reward.modality == "video" else "the files"
    return (
        f"to compare: score {files} in {folder}\n"
        f"with the reward's own package ({reward.source}) and the prompts above;\n"
        "the first table should agree but for PIL's rounding of resized pixels to 8 bits (docs/rewards.md)"
    )
