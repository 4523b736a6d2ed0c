"""What a compiled program exchanges between devices, and which kernels it calls: read from the text of its HLO.

XLA's own cost analysis counts the body of a loop once. Here each instruction counts as often as its loops run.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
# How often a device sends its share of the array: in a ring of n devices a share is 1/n of it, sent n - 1 times.
_PASSES = {"all-reduce": 2.0}
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        kind: one of :data:`KINDS`.
        count: how often a run of the program does it.
        n_bytes: size of the whole array that is exchanged once: what an all-gather makes, a reduce-scatter takes.
        groups: devices that exchange with each other, by their place in the mesh; a permutation has pairs.
        source: operation of the model that it belongs to, as JAX names it.
    """

    kind: str
    count: float
    n_bytes: float
    groups: tuple[tuple[int, ...], ...]
    source: str = ""

    @property
    def group_size(self) -> int:
        return max(map(len, self.groups), default=1)

    @property
    def sent(self) -> float:
        """The bytes that each device sends in all of them."""
        return self.count * sent_bytes(self.kind, self.n_bytes, self.group_size)


def sent_bytes(kind: str, n_bytes: float, n_devices: int) -> float:
    """Return the bytes that each of ``n_devices`` sends in a collective on an array of ``n_bytes``, the least possible.

    Source: Chan et al. 2007, "Collective communication: theory, practice, and experience".
    """
    if kind.startswith("collective-"):
        return n_bytes
    return _PASSES.get(kind, 1.0) * n_bytes * (n_devices - 1) / n_devices


