"""Joules of an image: measured by the devices' own energy counters where they have one, else
modelled; an `Energy` says which, and a comparison of the two kinds is refused.

Measured: NVML's total energy since the driver was loaded (Volta and later), read from the driver's
own library before and after enough repetitions that the counter's steps, up to 0.1 s apart, do not
matter. It counts whole GPUs, idle power and other programs on them included. Modelled: the
constants of `costs.energy`, which see the denoiser's products and weights alone.
"""

import ctypes
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from mpqdiff.costs import energy
from mpqdiff.errors import InputError
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Remainder, Site

MEASURED, MODELLED = "measured", energy.LABEL
SECONDS = 3.0  # of repetitions between two readings
_LIBRARY = "libnvidia-ml.so.1"


class Counter(NamedTuple):
    """`read()` gives joules since some moment; `source` says of what."""

    read: Callable[[], float]
    source: str


class Energy(NamedTuple):
    """`joules` per image; `label` MEASURED or MODELLED; `source` one line on how."""

    joules: float
    label: str
    source: str


def joules_per_image(
    run: Callable[[], Any],
    *,
    images: int,
    modelled: float,
    counter: Counter | None,
    seconds: float = SECONDS,
) -> Energy:
    """Energy of `run()`, which makes `images` images, over `seconds` of repeating it, warmed up.

    `counter` as `find_counter` gives it; with None, or (with a warning) one that does not advance,
    the result is `modelled` joules per image. Raises InputError on no image.
    """
    if images < 1:
        raise InputError(f"got images={images} per run, expected at least 1")
    if counter is not None:
        count, before, start = 0, counter.read(), time.perf_counter()
        while count == 0 or time.perf_counter() - start < seconds:
            jax.block_until_ready(run())
            count += 1
        elapsed = time.perf_counter() - start
        used = counter.read() - before
        if used > 0:
            source = f"{counter.source}, over {elapsed:.1f} s: {count} runs of {images} images"
            return Energy(used / (count * images), MEASURED, source)
        warnings.warn(
            f"the energy counter did not advance in {elapsed:.1f} s: energy is modelled",
            stacklevel=2,
        )
    source = "model of costs.energy (45 nm constants): products and weights of the denoiser alone"
    return Energy(float(modelled), MODELLED, source)


def ratio(a: Energy, b: Energy) -> float:
    """Joules of `a` over those of `b`. Raises InputError when one is measured, one modelled."""
    if a.label != b.label:
        raise InputError(
            f"got {a.joules:g} J {a.label} and {b.joules:g} J {b.label}: only energies found in "
            "the same way compare; run both on a device with a counter, or model both"
        )
    return a.joules / b.joules


def modelled_joules(
    sites: Sequence[Site],
    remainder: Sequence[Remainder],
    w_bits: Mapping[str, int | None],
    a_bits: Mapping[str, Any],
    *,
    evaluations: int,
    batch: int,
) -> float:
    """Joules per image of `evaluations` denoiser calls that serve `batch` images each.

    Widths by site path as a plan has them, the larger where a product's operands differ; a site
    without either width is in float.
    """
    total = energy.float_joules([], remainder, batch=batch)
    for site in sites:
        widths = _widths(site, w_bits.get(site.path), a_bits.get(site.path))
        total += energy.site_joules(site, *widths, batch=batch)
    return evaluations * total


def _widths(site: Site, w_bits: int | None, a_bits: Any) -> tuple[int, int]:
    operands = list(a_bits.values()) if isinstance(a_bits, dict) else [a_bits]
    bits = [width for width in operands if width is not None]
    if len(bits) < len(operands) or (site.parameters and w_bits is None):
        return FLOAT_BITS, FLOAT_BITS
    return w_bits or max(bits), max(bits)


def find_counter(devices: Sequence[Any] | None = None, *, library: Any = None) -> Counter | None:
    """The energy counter of `devices` together; None where one of them has none.

    `devices` are JAX's, by default the one that programs run on. `library` has NVML's functions,
    by default the driver's own.
    """
    devices = jax.local_devices()[:1] if devices is None else devices
    if not devices or any(device.platform != "gpu" for device in devices):
        return None
    try:
        library = ctypes.CDLL(_LIBRARY) if library is None else library
        if library.nvmlInit_v2():
            return None
        handles = [_handle(library, device.local_hardware_id or 0) for device in devices]
        read = partial(_joules, library, handles)
        read()
    except (OSError, AttributeError, InputError):  # no driver, an old one, a device without
        return None
    return Counter(read, f"NVML total energy of {len(handles)} GPU, idle power included")


def _handle(library, ordinal: int) -> ctypes.c_void_p:
    """NVML's handle of CUDA's device `ordinal`.

    NVML ignores CUDA_VISIBLE_DEVICES, whose entries are numbers or UUIDs. Numbers are taken to
    mean the order on the bus, as they do among equal GPUs and under CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else []
    if names and ordinal >= len(names):
        raise InputError(f"got GPU {ordinal}, CUDA_VISIBLE_DEVICES={visible} has {len(names)}")
    name = names[ordinal].strip() if names else str(ordinal)
    handle = ctypes.c_void_p()
    if name.isdigit():
        failed = library.nvmlDeviceGetHandleByIndex_v2(
            ctypes.c_uint(int(name)), ctypes.byref(handle)
        )
    else:
        failed = library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
    if failed:
        raise InputError(f"NVML does not know GPU {name!r} (status {failed})")
    return handle


def _joules(library, handles: Sequence[ctypes.c_void_p]) -> float:
    total = 0
    for handle in handles:
        millijoules = ctypes.c_ulonglong()
        failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        if failed:
            raise InputError(f"the GPU's energy counter cannot be read (NVML status {failed})")
        total += millijoules.value
    return total / 1e3
