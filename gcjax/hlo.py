"""What a compiled step really sends, beside what it declares.

Three texts describe a step's collectives: the jaxpr, as the step was written, with the
named scopes in which `collectives` declares what it counts; the compiled program, whose
compiler may have widened types, combined, added or dropped collectives; and the bits
that `Info.words` reports. `wire_report` reads the first two, and so checks the third.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from gcjax import network

_KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
_OP = re.compile(rf"({'|'.join(sorted(set(_KINDS.values())))})(-start)?$")
_SCOPE = re.compile(r"gcjax:([^:/()]+):words=(\d+)")
_BRANCH = re.compile(r"\bbranch_(\d+)_fun\b")


class Branch(NamedTuple):
    """A branch of one of the step's conditionals."""

    switch: int  # number of the conditional, in the order of the program
    index: int
    count: int  # how many branches there are


class Collective(NamedTuple):
    """One collective of a step: as it was written, and as it was compiled."""

    name: str  # what it was declared as; "" if it was not
    where: tuple[Branch, ...]  # () where every step comes by
    kind: str  # "all-gather", "all-reduce", ...
    operand: str  # compiled type and shape of one worker's part, e.g. "u32[2,54]"
    num_workers: int
    times: int | None  # in one step; None in a loop of unknown length
    declared_bytes: int | None  # that one worker contributes, each time
    compiled_bytes: int  # the same in the compiled program; 0 if it vanished
    sent_bytes: float  # that one worker sends by the usual algorithm, each time
    op: str  # its name in the compiled program; combined ones share it
    problem: str  # "" if all is as declared


