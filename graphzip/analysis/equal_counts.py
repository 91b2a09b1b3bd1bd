"""Arrays must stay arrays: which channels have to keep equal counts.

Where a view lays channels out as a rectangle (heads, groups of a convolution), every line of the rectangle keeps the
same number of channels, while each line may keep channels of its own. Along which dimension the lines run follows from
the view: the innermost one, wherever a permutation takes it.
"""

from __future__ import annotations

import numpy as np

from graphzip.analysis.propagate import Propagation
from graphzip.labels import Hashes, IntArray, Reason, Solution, mix, support
from graphzip.ops.site import Move

__all__ = ["Rectangles", "find_blocks"]


def find_blocks(solution: Solution, rectangles: Rectangles, signature: Hashes) -> tuple[IntArray, dict[int, Reason]]:
    """A block number per channel, and why channels cannot be merged where no blocks would do."""
    block = np.zeros(solution.count, dtype=np.int64)
    conflicts: dict[int, Reason] = {}
    for outer, inner, place in solution.containers:
        for channel in np.unique(outer).tolist():
            conflicts.setdefault(channel, Reason(None, "holds whole blocks of channels"))
        block = _refine(block, _sets(inner, place, solution.count))  # containers of one channel stay apart
    for _, classes, lines in rectangles.found:
        block = _refine(block, _sets(classes.ravel(), lines.ravel(), solution.count))
    for classes, lines in rectangles.normed:
        block = _refine(block, _sets(classes.ravel(), lines.ravel(), solution.count))
    for classes, lines in rectangles.normed:
        if not _even(classes, lines, signature, block):
            block = _cut_alike(block, np.unique(classes), signature)
    for subject, labels, _ in rectangles.torn:
        for channel in np.unique(rectangles.classes(labels)).tolist():
            conflicts.setdefault(channel, subject.says("lays parts of different blocks side by side"))
    for subject, classes, lines in rectangles.found:
        if not _even(classes, lines, signature, block):
            for channel in np.unique(classes).tolist():
                conflicts.setdefault(
                    channel, subject.says("needs equal parts that different channel groups share unevenly")
                )
    return block, conflicts


