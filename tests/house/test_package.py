"""The package's face: lazy names that type checkers see too, and what the package declares about itself."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import graphzip

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "PyYAML", "onnx_ir": "onnx-ir", "jinja2": "Jinja2"}


def run(code: str) -> str:
    """What a fresh interpreter prints for `code`, started in the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def type_checking_imports() -> dict[str, str]:
    """Name to home, as `if TYPE_CHECKING` of the face has it."""
    tree = ast.parse((ROOT / "graphzip" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: node.module or "" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


@pytest.mark.parametrize("name", graphzip.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(graphzip, name) is getattr(graphzip, name)
    assert name in dir(graphzip)


def test_all_is_sorted_and_complete() -> None:
    assert set(graphzip.__all__) == {*type_checking_imports(), "__version__"}
    assert len(set(graphzip.__all__)) == len(graphzip.__all__)


def test_names_come_from_where_type_checkers_look() -> None:
    for name, home in type_checking_imports().items():
        assert graphzip._HOME_OF.get(name, "graphzip.errors") == home


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'graphzip' has no attribute 'prune'"):
        graphzip.prune  # noqa: B018


def test_import_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'numpy', 'onnx', 'sklearn', 'rich', 'pydantic'}"
    assert run(f"import sys, graphzip, graphzip.errors; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_help_of_the_command_line_loads_no_torch() -> None:
    assert run("import sys, graphzip.commands.cli; print('torch' in sys.modules)") == "False"


def test_star_import_gives_the_public_names() -> None:
    assert (
        run("from graphzip import *; print(Plan.__module__, GraphZipError.__name__)")
        == "graphzip.plan.plan GraphZipError"
    )


def test_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", graphzip.__version__)


@pytest.mark.parametrize("package", ["graphzip", "passes/graphzip_passes"])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


# ------------------------------------------------------------------------------------------------- other people's names

OTHERS = ("passes.py", "models.py", "tables.py", "results.py", "report.py", "plan.py", "export.py", "ops.py")
COMPILED = """
import torch, graphzip
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
compiled = graphzip.compile(model, graphzip.Plan([graphzip.ClusterMerge(keep=0.5)]), (torch.randn(2, 3),))
print(compiled.module(torch.randn(5, 3)).shape)
"""


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A folder in which every short name that we might import is taken by code that must not run."""
    for name in OTHERS:
        (tmp_path / name).write_text("raise SystemExit('the wrong module was imported')\n", encoding="utf-8")
    for name in ("graph", "rewrite", "analysis", "tools", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["-c", COMPILED], "torch.Size([5, 2])"),
        (["-m", "graphzip", "inspect", "mine.py:net", "--input", "2x3"], "1 of 2 groups can shrink"),
    ],
    ids=["library", "command line"],
)
def test_modules_of_the_users_folder_are_never_taken_for_ours(taken: Path, command: list[str], expected: str) -> None:
    source = "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))\n"
    (taken / "mine.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(taken), str(ROOT), str(ROOT / "passes")])}
    done = subprocess.run(
        [sys.executable, *command], cwd=taken, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert expected in done.stdout


# ------------------------------------------------------------------------------------------------- pyproject


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The dependencies and the extras of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"], project["optional-dependencies"]


def test_torch_alone_has_an_upper_bound_behind_what_is_tested() -> None:
    """Private parts of torch are used, and of nothing else (`tests/graph/test_torch_private.py`)."""
    dependencies, extras = requirements()
    for requirement in [*dependencies, *(each for extra in extras.values() for each in extra)]:
        specifier = requirement.partition(";")[0].strip()
        bound = r"(,<[0-9.]+)" if specifier.startswith("torch>") else ""
        assert re.fullmatch(rf"[A-Za-z0-9-]+>=[0-9.]+{bound}", specifier), requirement
    (torch,) = (each for each in dependencies if each.startswith("torch>"))
    major, minor, _ = re.search(r"torch==(\d+)\.(\d+)\.(\d+)", (ROOT / ".ci" / "constraints.txt").read_text()).groups()  # type: ignore[union-attr]
    assert torch.endswith(f",<{major}.{int(minor) + 1}")


@pytest.mark.parametrize(
    ("platform", "machine", "distribution"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
    ],
)
def test_each_platform_gets_one_onnxruntime(platform: str, machine: str, distribution: str) -> None:
    markers = pytest.importorskip("packaging.requirements")
    found = [markers.Requirement(each) for each in requirements()[0] if each.startswith("onnxruntime")]
    here = {"sys_platform": platform, "platform_machine": machine}
    assert [each.name for each in found if each.marker.evaluate(here)] == [distribution]


def test_the_environment_without_a_gpu_differs_in_onnxruntime_alone() -> None:
    lines = (ROOT / "tools" / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    plain = {each.partition(";")[0] for each in requirements()[0] if not each.startswith("onnxruntime-gpu")}
    assert sorted(listed) == sorted(plain)


WITHOUT_A_GPU = """
import onnxruntime, torch, graphzip
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
compiled = graphzip.compile(model, graphzip.Plan([graphzip.ClusterMerge(keep=0.5)]), (torch.randn(2, 3),))
print(onnxruntime.__file__)
print([name for name in onnxruntime.get_available_providers() if "CUDA" in name or "Tensorrt" in name])
print(compiled.export("slim.onnx").verified, compiled.verify("slim.onnx").verified)
"""


@pytest.mark.slow
def test_the_plain_onnxruntime_does_as_well(tmp_path: Path) -> None:
    """Installed into a folder that comes before the environment's own packages; 73 MB from a registry."""
    folder = tmp_path / "plain"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "onnxruntime"]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("onnxruntime cannot be downloaded")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), str(ROOT / "passes")])}
    command = [sys.executable, "-c", WITHOUT_A_GPU]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [str(folder / "onnxruntime" / "__init__.py"), "[]", "True True"], done.stderr


def test_every_import_is_declared() -> None:
    dependencies, extras = requirements()
    declared = {re.split(r"[>;\s]", each)[0].lower() for each in [*dependencies, *extras["models"], *extras["plot"]]}
    used = set()
    for path in [*(ROOT / "graphzip").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add((node.module or "").split(".")[0])
    outside = used - set(sys.stdlib_module_names) - {"graphzip", "graphzip_passes", "typing_extensions"}
    assert {DISTRIBUTIONS.get(name, name).lower() for name in outside} <= declared
