"""The kind of device that a program is compiled for, on which a few choices depend: dtype, attention, unrolling."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """A kind of device."""

    platform: str  # JAX's name: cpu, gpu (also cuda) or tpu
    capability: float | None = None  # NVIDIA's compute capability, such as 7.5 (T4) or 9.0 (H100)


# JAX's own kind of context: its value is a part of every cache of traced functions, so that nothing which was traced
# for one target is used for another.
_named: Any = jax.make_user_context(None)


def target() -> Target:
    """Return the compilation target: the one that :func:`compiling_for` names, else the device that JAX computes on."""
    if _named.value is not None:
        return _named.value
    device = getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]
    return target_of(jax.local_devices(backend=device)[0] if isinstance(device, str) else device)


def compiling_for(platform: str, capability: float | None = None) -> AbstractContextManager[None]:
    """Within the context, trace programs for another kind of device; this machine needs none of that kind.

    Such a program is for ``jax.jit(f).trace(...).lower(lowering_platforms=(platform,))``, not to be run here. A GPU
    without a capability counts as one that is not NVIDIA's.
    """
    return _named(Target(platform, capability))


def target_of(device: jax.Device) -> Target:
    """Return the kind of a device."""
    try:  # NVIDIA's are numbers, "9.0"; AMD's are names, "gfx942"; CPUs and TPUs have none
        return Target(device.platform, float(device.compute_capability))
    except (AttributeError, ValueError):
        return Target(device.platform)