class Rectangles:
    """Every rectangle of channels with its lines, and what does not keep lines together."""

    def __init__(self, propagation: Propagation, solution: Solution) -> None:
        self.solution = solution
        self.found: list[tuple[Reason, IntArray, IntArray]] = []
        self.normed: list[tuple[IntArray, IntArray]] = []
        self.torn: list[tuple[Reason, IntArray, IntArray]] = []
        self.lines: dict[int, IntArray] = {}
        self.next_line = 0
        self._seen: set[bytes] = set()
        self._held: list[IntArray] = []
        for subject, rows in propagation.blocks:
            lines = self._fresh(rows.shape[0])[:, None]
            self._add(subject, self.classes(rows), np.broadcast_to(lines, rows.shape))
        for rows in propagation.normed:
            lines = self._fresh(rows.shape[0])[:, None]
            self.normed.append((self.classes(rows), np.broadcast_to(lines, rows.shape)))
        for subject, move in propagation.named_moves():
            self._follow(subject, move)
        for node, axes in propagation.axes.items():
            for output in axes if isinstance(axes, list) else [axes]:
                for axis in output:
                    if node.op != "get_attr" and self._is_rectangle(axis):
                        self._add(Reason(node.name, f"node {node.name}"), self.classes(axis), self._lines_of(axis))

    def classes(self, axis: IntArray) -> IntArray:
        return self.solution.classes[axis]

    def interleaved(self) -> list[IntArray]:
        """Labels of what lays lines into each other, a row for each line.

        What stays of such lines is in order only where the same places stay in all of them.
        """
        rows = [_in_rows(labels, lines) for _, labels, lines in self.torn if len(support(labels)) <= 1]
        return [each for each in rows if each is not None and np.ptp(self.classes(each), axis=0).any()]

    def _fresh(self, count: int) -> IntArray:
        numbers = np.arange(self.next_line, self.next_line + count, dtype=np.int64)
        self.next_line += count
        return numbers

    def _is_rectangle(self, axis: IntArray) -> bool:
        return len(self._varying(axis)) > 1

    def _varying(self, axis: IntArray) -> list[int]:
        if len(support(axis)) < 2:
            return []
        classes = self.classes(axis)
        return [
            dim
            for dim in support(axis)
            if not np.array_equal(classes, np.broadcast_to(np.take(classes, [0], axis=dim), classes.shape))
        ]

    def _lines_of(self, axis: IntArray) -> IntArray:
        """The line of each position; along the innermost dimension where nothing else is known."""
        known = self.lines.get(id(axis))
        if known is None:
            known = self._lines_along(axis, self._varying(axis)[-1])
        return known

    def _numbers(self, source: IntArray, laid_out: bool) -> IntArray:
        """The lines of a source; one that has the same channels in every row has a line for each row."""
        if laid_out:
            return self._lines_of(source)
        varying = self._varying(source)
        shape = [1 if dim in varying or not varying else size for dim, size in enumerate(source.shape)]
        return np.broadcast_to(self._fresh(int(np.prod(shape))).reshape(shape), source.shape)

    def _lines_along(self, axis: IntArray, dim: int) -> IntArray:
        shape = [1 if d == dim else size for d, size in enumerate(axis.shape)]
        lines = np.broadcast_to(self._fresh(int(np.prod(shape))).reshape(shape), axis.shape)
        self.lines[id(axis)] = lines
        self._held.append(axis)
        return lines

    def _follow(self, subject: Reason, move: Move) -> None:
        """Give the result of a movement the lines of its sources, or new ones where a view makes a rectangle."""
        laid_out = [id(source) in self.lines or self._is_rectangle(source) for source in move.sources]
        if not any(laid_out):
            if self._is_rectangle(move.result):
                self._lines_along(move.result, self._innermost(move))
            return
        flat = np.concatenate(
            [
                self._numbers(source, source_laid_out).ravel()
                for source, source_laid_out in zip(move.sources, laid_out, strict=True)
            ]
        )
        lines = np.where(move.origin >= 0, flat[np.maximum(move.origin, 0)], -1)
        if self._keeps_together(move.result, lines):
            self.lines[id(move.result)] = lines
            self._held.append(move.result)
        elif self._is_rectangle(move.result) and self._splits_lines(move, lines):
            self._lines_along(move.result, self._innermost(move))
        elif (dim := self._joined_along(move, lines, flat)) is not None:
            self._lines_along(move.result, dim)
        else:
            self.torn.append((subject, move.result, lines))

    def _innermost(self, move: Move) -> int:
        """The dimension along which neighbours stood next to each other in the source."""
        dims = self._varying(move.result)
        steps = {dim: np.diff(move.origin, axis=dim) for dim in dims}
        return next((dim for dim in reversed(dims) if (steps[dim] == 1).all()), dims[-1])

    def _keeps_together(self, result: IntArray, lines: IntArray) -> bool:
        """Whether every line runs along one dimension of the result, or is a run of a flat result."""
        dims = support(result)
        if len(dims) <= 1:
            flat = lines.ravel()
            runs = 1 + int((flat[1:] != flat[:-1]).sum())
            return runs == np.unique(flat).size or self._one_class_each(result, lines)
        return any(np.array_equal(lines, np.broadcast_to(np.take(lines, [0], axis=dim), lines.shape)) for dim in dims)

    def _one_class_each(self, result: IntArray, lines: IntArray) -> bool:
        """Whether the lines hold the same channels at the same places, so that what stays is a rectangle anyway."""
        order = np.argsort(lines.ravel(), kind="stable")
        classes, numbers = self.classes(result).ravel()[order], lines.ravel()[order]
        count = np.unique(numbers).size
        if classes.size % count:
            return False
        rows = classes.reshape(count, -1)
        return bool((rows == rows[0]).all())

    def _splits_lines(self, move: Move, lines: IntArray) -> bool:
        """Whether a view cuts lines into equal parts, innermost dimension last."""
        dim = self._innermost(move)
        return np.array_equal(lines, np.broadcast_to(np.take(lines, [0], axis=dim), lines.shape))

    def _joined_along(self, move: Move, lines: IntArray, sources: IntArray) -> int | None:
        """The dimension along which whole lines of the sources stand behind each other, the same ones in every row."""
        names, sizes = np.unique(sources, return_counts=True)
        starts = np.cumsum([source.size for source in move.sources])
        operand = np.searchsorted(starts, move.origin, side="right")
        for dim in support(move.result):
            rows = np.moveaxis(lines, dim, -1).reshape(-1, lines.shape[dim])
            kinds = np.moveaxis(operand, dim, -1).reshape(rows.shape)
            if (kinds == kinds[0]).all() and all(_whole_runs(row, names, sizes) for row in rows):
                return dim
        return None

    def _add(self, subject: Reason, classes: IntArray, lines: IntArray) -> None:
        key = classes.tobytes() + lines.tobytes()
        if key not in self._seen:
            self._seen.add(key)
            self.found.append((subject, classes, lines))


