"""What is published: metadata, and an sdist and a wheel that install into an empty environment and work there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import graphzip
from tools.manual.pages import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORK = """
import torch, graphzip
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
compiled = graphzip.compile(model, graphzip.Plan([graphzip.ClusterMerge(keep=0.5)]), (torch.randn(2, 3),))
print(graphzip.__file__, compiled.export("slim.onnx").verified)
"""


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == graphzip.__version__
    assert found["title"] == "graphzip"
    assert f'license = "{found["license"]}"' in PROJECT
    assert f'Repository = "{found["repository-code"]}"' in PROJECT


def test_one_address_is_used_everywhere() -> None:
    """The repository's address stands in several files; where it changes, it changes in all."""
    (address,) = re.findall(r'^Repository = "(.+)"$', PROJECT, flags=re.MULTILINE)
    assert f"repo_url: {address}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in ("Documentation", "Changelog", "Issues"):
        assert re.search(rf'^{name} = "{re.escape(address)}/', PROJECT, flags=re.MULTILINE)
    assert address in (ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text(encoding="utf-8")


def test_classifiers_name_every_python_that_is_claimed() -> None:
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert claimed == ["3.10", "3.11", "3.12", "3.13"]
    assert f'requires-python = ">={claimed[0]}"' in PROJECT


@pytest.mark.parametrize("name", ["wrong.yml", "stays.yml"])
def test_issue_templates_are_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [each["id"] for each in form["body"]]
    assert len(ids) == len(set(ids))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist of the checkout and a wheel of it; needs a registry, for a build has an environment of its own."""
    if find_spec("build") is None:
        pytest.skip("build is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and "hatchling" in done.stdout + done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("hatchling cannot be downloaded")
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.slow
def test_the_sdist_has_what_the_tests_need_and_the_wheel_the_packages_alone(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "docs/index.md", "tests/conftest.py", "tools/floors.py"} <= inside
    with zipfile.ZipFile(built[".whl"]) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"graphzip", "graphzip_passes", f"graphzip-{graphzip.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_of_the_checkout_is(built: dict[str, Path], tmp_path: Path) -> None:
    """Of an empty environment everything but graphzip itself is borrowed: torch alone would be gigabytes."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(built[".whl"])], check=True)
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(packages, "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", WORK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [f"{packages}/graphzip/__init__.py", "True"], done.stderr
    said = subprocess.run(
        [home / "bin" / "graphzip", "inspect", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert said.returncode == 0
