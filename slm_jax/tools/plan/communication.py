"""What the devices of a training step send to each other, from closed formulas, and how long that takes at least.

Per device and step of ``A`` micro-batches, with the mesh's axes as in :mod:`slm_jax.training.sharding` (N numbers of a
leaf, c = bytes of a number in ``dtype``, T tokens of a micro-batch on a device, E = embed, L = layers):

=========================================  ==============  ===================  =================================
what                                       collective      along                bytes of the array, times
=========================================  ==============  ===================  =================================
weights, split along fsdp                  all-gather      fsdp                 N c, A; of a block 2 A (both passes)
their gradients                            reduce-scatter  fsdp                 N c, A
gradients of copies                        all-reduce      replica, data        N c / fsdp, 1
gradients of weights that are whole        all-reduce      all that split rows  N c, 1
outputs of attention and MLP               all-reduce      tensor               T E c, 4 A L (5 A L with remat full)
=========================================  ==============  ===================  =================================

The gradient of the head's kernel is float32, unless micro-batches are summed first; a head that is tied to the token
embedding adds a gather and a gradient to those of the lookup. On most TPU slices an all-reduce replaces the
reduce-scatter (:meth:`slm_jax.tools.plan.cluster.Cluster.scatters`). A ring of n devices sends (n - 1) / n of the
array in an all-gather or a reduce-scatter, twice that in an all-reduce. ``slm-jax plan --compile`` counts what XLA's
compilers make of the same step.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from slm_jax.nn.axes import Axes, find_axes
from slm_jax.nn.sharding import COPIES, ROWS, param_spec
from slm_jax.tools.plan.cluster import Cluster
from slm_jax.tools.plan.hlo import Collective, sent_bytes
from slm_jax.tools.plan.memory_model import Work
from slm_jax.training.hardware import Device
from slm_jax.training.task import Parameters


class Wires(NamedTuple):
    """Seconds that a device needs to send over its links, and over the network; both can happen at the same time."""

    links: float
    network: float


def wire_seconds(device: Device, kind: str, n_bytes: float, size: int, spans: int) -> Wires:
    """Return the least times of a collective on an array of ``n_bytes`` by ``size`` devices in ``spans`` domains.

    A domain is a host of GPUs or a slice of TPUs. Between domains each device sends its own part of the array, while
    the links inside carry the other parts.
    """
    if kind.startswith("collective-"):
        return Wires(0.0, n_bytes / device.network) if spans > 1 else Wires(n_bytes / device.link, 0.0)
    inside = max(1, size // spans)
    links = sent_bytes(kind, n_bytes, inside) / device.link
    return Wires(links, sent_bytes(kind, n_bytes / inside, spans) / device.network)


def least_seconds(times: Iterable[Wires]) -> float:
    """Return the least time of several exchanges."""
    times = list(times)
    return max(sum(one.links for one in times), sum(one.network for one in times))


def compiled_seconds(device: Device, collectives: Sequence[Collective], mesh: Mesh) -> float:
    """Return the least time of the collectives of a program that is compiled for a mesh."""
    of_host = device.platform == "gpu"
    domains = [one.process_index if of_host else getattr(one, "slice_index", 0) for one in mesh.devices.flat]

    def times(one: Collective) -> Wires:
        spans = max(len({domains[i] for i in group}) for group in one.groups)
        return Wires(*(one.count * t for t in wire_seconds(device, one.kind, one.n_bytes, one.group_size, spans)))

    return least_seconds(map(times, collectives))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind in a training step.

    Attributes:
        what: what is exchanged, for people.
        kind: one of :data:`slm_jax.tools.plan.hlo.KINDS`.
        axes: axes of the mesh along which devices exchange.
        n_bytes: size of the arrays, all together, of one device's group.
        size, spans: devices of a group, and the hosts (of GPUs) or slices (of TPUs) that they are in.
        sent: bytes that each device sends.
        wires: the least times that it takes.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    n_bytes: float
    size: int
    spans: int
    sent: float
    wires: Wires


def step_exchanges(
    work: Work, params: Parameters, sizes: Mapping[str, int], cluster: Cluster, device: Device
) -> list[Exchange]:
    """Return what a training step exchanges, by the table above; ``sizes``: of the mesh's axes, the outermost first."""
    parts: dict[tuple[str, str, tuple[str, ...]], float] = {}
    for what, kind, axes, n_bytes in itertools.chain(_of_parameters(work, params, sizes), _of_activations(work)):
        if kind == "reduce-scatter" and not cluster.scatters(sizes["fsdp"]):
            kind = "all-reduce"
        parts[what, kind, axes] = parts.get((what, kind, axes), 0.0) + n_bytes
    found = []
    for (what, kind, axes), n_bytes in parts.items():
        size, spans = math.prod(sizes.get(axis, 1) for axis in axes), _spans(sizes, axes, cluster.domain)
        if size > 1 and n_bytes:
            wires = wire_seconds(device, kind, n_bytes, size, spans)
            found.append(Exchange(what, kind, axes, n_bytes, size, spans, sent_bytes(kind, n_bytes, size), wires))
    return found


