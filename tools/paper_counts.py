"""What ACDC, CSG, MTZ and Cross-Domain print of sizes, beside what their layers and graphzip's passes give.

Sources: "A Joint Subspace View to Convolutional Neural Networks" (ACDC), "Associative Convolutional Layers" (CSG),
"Multi-Task Zipping via Layer-wise Neuron Sharing" (MTZ), "Cross Domain Model Compression by Structurally Weight
Sharing". ACDC does not count the linear layer. MTZ and Cross-Domain are counted from the printed widths alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import paper_nets as nets
import paper_nets_factored as factored
import torch
from torch import nn

import graphzip as gz

__all__ = ["COUNTED", "Counted"]

SMALL, TINY, LARGE = 32, 64, 224
_WIDE = "about 0.012 M more than the layers give, in all rows of this network"
_GROUPS = "the rule that gives the other rows with groups does not give this"


@dataclass(frozen=True)
class Counted:
    """A printed number of a `table` of a `paper`, and how ours is found; `digits` behind the point are printed.

    A printed number is met where ours, rounded or cut off to so many digits, is the same.
    """

    paper: str
    table: str
    result: str
    unit: str
    printed: float
    count: Callable[[], float]
    digits: int = 2
    remark: str = ""

    @property
    def key(self) -> str:
        """What `--only` is compared with."""
        return f"{self.paper}_{self.result}".lower().replace(" ", "_")

    def follows(self, ours: float) -> bool:
        unit = 10.0**-self.digits
        return -0.5 * unit <= ours - self.printed + 1e-9 < unit


def _compiled(build: Callable[[], nn.Module], side: int, uncounted: int, passes: Sequence[gz.PassOptions]) -> int:
    model, images = build().eval(), (torch.zeros(2, 3, side, side),)
    return gz.compile(model, gz.Plan(list(passes)), images).report.after.params - uncounted


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision.models

        model: nn.Module = getattr(torchvision.models, name)(weights=None, **options)
        return model

    return build


_NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "VGG16": (nets.CifarVgg, SMALL, 5_130),
    "ResNet18": (factored.CifarResNet18, SMALL, 5_130),
    "WRN-40-1": (lambda: factored.WideResNet(40, 1), SMALL, 650),
    "WRN-40-4": (lambda: factored.WideResNet(40, 4), SMALL, 2_570),
    "WRN-28-10": (lambda: factored.WideResNet(28, 10), SMALL, 6_410),
    "ResNet34": (_torchvision("resnet34"), LARGE, 513_000),
    "ResNet50": (_torchvision("resnet50"), LARGE, 2_049_000),
}
"""Networks of ACDC, the side of their images and the parameters of the linear layer."""


def _acdc(
    table: str, net: str, share: str, atoms: int, size: int | None, printed: float, *, digits: int = 2, remark: str = ""
) -> Counted:
    build, side, uncounted = _NETS[net]
    options = gz.AtomFactorize(share=share, atoms=atoms, group_size=size, init="random", force=True)
    result = f"{net} {'g-' if size else ''}{share} m{atoms}{f' s{size}' if size else ''}"
    return Counted(
        "ACDC", table, result, "M parameters", printed,
        lambda: _compiled(build, side, uncounted, [options]) / 1e6, digits, remark,
    )  # fmt: skip


def _grown(share: str, atoms: int, printed: float) -> Counted:
    options = gz.AtomFactorize(share=share, atoms=atoms, init="random", force=True)
    build = lambda: factored.WideResNet(28, 10, 200)  # noqa: E731
    return Counted(
        "ACDC", "C", f"WRN-28-10 {share} m{atoms}, TinyImageNet", "M parameters", printed,
        lambda: _compiled(build, TINY, 128_200, [options]) / 1e6, 2, _WIDE,
    )  # fmt: skip


def _csg(
    table: str, net: str, build: Callable[[], nn.Module], side: int, printed: int, *passes: gz.PassOptions
) -> Counted:
    return Counted("CSG", table, net, "parameters", printed, lambda: _compiled(build, side, 0, passes), 0)


def _slices(side: int, kernel: int, code: int, **options: Any) -> gz.SliceGenerate:
    return gz.SliceGenerate(slice=(side, side, kernel, kernel), code=code, init="random", force=True, **options)


_THIN, _PLAIN = _slices(12, 3, 72), _slices(16, 3, 128)


def _dense(growth: int) -> Callable[[], nn.Module]:
    return lambda: factored.DenseNetBC(growth)


def _deeplab(depth: int) -> Callable[[], nn.Module]:
    return lambda: factored.DeepLab(depth)


def _csg_rows() -> Iterator[Counted]:
    def resnet56() -> nn.Module:
        return nets.CifarResNet(9)

    yield _csg("1", "DenseNet-BC-40-48 CSG", _dense(48), SMALL, 1_416_394, _THIN)
    yield _csg("1", "DenseNet-BC-40-48 BCSG", _dense(48), SMALL, 1_323_082, _slices(12, 3, 72, binary=True))
    wide = _slices(12, 3, 72, include=["features.*.conv1", "features.*.conv2"])
    yield _csg("1", "DenseNet-BC-40-48 CSG with 1x1 kernels", _dense(48), SMALL, 904_906, wide)
    yield _csg("1", "DenseNet-BC-40-36 CSG", _dense(36), SMALL, 842_842, _THIN)
    yield _csg("1", "ResNet-56 CSG 128", resnet56, SMALL, 347_162, _PLAIN)
    yield _csg("1", "ResNet-56 CSG 72", resnet56, SMALL, 160_450, _THIN)
    yield _csg("1", "ResNet-56 BCSG 1024", resnet56, SMALL, 381_978, _slices(16, 3, 1024, binary=True))
    for binary, shuffle, mobile in ((False, 171_818, 1_595_322), (True, 167_722, 1_591_226)):
        name = "BCSG" if binary else "CSG"
        last = _slices(16, 1, 16, binary=binary, include=["conv5.0"])
        build = _torchvision("shufflenet_v2_x0_5", num_classes=10)
        yield _csg("1", f"ShuffleNet 0.5x {name}", build, SMALL, shuffle, last)
        first = _slices(16, 1, 16, binary=binary, include=["blocks.*.conv1"])
        yield _csg("1", f"MobileNetV2 {name}", factored.MobileNet, SMALL, mobile, first)
    for depth, plain, bits in ((50, 15_163_432, 14_868_520), (101, 24_685_608, 24_390_696)):
        build = _torchvision(f"resnet{depth}")
        yield _csg("2", f"ResNet-{depth} CSG", build, TINY, plain, _PLAIN)
        yield _csg("2", f"ResNet-{depth} BCSG", build, TINY, bits, _slices(16, 3, 128, binary=True))
    for depth, once, twice in ((50, 29_958_581, 16_884_149), (101, 39_480_757, 26_406_325)):
        inside = ["backbone.layer*.conv2"]
        one = _slices(16, 3, 128, include=inside)
        both = _slices(16, 3, 128, include=[*inside, "aspp.[123].0"], scopes=["aspp.*"])
        yield _csg("3", f"DeepLab ResNet-{depth} CSG", _deeplab(depth), TINY, once, one)
        yield _csg("3", f"DeepLab ResNet-{depth} CSG and ASPP", _deeplab(depth), TINY, twice, both)


_SHARED = (64, 64, 96, 96, 192, 192, 192, 384, 320, 320, 436, 436, 436, 1792, 4096)
_VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 4096, 4096)
_HEADS = 4097 * (1000 + 40)


def _zipped(part: slice, heads: int = 0) -> float:
    """Percent of the weights and biases of two VGG-16 that both have, by the shared neurons of MTZ's table 3."""
    areas = (9,) * 13 + (49, 1)
    shared, whole = (
        sum((area * a + 1) * b for area, a, b in list(zip(areas, (3, *widths), widths, strict=False))[part])
        for widths in (_SHARED, _VGG)
    )
    return 100 * 2 * shared / (2 * whole + heads)


