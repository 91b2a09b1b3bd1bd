"""Exported files outside of Python: the examples for C++ and for the browser are built, run, and right.

The first needs the headers of onnxruntime, in a usual place or in the folder that GRAPHZIP_ORT_INCLUDE names (a release
for C++ has them under `include`), and the second the npm package, which is fetched where npm is.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import graphzip as gz

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "deploy"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
INCLUDES = [os.environ.get("GRAPHZIP_ORT_INCLUDE"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
SAMPLES = 70

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, samples, and the classes that the module says they are of."""
    home = tmp_path_factory.mktemp("deploy")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5, bias=False)]
        model = nn.Sequential(*layers).eval()
        images = torch.randn(SAMPLES, 3, 8, 8) + 2 * torch.randn(SAMPLES, 3, 1, 1)
        compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), (images[:2],))
    compiled.export(home / "slim.onnx")
    images.numpy().tofile(home / "images.f32")
    with torch.no_grad():
        classes = compiled.module(images).argmax(1)
    assert len(classes.unique()) > 2
    np.savetxt(home / "classes.txt", classes.numpy(), fmt="%d")
    return home


def classes(folder: Path) -> list[str]:
    return (folder / "classes.txt").read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    """The example for C++, compiled against the library that the Python package brings."""
    include = next((path for path in INCLUDES if path and Path(path, "onnxruntime_cxx_api.h").is_file()), None)
    libraries = list(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if shutil.which("g++") is None or include is None or not libraries:
        pytest.skip("needs g++, the headers of onnxruntime (GRAPHZIP_ORT_INCLUDE) and its library")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(libraries[0])
    target = folder / "classify"
    warnings = ["-Wall", "-Wextra", "-Werror", "-isystem", include]
    linked = ["-L", str(folder), "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    command = ["g++", "-std=c++17", *warnings, str(EXAMPLES / "classify.cpp"), *linked, "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.mark.parametrize("batch", [1, 32, 1000])
def test_in_cpp(program: Path, folder: Path, batch: int) -> None:
    command = [program, folder / "slim.onnx", folder / "images.f32", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == classes(folder)


def test_in_cpp_what_is_wrong_is_said(program: Path, folder: Path) -> None:
    for given, said in (
        (["slim.onnx"], "usage: classify MODEL.onnx IMAGES.f32 BATCH"),
        (["slim.onnx", "no.f32", "1"], "cannot read no.f32"),
        (["no.onnx", "images.f32", "1"], "no.onnx"),
    ):
        done = subprocess.run([program, *given], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode in (1, 2)
        assert said in done.stderr


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The example for the browser, served from this machine with the npm package beside it."""
    if CHROMIUM is None or shutil.which("npm") is None:
        pytest.skip("needs Chromium and npm")
    packed = subprocess.run(
        ["npm", "pack", "--silent", "onnxruntime-web"], cwd=folder, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        pytest.skip(f"onnxruntime-web cannot be fetched: {packed.stderr[-200:]}")
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    shutil.copy(EXAMPLES / "classify.html", folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/classify.html"
        server.shutdown()
        thread.join()


def test_in_the_browser(address: str, folder: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=120000", "--dump-dom"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={folder / 'profile'}", f"{address}?shape=3,8,8"]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    assert "<title>done</title>" in done.stdout
    shown = re.search(r'<pre id="classes">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown is not None
    assert shown[1].split() == classes(folder)