_Part = tuple[str, str, tuple[str, ...], float]


def _of_parameters(work: Work, params: Parameters, sizes: Mapping[str, int]) -> Iterator[_Part]:
    for tree, trained in ((params.trainable, True), (params.frozen, False)):
        for path, leaf in flatten_dict(tree, sep="/").items():
            axes = find_axes(path)
            split = {name for name in param_spec(axes, leaf.shape, sizes) if name}
            numbers = leaf.size / math.prod(sizes[axis] for axis in split if axis != "fsdp")
            gathered, gradient = _itemsizes(work, axes, trained)
            summed = gradient
            if work.accumulate > 1:
                summed = 2 if work.cfg.dtype == "bfloat16" else leaf.dtype.itemsize
            if "fsdp" in split:
                yield "weights", "all-gather", ("fsdp",), work.accumulate * numbers * gathered
            if trained and "fsdp" in split:
                yield "gradients", "reduce-scatter", ("fsdp",), work.accumulate * numbers * gradient
                yield "gradients of other copies", "all-reduce", COPIES, numbers * summed / sizes["fsdp"]
            elif trained:
                yield "gradients", "all-reduce", ROWS, numbers * summed


def _itemsizes(work: Work, axes: Axes | None, trained: bool) -> tuple[int, int]:
    """Return the bytes in which a micro-batch gathers a number of a leaf, in all, and exchanges its gradient."""
    c = work.itemsize
    if axes is None:
        return c, c
    if axes.is_head:
        return c, 4
    if axes.is_table and "vocab" in axes.inputs and work.cfg.tie_weights:
        return 2 * c, c + 4
    if not (axes.stack and trained):
        return c, c
    # With model.remat full queries, keys and values are projected in a part of the block that is recomputed.
    is_projection = axes.inputs and axes.outputs[0] in ("heads", "kv_heads")
    return (3 * c if work.remat == "full" and is_projection else 2 * c), c


def _of_activations(work: Work) -> Iterator[_Part]:
    n_bytes = work.tokens * work.sizes["embed"] * work.itemsize
    per_layer = 5 if work.remat == "full" else 4
    yield "activations", "all-reduce", ("tensor",), per_layer * work.sizes["layers"] * work.accumulate * n_bytes


def _spans(sizes: Mapping[str, int], axes: Sequence[str], domain: int) -> int:
    """Return the number of domains that the devices of a group along ``axes`` are in."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    group = ids[tuple(slice(None) if axis in axes else 0 for axis in sizes)]
    return len(np.unique(group // domain))


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The least time of a training step, in seconds on each device, and what to expect.

    Attributes:
        compute: the step's FLOPs at the peak, recomputation (model.remat full) included.
        exchanges: what is sent; wires: the least time of all of it.
        overlapped, in_turn: seconds of a step that computes at the assumed MFU, if communication happens meanwhile, and
            if it happens before or after.
        mfu: expected share of the peak, if communication happens meanwhile, and if not.
        bound_below: tokens of a step on one device below which communication takes longer than computation; None: it
            always does.
    """

    compute: float
    exchanges: tuple[Exchange, ...]
    wires: float
    overlapped: float
    in_turn: float
    mfu: tuple[float, float]
    bound_below: float | None

    @property
    def sent(self) -> float:
        """The bytes that each device sends."""
        return sum(one.sent for one in self.exchanges)


def step_time(
    work: Work, exchanges: Sequence[Exchange], device: Device, flops_per_token: float, mfu: float
) -> StepTime:
    """Return the times of a step; ``mfu``: share of the peak that a device reaches alone."""
    tokens = work.tokens * work.accumulate
    model_seconds = flops_per_token * tokens / device.peak(work.cfg.dtype)
    busy, wires = model_seconds / mfu, least_seconds(one.wires for one in exchanges)
    # The exchange of activations grows with the tokens; that of weights and gradients does not.
    fixed = least_seconds(one.wires for one in exchanges if one.what != "activations")
    left = (busy - (wires - fixed)) / tokens
    return StepTime(
        compute=model_seconds * (4 / 3 if work.remat == "full" else 1),
        exchanges=tuple(exchanges),
        wires=wires,
        overlapped=max(busy, wires),
        in_turn=busy + wires,
        mfu=(model_seconds / max(busy, wires), model_seconds / (busy + wires)),
        bound_below=fixed / left if left > 0 else None,
    )
