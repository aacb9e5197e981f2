"""The page: self-contained, balanced, escaped, whole when parts are missing, and honest about the worst pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from alignkit.errors import DataError, MissingFileError
from alignkit.evaluation.card import CardInputs, write_card
from alignkit.evaluation.gallery import choose
from alignkit.evaluation.judged import read_all
from alignkit.evaluation.page import picture
from alignkit.evaluation.paired import evaluate
from alignkit.evaluation.report import ReportInputs, render, verdict, write_report
from alignkit.evaluation.results import read_evaluation, read_pairs
from alignkit.evaluation.terminal import before_after
from alignkit.records import Prompt

VOID = {"meta", "img", "br", "link", "input", "hr"}
LOG = [
    *({"step": k, "loss": 0.7 - k / 1000, "grad_norm": 0.5, "health/implicit_accuracy": 0.6, "health/margin": k / 100}
      | {"health/winner_error_delta": -k / 1e5, "health/loser_error_delta": k / 1e5, "health/saturated": 0.1}
      for k in range(1, 61)),
    {"step": 20, "eval_reward/grey": 1.0},
    {"step": 40, "eval_reward/grey": 1.5},
]  # fmt: skip
DATA = {
    "rows": 12,
    "agreement": {"a": {"a": 1.0, "b": 0.7}, "b": {"a": 0.7, "b": 0.9}},
    "phi_histogram": {"edges": [0.0, 0.5, 1.0], "counts": [7, 5]},
    "generator_bias": {"pair_accuracy": 0.613, "generators": {"weak": {"mean_phi": 0.4, "win_share": None}}},
}
CONFIG = {"train": {"beta": 1000, "lora": {"r": 16}}, "empty": None}


class Balance(HTMLParser):
    """Every tag that opens closes, in order; collects what attributes point at."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag


def parse(text):
    page = Balance()
    page.feed(text)
    page.close()
    assert page.stack == []
    return page


@pytest.fixture(scope="module")
def full(finished):
    return render(ReportInputs("A run", finished, LOG, DATA, CONFIG, {"torch": "2.13"}, "alignkit report runs/a"))


def test_nothing_is_fetched_and_nothing_runs(full):
    page = parse(full)
    targets = [value for _, attrs in page.tags for key, value in attrs.items() if key in {"src", "href", "srcset"}]
    assert targets
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert not re.search(r"url\(|@import|<script|\son\w+=", full)
    assert not re.search(r"https?://", full)


def test_the_page_is_named_described_and_linked_inside(full):
    page = parse(full)
    assert "<title>A run</title>" in full
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} <= set(ids)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")


def test_tiny_pictures_are_shown_pixel_by_pixel_and_are_the_stored_ones(full, finished):
    pairs = read_pairs(finished)
    row = choose(pairs, "gold", 6)["gains"][0]
    for side in ("base", "tuned"):
        png = pairs.media(side, [row])[row]
        assert f"data:image/png;base64,{base64.b64encode(png).decode()}" in full
    assert all(attrs["class"] == "tiny" for tag, attrs in parse(full).tags if tag == "img")


def test_a_large_picture_is_embedded_smaller():
    sink = io.BytesIO()
    Image.new("RGB", (1024, 512), "navy").save(sink, format="PNG")
    tag = picture(sink.getvalue(), "sea")
    assert 'width="384" height="192"' in tag
    assert "tiny" not in tag


def test_numbers_settings_and_config_are_on_the_page(full, finished):
    evaluation = read_evaluation(finished)
    overall = evaluation.result("grey").overall
    text = re.sub(r"<style>.*?</style>", "", full, flags=re.DOTALL)
    for expected in (
        "2 steps, guidance 1, 8×8",
        "8 × 3",
        f"{overall.base.mean:.0f}",
        verdict(evaluation),
        "0.613",
        "alignkit report runs/a",
        "2.13",
        "Held-out grey",
    ):
        assert expected in text
    for key in ("beta", "lora", "1000"):
        assert key in text


