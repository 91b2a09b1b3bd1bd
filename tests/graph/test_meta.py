"""Every key that code reads or writes in `node.meta` is documented in `NodeMeta`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from graphzip.graph.meta import NodeMeta
from tools.floors import modules

OF_TORCH = {"nn_module_stack", "stack_trace"}
"""What `torch.export` records, read before it is left out."""


def keys(source: str) -> Iterator[str]:
    """The keys in `.meta["key"]`, `.meta.get("key")`, `"key" in .meta`, `.meta.update(key=..)`, also of `meta_of`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and _is_meta(node.value):
            yield from _texts([node.slice])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_meta(node.func.value):
            yield from _texts(node.args[:1])
            yield from (each.arg for each in node.keywords if each.arg)
        elif isinstance(node, ast.Compare) and any(_is_meta(each) for each in node.comparators):
            yield from _texts([node.left])


def _is_meta(node: ast.AST) -> bool:
    typed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "meta_of"
    return typed or (isinstance(node, ast.Attribute) and node.attr == "meta")


def _texts(nodes: list[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("module", modules())
def test_keys_are_documented(module: str) -> None:
    found = set(keys(modules()[module].read_text(encoding="utf-8")))
    assert found <= {*NodeMeta.__annotations__, *OF_TORCH}


def test_no_key_is_documented_in_vain() -> None:
    used = {key for path in modules().values() for key in keys(path.read_text(encoding="utf-8"))}
    assert set(NodeMeta.__annotations__) <= used


@pytest.mark.parametrize(
    "source",
    [
        'node.meta["a"]',
        'meta_of(node)["a"]',
        '"a" in meta_of(node)',
        'a.b.meta.get("a")',
        '"a" in node.meta',
        "node.meta.update(a=1)",
        'x.meta.pop("a", 1)',
    ],
)
def test_keys_are_found(source: str) -> None:
    assert list(keys(source)) == ["a"]
