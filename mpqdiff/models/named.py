"""A user's own linen module by the name "package.module:ClassName", importable where we run.

Importing runs the module's code: only a name that the user wrote (config.model.name) comes here,
never one that a weights file holds.
"""

import importlib
import os
import sys
from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mpqdiff.denoiser import Prediction
from mpqdiff.errors import InputError

OFFERS = (
    "an own model is a linen module with image_size, channels and num_classes (None without "
    "labels), called as module(x_t, t, cond): x_t float [B,H,W,C], t int32 [] or [B], cond int32 "
    "labels [B]; it gives eps [B,H,W,C] or a Prediction"
)


def is_named(name: str) -> bool:
    """Whether a model's name is that of a class to import."""
    return ":" in name


def build(name: str, **kwargs) -> nn.Module:
    """The module `name(**kwargs)`, checked for what a denoiser offers (`OFFERS`).

    The working directory is searched after what is installed. Raises InputError when there is no
    such module or class, it is no linen module, it does not take `kwargs`, or does not fit.
    """
    cls = _class(name)
    try:
        module = cls(**kwargs)
    except Exception as error:  # whatever a constructor raises
        known = [field.name for field in fields(cls) if field.name not in ("parent", "name")]
        raise InputError(
            f"model {name!r} got {kwargs}: {_line(error)}; its fields are {', '.join(known)}: set "
            "config.model.kwargs"
        ) from error
    _check(module, name)
    return module


def _class(name: str) -> type[nn.Module]:
    where, _, attribute = name.partition(":")
    if not where or not attribute or not all(part.isidentifier() for part in where.split(".")):
        raise InputError(f"model {name!r}: expected package.module:ClassName")
    try:
        found = getattr(_imported(where, name), attribute)
    except AttributeError as error:
        here = sys.modules[where]
        known = [one for one, value in vars(here).items() if _is_module(value)]
        raise InputError(
            f"model {name!r}: {getattr(here, '__file__', where)} has no {attribute!r}; its linen "
            f"modules: {', '.join(known) or 'none'}"
        ) from error
    if not _is_module(found):
        raise InputError(f"model {name!r} is {found!r}: expected a class of flax.linen.Module")
    return found


def _imported(where: str, name: str):
    folder = os.getcwd()
    added = folder not in sys.path
    if added:  # a console script does not search where it is started
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be newer than the last look
    try:
        return importlib.import_module(where)
    except Exception as error:  # whatever the user's code raises
        absent = isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}.")
        why = "there is none" if absent else f"{type(error).__name__}: {_line(error)}"
        raise InputError(
            f"model {name!r}: cannot import {where!r} ({why}); looked in what is installed, in "
            f"PYTHONPATH and in {folder}: start mpqdiff where the module is, or set PYTHONPATH"
        ) from error
    finally:
        if added:
            sys.path.remove(folder)


def _is_module(value) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _check(module: Any, name: str) -> None:
    """InputError unless the module has the sizes and the call of a denoiser. Traced, never run."""
    for field, none in (("image_size", False), ("channels", False), ("num_classes", True)):
        missing = not hasattr(module, field)
        value = getattr(module, field, None)
        if missing or not ((none and value is None) or (type(value) is int and value > 0)):
            got = "lacks it" if missing else f"has {value!r}"
            raise InputError(
                f"model {name!r}: {field} must be a positive integer{' or None' * none}; it {got}. "
                f"{OFFERS}"
            )
    shape = (2, module.image_size, module.image_size, module.channels)
    row = jax.ShapeDtypeStruct((2,), jnp.int32)
    for t in (row, jax.ShapeDtypeStruct((), jnp.int32)):
        inputs = jax.ShapeDtypeStruct(shape, jnp.float32), t, row
        try:
            variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
            out: Any = jax.eval_shape(
                lambda params, *call: module.apply({"params": params}, *call),
                variables.get("params", {}),
                *inputs,
            )
        except Exception as error:  # whatever the user's code raises
            raise InputError(
                f"model {name!r} could not be called with t of shape {list(t.shape)}: "
                f"{type(error).__name__}: {_line(error)}. {OFFERS}; one that is called otherwise "
                "is for mpqdiff.from_flax, in Python"
            ) from error
        eps = out.eps if isinstance(out, Prediction) else out
        got = getattr(eps, "shape", type(eps).__name__)
        if got != shape:
            raise InputError(f"model {name!r} gives {got} for x_t {shape}. {OFFERS}")


def _line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
