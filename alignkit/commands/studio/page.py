"""The page of a studio: layout and events in Gradio, served on loopback.

Nothing is fetched from a network: Gradio's telemetry and its fonts are off, and the page's policy forbids other origins
(`guard`). Deliberately not here: what is shown (`view`) and computed (`session`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from alignkit.commands.studio import view
from alignkit.commands.studio.guard import Guard
from alignkit.commands.studio.session import Session, Tell
from alignkit.errors import AlignKitError, ConfigError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported and used
import fastapi
import gradio as gr
import uvicorn

if TYPE_CHECKING:
    from alignkit.generators.live import Recipe

_SAME = (gr.skip(), gr.skip(), gr.skip())  # image, scores and frontier stay
LOOPBACK = "127.0.0.1"
_SPACES = [
    ("weights: one model", "weights"),
    ("embedding: text encoders", "embedding"),
    ("prediction: denoisers", "prediction"),
]
_PLAIN: Any = {"js_on_load": None, "apply_default_css": False}
_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]
_CSS = """
.gradio-container { max-width:1320px !important; } footer { display:none !important; }
#message:not(:has(.studio)), #exported:not(:has(.studio)) { display:none; }
"""
_ACCENT = "#1f6f8b"
_COLOURS = {
    **dict.fromkeys(["slider_color", "loader_color", "button_primary_background_fill"], _ACCENT),
    "button_primary_background_fill_hover": "#185a71",
    "button_primary_text_color": "white",
    "checkbox_background_color_selected": _ACCENT,
    "body_background_fill": "#faf9f6",
}
_COLOURS |= {f"{name}_dark": value for name, value in _COLOURS.items()} | {"body_background_fill_dark": "#14161a"}


class Page:
    """The components of one page and what their events do; all work is the session's."""

    def __init__(self, session: Session) -> None:
        self.session, job = session, session.job
        count = job.sampling.steps
        with gr.Blocks(title="alignkit studio", analytics_enabled=False) as self.blocks:
            self.locked = gr.State((job.prompt, job.seed))
            gr.HTML(view.heading(session), **_PLAIN)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    with gr.Group():
                        self.prompt = gr.Textbox(job.prompt, label="Prompt", lines=2, max_lines=6, elem_id="prompt")
                        self.seed = gr.Number(job.seed, label="Seed", precision=0, minimum=0, elem_id="seed")
                        use = gr.Button("Use this prompt and seed", size="sm", elem_id="use")
                    self.space = gr.Radio(_SPACES, value=job.space, label="Mix", elem_id="space")
                    with gr.Group():
                        self.weights = [
                            gr.Slider(
                                min(-0.5, value), max(1.5, value), value, step=0.01, label=name, elem_classes="weight"
                            )
                            for name, value in job.start.items()
                        ]
                        self.rest = gr.Checkbox(value=True, label="The base has the rest to 1", elem_id="rest")
                    with gr.Group(visible=job.space != "weights") as self.window:
                        self.first = gr.Slider(
                            0, count - 1, job.steps.start, step=1, label="From step", elem_id="first"
                        )
                        self.stop = gr.Slider(
                            1, count, job.steps.stop, step=1, label="Up to, without, step", elem_id="stop"
                        )
                    with gr.Row():
                        self.live = gr.Checkbox(value=True, label="Draw on every change", elem_id="live", scale=2)
                        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                    with gr.Group():
                        self.name = gr.Textbox(
                            label=f"Export this mix into {job.out}/", placeholder="name", elem_id="name"
                        )
                        export = gr.Button("Export", elem_id="export")
                    self.exported = gr.HTML(**_PLAIN, elem_id="exported")
                with gr.Column(scale=5, min_width=420):
                    self.message = gr.HTML(**_PLAIN, elem_id="message")
                    self.stage = gr.HTML(**_PLAIN, elem_id="stage", min_height=300)
                    with gr.Row():
                        with gr.Column(min_width=260):
                            self.scores = gr.HTML(**_PLAIN, elem_id="scores")
                        with gr.Column(min_width=320, visible=session.frontier is not None):
                            self.frontier = gr.HTML(**_PLAIN, elem_id="frontier")
            self._connect(use, draw, export)

    def _connect(self, use: Any, draw: Any, export: Any) -> None:
        mix = [self.space, self.first, self.stop, self.rest, *self.weights]
        shown = [self.message, self.stage, self.scores, self.frontier]
        options: dict[str, Any] = {
            "concurrency_id": "session",
            "show_progress_on": self.stage,
            "api_visibility": "private",
        }
        once: Any = {**options, "trigger_mode": "always_last"}
        changes = [part.change for part in mix]
        gr.on(changes, self._changed, [self.live, self.locked, *mix], shown, **once)
        gr.on([draw.click, self.blocks.load], self._drawn, [self.locked, *mix], shown, **once)
        gr.on(
            [use.click, self.prompt.submit, self.seed.submit],
            self._lock,
            [self.prompt, self.seed],
            self.locked,
            api_visibility="private",
        ).then(self._drawn, [self.locked, *mix], shown, **once)
        self.space.change(
            lambda space: gr.update(visible=space != "weights"), self.space, self.window, api_visibility="private"
        )
        gr.on(
            [export.click, self.name.submit],
            self._export,
            [self.name, *mix],
            self.exported,
            concurrency_id="session",
            api_visibility="private",
        )

    @staticmethod
    def _lock(prompt: str, seed: Any) -> tuple[str, Any]:
        return prompt, seed

    def _recipe(self, space: Any, first: Any, stop: Any, rest: bool, *weights: Any) -> Recipe:  # noqa: FBT001 - Gradio's
        named = dict(zip(self.session.job.members, weights, strict=True))
        return self.session.recipe(space, named, (first, stop), rest=rest)

    def _changed(self, live: bool, locked: tuple[str, Any], *mix: Any, progress: Any = gr.Progress()) -> Any:  # noqa: FBT001, B008
        if not live:
            return view.note("The mix has changed. Press Draw for its image."), *_SAME
        return self._drawn(locked, *mix, progress=progress)

    def _drawn(self, locked: tuple[str, Any], *mix: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        tell: Tell = lambda share, text: progress(share, desc=text)  # noqa: E731
        try:
            recipe = self._recipe(*mix)
            shot = self.session.shot(recipe, *locked, tell)
        except AlignKitError as error:
            return view.problem(error), *_SAME
        image = view.stage(shot, self.session.job.sampling.fps)
        return "", image, view.scores(shot), view.frontier(self.session, recipe)

    def _export(self, name: str, *mix: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008
        progress(0.0, desc=f"writing {name}")
        try:
            folder, command = self.session.export(self._recipe(*mix), name)
        except AlignKitError as error:
            return view.problem(error)
        print(f"exported {folder}; the same again:\n  {command}", flush=True)
        return view.exported(str(folder), command)


async def application(session: Session) -> Guard:
    """The page as an ASGI application. A coroutine, for Gradio opens event loops of its own where none is running."""
    theme = gr.themes.Base(primary_hue="cyan", neutral_hue="stone", font=_FONTS, font_mono=_MONO)
    mounted = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        Page(session).blocks,
        "/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=False,
        max_file_size="1kb",  # nothing is uploaded
        theme=theme.set(**_COLOURS),
        css=_CSS,
        head=f"<style>{view.STYLE}</style>",
    )
    return Guard(mounted)


@contextlib.contextmanager
def serve(session: Session, port: int) -> Iterator[str]:
    """Serve the page within it; gives its address. Raises ConfigError where the port is taken.

    With a server of its own: `launch` of Gradio looks for its server by way of a proxy and waits five seconds for it.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, port))
            listening.listen()
        except OSError as error:
            raise ConfigError(f"port {port} cannot be used: {error.strerror}; give another, or --port 0") from error
        guarded = asyncio.run(application(session))
        server = uvicorn.Server(
            uvicorn.Config(guarded, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