class WireReport(NamedTuple):
    """All collectives of a step; `str` makes a table of it."""

    rows: tuple[Collective, ...]
    # Collectives on the longest path through the branches; a combined one counts once,
    # and a loop of unknown length as one turn.
    collectives_per_step: int
    sent_bytes_per_step: float  # by one worker, on the path that sends most

    @property
    def mismatches(self) -> tuple[Collective, ...]:
        """The rows with a problem."""
        return tuple(row for row in self.rows if row.problem)

    @property
    def totals(self) -> dict[tuple[Branch, ...], tuple[int, int, float]]:
        """For every path: bytes declared, bytes compiled and bytes sent by a worker.

        A path is where some collective stands; its total holds that branch's
        collectives and those outside of it that the step passes on the way.
        """
        paths = sorted({row.where for row in self.rows}, key=lambda p: (len(p), p))
        out = {}
        for path in paths:
            met = [r for r in self.rows if r.where == path[: len(r.where)]]
            times = [r.times or 1 for r in met]
            parts = [
                (r.declared_bytes or 0, r.compiled_bytes, r.sent_bytes) for r in met
            ]
            scaled = [[t * x for x in p] for t, p in zip(times, parts, strict=True)]
            out[path] = tuple(sum(column) for column in zip(*scaled, strict=True))
        return out

    def __str__(self) -> str:
        if not self.rows:
            return "no collectives: this step sends nothing"
        head = ("collective", "where", "kind", "operand", "times")
        head += ("declared B", "compiled B", "sent B", "")
        lines = [head, *(_line(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (True, True, True, True, False, False, False, False, True)
        table = [
            "  ".join(
                c.ljust(w) if is_left else c.rjust(w)
                for c, w, is_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        ]
        workers = max(row.num_workers for row in self.rows)
        table += [
            "",
            f"{self.collectives_per_step} collectives a step at most; a worker of "
            f"{workers} sends at most {self.sent_bytes_per_step:,.0f} bytes; "
            f"{len(self.mismatches)} mismatches",
            "",
            "path: declared, compiled and sent bytes of a step",
        ]
        for path, (declared, compiled, sent) in self.totals.items():
            table.append(
                f"  {_place(path) or 'every step'}: {declared:,}, {compiled:,}, "
                f"{sent:,.0f}"
            )
        return "\n".join(table)


def wire_report(step: Callable, *args: Any) -> WireReport:
    """Compiles a step and lists its collectives, declared beside compiled.

    Collectives of gcjax declare their words in a named scope, the number that
    `Info.words` counts. Reported as problems: bytes that differ from it, such as bf16
    widened to float32 by the backend; a collective that nobody declared, a user's own
    or the compiler's; one that was declared and is not in the program.

    Args:
      step: A function over workers on a device mesh (`over_workers` with a mesh,
        `jax.shard_map`), jitted or not.
      *args: Its arguments, arrays or `jax.ShapeDtypeStruct`s; nothing is executed.

    Raises:
      ValueError: if the step's workers are simulated, and so send nothing.
    Note: The compiler may combine several all-reduces into one and keep the name of
      one of them only; they are told apart by their sizes. An all-gather's part, an
      all-reduce's or all-to-all's buffer is what a worker *contributes*; it *sends*
      that times `network.sent_bytes`' factor.
    """
    traced = (step if hasattr(step, "trace") else jax.jit(step)).trace(*args)
    written = list(_written(traced.jaxpr.jaxpr, {}))
    if not written and _mentions(traced.jaxpr.jaxpr):
        raise ValueError(
            "wire_report: this step sends nothing, its workers are simulated by "
            "jax.vmap; build it with over_workers(..., mesh=mesh)"
        )
    ops = compiled(traced.lower().compile().as_text())
    rows = tuple(_match(written, ops))
    times = {op.name: op.times or 1 for op in ops}
    sent = defaultdict(float)
    for row in rows:
        sent[row.op] += row.sent_bytes
    return WireReport(
        rows,
        _longest(ops, lambda op: times[op.name]),
        _longest(ops, lambda op: times[op.name] * sent[op.name]),
    )


# --- The step as it was written. ------------------------------------------------------


class _Written(NamedTuple):
    kind: str
    name: str
    words: int | None  # declared; None if it is not
    dtype: str
    elements: int
    num_workers: int
    where: tuple[Branch, ...]
    times: int | None


def _written(jaxpr: core.Jaxpr, axes: dict[str, int]) -> Iterator[_Written]:
    """The collectives of a jaxpr, in order; `axes` are the mesh axes around it."""
    switches = iter(range(10**9))

    def walk(jaxpr, axes, scope, where, times) -> Iterator[_Written]:
        for eqn in jaxpr.eqns:
            inner = f"{scope}/{eqn.source_info.name_stack}"
            if kind := _KINDS.get(eqn.primitive.name):
                yield from _operands(eqn, kind, axes, inner, where, times)
            elif eqn.primitive.name == "cond":
                switch, branches = next(switches), eqn.params["branches"]
                for i, branch in enumerate(branches):
                    at = (*where, Branch(switch, i, len(branches)))
                    yield from walk(branch.jaxpr, axes, inner, at, times)
            else:
                turns = {"scan": eqn.params.get("length"), "while": None}
                more = turns.get(eqn.primitive.name, 1)
                total = times * more if times is not None and more is not None else None
                mesh = eqn.params.get("mesh")
                around = axes | dict(mesh.shape) if mesh is not None else axes
                for sub in subjaxprs(eqn):
                    yield from walk(sub, around, inner, where, total)

    yield from walk(jaxpr, axes, "", (), 1)


def _operands(eqn, kind, axes, scope, where, times) -> Iterator[_Written]:
    named = eqn.params.get("axes", eqn.params.get("axis_name"))
    named = named if isinstance(named, tuple | list) else (named,)
    named = [a for a in named if a in axes]
    groups = eqn.params.get("axis_index_groups")
    size = len(groups[0]) if groups else math.prod(axes[a] for a in named)
    found = _SCOPE.findall(scope)
    name, words = (found[-1][0], int(found[-1][1])) if found else ("", None)
    for x in eqn.invars if named else ():
        dtype, elements = x.aval.dtype.name, math.prod(x.aval.shape)
        yield _Written(kind, name, words, dtype, elements, size, where, times)


def subjaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _mentions(jaxpr: core.Jaxpr) -> bool:
    """Whether anything in a jaxpr stands within the scope of a declared collective."""
    return any(
        _SCOPE.search(str(eqn.source_info.name_stack))
        or any(_mentions(sub) for sub in subjaxprs(eqn))
        for eqn in jaxpr.eqns
    )


# --- The step as it was compiled. -----------------------------------------------------


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str  # attributes


class _Operand(NamedTuple):
    text: str  # e.g. "f32[8,3]"
    elements: int
    num_bytes: int


class _Op(NamedTuple):
    """A collective of the compiled program."""

    name: str
    kind: str
    operands: list[_Operand]
    num_workers: int | None  # None where the text does not tell
    scope: tuple[str, int] | None  # declared name and words
    branches: tuple[int, ...]  # as the program was written
    where: tuple[tuple[str, int], ...]  # conditionals and branches of this program
    times: int | None


def compiled(text: str) -> list[_Op]:
    """The collectives of an HLO module's text."""
    computations, entry = _parse(text)
    devices = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:100_000])
    everyone = max(map(int, devices), default=1)

    def walk(name: str, place, times) -> Iterator[_Op]:
        shapes = {i.name: i.shape for i in computations[name]}
        for i in computations[name]:
            if found := _OP.match(i.op):
                yield _collective(i, found[1], shapes, everyone, place, times)
                continue
            calls, turns = _calls(i), times
            if i.op == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', i.rest)
                turns = times * int(trips[1]) if times and trips else None
            for number, callee in enumerate(calls):
                at = place
                if i.op == "conditional":
                    at = (*place, (f"{name}/{i.name}", number))
                yield from walk(callee, at, turns)

    return list(walk(entry, (), 1))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Splits an HLO module's text into computations; also the entry's name."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            shape, after = _take_shape(found[2])
            if called := re.match(r"([\w\-]+)\((.*)", after):
                inside, rest = _take_parenthesis("(" + called[2])
                operands = re.findall(r"%([\w.\-]+)", inside)
                current.append(_Instruction(found[1], shape, called[1], operands, rest))
    return computations, entry


def _take_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, after = text.partition(" ")
        return shape, after
    shape, after = _take_parenthesis(text)
    return shape, after.lstrip()


def _take_parenthesis(text: str) -> tuple[str, str]:
    """Splits a text that begins with "(" behind the ")" that belongs to it."""
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return text[: at + 1], text[at + 1 :]
    return text, ""


def _calls(i: _Instruction) -> list[str]:
    """Computations that an instruction runs; branches in their order."""
    if i.op == "conditional":
        if found := re.search(r"branch_computations=\{([^}]*)\}", i.rest):
            return re.findall(r"%?([\w.\-]+)", found[1])
        pair = re.search(r"true_computation=%?([\w.\-]+)", i.rest)
        other = re.search(r"false_computation=%?([\w.\-]+)", i.rest)
        return [other[1], pair[1]]
    names = {"while": "body", "call": "to_apply", "async-start": "calls"}
    key = names.get(i.op, "calls" if i.op == "fusion" else None)
    found = key and re.search(rf"\b{key}=%?([\w.\-]+)", i.rest)
    return [found[1]] if found else []


def _collective(i: _Instruction, kind, shapes, everyone, place, times) -> _Op:
    operands = [x for name in i.operands for x in _arrays(shapes.get(name, ""))]
    label = re.search(r'op_name="((?:[^"\\]|\\.)*)"', i.rest)
    scopes = _SCOPE.findall(label[1] if label else "")
    return _Op(
        name="/".join([*(f"{c}:{b}" for c, b in place), i.name]),
        kind=kind,
        operands=operands,
        num_workers=_group_size(i.rest, everyone),
        scope=(scopes[-1][0], int(scopes[-1][1])) if scopes else None,
        branches=tuple(map(int, _BRANCH.findall(label[1] if label else ""))),
        where=place,
        times=times,
    )


def _arrays(shape: str) -> list[_Operand]:
    """The arrays of a shape, which may be a tuple."""
    out = []
    for dtype, dims in re.findall(r"\b([a-z]+[0-9]*\w*)\[([\d,]*)\]", shape):
        elements = math.prod(int(d) for d in dims.split(",") if d)
        width = re.match(r"[a-z]+(\d+)", dtype)
        bits = int(width[1]) if width else 8  # pred
        size = -(-elements * bits // 8)
        out.append(_Operand(f"{dtype}[{dims}]", elements, size))
    return out


def _group_size(rest: str, everyone: int) -> int | None:
    """Workers in a group, from any of the syntaxes of `replica_groups`."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = {a: int(n) for a, n in re.findall(r"'([^']*)'=(\d+)", found[1])}
        named = re.findall(r"'([^']*)'", found[2])
        return math.prod(sizes[a] for a in named) if set(named) <= set(sizes) else None
    return everyone if "replica_groups={}" in rest else None


# --- Both side by side. ---------------------------------------------------------------


def _match(written: list[_Written], ops: list[_Op]) -> Iterator[Collective]:
    """Rows in the order of the program as written, then what the compiler added."""
    free = dict(enumerate(written))
    parts = [part for op in ops for part in _parts(op)]
    found: dict[int, tuple[_Op, list[_Operand]]] = {}
    # From the strictest to the loosest: what a part of a compiled collective may be.
    for rule in (_same_scope_and_size, _same_scope, _same_size, _same_declaration):
        rest = []
        for op, operands in parts:
            at = next((k for k, w in free.items() if rule(w, op, operands)), None)
            if at is None:
                rest.append((op, operands))
            else:
                found[at] = op, operands
                del free[at]
        parts = rest
    for k, w in enumerate(written):
        if k in found:
            yield _row(w, *found[k])
        elif w.num_workers > 1 and w.elements:
            yield _row(w, None, [])
    for op, operands in parts:
        if (op.num_workers or 2) > 1:
            yield _row(None, op, operands)


def _parts(op: _Op) -> list[tuple[_Op, list[_Operand]]]:
    """One entry per array that was written; all-to-all has one operand per worker."""
    if op.kind == "all-to-all" or len(op.operands) < 2:
        return [(op, op.operands)]
    return [(op, [x]) for x in op.operands]


def _alike(w: _Written, op: _Op) -> bool:
    return w.kind == op.kind and tuple(b.index for b in w.where) == op.branches


def _same_scope_and_size(w: _Written, op: _Op, operands: list[_Operand]) -> bool:
    return _same_scope(w, op, operands) and _same_size(w, op, operands)


def _same_scope(w: _Written, op: _Op, operands: list[_Operand]) -> bool:
    if not _alike(w, op) or len(op.operands) != len(operands):
        return False  # of combined ones only one has kept its scope
    return op.scope is not None and op.scope == (w.name, w.words)


def _same_size(w: _Written, op: _Op, operands: list[_Operand]) -> bool:
    return _alike(w, op) and w.elements == sum(x.elements for x in operands)


def _same_declaration(w: _Written, op: _Op, operands: list[_Operand]) -> bool:
    """Compiled to another kind of collective, or moved out of its branch."""
    del operands
    return op.scope is not None and op.scope == (w.name, w.words)


def _row(w: _Written | None, op: _Op | None, operands: list[_Operand]) -> Collective:
    num_bytes = sum(x.num_bytes for x in operands)
    kind = op.kind if op else w.kind
    workers = (op and op.num_workers) or (w.num_workers if w else 1)
    return Collective(
        name=w.name if w else "",
        where=w.where if w else tuple(Branch(-1, b, 0) for b in op.branches),
        kind=kind,
        operand=_short(operands),
        num_workers=workers,
        times=w.times if w else op.times,
        declared_bytes=4 * w.words if w and w.words is not None else None,
        compiled_bytes=num_bytes,
        sent_bytes=network.sent_bytes(kind, num_bytes, workers),
        op=op.name if op else "",
        problem=_problem(w, op, operands, num_bytes),
    )


def _problem(w: _Written | None, op: _Op | None, operands, num_bytes: int) -> str:
    if w is None:
        return "added by the compiler"
    if op is None:
        return "not in the compiled program"
    problems = [] if w.words is not None else ["not declared"]
    if w.kind != op.kind:
        problems.append(f"written as {w.kind}")
    # A declaration is in whole words.
    expected = w.words if w.words is not None else -(-_bytes(w) // 4)
    if -(-num_bytes // 4) != expected:
        compiled = operands[0].text.split("[")[0] if operands else "nothing"
        what = "declared" if w.words is not None else "written"
        problems.append(
            f"{num_bytes} bytes of {compiled}, {4 * expected} {what} ({w.dtype})"
        )
    return ", ".join(problems)


def _bytes(w: _Written) -> int:
    return w.elements * jax.numpy.dtype(w.dtype).itemsize


def _longest(ops: Iterable[_Op], cost: Callable[[_Op], float], depth: int = 0) -> Any:
    """Cost of the path through all conditionals that costs most."""
    total, below = 0, defaultdict(lambda: defaultdict(list))
    for op in ops:
        if len(op.where) == depth:
            total += cost(op)
        else:
            conditional, branch = op.where[depth]
            below[conditional][branch].append(op)
    for branches in below.values():
        total += max(_longest(b, cost, depth + 1) for b in branches.values())
    return total


def _short(operands: list[_Operand]) -> str:
    texts = [x.text for x in operands]
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"{len(texts)} x {texts[0]}"
    return " + ".join(texts)


def _place(where: tuple[Branch, ...]) -> str:
    return ", ".join(
        f"switch {b.switch} branch {b.index}" + (f"/{b.count}" if b.count else "")
        if b.switch >= 0
        else f"branch {b.index}"
        for b in where
    )


def _line(row: Collective) -> tuple[str, ...]:
    declared = "-" if row.declared_bytes is None else f"{row.declared_bytes:,}"
    return (
        row.name or "?",
        _place(row.where),
        row.kind,
        row.operand,
        "loop" if row.times is None else str(row.times),
        declared,
        f"{row.compiled_bytes:,}",
        f"{row.sent_bytes:,.0f}",
        row.problem,
    )
