"""The page of `alignkit studio` in Chromium: sliders, images, messages, export, the frontier; its server.

Tests wait for states of the page, never for time.
"""

from __future__ import annotations

import base64
import http.client

import numpy as np
import pytest
from chromium import PATIENCE, launched, needs_chromium
from fronts import REWARDS, point
from random_adapters import shake

from alignkit.adapters.mixture import read_mixture
from alignkit.commands.specs import GeneratorSpec
from alignkit.commands.studio.job import StudioJob
from alignkit.commands.studio.session import Session
from alignkit.errors import ConfigError
from alignkit.evaluation.frontier import MEMBERS, Frontier
from alignkit.media import decode_image
from alignkit.records import Sampling

pytest.importorskip("gradio", reason="Gradio is not installed (pip install alignkit[studio])")

pytestmark = needs_chromium
EDGE = [
    point(MEMBERS, (1, 0), (4, 0), name="one"),
    point(MEMBERS, (0, 1), (0, 4), name="two"),
    point("weights", (0.5, 0.5), (3, 3)),
]


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def session(load, model_folders, tmp_path_factory):
    """Two LoRAs with a reward and a frontier."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "two")}
    for number, folder in enumerate(folders.values()):
        generator = load("unet")
        generator.add_lora(2, None, None, 0.0)
        shake(generator.net, number, only="lora_")
        generator.save_adapter(folder)
    job = StudioJob(
        base=GeneratorSpec(model=str(model_folders["unet"])),
        members={name: str(folder) for name, folder in folders.items()},
        prompt="a red circle",
        seed=5,
        sampling=Sampling(steps=4, guidance_scale=1.0, height=16, width=16),
        out=tmp_path_factory.mktemp("out"),
    )
    opened = Session.open(job, quiet)
    return Session(
        job, opened.live, {"light": lambda media, _: media.mean((1, 2, 3))}, Frontier(["one", "two"], REWARDS, EDGE)
    )


@pytest.fixture(scope="module")
def address(session):
    from alignkit.commands.studio.page import serve

    with serve(session, 0) as url:
        yield url


@pytest.fixture
def page(address):
    """The page; at the end nothing was wrong or from elsewhere."""
    faults = []
    with launched() as chromium:
        opened = chromium.new_page(viewport={"width": 1320, "height": 1000})
        opened.set_default_timeout(PATIENCE)
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        opened.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith(own) else None)
        own = (address, "data:", "blob:")
        opened.goto(address)
        yield opened
    assert faults == []


def weigh(page, member, weight):
    page.fill(f"input[aria-label='number input for {member}']", str(weight))


def caption(page, text):
    page.wait_for_selector(f"#mix figcaption:text-is('Mixture: {text}')")


def test_the_page(page, session):
    caption(page, "0.5 one + 0.5 two, mixed as weights")
    assert "nearest: weights 0.5-0.5: 3.000, 3.000" in page.text_content("#frontier")
    weigh(page, "one", 0.3)
    caption(page, "0.3 one + 0.5 two + 0.2 base, mixed as weights")
    # Of the mixture of (3, 3) 0.6, of the member of (0, 4) and of the base 0.2.
    assert "this mixture, interpolated: 1.800, 2.600" in page.text_content("#frontier")
    mix = session.recipe("weights", {"one": 0.3, "two": 0.5}, (0, 4), rest=True)
    shot = session.shot(mix, "a red circle", 5, quiet)
    for name, side in (("base", shot.base), ("mix", shot.mix)):
        source = page.get_attribute(f"#{name} img", "src")
        assert np.array_equal(decode_image(base64.b64decode(source.partition(",")[2]), name), side.image)
    assert page.inner_text("#scores tr[data-reward=light] td >> nth=1") == f"{shot.mix.scores['light']:.3f}"

    page.uncheck("#live input")
    weigh(page, "two", 0.1)
    page.wait_for_selector("#message:has-text('Press Draw')")
    caption(page, "0.3 one + 0.5 two + 0.2 base, mixed as weights")
    page.click("#draw")
    caption(page, "0.3 one + 0.1 two + 0.6 base, mixed as weights")
    page.check("#live input")

    page.fill("#prompt textarea", "two blue rings")
    weigh(page, "two", 0.2)  # the prompt is locked until it is asked for
    caption(page, "0.3 one + 0.2 two + 0.5 base, mixed as weights")
    assert page.inner_text("#stage .prompt") == "a red circle seed 5"
    page.fill("#seed input", "7")
    page.click("#use")
    page.wait_for_selector("#stage .prompt:has-text('two blue rings seed 7')")
    page.fill("#prompt textarea", " ")
    page.click("#use")
    page.wait_for_selector("#message [role=alert]:has-text('the prompt is empty')")
    page.fill("#prompt textarea", "two blue rings")
    page.click("#use")
    page.wait_for_selector("#message [role=alert]", state="detached")

    assert not page.is_visible("#first")
    page.click("#space label:has-text('prediction')")
    page.fill("input[aria-label='number input for From step']", "2")
    caption(page, "0.3 one + 0.2 two + 0.5 base, mixed as prediction, from 50% to 100% of the steps")
    assert "This frontier has no mixtures of prediction" in page.inner_text("#frontier")
    page.uncheck("#rest input")
    page.wait_for_selector("#message [role=alert]:has-text('the weights sum to 0.5, not to 1')")
    page.check("#rest input")
    page.wait_for_selector("#message [role=alert]", state="detached")
    page.fill("#name input, #name textarea", "half")
    page.click("#export")
    page.wait_for_selector("#exported [role=status]:has-text('alignkit soup --members')")
    written = read_mixture(session.job.out / "half")
    assert written.weights == (0.3, 0.2, 0.5)
    assert written.window.bounds == [0.5, 1.0]
    page.click("#export")
    page.wait_for_selector("#exported [role=alert]:has-text('never overwrites')")


def test_the_server_answers_this_machine_alone(address, session):
    from alignkit.commands.studio.page import serve

    def answer(**headers):
        connection = http.client.HTTPConnection(address.split("/")[2], timeout=60)
        connection.request("GET", "/config", headers={name.replace("_", "-"): text for name, text in headers.items()})
        found = connection.getresponse()
        text = found.read().decode()
        connection.close()
        return found, text

    found, text = answer()
    assert found.status == 200
    assert "connect-src 'self'" in found.headers["Content-Security-Policy"]
    assert '"analytics_enabled":false' in text.replace(" ", "")
    assert answer(Host="evil.example")[0].status == 421
    assert answer(Origin="https://evil.example")[0].status == 403
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port} cannot be used"), serve(session, port):
        pass
