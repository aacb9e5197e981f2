"""The program: a table from verbs to the functions that do them, and how errors and Ctrl-C end a command.

Methods (`train NAME`) come from `alignkit.trainers.METHODS`. Deliberately not here: the verbs (`alignkit.commands`) and
any heavy import, so that `alignkit --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from alignkit import __version__
from alignkit.errors import AlignKitError, UnknownNameError, nearest
from alignkit.escape import EscapedStream, to_line
from alignkit.resolve import resolve
from alignkit.trainers import METHODS

_TRAIN = "alignkit.commands.train:main"  # called with the method's name as the first word
COMMANDS = {
    "init": ("alignkit.commands.init:main", "Copy a recipe into the current folder, to be changed."),
    "run": ("alignkit.commands.run:main", "The whole job: prompts to report, in one resumable folder."),
    "generate": ("alignkit.commands.generate:main", "Generate candidates for prompts with several generators."),
    "score": ("alignkit.commands.score:main", "Score candidates with several rewards; raw scores are kept."),
    "rank": ("alignkit.commands.rank:main", "Turn scores into a ranked dataset."),
    "aspects": ("alignkit.commands.aspects:main", "Write yes/no questions about prompts, for a critic."),
    "dense-pairs": ("alignkit.commands.dense_pairs:main", "Make pairs of clips from captioned real videos."),
    "annotate": ("alignkit.commands.annotate:main", "Label segments of pairs of clips on a page in the browser."),
    "label": ("alignkit.commands.label:main", "Label the segments of pairs of clips."),
    **{f"train {name}": (_TRAIN, method.summary) for name, method in METHODS.items()},
    "soup": ("alignkit.commands.soup:main", "Mix several trainings of one model into one."),
    "frontier": ("alignkit.commands.frontier:main", "Evaluate mixtures of trainings: Pareto front and barriers."),
    "studio": ("alignkit.commands.studio.main:main", "Try mixtures on a page in the browser: sliders and images."),
    "evaluate": ("alignkit.commands.evaluate:main", "Compare base and tuned on the same prompts and seeds."),
    "export": ("alignkit.commands.export:main", "Write ranked data as pairs for TRL or Pick-a-Pic programs."),
    "report": ("alignkit.commands.report:main", "Write one self-contained report.html."),
    "doctor": ("alignkit.commands.doctor.main:main", "Show versions, devices, optional parts and memory estimates."),
    "sandbox train": ("alignkit.commands.sandbox:main", "Repeat the training of one model of the embedded sandbox."),
    "ladder": ("alignkit.commands.ladder:main", "Compare training methods, arm by arm."),
}

# Causes outside the program that any write or read may meet, also one of a library; other errors keep their traceback.
_KNOWN = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "correct the permissions of this file or its folder",
}
_USAGE = """\
usage: alignkit VERB [--config FILE.yaml] [--key value ...] [--dry-run]

{verbs}

  --help        after a verb: its keys with type, default and meaning
  --help-all    after `run` and `train`: the keys of transformers.TrainingArguments as well
  --dry-run     print the resolved config, which --config reads again, and what would be done; loads no model
  --traceback   show where an error came from
  --version     print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code (0 done, 2 an error the user can correct, 130 interrupted)."""
    # OpenMP reads it when torch is imported. Threads that wait otherwise spin, and slow down other jobs on these cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)  # users' modules (`mymodule:Bright`); last, so that none hides a library
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    output = contextlib.redirect_stdout(EscapedStream(sys.stdout))
    with output, contextlib.redirect_stderr(EscapedStream(sys.stderr, has_bars=True)):
        return _run(words, show_traceback=show_traceback)


def _run(words: list[str], *, show_traceback: bool) -> int:
    try:
        _dispatch(words)
    except AlignKitError as error:
        if show_traceback:
            raise
        lines = (to_line(str(line)) for line in error.args)
        print("alignkit: " + "\n".join(lines), file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read us (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if show_traceback or error.errno not in _KNOWN:
            raise
        print(
            f"alignkit: {to_line(str(error))}; {_KNOWN[error.errno]}, then run the same command again",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        again = f"The same command continues:\n  {shlex.join(['alignkit', *words])}"
        print(f"\nalignkit: interrupted; finished parts are kept. {again}", file=sys.stderr)
        return 130
    return 0


def _dispatch(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        print(__version__)
    elif not words or words[0] in ("--help", "-h", "help"):
        print(_usage(COMMANDS))
    else:
        _find(words)()


def _find(words: list[str]) -> Callable[[], None]:
    """The command that the first one or two words name, ready to be called; `train module:METHOD` is a user's own."""
    if words[0] == "train" and (" ".join(words[:2]) in COMMANDS or ":" in "".join(words[1:2])):
        train = resolve(_TRAIN, {}, kind="command")
        return lambda: train(words[1:])
    for length in (2, 1):
        verb, rest = " ".join(words[:length]), words[length:]
        if verb in COMMANDS:
            main_function = resolve(COMMANDS[verb][0], {}, kind="command")
            return lambda: main_function(rest)
    family = [verb for verb in COMMANDS if verb.startswith(f"{words[0]} ")]
    if family and (len(words) == 1 or words[1] in ("--help", "-h")):
        return lambda: print(_usage(family))
    command = " ".join(words[:2] if family else words[:1])
    own = " A method of your own: 'train package.module:METHOD'." if words[0] == "train" else ""
    raise UnknownNameError(
        f"unknown command '{command}'.{nearest(command, COMMANDS)}{own} `alignkit --help` lists all."
    )


def _usage(verbs: Sequence[str] | dict[str, tuple[str, str]]) -> str:
    width = max(map(len, COMMANDS)) + 2
    return _USAGE.format(verbs="\n".join(f"  {verb:<{width}}{COMMANDS[verb][1]}" for verb in verbs))
