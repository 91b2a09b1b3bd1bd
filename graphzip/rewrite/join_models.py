"""Join the graphs of several models into one, and take one of them out again.

The joint graph holds every model under its task's name: parameter `conv1.weight` of task `a` is `a.conv1.weight`, input
`x` is `a_x`, the results are a dictionary by task. A tensor that several tasks hold is fetched once; so the analyzer
sees its channels coupled in all of them, and every pass that takes one model takes the joint one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from graphzip.errors import RewriteError
from graphzip.graph.guards import tie_sizes
from graphzip.graph.inputs import CallCode, InputSpec, fake_input
from graphzip.graph.meta import meta_of, owner_name
from graphzip.graph.restore_modules import to_module
from graphzip.graph.state import Aliases, get_tensor, graph_module, inside, joined, named_state, share_tree
from graphzip.graph.tasks import Task, joined_module
from graphzip.graph.torch_private import FakeTensorMode, PyTreeCodeGen, PyTreeInfo, ShapeEnv, pytree
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import settle, tie

__all__ = ["inputs_of", "join", "module_of", "renamed", "task_of"]


def join(models: Mapping[str, Traced]) -> Traced:
    """One graph of several models, by task name. Tensors are shared with the given graphs, which stay as they are."""
    root, graph = nn.Module(), fx.Graph()
    tasks = tuple(_task(name, each) for name, each in models.items())
    made: dict[str, dict[fx.Node, fx.Node]] = {name: {} for name in models}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for name, each in models.items():
        leaves = pytree.tree_leaves((each.example_inputs, each.example_kwargs))
        placeholders = [node for node in each.graph.nodes if node.op == "placeholder"]
        for node, spec, leaf in zip(placeholders, each.inputs, leaves, strict=True):
            copied = graph.placeholder(f"{name}_{node.target}")
            copied.meta["val"] = fake_input(mode, leaf, spec)
            made[name][node] = copied
        tie_sizes(each.conditions, {str(node.target): made[name][node].meta["val"] for node in placeholders})
    results: list[Any] = []
    for name, each in models.items():
        root.add_module(name, share_tree(each.module))
        for node in each.graph.nodes:
            if node.op == "output":
                results += fx.node.map_arg(list(node.args[0]), made[name].__getitem__)
            elif node.op != "placeholder":
                made[name][node] = _copied(graph, node, made[name], name)
    graph.output(tuple(results))
    graph.set_codegen(CallCode(_signature(tasks)))
    joint = Traced(
        module=graph_module(root, graph, "Tasks"),
        inputs=tuple(
            replace(spec, name=f"{name}_{spec.name}") for name, each in models.items() for spec in each.inputs
        ),
        example_inputs=tuple(_given(each.example_inputs) for each in models.values()),
        module_types={
            f"{name}.{key}": kind for name, each in models.items() for key, kind in each.module_types.items()
        },
        notes=tuple(f"{name}: {note}" for name, each in models.items() for note in each.notes),
        batch_dynamic=all(each.batch_dynamic for each in models.values()),
        conditions=tuple(
            renamed(text, {spec.name: f"{name}_{spec.name}" for spec in each.inputs})
            for name, each in models.items()
            for text in each.conditions
        ),
        tasks=tasks,
    )
    tie(joint)
    return settle(joint)


def task_of(joint: Traced, name: str) -> Traced:
    """The graph of one task under its own names; tensors are shared with the joint graph.

    Raises `RewriteError` where the task reads a tensor that has no name in it.
    """
    number = [task.name for task in joint.tasks].index(name)
    task = joint.tasks[number]
    start = sum(before.in_spec.num_leaves for before in joint.tasks[:number])
    inputs = slice(start, start + task.in_spec.num_leaves)
    outputs = next(node for node in joint.graph.nodes if node.op == "output").args[0]
    first = sum(_leaves(before) for before in joint.tasks[:number])
    results = outputs[first : first + _leaves(task)]
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"][inputs]
    wanted = {*placeholders, *_ancestors(results)}
    local = _local_names(joint, name)
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in joint.graph.nodes:
        if node in wanted:
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].target = _target(node, local, f"{name}_")
            _rename(made[node], partial(inside, prefix=name))
    graph.output(fx.node.map_arg(tuple(results), made.__getitem__))
    graph.set_codegen(CallCode(PyTreeInfo(list(task.arguments), task.in_spec, task.out_spec)))
    root = share_tree(joint.module.get_submodule(name)) if hasattr(joint.module, name) else nn.Module()
    names = {spec.name: spec.name.removeprefix(f"{name}_") for spec in joint.inputs[inputs]}
    traced = Traced(
        module=graph_module(root, graph, name),
        inputs=tuple(InputSpec(names[spec.name], spec.shape, spec.dtype) for spec in joint.inputs[inputs]),
        example_inputs=inputs_of(joint)[name],
        module_types={
            inside(key, name): kind for key, kind in joint.module_types.items() if key.startswith(f"{name}.")
        },
        notes=tuple(note.removeprefix(f"{name}: ") for note in joint.notes if note.startswith(f"{name}: ")),
        batch_dynamic=joint.batch_dynamic,
        conditions=tuple(renamed(text, names) for text in joint.conditions if set(_inputs_in(text)) & names.keys()),
    )
    tie(traced)
    traced.module.recompile()
    return traced


def inputs_of(traced: Traced) -> Any:
    """The example inputs as the user gives them: a tuple, or a tuple by task."""
    if not traced.tasks:
        return traced.example_inputs
    return {
        task.name: (given,) if task.positional.num_children == 1 else given
        for task, given in zip(traced.tasks, traced.example_inputs, strict=True)
    }


def module_of(traced: Traced) -> nn.Module:
    """The module to train: of one model, or of several with the tensors that they share, as copies."""
    if not traced.tasks:
        return to_module(traced)
    own: dict[int, torch.Tensor] = {}
    children = {task.name: to_module(task_of(traced, task.name), own) for task in traced.tasks}
    return joined_module(children, {task.name: task.positional.num_children for task in traced.tasks})


def _task(name: str, traced: Traced) -> Task:
    codegen = traced.graph._codegen
    assert isinstance(codegen, PyTreeCodeGen)
    info = codegen.pytree_info
    return Task(name, tuple(info.orig_args), info.in_spec, info.out_spec)


def _signature(tasks: tuple[Task, ...]) -> PyTreeInfo:
    """`forward(a, b)` with a dictionary by task as its result."""
    given = [task.positional.child(0) if task.positional.num_children == 1 else task.positional for task in tasks]
    results = [pytree.tree_structure(0) if task.out_spec is None else task.out_spec for task in tasks]
    names = [task.name for task in tasks]
    inputs = pytree.TreeSpec(tuple, None, [pytree.TreeSpec(tuple, None, given), pytree.TreeSpec(dict, [], [])])
    return PyTreeInfo(names, inputs, pytree.TreeSpec(dict, names, results))


def _given(inputs: tuple[Any, ...]) -> Any:
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def _leaves(task: Task) -> int:
    return 1 if task.out_spec is None else int(task.out_spec.num_leaves)


def _copied(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node], task: str) -> fx.Node:
    copied = graph.node_copy(node, made.__getitem__)
    if node.op == "get_attr":
        copied.target = f"{task}.{node.target}"
    _rename(copied, partial(joined, task))
    return copied


def _rename(node: fx.Node, name_of: Callable[[str], str]) -> None:
    """Give the modules that a node's metadata speaks of the names that `name_of` gives for theirs."""
    meta = meta_of(node)
    meta["owner"] = name_of(owner_name(node))
    if "factored" in meta:
        meta["factored"] = replace(meta["factored"], layer=name_of(meta["factored"].layer))


