"""The packages of the wheel: `configs` becomes data of `alignkit.configs`. All other metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["alignkit*", "rewards*", "data_pipelines*"]), "alignkit.configs"],
    package_dir={"alignkit.configs": "configs"},
)
