"""An exported program as one flat, clean graph, with what must hold between the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from graphzip.canonical.canonicalize import clean
from graphzip.canonical.inline_subgraphs import inline_subgraphs
from graphzip.canonical.squeezes import squeezed
from graphzip.graph.guards import Open, Sizes
from graphzip.graph.inputs import CallCode
from graphzip.graph.state import Aliases, find_aliases, graph_module, rebuild_state
from graphzip.graph.torch_private import PyTreeCodeGen
from graphzip.tracing.compare_modes import Form
from graphzip.tracing.program import Program, asked_dims, asked_minima

__all__ = ["Flat", "FormOf", "flatten", "stated"]


@dataclass
class Flat:
    """The graph in a module with the tensors of the model; it still has to be compiled.

    `conditions` hold of all inputs for which the graph is the model; at those of one row, `open` comparisons are to be
    looked into. `asked` are the conditions of the model's own comparisons, each with its line. `asked_at` are lines of
    the model that ask for conditions. `notes` are sentences for the report, `form`
    is what `flatten` was told to keep of the raw graph.
    """

    program: Program
    module: fx.GraphModule
    aliases: Aliases
    sizes: Sizes
    conditions: tuple[str, ...]
    open: list[Open]
    asked: dict[str, str]
    asked_at: dict[str, str]
    notes: tuple[str, ...]
    form: Form | None

    def all_notes(self) -> tuple[str, ...]:
        """The notes, with one on the conditions."""
        if not self.conditions:
            return self.notes
        lines = [f"{text} ({line})" if (line := self.asked_at.get(text)) else text for text in self.conditions]
        return (
            *self.notes,
            f"inputs must have {', '.join(lines)}: the path that was traced needs it; others are refused",
        )


def stated(source: nn.Module, flat: Flat) -> set[str]:
    """Those conditions that were given with the sizes that are open: nobody asks for more."""
    return flat.sizes.lower_bounds(asked_minima(source, flat.program))


FormOf = Callable[[fx.GraphModule], Form | None]


def flatten(program: Program, source: nn.Module, form_of: FormOf | None = None) -> Flat:
    """Inline the subgraphs of an exported `source`, clean its graph. Raises `TraceError` for what cannot be inlined."""
    unlifted = program.unlifted()
    sizes = Sizes(unlifted.graph)
    conditions = sizes.conditions()
    notes = inline_subgraphs(unlifted)
    form = form_of(unlifted) if form_of is not None else None
    aliases = find_aliases(source)
    root = rebuild_state(source, unlifted, aliases)
    code = unlifted.graph._codegen
    assert isinstance(code, PyTreeCodeGen)
    unlifted.graph.set_codegen(CallCode(code.pytree_info))
    module = graph_module(root, unlifted.graph, type(source).__name__, compiled=False)
    written = clean(module, aliases)
    squeezes = [branch for node in module.graph.nodes for branch in squeezed(node)]
    branches = [*program.watch.branches, *squeezes, *written.branches]
    told = (*program.notes, *_fixed(program, sizes), *_ones(program, source, module.graph), *notes, *written.notes)
    found, asked = sizes.open(branches), sizes.asked(branches)
    return Flat(program, module, aliases, sizes, conditions, found, asked, {}, told, form)


def _fixed(program: Program, sizes: Sizes) -> Iterator[str]:
    """One sentence on sizes that were to be open and that the model makes a number of."""
    known = {place: (size, program.watch.fixed.get(symbol)) for place, (size, symbol) in sizes.fixed.items()}
    if known:
        listed = ", ".join(f"{place} = {size}" for place, (size, _) in known.items())
        lines = list(dict.fromkeys(line for _, line in known.values() if line))
        why = f" ({', '.join(lines)} needs it as a number)" if lines else ""
        yield f"fixed as in the example{why}: {listed}; other sizes are refused"


def _ones(program: Program, source: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """One sentence on sizes that were to be open and are one in the example, which `torch.export` takes as a number."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    found = [
        f"{nodes[number].target}.shape[{dim}]"
        for number, dims in asked_dims(source, program).items()
        for dim in dims
        if isinstance(size := nodes[number].meta["val"].shape[dim], int) and size == 1
    ]
    if found:
        yield f"fixed at one, as in the example: {', '.join(found)}; give an example with two there to have it open"
