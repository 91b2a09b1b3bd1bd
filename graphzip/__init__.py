"""Make trained PyTorch models slimmer without changing what they compute.

    import graphzip as gz

    plan = gz.Plan([gz.ClusterMerge(keep=0.5)])
    compiled = gz.compile(model, plan, example_inputs)
    compiled.export("slim.onnx")

Every public name is an attribute of this package. It is loaded when it is first used, so `import graphzip` is quick and
does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from graphzip.version import __version__

if TYPE_CHECKING:
    from graphzip.analysis.code_size import suggest_code_size
    from graphzip.analysis.coefficient_rank import CoefficientRank, coefficient_rank
    from graphzip.analysis.cost import Cost
    from graphzip.analysis.explain import Explanation
    from graphzip.analysis.groups import ChannelGroup, ChannelGroups, ParamSlice
    from graphzip.api import Compiled, Prepared, channel_groups, compile, cost, load, prepare
    from graphzip.budget import Sensitivity, WidthStudy, plan_for
    from graphzip.distill import distill
    from graphzip.errors import (
        ArchiveError,
        ExampleInputError,
        ExportError,
        GraphZipError,
        InputShapeError,
        MissingDependencyError,
        NotFoundError,
        PlanError,
        RewriteError,
        TraceError,
        VerificationError,
        WeightsError,
    )
    from graphzip.export.generator import save_generator
    from graphzip.export.onnx import ExportReport
    from graphzip.grow import expand
    from graphzip.history import History
    from graphzip.picture import draw_groups, draw_sharing, draw_study
    from graphzip.plan import (
        AtomFactorize,
        ClusterMerge,
        CrossDomainShare,
        FoldBatchNorm,
        Plan,
        PruneChannels,
        SliceGenerate,
        Zip,
    )
    from graphzip.widening import widen
    from graphzip_passes.clustering import register_clustering


__all__ = [
    "ArchiveError",
    "AtomFactorize",
    "ChannelGroup",
    "ChannelGroups",
    "ClusterMerge",
    "CoefficientRank",
    "Compiled",
    "Cost",
    "CrossDomainShare",
    "ExampleInputError",
    "Explanation",
    "ExportError",
    "ExportReport",
    "FoldBatchNorm",
    "GraphZipError",
    "History",
    "InputShapeError",
    "MissingDependencyError",
    "NotFoundError",
    "ParamSlice",
    "Plan",
    "PlanError",
    "Prepared",
    "PruneChannels",
    "RewriteError",
    "Sensitivity",
    "SliceGenerate",
    "TraceError",
    "VerificationError",
    "WeightsError",
    "WidthStudy",
    "Zip",
    "__version__",
    "channel_groups",
    "coefficient_rank",
    "compile",
    "cost",
    "distill",
    "draw_groups",
    "draw_sharing",
    "draw_study",
    "expand",
    "load",
    "plan_for",
    "prepare",
    "register_clustering",
    "save_generator",
    "suggest_code_size",
    "widen",
]

_HOMES: Final = {
    "graphzip.analysis.code_size": ("suggest_code_size",),
    "graphzip.analysis.coefficient_rank": ("CoefficientRank", "coefficient_rank"),
    "graphzip.analysis.cost": ("Cost",),
    "graphzip.analysis.explain": ("Explanation",),
    "graphzip.analysis.groups": ("ChannelGroup", "ChannelGroups", "ParamSlice"),
    "graphzip.api": ("Compiled", "Prepared", "channel_groups", "compile", "cost", "load", "prepare"),
    "graphzip.budget": ("Sensitivity", "WidthStudy", "plan_for"),
    "graphzip.distill": ("distill",),
    "graphzip.export.generator": ("save_generator",),
    "graphzip.export.onnx": ("ExportReport",),
    "graphzip.picture": ("draw_groups", "draw_sharing", "draw_study"),
    "graphzip.history": ("History",),
    "graphzip.grow": ("expand",),
    "graphzip.plan": (
        "AtomFactorize",
        "ClusterMerge",
        "CrossDomainShare",
        "FoldBatchNorm",
        "Plan",
        "PruneChannels",
        "SliceGenerate",
        "Zip",
    ),
    "graphzip.widening": ("widen",),
    "graphzip_passes.clustering": ("register_clustering",),
}
"""Where public names live. A public name that is not here is an error class in `graphzip.errors`."""

_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF.get(name, "graphzip.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
