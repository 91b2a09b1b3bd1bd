"""What can go wrong, in the user's words.

Every error that graphzip raises on purpose derives from `GraphZipError`. A message names the module, node or plan
key, says what is wrong, and says what to do.
"""

from __future__ import annotations

__all__ = [
    "ArchiveError",
    "ExampleInputError",
    "ExportError",
    "GraphZipError",
    "InputShapeError",
    "MissingDependencyError",
    "NotFoundError",
    "PlanError",
    "ProcessesError",
    "RewriteError",
    "TraceError",
    "VerificationError",
    "WeightsError",
]


class GraphZipError(Exception):
    """Base class of every refusal of graphzip."""

    def __str__(self) -> str:
        """The message. Names in it may come from a file of a stranger: what would steer a terminal is spelled out."""
        return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in super().__str__())


class PlanError(GraphZipError, ValueError):
    """A plan that cannot be read, is invalid, or does not fit the model."""


class ExampleInputError(GraphZipError, ValueError):
    """Example inputs that are missing or that the model does not accept."""


class InputShapeError(GraphZipError, ValueError):
    """A compiled module was called with an input whose shape it was not compiled for."""


class TraceError(GraphZipError):
    """A model that `torch.export` cannot turn into a graph."""


class RewriteError(GraphZipError):
    """A rewrite that cannot be carried out without changing what the model computes."""


class ExportError(GraphZipError):
    """A model that cannot be written as ONNX, or a place that cannot be written to."""


class VerificationError(ExportError):
    """A file that is not the module: another weight, operator or output, or none that can be read.

    An export has then left no file; a file that was only checked stays.
    """


class ArchiveError(GraphZipError):
    """A saved model that cannot be written or read."""


class ProcessesError(GraphZipError, RuntimeError):
    """Processes that work on one model and do not come together: one is gone, failed, or does something else."""


class WeightsError(GraphZipError):
    """A weights file that cannot be read or does not fit the model."""


class NotFoundError(GraphZipError, KeyError, IndexError):
    """A name or a number that nothing has."""

    __str__ = Exception.__str__  # that of KeyError puts quotes around the message


class MissingDependencyError(GraphZipError, ImportError):
    """An optional package is needed; the message gives the pip line that installs it."""
