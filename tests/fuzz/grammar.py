"""Random programs: inputs, a first layer, statements, and what is returned."""

from __future__ import annotations

from typing import Any

from fuzz import rules_blocks, rules_layers, rules_math, rules_mixing, rules_moves, rules_writes
from fuzz.gen import RULES, Gen, Skip, Value
from fuzz.program import Program

__all__ = ["make_program"]

FAMILIES = (rules_blocks, rules_layers, rules_math, rules_mixing, rules_moves, rules_writes)

_SHAPES: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = (
    ("BC", ((8,), (4,), (6,), (5,))),
    ("BLC", ((5, 8), (4, 4), (3, 6), (4, 8), (1, 8), (6, 4))),
    ("BCHW", ((3, 8, 8), (4, 4, 4), (3, 6, 8), (1, 6, 6), (3, 5, 7))),
    ("BCL", ((3, 9), (4, 4), (2, 8))),
    ("BL", ((5,), (4,))),
    ("BCDHW", ((2, 3, 4, 4),)),
)


def make_program(
    seed: int, *, most: int = 7, rules: frozenset[str] | None = None, weights: dict[str, float] | None = None
) -> Program:
    """The program of a seed, with 2 to `most` statements besides the first layers and the last ones."""
    g = Gen(seed)
    _inputs(g)
    names = [name for name in RULES if rules is None or name in rules]
    shares = [(weights or {}).get(name, RULES[name][1]) for name in names]
    wanted = g.rng.randrange(2, most + 1)
    for _ in range(12 * wanted):
        if g.apply(g.rng.choices(names, shares)[0]):
            wanted -= 1
        if not wanted:
            break
    return g.program(_outputs(g))


def _inputs(g: Gen) -> None:
    layout, shapes = g.rng.choices(_SHAPES, (4, 5, 5, 2, 1.5, 0.5))[0]
    dynamic = _dynamic(g, layout)
    sizes = g.one(*shapes)
    if layout == "BL":
        x = g.input(sizes, "BL", high=10, dynamic=dynamic)
        _first(g, x)
    else:
        x = g.input(sizes, layout, dynamic=dynamic)
        if g.chance(0.92):
            _first(g, x)
    if g.chance(0.2):
        _second(g, layout, sizes, dynamic)


def _dynamic(g: Gen, layout: str) -> tuple[int, ...]:
    if not g.chance(0.15):
        return ()
    return {"BCHW": (2, 3), "BLC": (1,), "BCL": (2,), "BL": (1,)}.get(layout, ())


def _second(g: Gen, layout: str, sizes: tuple[int, ...], dynamic: tuple[int, ...]) -> None:
    kind = g.one("same", "same", "vector", "mask", "ints")
    if kind == "same" and layout != "BL":
        z = g.input(sizes, layout, dynamic=dynamic)
    elif kind == "mask" and layout in ("BLC", "BL"):
        g.input(sizes[:1], "BL", flags=True, dynamic=dynamic)
        return
    elif kind == "ints":
        z = g.input((), "B", high=10)
    else:
        z = g.input((g.one(4, 6),), "BC")
    _first(g, z)


def _first(g: Gen, x: Value) -> None:
    """A layer that makes channels of an input."""
    g.rule = "first"
    width = g.width()
    try:
        if x.layout in ("BL", "B"):
            layer = g.layer(f"nn.Embedding(10, {width})")
            g.put(f"{layer}({x})", [x], "BLC" if x.layout == "BL" else "BC")
        elif x.layout in ("BC", "BLC"):
            layer = g.layer(f"nn.Linear({x.c}, {width})")
            g.put(g.one(f"{layer}({x})", f"{layer}({x}).relu()", f"{layer}({x}).tanh()"), [x], x.layout)
        else:
            rank = x.rank - 2
            more = g.one("3, padding=1", "3, padding=1", "1", "3, padding=1, bias=False", "2, stride=2", "3")
            layer = g.layer(f"nn.Conv{rank}d({x.c}, {width}, {more})")
            g.put(g.one(f"{layer}({x})", f"{layer}({x}).relu()", f"F.silu({layer}({x}))"), [x], x.layout)
    except Skip:
        return


def _outputs(g: Gen) -> str:
    """Heads for what nothing reads, and how they are returned."""
    g.rule = "head"
    unread = [v for v in g.values if v.name not in g.read and (v.tensor.is_floating_point() or len(g.values) == 1)]
    unread = [v for v in unread if v.name not in {each.name for each in g.inputs}] or [g.values[-1]]
    if len(unread) > 3:
        unread = unread[-3:]
    found = [_head(g, value) for value in unread]
    if g.chance(0.1):
        found.append(str(g.rng.choice(g.values)))
    if g.chance(0.04):
        found.append(f"{found[0]}.argmax(-1)")
    if len(found) == 1:
        y = found[0]
        return g.one(
            y,
            y,
            y,
            y,
            y,
            f"({y},)",
            f"{{'out': {y}}}",
            f"[{y}]",
            f"({y}, {y} * 2)",
            f"{{'a': {y}, 'b': ({y}.mean(), None)}}",
        )
    joined = ", ".join(found)
    keys = ", ".join(f"'k{i}': {y}" for i, y in enumerate(found))
    pairs = f"({found[0]}, {{{keys}}})"
    return g.one(f"({joined})", f"({joined})", f"[{joined}]", f"{{{keys}}}", pairs, f"({joined}, None)")


def _head(g: Gen, x: Value) -> str:
    kind = g.rng.choices(("layer", "mean", "plain"), (6, 1, 1.5))[0]
    try:
        if kind == "layer" and x.layout in ("BC", "BLC", "BHWC", "BNLC"):
            return str(g.put(f"{g.layer(f'nn.Linear({x.c}, 3)')}({x})", [x], x.layout))
        if kind == "layer" and x.layout in ("BCHW", "BCL", "BCDHW"):
            rank = x.rank - 2
            if g.chance(0.3):
                pooled: Any = g.put(f"{x}.flatten(2).mean(-1)", [x], "BC")
                return str(g.put(f"{g.layer(f'nn.Linear({x.c}, 3)')}({pooled})", [pooled], "BC"))
            return str(g.put(f"{g.layer(f'nn.Conv{rank}d({x.c}, 3, 1)')}({x})", [x], x.layout))
        if kind == "mean":
            return f"{x}.mean({x.rank - 1})"
    except Skip:
        pass
    return x.name
