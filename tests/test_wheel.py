"""The wheel in an empty folder: recipes, prompts, model configs and the sandbox's weights are found, and a job runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = ("alignkit", "rewards", "data_pipelines", "configs")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
SMALL = [
    "--prompts.count=8",
    "--prompts.held_out=0.5",
    "--generate.sources=[{name: unet, seeds_per_prompt: 2, sampling: {steps: 1, height: 64, width: 64}}]",
    "--validation=null",
    "--train.eval_strategy=no",
    "--train.max_steps=1",
    "--train.per_device_train_batch_size=1",
    "--evaluate.sampling.steps=1",
    "--evaluate.bootstrap_samples=10",
]


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the wheel's packages, built from a copy, so that nothing is left in the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for tree in TREES:
        shutil.copytree(ROOT / tree, folder / "source" / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, folder / "source" / file)
    stored = "--config-settings=--build-option=--compression=stored"  # compressing the weights takes seconds
    options = ["--no-deps", "--no-build-isolation", "--no-index", stored]
    pip("wheel", str(folder / "source"), *options, "--wheel-dir", str(folder / "built"))
    (wheel,) = (folder / "built").glob("alignkit-*.whl")
    pip("install", str(wheel), "--no-deps", "--no-index", "--no-compile", "--target", str(folder / "site"))
    return folder / "site"


@pytest.fixture
def program(installed, tmp_path):
    """Run `alignkit` of the wheel in an empty folder; returns what it printed."""

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "alignkit", *words]
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_configs_and_nothing_else_new(installed):
    def names(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    shipped = names(installed / "alignkit" / "configs")
    assert shipped == names(ROOT / "configs")
    assert (installed / "data_pipelines" / "annotation" / "page.html").is_file()
    assert {path.name for path in installed.iterdir() if "-" not in path.name} == {
        "alignkit",
        "bin",
        "data_pipelines",
        "rewards",
    }


def test_a_shipped_recipe_runs_in_an_empty_folder(program, tmp_path):
    """A job of seconds; the card names the base model as the config does."""
    program("run", "--config", "configs/demo_short.yaml", *SMALL)
    run = tmp_path / "runs" / "demo_short"
    assert (run / "report.html").is_file()
    card = (run / "train" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "base_model: sandbox:unet\n" in card


def test_a_dry_run_in_an_empty_folder_misses_only_downloads(program, tmp_path):
    plan = program("run", "--config", "configs/rankdpo_sd3.yaml", "--dry-run")
    missing = [line for line in plan.splitlines() if "NOT THERE YET" in line]
    assert len(missing) == 4
    assert all("models/rewards/" in line for line in missing)
    assert list(tmp_path.iterdir()) == []