def _ancestors(results: Any) -> set[fx.Node]:
    found = [value for value in results if isinstance(value, fx.Node)]
    seen = set(found)
    while found:
        for source in found.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                found.append(source)
    return seen


def _local_names(joint: Traced, name: str) -> Aliases:
    """For every name in the joint graph the name that the same tensor has in the task."""
    held: dict[int, str] = {}
    for full, tensor in named_state(joint.module):
        if full.startswith(f"{name}."):
            held.setdefault(id(tensor), inside(full, name))
    fetched = {str(node.target) for node in joint.graph.nodes if node.op == "get_attr"}
    tensors = {full: id(get_tensor(joint.module, full)) for full in fetched}
    own = {full: inside(full, name) for full in fetched if full.startswith(f"{name}.")}
    return {full: held[key] for full, key in tensors.items() if key in held} | own


def _target(node: fx.Node, local: Aliases, prefix: str) -> Any:
    if node.op == "placeholder":
        return str(node.target).removeprefix(prefix)
    if node.op != "get_attr":
        return node.target
    if node.target not in local:
        raise RewriteError(f"task {prefix[:-1]!r} reads {node.target!r}, which is not a tensor of its own")
    return local[str(node.target)]


def _inputs_in(condition: str) -> list[str]:
    """The names of the inputs whose sizes a condition reads."""
    return re.findall(r"\b(\w+)(?=\.shape\[)", condition)


def renamed(condition: str, names: Mapping[str, str]) -> str:
    """The condition with other names of the inputs."""
    return re.sub(r"\b(\w+)(?=\.shape\[)", lambda match: names.get(match[1], match[1]), condition)
