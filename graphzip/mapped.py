"""Tensors that lie in files and are mapped: they take memory while they are read, and can give it back.

A safetensors file is its length, a header in JSON that says where each tensor lies, and their bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import warnings
import weakref
from pathlib import Path
from typing import Final

import torch

__all__ = ["STORED", "MappedFiles", "raw_bytes"]

STORED: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""The names of dtypes in a safetensors file."""

_DTYPES: Final = {name: dtype for dtype, name in STORED.items()}


class MappedFiles:
    """Files that are mapped as long as somebody has a tensor of theirs. Nothing may be written to these tensors."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._stored: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()

    def tensors(self, file: Path) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file, which is known to be one. Raises `KeyError` for a dtype of eight bits."""
        mapped = self._mapped(file)
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        header.pop("__metadata__", None)
        return {
            name: _viewed(mapped, start + entry["data_offsets"][0], _DTYPES[entry["dtype"]], entry["shape"])
            for name, entry in header.items()
        }

    def stored(self, value: torch.Tensor, file: Path) -> torch.Tensor:
        """The same tensor from a new `file`, which goes by itself where the system allows it."""
        if not value.numel():
            return value
        value = value.detach().cpu().contiguous()
        file.write_bytes(raw_bytes(value))
        mapped = self._mapped(file)
        with contextlib.suppress(OSError):  # what is mapped goes with the last that reads it; not so on Windows
            file.unlink()
        found = _viewed(mapped, 0, value.dtype, value.shape)
        self._stored[mapped] = found.data_ptr()
        return found

    def holds(self, value: torch.Tensor) -> bool:
        """Whether a tensor is one that was `stored`, or a view of it."""
        return value.untyped_storage().data_ptr() in self._stored.values()

    def rest(self) -> None:
        """Give the memory of all back; what is read from here on is read from the files again."""
        for each in list(self._open) if hasattr(mmap, "MADV_DONTNEED") else ():
            each.madvise(mmap.MADV_DONTNEED)

    @staticmethod
    def trim() -> None:
        """Give back what tensors that are gone left in the heap; only the C library of GNU keeps it, and can."""
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def _mapped(self, file: Path) -> mmap.mmap:
        with file.open("rb") as opened:
            found = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._open.add(found)
        return found


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _viewed(mapped: mmap.mmap, start: int, dtype: torch.dtype, shape: list[int] | torch.Size) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    if start % dtype.itemsize:
        return torch.frombuffer(bytearray(mapped[start : start + count * dtype.itemsize]), dtype=dtype).view(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it cannot be written to, and is not
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start).view(shape)
