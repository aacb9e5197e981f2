"""Strict configuration: what is accepted, and what every refusal says."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.config import load
from alignkit.errors import ConfigError, MissingFileError, ResumeError
from alignkit.provenance import dump, vars_of, write_resolved
from alignkit.records import Sampling


class Color(enum.Enum):
    """A choice by value."""

    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A named part."""

    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A config with a field of every kind."""

    specs: Mapping[str, Spec]
    rate: float = 1e-4
    loss: Literal["pair", "list"] = "pair"
    color: Color = Color.RED
    seeds: Sequence[int] = (1, 2)
    limit: int | None = None
    name: str = "job"
    quiet: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"rate is {self.rate}; it must be positive")


SPECS = "specs: {base: {folder: weights}}\n"


@pytest.fixture
def read(tmp_path):
    """Write YAML text and load it with flags."""

    def load_text(text: str, *argv: str) -> Job:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return load(Job, argv, file=path)

    return load_text


def refusal(read, text: str, *argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *argv)
    return str(caught.value)


def test_flags_override_the_file_section_by_section(read):
    job = read(SPECS + "rate: 0.5\nsampling: {steps: 8, height: 64}\n", "--rate=0.25", "--sampling.steps", "4")
    assert job.rate == 0.25
    assert (job.sampling.steps, job.sampling.height) == (4, 64)


def test_flag_forms_are_alike(read):
    forms = (["--seeds", "[3, 4]"], ["--seeds=[3, 4]"], ["--seeds", "3", "4"])
    assert [read(SPECS, *form).seeds for form in forms] == [(3, 4)] * 3
    assert read(SPECS, "--seeds", "5", "--rate", "2").seeds == (5,)


def test_a_flag_reaches_into_a_mapping_of_sections(read):
    job = read(SPECS, "--specs.base.options.depth", "3", "--specs.other.folder", "more")
    assert job.specs["base"] == Spec(folder=Path("weights"), options={"depth": 3})
    assert job.specs["other"].folder == Path("more")
    job = read(SPECS, "--specs.base.options.inner.depth", "3", "--specs.base.options.inner.words", "1", "two")
    assert job.specs["base"].options == {"inner": {"depth": 3, "words": ["1", "two"]}}


@pytest.mark.parametrize(
    ("flag", "field_name", "value"),
    [
        ("--rate=1e-5", "rate", 1e-5),
        ("--limit=null", "limit", None),
        ("--limit=7", "limit", 7),
        ("--name=123", "name", "123"),
        ("--name=a: b", "name", "a: b"),
        ("--color=blue", "color", Color.BLUE),
        ("--loss=list", "loss", "list"),
        ("--quiet", "quiet", True),
        ("--quiet=false", "quiet", False),
    ],
)
def test_flag_text_becomes_the_type(read, flag, field_name, value):
    found = vars_of(read(SPECS, flag))[field_name]
    assert found == value
    assert type(found) is type(value)


def test_scientific_notation_in_yaml_is_a_number(read):
    assert read(SPECS + "rate: 1e-4\n").rate == 1e-4  # PyYAML itself reads text here


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("rat: 1\n", [], r"job.yaml:2: unknown key 'rat'. Did you mean 'rate'?"),
        ("", ["--rat", "1"], "flag --rat: unknown key 'rat'. Did you mean 'rate'?"),
        ("", ["--height", "1"], "flag --height: unknown key 'height'. Did you mean 'sampling.height'?"),
        ("sampling: {step: 3}\n", [], "job.yaml:2: unknown key 'sampling.step'. Did you mean 'steps'?"),
        ("rate: 1.0\nrate: 2.0\n", [], "job.yaml:3: 'rate' is given twice (first at"),
        ("sampling:\n  steps: 1\n  steps: 2\n", [], "job.yaml:4: 'steps' is given twice"),
        ("", ["--rate=1", "--rate", "2"], "flag --rate is given twice"),
        ("sampling: {steps: 5.5}\n", [], "job.yaml:2: sampling.steps must be int, not 5.5"),
        ("sampling: {steps: true}\n", [], "sampling.steps must be int, not True"),
        ("quiet: 1\n", [], "quiet must be bool, not 1"),
        ("name: 12\n", [], "name must be str, not 12 (quote it)"),
        ("loss: pairs\n", [], "loss must be pair | list, not 'pairs'. Did you mean 'pair'?"),
        ("seeds: [1, x]\n", [], "seeds[1] must be int, not 'x'"),
        ("limit: many\n", [], "limit must be int, not 'many'"),
        ("", ["seeds", "--rate", "2"], "unexpected word 'seeds'"),
        ("", ["--rate", "1", "2"], "flag --rate: rate must be float, not a list"),
        ("", ["--specs.base.foldr", "x"], "unknown key 'specs.base.foldr'. Did you mean 'folder'?"),
        ("", ["--name.first", "x", "--rate", "2"], "name must be str, not a section"),
        ("rate: -1\n", [], "rate is -1.0; it must be positive"),
        ("sampling: 3\n", [], "sampling must be section Sampling, not 3"),
        ("sampling: {steps: -1}\n", [], "job.yaml:2: sampling: steps is -1; it must be at least 1"),
        ("sampling: {height: 0}\n", [], "height is 0; it must be at least 1"),
        ("sampling: {num_frames: 0}\n", [], "num_frames is 0; it must be at least 1"),
        ("sampling: {guidance_scale: -1}\n", [], "guidance_scale is -1.0; it must be finite and not negative"),
        ("sampling: {guidance_scale: .nan}\n", [], "job.yaml:2: .nan is no finite number"),
        ("rate: .inf\n", [], "job.yaml:2: .inf is no finite number"),
        ("rate: 1e400\n", [], "job.yaml:2: rate must be float, not '1e400'"),
        ("", ["--rate=nan"], "flag --rate: rate must be float, not 'nan'"),
        ("", ["--rate=1e999"], "flag --rate: rate must be float, not '1e999'"),
        ("", ["--limit=9223372036854775808"], "limit must be int, not 9223372036854775808 (it must fit in 64 bits)"),
        (f"limit: {'9' * 5000}\n", [], "job.yaml:2: a number of 5000 characters; the limit is 40"),
        ("limit: 010\n", [], "job.yaml:2: 010 starts with 0, which is base 8 in YAML"),
        ("limit: 1:30\n", [], "job.yaml:2: limit must be int, not '1:30'"),
        ("name: on\n", [], "job.yaml:2: name must be str, not True, which YAML makes of 'on' (quote it)"),
        ("loss: off\n", [], "job.yaml:2: loss must be pair | list, not False, which YAML makes of 'off' (quote it)"),
        ("? [a]\n: 1\n", [], "job.yaml:2: a key must be a name, not a list or a mapping"),
        ("? {a: 1}\n: 1\n", [], "job.yaml:2: a key must be a name"),
        ("name: !!binary aGk=\n", [], "job.yaml:2: the tag '!!binary' is not read"),
        ("seeds: !!set {1}\n", [], "job.yaml:2: the tag '!!set' is not read"),
        ('name: "\\ud800"\n', [], "job.yaml:2: '\\ud800' holds half of a character"),
        (
            "sampling:\n\tsteps: 1\n",
            [],
            "job.yaml:3: not valid YAML: found character '\\t' that cannot start",
        ),
        ("name: a\0b\n", [], "job.yaml:2: not valid YAML: the character '\\x00' is not allowed"),
        ("seeds: &a [*a]\n", [], "job.yaml:2: nested over 50 deep, the limit; does an anchor (&) contain itself?"),
        (f"seeds: {'[' * 10_000}\n", [], "nested over 50 deep, the limit"),
        ("name: x\n--- \nname: y\n", [], "job.yaml:3: not valid YAML: but found another document"),
    ],
)
def test_a_refusal_names_place_value_and_fix(read, text, argv, message):
    assert message in refusal(read, SPECS + text, *argv)


def test_an_abbreviated_key_is_unknown(read):
    assert "unknown key 'samp'" in refusal(read, SPECS + "samp: {steps: 3}\n")
    assert "unknown key 'sampling.step'" in refusal(read, SPECS, "--sampling.step", "3")


def test_all_problems_are_told_at_once(read):
    told = refusal(read, SPECS + "rat: 1\nname: 3\nname: 4\n", "--loss", "x")
    assert told.startswith("4 problems:")
    assert all(word in told for word in ("'rat'", "given twice", "name must be str", "loss must be"))


def test_a_missing_required_key_is_named():
    with pytest.raises(ConfigError, match="key 'specs' is missing"):
        load(Job)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingFileError, match=r"absent\.yaml"):
        load(Job, file=tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    for data, message in ((b"a: \xff", "not UTF-8"), (b"a: [1", "not valid YAML"), (b"- 1", "key: value")):
        bad.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            load(Job, file=bad)


def test_yaml_never_makes_python_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(ConfigError):
        load(Job, file=path)


def test_aliases_that_explode_are_bounded(read):
    """Nine levels of nine aliases each stand for 9**9 values."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    told = refusal(read, "\n".join(levels))
    assert "over 20000 values, the limit; an alias (*) counts with all its content" in told