@pytest.mark.parametrize("left_out", ["evaluation", "log", "data", "config", "versions", "all"])
def test_a_missing_part_is_said_to_be_missing(finished, left_out):
    parts = {"evaluation": finished, "log": LOG, "data": DATA, "config": CONFIG, "versions": {"torch": "2.13"}}
    sentences = {
        "evaluation": "No evaluation in this run.",
        "log": "No training log in this run.",
        "data": "No data statistics in this run.",
        "config": "No configuration in this run.",
        "versions": "No versions recorded.",
    }
    kept = {key: value for key, value in parts.items() if left_out not in (key, "all")}
    text = render(ReportInputs("A run", **kept))
    parse(text)
    for key, sentence in sentences.items():
        assert (sentence in text) == (key not in kept)


def test_a_log_with_few_keys_and_statistics_of_unknown_form_still_render():
    log = [
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": 0.5},
        {"epoch": 1.0, "loss": 3},
        {"train_runtime": 5.0},
    ]
    data = {"agreement": 0.7, "phi_histogram": "none", "generator_bias": [1, 2], "deep": {"a": {"b": [1, 2, {"c": 3}]}}}
    text = render(ReportInputs("Odd", None, log, data))
    parse(text)
    assert "Not in this log." in text
    assert "not finite at 1 logged steps, first at 1" in text
    assert "phi_histogram" in text


def test_only_what_was_measured_is_said_to_have_passed(full):
    assert "No warnings. Checked: winner error, saturation, gradient norm." in full
    text = render(ReportInputs("SFT", None, [{"step": k, "loss": 1.0} for k in range(20)]))
    assert "No warnings" not in text
    assert "none of the health measurements" in text


EVIL = '<script>alert("x")</script> & "quotes" | <img src=http://evil>'


def test_whatever_was_written_by_somebody_is_escaped(world, tmp_path):
    prompts = [Prompt.from_text(EVIL, category="<b>odd</b>"), Prompt.from_text("tame", category="tame & calm")]
    names = ("<i>base</i>", "<u>tuned</u>")
    sources = (world.source(names[0]), world.source(names[1], lambda text, seed: 3))
    rewards = {"<em>": world.reader("<em>")}
    evaluate(*sources, prompts, world.config, tmp_path / "e", rewards=rewards, gold=None)
    data = {EVIL: {EVIL: EVIL}, "agreement": {EVIL: {EVIL: 0.5}}, "generator_bias": {"generators": {EVIL: {EVIL: 1}}}}
    log = [{"step": 1, f"eval_reward/{EVIL}": 1.0}]
    text = render(ReportInputs(EVIL, tmp_path / "e", log, data, {EVIL: EVIL}, {EVIL: EVIL}, EVIL))
    tags = {tag for tag, _ in parse(text).tags}
    assert tags.isdisjoint({"script", "u", "em"})
    assert not re.search(r"<(script|b>odd|i>base|u>tuned|em>|img src=http)", text)
    card = write_card(CardInputs("T", "RankDPO", "a/b", tmp_path / "e"), tmp_path / "card").read_text()
    assert "<script>" not in card


def test_the_gallery_holds_the_true_biggest_gain_and_loss(finished):
    pairs = read_pairs(finished)
    gain = pairs.gain("grey")
    chosen = choose(pairs, "grey", 4)
    assert gain[chosen["gains"][0]] == gain.max() > 0
    assert gain[chosen["losses"][0]] == gain.min() < 0
    assert list(gain[chosen["gains"]]) == sorted(gain[chosen["gains"]], reverse=True)
    for rows in chosen.values():
        assert len({pairs.prompts[row].id for row in rows}) == len(rows)
    assert set(chosen["random"]).isdisjoint([*chosen["gains"], *chosen["losses"]])


def test_equal_verdicts_of_gold_are_ordered_by_the_proxies(finished):
    pairs = read_pairs(finished)
    gold, grey = pairs.gain("gold"), pairs.gain("grey")
    chosen = choose(pairs, "gold", 1)
    assert grey[chosen["gains"][0]] == max(grey[gold == 1])
    assert grey[chosen["losses"][0]] == min(grey[gold == -1])


