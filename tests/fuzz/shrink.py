"""Make a failing program small: statements, outputs, inputs and pieces of text go as long as it fails the same way."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from fuzz.case import Case, Outcome, check, same_failure, with_program
from fuzz.program import Line, Program

__all__ = ["script", "shrink"]


def shrink(case: Case, outcome: Outcome, *, seconds: float = 60.0) -> tuple[Case, Outcome]:
    """The smallest case found that fails like `outcome`, within so much processor time."""
    if outcome.stage not in ("float", "export", "onnx"):
        case = replace(case, onnx=False)
    end = time.process_time() + seconds
    changed = True
    while changed and case.program is not None:
        changed = False
        for program in _smaller(case.program):
            if time.process_time() > end:
                return case, outcome
            if not _runs(program):
                continue
            trial = with_program(case, program.used())
            found = check(trial)
            if same_failure(outcome, found):
                case, outcome, changed = trial, found, True
                break
    return case, outcome


def _runs(program: Program) -> bool:
    try:
        model = program.build()
        with torch.no_grad():
            model(*program.make_inputs(4))
    except Exception:
        return False
    return True


def _smaller(program: Program) -> Iterator[Program]:
    yield from _fewer_outputs(program)
    for number in reversed(range(len(program.lines))):
        line = program.lines[number]
        rest = program.lines[:number] + program.lines[number + 1 :]
        for source in line.reads:
            renamed = [_renamed(each, line.writes, source) for each in rest[number:]]
            outputs = _swap(program.outputs, line.writes, source)
            yield _pruned(replace(program, lines=(*rest[:number], *renamed), outputs=outputs))
    for number in range(len(program.lines)):
        for text in _simpler(program.lines[number].text):
            line = replace(program.lines[number], text=text)
            yield _pruned(replace(program, lines=(*program.lines[:number], line, *program.lines[number + 1 :])))
    for number, each in enumerate(program.inputs):
        text = "\n".join([*(line.text for line in program.lines), program.outputs])
        if len(program.inputs) > 1 and not re.search(rf"\b{each.name}\b", text):
            yield replace(program, inputs=program.inputs[:number] + program.inputs[number + 1 :])
        if each.dynamic:
            yield replace(program, inputs=tuple(replace(one, dynamic=()) for one in program.inputs))


def _swap(text: str, names: tuple[str, ...], by: str) -> str:
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", by, text)


def _renamed(line: Line, names: tuple[str, ...], by: str) -> Line:
    reads = tuple(dict.fromkeys(by if each in names else each for each in line.reads))
    return replace(line, text=_swap(line.text, names, by), reads=reads)


def _pruned(program: Program) -> Program:
    """Without the lines whose results nobody reads."""
    kept: list[Line] = []
    text = program.outputs
    for line in reversed(program.lines):
        if any(re.search(rf"\b{name}\b", text) for name in line.writes):
            kept.append(line)
            text += "\n" + line.text
    return replace(program, lines=tuple(reversed(kept)))


def _fewer_outputs(program: Program) -> Iterator[Program]:
    names = [name for line in program.lines for name in line.writes]
    shown = list(dict.fromkeys(re.findall(r"\b[a-z]+[0-9]*\b", program.outputs)))
    shown = [name for name in shown if name in names]
    for name in shown:
        if program.outputs != name:
            yield _pruned(replace(program, outputs=name))
    for line in reversed(program.lines[:-1]):
        for name in line.writes:
            if program.outputs != name:
                yield _pruned(replace(program, outputs=name))


def _simpler(text: str) -> Iterator[str]:
    """An expression is replaced by one of its parts; a statement of several goes."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    if len(tree.body) > 1:
        for number in range(len(tree.body)):
            body = tree.body[:number] + tree.body[number + 1 :]
            yield "\n".join(ast.unparse(each) for each in body)
    for place in range(sum(isinstance(node, ast.expr) for node in ast.walk(tree))):
        for part in range(4):
            made = _cut(text, place, part)
            if made is not None and made != text:
                yield made


def _cut(text: str, place: int, part: int) -> str | None:
    """The text in which the expression number `place` is its own part number `part`."""
    tree = ast.parse(text)
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
    ]
    if place >= len(nodes):
        return None
    node = nodes[place]
    if isinstance(node, ast.Call):
        parts = [*([node.func.value] if isinstance(node.func, ast.Attribute) else []), *node.args]
    elif isinstance(node, ast.BinOp):
        parts = [node.left, node.right]
    elif isinstance(node, ast.Subscript | ast.Attribute):
        parts = [node.value]
    elif isinstance(node, ast.UnaryOp):
        parts = [node.operand]
    else:
        return None
    if part >= len(parts) or isinstance(parts[part], ast.Constant | ast.Starred):
        return None
    new = parts[part]
    if isinstance(new, ast.Name) and new.id in ("torch", "F", "self", "nn"):
        return None

    class Put(ast.NodeTransformer):
        def visit(self, each: ast.AST) -> ast.AST:
            return new if each is node else super().generic_visit(each)

    return ast.unparse(ast.fix_missing_locations(Put().visit(tree)))


_SCRIPT = """{head}

import sys
from pathlib import Path

import graphzip as gz

TESTS = Path(gz.__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "support"), str(TESTS / "support" / "networks")]
from fuzz.case import Case, check
from fuzz.program import Input, Program

NET = '''
{source}'''
PROGRAM = Program.given(NET{inputs})
OUTCOME = check(Case({seed}, {job!r}, PROGRAM, onnx={onnx}))
print(OUTCOME)
assert OUTCOME.status != "failed", OUTCOME.detail
"""


def script(case: Case, outcome: Outcome) -> str:
    """A file that shows the failure again."""
    head = f'"""{outcome.kind} while {outcome.stage}: {outcome.detail[:300]}"""'.replace("\\", "/")
    if case.program is None:
        return _SCRIPT.split("NET = ")[0].format(head=head) + f"print(check(Case({case.seed}, {case.job!r}, None)))\n"
    inputs = "".join(f", {each!r}" for each in case.program.inputs) + (", random=True" if case.program.random else "")
    return _SCRIPT.format(
        head=head, source=case.program.source(), inputs=inputs, seed=case.seed, job=case.job, onnx=case.onnx
    )
