"""Help pages: what comes first, what they load, and that keys read from source text are those of the classes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING
from typing import get_type_hints

import pytest

from alignkit import cli
from alignkit.commands.methods import config_class, config_keys
from alignkit.commands.outline import outline
from alignkit.config import describe, init_fields, own_keys
from alignkit.trainers import METHODS

ENUMS = {"hub_strategy"}  # typed with an enum of transformers, whose values the source does not list


def default(field):
    return field.default if field.default is not MISSING else field.default_factory()


@pytest.mark.parametrize("method", METHODS)
def test_the_outline_is_the_class(method):
    """Keys, order, types, defaults and help, by importing the class that the outline is read without."""
    read, real = config_keys(method), config_class(method)
    known = init_fields(real)
    assert list(init_fields(read)) == [name for name in own_keys(real) if name in known]
    types, written = get_type_hints(real), get_type_hints(read)
    for name, field in init_fields(read).items():
        assert default(field) == default(known[name]), name
        assert field.metadata == known[name].metadata, name
        assert name in ENUMS or describe(written[name]) == describe(types[name]), name


def test_an_outline_of_absent_source_names_it():
    with pytest.raises(ImportError, match="no source of module 'absent_module'"):
        outline("absent_module:Config")
    with pytest.raises(LookupError, match="defines no class 'Nothing'"):
        outline("alignkit.trainers.sft:Nothing")


@pytest.mark.parametrize("verb", ["run", "train rankdpo", "train sft", "generate", "evaluate", "export", "init"])
def test_help_loads_no_model_library(verb):
    code = (
        "import sys; from alignkit.cli import main; "
        f"code = main({[*verb.split(), '--help']}); "
        "print(sorted({'torch', 'transformers', 'diffusers', 'datasets', 'trl'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("verb", "lines"),
    [
        ("annotate", ["--pairs  path  (required)", "--generator.model  str  (required with this section)"]),
        ("label", ["--generator.model  str  (required with this section)"]),
        ("doctor", ["--critic.model  path  (required with this section)"]),
        ("train drf", ["--model  str  (required)", "--validation.rewards  list of str  (required with this section)"]),
        ("soup", ["--greedy.reward.reward  str  (required with this section)"]),
        ("evaluate", ["--base.model  str  (required)", "--tuned.model  str  (default: the base's)"]),
        ("generate", ["--generate.sources[].sampling.negative_prompt  str  ['']"]),
    ],
)
def test_what_is_required_and_where(verb, lines, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    page = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert set(lines) <= set(page)


def test_the_method_comes_first_and_transformers_on_demand(capsys):
    assert cli.main(["train", "rankdpo", "--help"]) == 0
    page = capsys.readouterr().out
    assert cli.main(["train", "rankdpo", "--help-all"]) == 0
    whole = capsys.readouterr().out
    for text in (page, whole):
        places = [text.index(f"  --{key}  ") for key in ("out", "model", "loss", "lora_rank")]
        assert places == sorted(places)
    assert "--adam_beta1" not in page
    assert "alignkit train rankdpo --help-all" in page
    assert whole.index("  --lora_rank  ") < whole.index("  --adam_beta1  ")
    assert "--output_dir" not in whole
    assert len(page.splitlines()) < 180 < len(whole.splitlines())