def find_collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled program (``compiled.as_text()``), the largest first."""
    module = _read(text)
    partitions = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
    n_devices = int(partitions[1]) if partitions else 1
    chains: set[str] = set()

    def collective(call: _Call) -> Collective | None:
        kind = call.opcode.removesuffix("-start")
        if kind not in KINDS:
            return None
        # A TPU starts, continues and ends a collective in several fusions, each with a copy of the instruction.
        if chain := re.search(r"channel_id=(\d+),.*\bchain_id=", call.rest):
            if chain[1] in chains:
                return None
            chains.add(chain[1])
        groups = _groups(call.rest, n_devices)
        size = max(map(len, groups), default=1)
        n_bytes = _whole_bytes(kind, call, size)
        if kind == "all-reduce" and call.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's fusion of an all-reduce and the slice of its result
        source = re.search(r'op_name="([^"]*)"', call.rest)
        return Collective(kind, 1, n_bytes, groups, source[1] if source else "")

    found = [dataclasses.replace(one, count=count) for one, count in _found(module, collective) if one.group_size > 1]
    return sorted(found, key=lambda one: one.sent, reverse=True)


def find_kernels(text: str) -> dict[str, int]:
    """Return the kernels that a program calls beside XLA's own code, and how often a run calls each.

    Flash attention is ``splash`` on a TPU and ``cudnn attention`` on a GPU, backward passes apart.
    """
    counts: collections.Counter[str] = collections.Counter()
    for name, count in _found(_read(text), _kernel):
        counts[name] += round(count)
    return dict(sorted(counts.items()))


# --- The text of a module ---


class _Call(NamedTuple):
    """An instruction: ``name = shape opcode(operands), attributes``."""

    computation: str  # that it is in
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def _kernel(call: _Call) -> str | None:
    """Return what a custom call is called in the field; None for one that computes nothing of its own."""
    target = next(iter(re.findall(r'custom_call_target="([^"]+)"', call.rest)), "")
    if target == "tpu_custom_call":
        names = f"{call.name} {call.rest}".lower()
        if "splash" not in names:
            return "Pallas kernel"
        return "splash attention" + (" backward" if re.search(r"dkv|dq|transpose\(", names) else "")
    if "fmha" in target:
        return "cudnn attention" + (" backward" if target.endswith("Backward") else "")
    for part, name in (("cublas", "cublas matmul"), ("cudnn", "cudnn"), ("triton", "triton kernel")):
        if part in target:
            return name
    return None


_Module = dict[str, list[_Call]]  # the instructions of each computation; the first program's is "ENTRY"


def _read(text: str) -> _Module:
    module: _Module = {}
    current = ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            shape, opcode, rest = _split(match[2])
            module[current].append(_Call(current, match[1], shape, opcode, rest))
        elif match := _HEADER.match(line):
            current = "ENTRY" if match[1] else match[2]
            module[current] = []
    return module


def _split(text: str) -> tuple[str, str, str]:
    """Split ``shape opcode(rest`` where the shape may be a tuple, with parentheses in its layouts."""
    end = text.find(" ")
    if text.startswith("("):
        depths = itertools.accumulate((letter == "(") - (letter == ")") for letter in text)
        end = next(place for place, depth in enumerate(depths, 1) if depth == 0)
    opcode, _, rest = text[end:].strip().partition("(")
    return text[:end], opcode, rest


def _found(module: _Module, find: Callable[[_Call], Any]) -> Iterator[tuple[Any, float]]:
    """Yield what ``find`` returns of each instruction that runs (unless it is None), and how often it runs."""

    @functools.cache
    def inside(computation: str) -> tuple[tuple[Any, float], ...]:
        found: list[tuple[Any, float]] = []
        for call in module.get(computation, ()):
            if (one := find(call)) is not None:
                found.append((one, 1.0))
            times = _trips(module, call) if call.opcode == "while" else 1.0
            for callee in _callees(call):
                found += [(one, count * times) for one, count in inside(callee)]
        return tuple(found)

    yield from inside("ENTRY")


def _callees(call: _Call) -> list[str]:
    if call.opcode in ("async-update", "async-done"):  # they name the computation that async-start runs
        return []
    lists = re.findall(
        r"\b(?:calls|to_apply|body|branch_computations|called_computations|true_computation|false_computation)="
        r"(\{[^}]*\}|%?[\w.\-]+)",
        call.rest,
    )
    return [name for names in lists for name in re.findall(r"[\w.\-]+", names)]


def _trips(module: _Module, call: _Call) -> float:
    """Return how often the body of a loop runs: as XLA noted it, else up to the number that its condition compares."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', call.rest):
        return float(known[1])
    parts = re.search(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)", call.rest)
    condition, body = (module.get(name, []) for name in parts.groups()) if parts else ([], [])
    limit = max(filter(None, map(_constant, condition)), default=1)
    return float(math.ceil(limit / _increment(condition, body)))


def _increment(condition: list[_Call], body: list[_Call]) -> int:
    """Return what an iteration adds to the counter that the condition compares; XLA unrolls loops in twos, too."""
    counter = next((m for c in condition if c.opcode == "get-tuple-element" and (m := _INDEX.search(c.rest))), None)
    if counter is None or not body:
        return 1
    calls = {c.name: c for c in body}
    results = _operands(body[-1])
    last = calls.get(results[int(counter[1])]) if int(counter[1]) < len(results) else None
    if last is None or last.opcode != "add":
        return 1
    return next((n for name in _operands(last) if name in calls and (n := _constant(calls[name]))), 1)


_INDEX = re.compile(r"index=(\d+)")


def _operands(call: _Call) -> list[str]:
    return re.findall(r"%([\w.\-]+)", call.rest.partition(")")[0])


def _constant(call: _Call) -> int | None:
    number = re.match(r"(\d+)\)", call.rest) if call.opcode == "constant" else None
    return int(number[1]) if number else None


def _whole_bytes(kind: str, call: _Call, group_size: int) -> float:
    """Return the bytes of the whole array, from the shape of the result (and operand, of a start) of one device."""
    n_bytes = shape_bytes(call.shape)
    starts = call.opcode.endswith("-start")
    if kind in ("all-gather", "reduce-scatter") and starts:  # the whole, and a device's part of it
        return n_bytes * group_size / (group_size + 1)
    if kind == "reduce-scatter":
        return n_bytes * group_size
    return n_bytes / 2 if starts and kind != "all-reduce" else n_bytes


def shape_bytes(shape: str) -> int:
    """Return the bytes of a shape such as ``bf16[8,128]{1,0}``, or of all in a tuple."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total


def _groups(text: str, n_devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the groups of a collective: lists, a reshaped and transposed range of all devices, or axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _lists(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _lists(listed[1])
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = _numbers(tiled[1]), _numbers(tiled[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if tiled[3]:
            ids = ids.transpose(_numbers(tiled[3]))
        return tuple(map(tuple, ids.reshape(shape).tolist()))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}(]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        order = [*(name for name in sizes if name not in along), *along]
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        ids = ids.transpose([list(sizes).index(name) for name in order])
        return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[name] for name in along)).tolist()))
    return (tuple(range(n_devices)),)


def _lists(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