def test_a_note_stands_under_the_title_and_is_escaped():
    text = render(ReportInputs("One", note="what <b>it</b> shows"))
    assert '</h1><p class="lead">what &lt;b&gt;it&lt;/b&gt; shows</p>' in text
    assert '<p class="lead"></p>' not in render(ReportInputs("One"))


def test_no_gain_gives_no_gains(world, tmp_path):
    sources = (world.source("base"), world.source("tuned"))
    evaluate(*sources, world.prompts, world.config, tmp_path, rewards=world.rewards(), gold="gold")
    chosen = choose(read_pairs(tmp_path), "gold", 3)
    assert (chosen["gains"], chosen["losses"], len(chosen["random"])) == ([], [], 3)
    assert "No significant gain on gold" in render(ReportInputs("Same", tmp_path))


def test_the_report_is_regenerated_but_hand_edits_are_kept(tmp_path):
    path = tmp_path / "report.html"
    write_report(ReportInputs("One"), path)
    write_report(ReportInputs("Two"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    edited = path.read_text().replace("Two", "Mine")
    path.write_text(edited)
    write_report(ReportInputs("Three"), path)
    assert (tmp_path / "report.kept-1.html").read_text() == edited
    assert "Three" in path.read_text()


def test_the_terminal_table_fits_eighty_columns_and_is_aligned(finished, world, tmp_path):
    rewards = {"a reward with a name far too long for a table": world.reader("long"), **world.rewards()}
    sources = (world.source("base"), world.source("tuned", world.shift))
    for evaluation in (
        read_evaluation(finished),
        evaluate(*sources, world.prompts, world.config, tmp_path, rewards=rewards, gold="gold"),
    ):
        lines = before_after(evaluation).splitlines()
        assert max(map(len, lines)) <= 80
        assert all(line.isascii() for line in lines)
        start = next(k for k, line in enumerate(lines) if line.startswith("reward"))
        rows = [lines[start], *lines[start + 2 : start + 2 + len(evaluation.results)]]
        assert len({len(row) for row in rows}) == 1
        assert rows[1].startswith("gold *")


def test_the_card_has_front_matter_scores_and_pictures_that_are_there(finished, tmp_path):
    peft_form = tmp_path / "README.md"
    peft_form.write_text("[More Information Needed]")
    path = write_card(CardInputs("T", "RankDPO", "org/model", finished, CONFIG, DATA, "apache-2.0"), tmp_path)
    text = path.read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "org/model"
    assert front["library_name"] == "diffusers"
    assert {"alignkit", "rankdpo", "lora"} <= set(front["tags"])
    pictures = re.findall(r"!\[\w+\]\(([^)]+)\)", text)
    assert len(pictures) >= 6
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "gold (held out)" in text
    assert "2 steps, guidance 1" in text
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "examples"}


@pytest.mark.parametrize("base", ["models/my-model", "org/model", "sandbox:unet", "/data/my model"])
def test_the_card_names_the_base_model_as_the_user_did(base, tmp_path, monkeypatch):
    """Code that loads it as well; no other path of the machine is printed."""
    (tmp_path / "models" / "my-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = write_card(CardInputs("T", "RankDPO", base), tmp_path / "out").read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == base
    loader = "load_generator" if base.startswith("sandbox:") else "from_pretrained"
    assert f'{loader}("{base}")' in text
    assert str(tmp_path) not in text
    assert "No paired evaluation of this result" in text


def test_reading_a_folder_that_is_none_or_damaged_names_the_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"evaluation\.json"):
        render(ReportInputs("x", tmp_path))
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json' is not JSON"):
        render(ReportInputs("x", tmp_path))
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": []}))
    with pytest.raises(DataError, match="other keys"):
        render(ReportInputs("x", tmp_path))


TRAP = "![t](http://tracker/x) [x](javascript:alert) <img src=http://e> `c` | b\x1b[2J"


@pytest.fixture(scope="module")
def hostile(world, tmp_path_factory):
    """An evaluation whose prompts, categories, models and rewards have hostile names."""
    out = tmp_path_factory.mktemp("hostile")
    prompts = [Prompt.from_text(f"{TRAP} {k}", category=f"{TRAP}{k % 2}") for k in range(4)]
    sides = (world.source(TRAP), world.source(f"tuned {TRAP}", lambda text, seed: 2))
    evaluate(*sides, prompts, world.config, out, rewards={TRAP: world.reader(TRAP)}, gold=TRAP)
    return out


def active(text):
    """What a Markdown viewer would load, follow or run: (type of token, address or text)."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        inside = [token, *(token.children or [])]
        found += [(t.type, t.attrGet("src") or t.attrGet("href") or t.content) for t in inside if t.type in ACTIVE]
    return found


ACTIVE = {"image", "link_open", "html_block", "html_inline"}


def test_hostile_texts_in_a_card_are_shown_and_do_nothing(hostile, tmp_path):
    """Its images are its own, its only HTML is the comment with its checksum; settings cannot end their block."""
    config = {"prompt": f"```\n\n{TRAP}\n", TRAP: [TRAP]}
    card = CardInputs(TRAP, TRAP, TRAP, hostile, config, config, validation={1: {TRAP: 1.0}})
    text = write_card(card, tmp_path).read_text(encoding="utf-8")
    found = active(text.split("---", 2)[2])
    images = [address for kind, address in found if kind == "image"]
    assert images
    assert all((tmp_path / address).is_file() for address in images)
    assert [kind for kind, _ in found if kind != "image"] == ["html_block"]
    assert found[-1][1].startswith("<!-- written by alignkit")
    assert "\x1b" not in text


def test_hostile_texts_in_a_report_are_shown_and_do_nothing(hostile):
    log = [{"step": k, "loss": 1.0, f"eval_reward/{TRAP}": 1.0} for k in (1, 2)]
    data = {TRAP: {TRAP: TRAP}, "agreement": {TRAP: {TRAP: 0.5}}, "generator_bias": {"generators": {TRAP: {TRAP: 1}}}}
    text = render(ReportInputs(TRAP, hostile, log, data, {TRAP: TRAP}, {TRAP: TRAP}, TRAP))
    tags = parse(text).tags
    assert {tag for tag, _ in tags}.isdisjoint({"script", "iframe", "link", "object", "embed", "form", "base"})
    addresses = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "data")]
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert "\x1b" not in text
    (policy,) = (attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "\x1b" not in before_after(read_evaluation(hostile))


@pytest.mark.parametrize("change", [{"prompts": TRAP}, {"base": 3}, {"confidence": TRAP}])
def test_texts_where_numbers_belong_are_refused(finished, tmp_path, change):
    stored = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    (tmp_path / "evaluation.json").write_text(json.dumps(stored | change), encoding="utf-8")
    with pytest.raises(DataError, match=r"evaluation\.json has other keys"):
        read_evaluation(tmp_path)
    judged = {"judge": "j", "wins": TRAP, "losses": 0, "abstentions": 0, "win_rate": 1.0, "low": None, "high": None}
    (tmp_path / "judged" / "j").mkdir(parents=True)
    for result in (judged, {"judge": "j"}, judged | {"wins": 1, "judge": 3}):
        (tmp_path / "judged" / "j" / "result.json").write_text(json.dumps(result), encoding="utf-8")
        with pytest.raises(DataError, match=r"result\.json' (has other keys|holds a text)"):
            read_all(tmp_path)


def test_embedded_images_are_bounded_whatever_was_stored():
    """Large files, other formats and metadata are encoded again; damaged ones are named."""
    texts = PngInfo()
    texts.add_text("note", "x" * 2_000_000)
    for kind, size, options in (("JPEG", (900, 300), {}), ("BMP", (40, 20), {}), ("PNG", (40, 20), {"pnginfo": texts})):
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, format=kind, **options)
        shown = base64.b64decode(re.search(r"base64,([^\"]*)", picture(buffer.getvalue(), "a")).group(1))
        with Image.open(io.BytesIO(shown)) as image:
            assert (image.format, image.size) == ("PNG", (384, 128) if kind == "JPEG" else size)
            assert "note" not in image.info
    with pytest.raises(DataError, match=r"^tuned image for: a cat: the image cannot be decoded"):
        picture(b"no image", "tuned image for: a cat")