def _whole_runs(row: IntArray, names: IntArray, sizes: IntArray) -> bool:
    """Whether a row is made of lines that stand behind each other, each of them whole and there once."""
    starts = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    found, lengths = row[starts], np.diff(np.r_[starts, row.size])
    known = np.isin(found, names)
    return bool(
        known.all() and np.unique(found).size == found.size and (sizes[np.searchsorted(names, found)] == lengths).all()
    )


def _in_rows(labels: IntArray, lines: IntArray) -> IntArray | None:
    """The labels of each line in a row of its own; none where the lines differ in length, or some belong to none."""
    numbers, counts = np.unique(lines, return_counts=True)
    if numbers[0] < 0 or (counts != counts[0]).any():
        return None
    order = np.argsort(lines.ravel(), kind="stable")
    rows: IntArray = labels.ravel()[order].reshape(numbers.size, -1)
    return rows


def _sets(members: IntArray, keys: IntArray, count: int) -> Hashes:
    """For each channel a hash of the keys it occurs with, and how often with each; 0 where it does not occur."""
    pairs, times = np.unique(np.stack([members.ravel(), keys.ravel()]), axis=1, return_counts=True)
    result = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(result, pairs[0], mix(pairs[1], times))
    return result


def _refine(block: IntArray, keys: Hashes) -> IntArray:
    """Split blocks so that channels with different keys are apart; channels without a key stay where they are."""
    touched = np.flatnonzero(keys)
    if not touched.size:
        return block
    _, parts = np.unique(mix(block[touched], keys[touched].view(np.int64)), return_inverse=True)
    refined: IntArray = block.copy()
    refined[touched] = block.max() + 1 + parts.reshape(-1)
    return refined


def _cut_alike(block: IntArray, channels: IntArray, signature: Hashes) -> IntArray:
    """Blocks of one size for every group: those of different sizes are cut into runs that all of them can hold.

    A norm weighs what stays of its groups, so they need not keep equal counts; but no cluster reaches over two of them.
    """
    cut: IntArray = block.copy()
    for key in np.unique(signature[channels]):
        members = np.flatnonzero(signature == key)
        members = members[np.argsort(block[members], kind="stable")]
        _, number, counts = np.unique(block[members], return_inverse=True, return_counts=True)
        place = np.arange(members.size) - (np.cumsum(counts) - counts)[number]
        _, part = np.unique(mix(number, place // np.gcd.reduce(counts)), return_inverse=True)
        cut[members] = cut.max() + 1 + part
    return cut


def _even(classes: IntArray, lines: IntArray, signature: Hashes, block: IntArray) -> bool:
    """Every line holds the same number of blocks, of the same sizes, of every group."""
    group = np.unique(signature[classes.ravel()], return_inverse=True)[1].reshape(-1)
    line = np.unique(lines.ravel(), return_inverse=True)[1].reshape(-1)
    table = np.zeros((line.max() + 1, group.max() + 1), dtype=np.int64)
    np.add.at(table, (line, group), 1)
    parts = np.zeros_like(table)
    triples = np.unique(np.stack([line, group, block[classes.ravel()]]), axis=1)
    np.add.at(parts, (triples[0], triples[1]), 1)
    return bool((table == table[0]).all() and (parts == parts[0]).all())
