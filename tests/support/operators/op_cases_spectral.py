"""Cases of complex numbers and Fourier transforms, distances and products of three: mixed along one dimension only."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import Cases, network, overload, param
from torch import Tensor

CASES = Cases()

aten = torch.ops.aten

TWO = ("make", "other")
LAST: dict[str, Any] = {"shape": (2, 3, 6), "dim": 2}


def parts(y: Tensor) -> Tensor:
    """What can be read of a complex tensor: both parts of each number."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def complex_(x: Tensor) -> Tensor:
    return torch.complex(x, x.sin())


# --- Fourier transforms --------------------------------------------------------------------------------------------

ALONG = ("fft_fft", "fft_rfft", "fft_ihfft", "fft_ifft", "fft_irfft", "fft_hfft")
WIDE = "fft_fft2 fft_rfft2 fft_ihfft2 fft_fftn fft_rfftn fft_ihfftn fft_ifft2 fft_irfft2 fft_hfft2 fft_ifftn fft_irfftn fft_hfftn"


def _along(name: str, *args: Any, **options: Any) -> Any:
    takes_complex = any(part in name for part in ("ifft", "irfft", "_hfft")) and "shift" not in name

    def run(m: Any, x: Tensor) -> Tensor:
        return parts(overload(name)(complex_(x) if takes_complex else x, *args, **options))

    return run


CASES.together(
    "transforms of positions",
    {
        **{name: _along(name, None, 1) for name in ALONG},
        **{name: _along(name, [1]) for name in ("fft_fftshift", "fft_ifftshift")},
        "real": lambda m, x: complex_(x).real,
        "imag": lambda m, x: complex_(x).imag,
        "view_as_real": lambda m, x: torch.view_as_real(complex_(x)),
        "complex": lambda m, x: torch.complex(x, x.cos()).abs(),
        "polar": lambda m, x: parts(torch.polar(x, x)),
        "angle": lambda m, x: complex_(x).angle(),
        "isreal": lambda m, x: torch.isreal(torch.complex(x, x.relu())),
        "_conj": lambda m, x: parts(complex_(x).conj()),
        "conj_physical": lambda m, x: parts(torch.conj_physical(complex_(x))),
        "resolve_conj": lambda m, x: parts(complex_(x)),
        "view_as_complex": lambda m, x: torch.view_as_complex(torch.stack([x, x.cos()], -1)).abs(),
    },
)
CASES.put(
    [overload(name) for name in WIDE.split()],
    "transforms of places",
    lambda: network(
        lambda m, x: tuple(_along(name, [3, 3], [2, 3])(m, x.unflatten(2, (3, 3))) for name in WIDE.split()), (2, 6, 9)
    ),
    {"make": 6},
)
CASES.add(aten.fft_fftn.default, lambda m, x: parts(torch.fft.fftn(x, s=[5])), name="of the last", free={"make": 6})
CASES.add(aten.fft_fftn.default, lambda m, x: parts(torch.fft.fftn(x)), name="of all", why="transforms along it")
CASES.add(aten.fft_fftshift.default, lambda m, x: torch.fft.fftshift(x), name="of all", why="transforms along it")
CASES.add(aten.fft_fft.default, lambda m, x: torch.fft.fft(x, dim=1).real, name="of channels",
          why="transforms along it")  # fmt: skip
CASES.add(aten.view_as_complex.default, lambda m, x: parts(torch.view_as_complex(x.unflatten(2, (3, 2))) ** 2).flatten(2),
          (2, 3, 6), dim=2, name="of pairs", free={"make": 3})  # fmt: skip
CASES.add(aten.view_as_complex.default, lambda m, x: torch.view_as_complex(x).abs(), (2, 5, 2), dim=2, out=1,
          name="of two channels", why="takes pairs of channels for complex numbers")  # fmt: skip
CASES.add(aten.mul.Tensor, lambda m, x: parts(torch.view_as_complex(m.w) * torch.fft.rfft(x)), name="by a complex weight",
          parts=lambda: {"w": param(6, 3, 2)})  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x: parts(torch.einsum("bcn,ocn->bon", torch.fft.rfft(x), torch.view_as_complex(m.w))),
          name="with a complex weight", parts=lambda: {"w": param(4, 6, 3, 2)}, free=None)  # fmt: skip


