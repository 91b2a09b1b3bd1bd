"""What a process has that all of its code shares, for tests that it stays as it was."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import numpy as np
import sympy
import torch
from torch import nn
from torch.fx.experimental.sym_node import SymNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def snapshot() -> dict[str, Any]:
    """Everything by name, in a form that can be compared."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "loggers": _loggers(),
        "logging": (logging.root.manager.disable, logging.getLoggerClass()),
        "streams": (id(sys.stdout), id(sys.stderr), id(sys.stdin)),
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook, sys.gettrace(), sys.getprofile()),
        "umask": mask,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "recursion": sys.getrecursionlimit(),
        "interrupt": signal.getsignal(signal.SIGINT),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "random": hash(bytes(torch.random.get_rng_state().numpy())),
        "python random": hash(random.getstate()),
        "numpy random": hash(str(np.random.get_state())),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "modes": (len(torch.overrides._get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack())),
        "compiling": (torch.compiler.is_compiling(), torch.compiler.is_exporting()),
        "methods": _methods(),
        "configurations": _configurations(),
        "classes of nodes": len(pytree.SUPPORTED_NODES),
        "evaluate": sympy.core.parameters.global_parameters.evaluate,
        "threads alive": sorted(each.name for each in threading.enumerate() if each.name != "tqdm_monitor"),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def _loggers() -> dict[str, Any]:
    """Loggers that say something of themselves; a new one that does not is no change."""
    named = {"": logging.root, **logging.root.manager.loggerDict}
    found = {}
    for name, each in named.items():
        if isinstance(each, logging.Logger):
            state = each.level, each.disabled, each.propagate, tuple(map(id, each.handlers)), len(each.filters)
            if state != (logging.NOTSET, False, True, (), 0):
                found[name] = state
    return found


def _methods() -> dict[str, Any]:
    """What others replace while they trace."""
    return {
        "call": nn.Module.__call__,
        "getattr": nn.Module.__getattr__,
        "setattr": nn.Module.__setattr__,
        "training": nn.Module.__dict__.get("training"),
        "is_grad_enabled": torch.is_grad_enabled,
        "no_grad": torch.no_grad,
        "bool": SymNode.bool_,
        "int": SymNode.guard_int,
        "operator": torch._ops.OpOverload.__call__,
        "empty": torch.empty,
        "tensor": torch.tensor,
    }


def _configurations() -> dict[str, Any]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch.fx.experimental._config as shapes

    return {each.__name__: each.get_config_copy() for each in (dynamo, functorch, shapes)}
