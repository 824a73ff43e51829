"""What kind of device a program is for, and what one can do at best, for model FLOPs utilisation."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets; the first key that the device kind contains.
PEAK = {
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v5": 459e12,
    "v4": 275e12,
    "v3": 123e12,
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
}


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: that of the current mesh, whose devices may be elsewhere (a program compiled ahead of time)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def has_host_memory(device: jax.Device) -> bool:
    """Whether a program for this device can keep arrays in its host's memory."""
    return "pinned_host" in {memory.kind for memory in device.addressable_memories()}


@functools.cache
def peak_flops(operands: str = "float32") -> float | None:
    """FLOP/s of one device: the data sheet's, on CPU the measured rate of a product of such operands in float32, None if unknown.

    CPUs have no data sheet figure that a program can reach, so there the question is how close the whole step comes to
    a plain matrix product on the same cores; the devices of one simulated mesh share them.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return next((peak for name, peak in PEAK.items() if name.lower() in device.device_kind.lower()), None)
    size = 1024
    with jax.default_device(device):
        x = jnp.ones((size, size), operands)
        product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
        product(x, x).block_until_ready()
        best = min(_timed(product, x) for _ in range(5))
    return 2 * size**3 / best / len(jax.local_devices())


def _timed(product: object, x: jax.Array) -> float:
    start = time.perf_counter()
    product(x, x).block_until_ready()  # type: ignore[operator]
    return time.perf_counter() - start