def test_an_alias_is_its_value(read):
    job = read("specs: {a: &a {folder: x}, b: *a}\n")
    assert job.specs["a"] == job.specs["b"] == Spec(folder=Path("x"))


def test_dates_and_clock_times_stay_text(read):
    job = read("specs: {a: {folder: 2026-01-31, options: {ratio: 16:9, on: 2026-01-31, off: yes}}}\nname: 12:30\n")
    assert job.specs["a"] == Spec(folder=Path("2026-01-31"), options={"ratio": "16:9", "on": "2026-01-31", "off": True})
    assert job.name == "12:30"


def test_config_files_are_bounded_and_utf8(tmp_path):
    path = tmp_path / "job.yaml"
    for data, message in (
        (b"name: x\n# " + b"x" * (1 << 19), "over 256 KiB, the limit for a config"),
        (b"name: x\nrate: \xff\n", r"job\.yaml:2: not UTF-8 \(byte 14\)"),
        ("name: x".encode("utf-16"), "not UTF-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            load(Job, file=path)
    path.write_bytes(b"\xef\xbb\xbf" + SPECS.encode())
    assert load(Job, file=path).specs


def test_a_home_folder_that_does_not_exist_is_a_name(read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    job = read("specs: {a: {folder: ~nobody-of-this-name/x}, b: {folder: ~/x}, c: {folder: 'x~'}}\n")
    assert [str(job.specs[name].folder) for name in "abc"] == ["~nobody-of-this-name/x", "/home/me/x", "x~"]


@settings(deadline=None)
@given(
    rate=st.floats(1e-9, 1e9),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20),
    seeds=st.lists(st.integers(0, 2**62), max_size=4),
    limit=st.none() | st.integers(-(2**63), 2**63 - 1),
    steps=st.integers(1, 100),
)
def test_what_is_saved_loads_to_an_equal_config(tmp_path_factory, rate, name, seeds, limit, steps):
    spec = Spec(folder=Path("a b"), options={"k": [1, "x", None]})
    job = Job(specs={"s": spec}, rate=rate, name=name, seeds=tuple(seeds), limit=limit, sampling=Sampling(steps=steps))
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_text(dump(job), encoding="utf-8")
    assert load(Job, file=path) == job


def test_a_folder_keeps_the_config_it_was_made_with(tmp_path):
    spec = {"s": Spec(folder=Path("a"))}
    write_resolved(tmp_path / "out", Job(specs=spec))
    (tmp_path / "out" / "result").write_bytes(b"x")
    write_resolved(tmp_path / "out", Job(specs=spec))
    with pytest.raises(ResumeError, match=r"rate: 0\.0001 -> 0\.5\n  config\.sampling\.steps: 30 -> 4"):
        write_resolved(tmp_path / "out", Job(specs=spec, rate=0.5, sampling=Sampling(steps=4)))
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text(encoding="utf-8"))["rate"] == 1e-4
    assert "torch" in (tmp_path / "out" / "versions.json").read_text(encoding="utf-8")
