"""`alignkit studio`: mixtures of reward-tuned members on a page in the browser, with their images and scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from alignkit.commands.specs import absences
from alignkit.commands.studio.job import StudioJob
from alignkit.commands.verb import Verb, execute
from alignkit.errors import ConfigError
from alignkit.shipped import model_path


def _plan(job: StudioJob) -> list[str]:
    folders = [*job.members.values(), *([str(job.frontier)] if job.frontier else [])]
    missing = [folder for folder in folders if not Path(model_path(folder)).exists()]
    return [
        *absences({"base": job.base}, rewards=job.rewards),
        *(f"NOT THERE YET: {folder}" for folder in missing),
        f"serve a page on 127.0.0.1, port {job.port or 'any'}, that mixes {', '.join(job.members)} on {job.base.model}",
        f"write the mixtures that you export into {job.out}",
    ]


def _work(job: StudioJob) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the studio's page is made with Gradio: pip install 'alignkit[studio]'")
    from alignkit.commands.studio.page import serve
    from alignkit.commands.studio.session import Session

    session = Session.open(job, lambda text: print(f"{text} ...", flush=True))
    with serve(session, job.port) as url:
        print(f"open {url} (Ctrl-C ends it)", flush=True)
        wait()
    print(f"exported mixtures are in {job.out}")


def wait() -> None:
    """Until Ctrl-C."""
    import threading

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Try mixtures of trainings on a page in the browser: sliders, images, rewards, the frontier, export."
    execute(Verb("studio", summary, lambda *_: StudioJob, _plan, _work), argv)
