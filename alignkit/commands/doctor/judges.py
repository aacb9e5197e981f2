"""`alignkit doctor --judge NAME`: try a judge on three shipped photographs, where the right one must not lose.

For each caption its own photograph is compared with each of the others, in both orders. Three photographs show that
the judge is reached and reads images and captions; they do not show how good it is.
"""

from __future__ import annotations

from alignkit.commands.specs import JudgeSpec, build_judge
from alignkit.errors import DataError
from alignkit.protocols import Reporting
from alignkit.records import Prompt
from rewards import photographs as shipped

SIDE = 224  # pixels: photographs of one size make one batch


def check(spec: JudgeSpec) -> None:
    """Load the judge and print its verdicts. Raises DataError where a wrong photograph wins, or for other verdicts."""
    import torch

    from rewards.models.media import resize

    judge = build_judge(spec.judge, spec.options)
    media = {name: resize(photograph[None], SIDE, SIDE)[0] for name, photograph in shipped.photographs().items()}
    names = list(media)
    pairs = [(right, wrong) for right in names for wrong in names if right != wrong]
    prompts = [Prompt.from_text(shipped.CAPTIONS[right]) for right, _ in pairs]
    own = torch.stack([media[right] for right, _ in pairs])
    other = torch.stack([media[wrong] for _, wrong in pairs])
    verdicts = [*judge.compare(own, other, prompts), *(-verdict for verdict in judge.compare(other, own, prompts))]
    if len(verdicts) != 2 * len(pairs) or not set(verdicts) <= {1, 0, -1}:
        raise DataError(f"judge {spec.judge}: verdicts {verdicts}; it must give 1, 0 or -1 for each pair")
    print(f"judge {spec.judge}: each caption's own photograph against the others, in both orders")
    for (right, wrong), first, second in zip(pairs, verdicts, verdicts[len(pairs) :], strict=False):
        print(f"  {right + ' against ' + wrong:<28}{_word(first)} as first, {_word(second)} as second")
    if isinstance(judge, Reporting):
        print(judge.report())
    lost = verdicts.count(-1)
    if lost:
        raise DataError(
            f"judge {spec.judge}: {lost} of {len(verdicts)} comparisons are lost to a wrong photograph. The question, "
            "the model or its options do not fit, or the judge is too weak"
        )
    print(f"{verdicts.count(1)} of {len(verdicts)} comparisons won, {verdicts.count(0)} abstentions, none lost")


def _word(verdict: int) -> str:
    return {1: "wins", 0: "abstains", -1: "loses"}[verdict]
