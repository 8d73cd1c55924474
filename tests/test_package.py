"""The package as a whole: light to import, all of it documented and typed."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pag_retrofit as pag

HEAVY = (
    "segmentation_models_pytorch",
    "timm",
    "matplotlib",
    "accelerate",
    "torchmetrics",
    "typer",
    "pydantic",
    "tensorboard",
    "rich",
    "yaml",
    "PIL",
)
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(pag.__path__, "pag_retrofit.")
    if not info.name.endswith(("__main__", "._kernels"))  # the latter is a library, not a module
)


def test_import_is_light() -> None:
    """Against a bare `import torch`, which brings some of its own."""
    code = (
        "import torch, sys; before = set(sys.modules); import pag_retrofit; "
        "print(*(m for m in set(sys.modules) - before))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    loaded = {name.split(".")[0] for name in output.split()}
    assert "pag_retrofit" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_every_public_name_exists_and_has_a_docstring() -> None:
    assert list(pag.__all__) == sorted(pag.__all__)
    for name in pag.__all__:
        value = getattr(pag, name)
        assert inspect.getdoc(value), name
        assert not name.startswith("_")


@pytest.mark.parametrize("name", [n for n in pag.__all__ if inspect.isfunction(getattr(pag, n))])
def test_docstrings_name_every_argument_or_none(name: str) -> None:
    function = getattr(pag, name)
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    assert len(parameters) <= 7
    section = text.partition("Args:")[2].partition("Returns:")[0]
    if section:
        missing = [p for p in parameters if f"{p}:" not in section]
        assert missing == []


def test_errors_are_value_errors() -> None:
    errors = [getattr(pag, name) for name in pag.__all__ if name.endswith("Error")]
    assert len(errors) >= 7
    for error in errors:
        assert issubclass(error, pag.PagError) and issubclass(error, ValueError)


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are_and_their_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


def test_the_package_is_typed() -> None:
    assert (Path(pag.__file__).parent / "py.typed").exists()


def test_the_version_has_one_source() -> None:
    assert metadata.version("pag-retrofit").count(".") >= 2