_ALEXNET = (64 * 121, 192 * 25, 384 * 9, 256 * 9, 256 * 9, 4096, 4096, 19)
_CHANNELS = (6, 128, 384, 768, 512, 18432, 8192, 8192)


def _times(clusters: tuple[int, ...]) -> float:
    """How many times fewer weights two AlexNets have whose input channels go into so many clusters."""
    before, after = (sum(map(math.prod, zip(widths, _ALEXNET, strict=True))) for widths in (_CHANNELS, clusters))
    return before / after


COUNTED: tuple[Counted, ...] = (
    _acdc("1", "VGG16", "net", 8, None, 2.11),
    _acdc("1", "VGG16", "net", 16, None, 4.21),
    _acdc("1", "VGG16", "block", 8, None, 4.89),
    _acdc("1", "VGG16", "block", 16, None, 9.78),
    _acdc("1", "VGG16", "layer", 8, 32, 0.13, remark=_GROUPS),
    _acdc("1", "ResNet18", "net", 8, None, 2.28),
    _acdc("1", "ResNet18", "net", 16, None, 4.38),
    _acdc("1", "ResNet18", "block", 8, None, 2.96),
    _acdc("1", "ResNet18", "block", 16, None, 5.76),
    _acdc("1", "ResNet18", "layer", 8, 32, 0.89, remark=_GROUPS),
    _acdc("1", "WRN-40-4", "net", 8, None, 0.58),
    _acdc("1", "WRN-40-4", "block", 8, None, 0.74),
    _acdc("1", "WRN-40-4", "layer", 8, 32, 0.36),
    _acdc("2", "WRN-40-1", "block", 8, None, 0.043, digits=3, remark="the layers give a fifth more"),
    _acdc("2", "WRN-40-1", "block", 24, None, 0.114, digits=3, remark="the layers give a quarter more"),
    _acdc("2", "WRN-40-4", "layer", 16, 32, 0.67, remark=_GROUPS),
    _acdc("2", "WRN-28-10", "block", 24, 160, 2.27, remark=_GROUPS),
    _acdc("2", "WRN-28-10", "net", 12, None, 5.21, remark=_WIDE),
    _acdc("2", "WRN-28-10", "block", 24, None, 13.20, remark=_WIDE),
    _acdc("3", "ResNet34", "layer", 12, 64, 1.66, remark=_GROUPS),
    _acdc("3", "ResNet34", "net", 12, None, 3.34),
    _acdc("3", "ResNet34", "block", 16, None, 5.77),
    _acdc("3", "ResNet50", "net", 8, None, 14.29),
    _acdc("3", "ResNet50", "block", 8, None, 16.37, remark="blocks of equal width and feature size give less"),
    *(_grown(*row) for row in (("net", 8, 3.57), ("block", 8, 4.59), ("block", 12, 6.74))),
    *_csg_rows(),
    Counted("MTZ", "3", "convolutions of VGG-16", "% shared", 56.94, lambda: _zipped(slice(13))),
    Counted("MTZ", "3", "linear layers of VGG-16", "% shared", 38.17, lambda: _zipped(slice(13, None))),
    Counted(
        "MTZ",
        "3",
        "VGG-16, heads counted",
        "% shared",
        39.61,
        lambda: _zipped(slice(None), _HEADS),
        2,
        "0.01 less with heads of 1,000 and 40",
    ),
    *(
        Counted("Cross-Domain", "2", f"AlexNet {name}", "times fewer weights", printed, lambda row=row: _times(row), 1)
        for name, printed, row in (
            ("GrOWL", 17.6, (6, 12, 12, 21, 72, 1037, 423, 8192)),
            ("kA", 14.8, (6, 32, 96, 192, 128, 1024, 512, 8192)),
            ("kB", 22.8, (6, 16, 48, 96, 64, 512, 512, 8192)),
        )
    ),
)