def _written(m: Any, x: Tensor) -> Tensor:
    found = torch.fft.rfft(x)
    out = torch.zeros(x.shape[0], 6, 4, dtype=found.dtype)
    out[:, :, :2] = found[:, :, :2] * 2
    out[:, :, -1] = found[:, :, 1].conj()
    return torch.fft.irfft(out, 5)


CASES.add(aten.slice_scatter.default, _written, name="of complex numbers")
CASES.add(aten.logcumsumexp.default, lambda m, x: x.logcumsumexp(2))
CASES.add(aten.logcumsumexp.default, lambda m, x: x.logcumsumexp(1), name="of channels", why="order of the channels")
CASES.add(aten.cummax.default, lambda m, x: x.cummax(2)[0])
CASES.add(aten.cummin.default, lambda m, x: x.cummin(-1).values)

# --- distances -----------------------------------------------------------------------------------------------------

for order in (1.0, 2.0, 3.0, float("inf")):
    CASES.add(aten.cdist.default, lambda m, x, y, order=order: torch.cdist(x, y, order), **LAST, makers=TWO, out=None,
              name=f"of order {order}", free={"make": 6})  # fmt: skip
CASES.add(aten.cdist.default, lambda m, x, y: torch.cdist(x, y, 0.0), **LAST, makers=TWO, out=None, name="of order 0",
          why="counts channels that differ")  # fmt: skip
CASES.add(aten.cdist.default, lambda m, x: torch.cdist(x, m.seen), **LAST, parts=lambda: {"seen": param(4, 6)},
          name="from prototypes", out=2, free={"make": 6, "seen": 4})  # fmt: skip
CASES.add(aten.cdist.default, lambda m, x: torch.cdist(x.mT, x.mT), (2, 3, 6), dim=2, out=None, name="of channels",
          why="is an output")  # fmt: skip
CASES.add(aten.pdist.default, lambda m, x: torch.pdist(x.flatten(0, 1)).sum() + x, **LAST)
CASES.add(aten.pdist.default, lambda m, x: torch.pdist(x.flatten(0, 1), 0).sum() + x, **LAST, name="of order 0",
          why="compares each with each")  # fmt: skip
CASES.add(aten.linalg_vector_norm.default, lambda m, x, y: torch.pairwise_distance(x, y) + torch.dist(x, y, 3), **LAST,
          makers=TWO, out=None, name="of a difference", free={"make": 6})  # fmt: skip
CASES.add(aten.linalg_vector_norm.default, lambda m, x: x / (torch.linalg.norm(x, dim=-1, keepdim=True) + torch.linalg.norm(x, 1, -1, True)),
          **LAST, name="of vectors")  # fmt: skip
CASES.add(aten.linalg_vector_norm.default, lambda m, x: x / (torch.linalg.matrix_norm(x, keepdim=True) + torch.linalg.norm(x, "fro", (1, 2), True)),
          **LAST, name="of matrices")  # fmt: skip
CASES.put([], "a norm of matrices of another kind", lambda: network(lambda m, x: torch.linalg.matrix_norm(x, 1), (2, 6, 5), out=None),
          {}, "is not understood")  # fmt: skip
for place, dim in (("rows", 1), ("channels", 2), ("samples", 0)):
    CASES.add(
        aten.where.ScalarOther, lambda m, x, dim=dim: torch.renorm(x, 2, dim, 0.5), **LAST, name=f"bounding {place}"
    )

# --- products of three ---------------------------------------------------------------------------------------------

CASES.add(aten.bilinear.default, lambda m, x, y: torch.bilinear(x, y, m.w, m.b), **LAST, makers=TWO, free=None,
          parts=lambda: {"w": param(4, 6, 6), "b": param(4)})  # fmt: skip
CASES.add(aten.bilinear.default, lambda m, x: torch.bilinear(x, x.sin(), m.w, None), **LAST, free={"make": 6, "w": 4},
          parts=lambda: {"w": param(4, 6, 6)}, name="of one")  # fmt: skip
CASES.add(aten.bilinear.default, lambda m, x: torch.bilinear(x, x.sin(), m.w.relu(), None), **LAST, free={"make": 6, "w": 4},
          parts=lambda: {"w": param(4, 6, 6)}, name="of a weight that is computed")  # fmt: skip
