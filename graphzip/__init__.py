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
from graphzip_passes.registry import BUILT_IN

if TYPE_CHECKING:
    from graphzip.analysis.code_size import suggest_code_size
    from graphzip.analysis.coefficient_rank import CoefficientRank, coefficient_rank
    from graphzip.analysis.cost import Cost
    from graphzip.analysis.explain import Explanation
    from graphzip.analysis.groups import ChannelGroup, ChannelGroups, ParamSlice
    from graphzip.api import Compiled, Prepared, channel_groups, compile, cost, load, prepare
    from graphzip.errors import (
        ArchiveError,
        ExampleInputError,
        ExportError,
        GraphZipError,
        InputShapeError,
        MissingDependencyError,
        NotFoundError,
        PlanError,
        ProcessesError,
        RewriteError,
        TraceError,
        VerificationError,
        WeightsError,
    )
    from graphzip.export.generator import save_generator
    from graphzip.export.onnx import ExportReport
    from graphzip.formats.by_tensor import compile_folder
    from graphzip.formats.exported import from_exported
    from graphzip.formats.huggingface import from_pretrained, save_pretrained
    from graphzip.formats.onnx_files.from_onnx import from_onnx
    from graphzip.plan.criteria import register_criterion
    from graphzip.plan.options import PassOptions
    from graphzip.plan.passes import (
        AtomFactorize,
        ClusterMerge,
        CrossDomainShare,
        DropBlocks,
        FoldBatchNorm,
        LowRank,
        Minimize,
        PruneChannels,
        SliceGenerate,
        Zip,
    )
    from graphzip.plan.plan import Plan
    from graphzip.process_groups import processes
    from graphzip.report.card import Card, Figures, Latency, Scores
    from graphzip.report.outcome import Bars, Outcome, Table
    from graphzip.report.picture import draw_groups, draw_sharing, draw_study
    from graphzip.report.report import Report
    from graphzip.runtime.inference import OnnxModule
    from graphzip.study.budget import Sensitivity, WidthStudy
    from graphzip.study.plans import plan_for
    from graphzip.traces import Trace, trace
    from graphzip.training.distill import distill
    from graphzip.training.expand import expand
    from graphzip.training.history import History
    from graphzip.training.tune import Tune
    from graphzip.training.widen import widen
    from graphzip_passes.base import Constraint, Decision, PassContext, Stage, register_pass
    from graphzip_passes.parts.clustering import register_clustering
    from graphzip_passes.parts.group_view import GroupView


__all__ = [
    "ArchiveError",
    "AtomFactorize",
    "Bars",
    "Card",
    "ChannelGroup",
    "ChannelGroups",
    "ClusterMerge",
    "CoefficientRank",
    "Compiled",
    "Constraint",
    "Cost",
    "CrossDomainShare",
    "Decision",
    "DropBlocks",
    "ExampleInputError",
    "Explanation",
    "ExportError",
    "ExportReport",
    "Figures",
    "FoldBatchNorm",
    "GraphZipError",
    "GroupView",
    "History",
    "InputShapeError",
    "Latency",
    "LowRank",
    "Minimize",
    "MissingDependencyError",
    "NotFoundError",
    "OnnxModule",
    "Outcome",
    "ParamSlice",
    "PassContext",
    "PassOptions",
    "Plan",
    "PlanError",
    "Prepared",
    "ProcessesError",
    "PruneChannels",
    "Report",
    "RewriteError",
    "Scores",
    "Sensitivity",
    "SliceGenerate",
    "Stage",
    "Table",
    "Trace",
    "TraceError",
    "Tune",
    "VerificationError",
    "WeightsError",
    "WidthStudy",
    "Zip",
    "__version__",
    "channel_groups",
    "coefficient_rank",
    "compile",
    "compile_folder",
    "cost",
    "distill",
    "draw_groups",
    "draw_sharing",
    "draw_study",
    "expand",
    "from_exported",
    "from_onnx",
    "from_pretrained",
    "load",
    "plan_for",
    "prepare",
    "processes",
    "register_clustering",
    "register_criterion",
    "register_pass",
    "save_generator",
    "save_pretrained",
    "suggest_code_size",
    "trace",
    "widen",
]

_HOMES: Final = {
    "graphzip.analysis.code_size": ("suggest_code_size",),
    "graphzip.analysis.coefficient_rank": ("CoefficientRank", "coefficient_rank"),
    "graphzip.analysis.cost": ("Cost",),
    "graphzip.analysis.explain": ("Explanation",),
    "graphzip.analysis.groups": ("ChannelGroup", "ChannelGroups", "ParamSlice"),
    "graphzip.api": ("Compiled", "Prepared", "channel_groups", "compile", "cost", "load", "prepare"),
    "graphzip.study.budget": ("Sensitivity", "WidthStudy"),
    "graphzip.study.plans": ("plan_for",),
    "graphzip.training.distill": ("distill",),
    "graphzip.export.generator": ("save_generator",),
    "graphzip.runtime.inference": ("OnnxModule",),
    "graphzip.export.onnx": ("ExportReport",),
    "graphzip.formats.by_tensor": ("compile_folder",),
    "graphzip.formats.exported": ("from_exported",),
    "graphzip.formats.huggingface": ("from_pretrained", "save_pretrained"),
    "graphzip.formats.onnx_files.from_onnx": ("from_onnx",),
    "graphzip.report.card": ("Card", "Figures", "Latency", "Scores"),
    "graphzip.report.outcome": ("Bars", "Outcome", "Table"),
    "graphzip.report.report": ("Report",),
    "graphzip.report.picture": ("draw_groups", "draw_sharing", "draw_study"),
    "graphzip.traces": ("Trace", "trace"),
    "graphzip.training.history": ("History",),
    "graphzip.training.expand": ("expand",),
    "graphzip.plan.criteria": ("register_criterion",),
    "graphzip.plan.options": ("PassOptions",),
    "graphzip.plan.passes": (
        "AtomFactorize",
        "ClusterMerge",
        "CrossDomainShare",
        "DropBlocks",
        "FoldBatchNorm",
        "LowRank",
        "Minimize",
        "PruneChannels",
        "SliceGenerate",
        "Zip",
    ),
    "graphzip.plan.plan": ("Plan",),
    "graphzip.process_groups": ("processes",),
    "graphzip.training.tune": ("Tune",),
    "graphzip.training.widen": ("widen",),
    "graphzip_passes.base": ("Constraint", "Decision", "PassContext", "Stage", "register_pass"),
    "graphzip_passes.parts.clustering": ("register_clustering",),
    "graphzip_passes.parts.group_view": ("GroupView",),
}
"""Where public names live. A public name that is not here is the options of a pass that is in a file of its own, where
the table of passes says, or an error class in `graphzip.errors`.
"""

_HOME_OF_PASS: Final = {name: home for home, _, name in (entry.partition(":") for entry in BUILT_IN.values())}
_HOME_OF: Final = _HOME_OF_PASS | {name: home for home, names in _HOMES.items() for name in names}
__all__ += sorted(name for name in _HOME_OF_PASS if name not in __all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF.get(name, "graphzip.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
