"""The one mechanism with which a model is observed or rewritten: `flax.linen.intercept_methods`.

`observe` and `rewrite` take a `denoise` function and return a *new* function. They never act on
an already jitted one: jax would reuse the trace made before the interceptor existed and skip it in
silence. Both count the sites they hit while tracing and raise when these differ from the list
they were given.

The model must be unrolled where its sites are: a reduction taken inside `nn.scan` or `nn.remat`
lives in an inner trace and cannot leave it. Such a model is refused with a message.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax

from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.models.product import Product

KINDS = {"dense": nn.Dense, "conv": nn.Conv, "product": Product, "embedding": nn.Embed}


def kind_of(module) -> str | None:
    """The site kind of a linen module, or None. Subclasses count as their base."""
    return next((kind for kind, cls in KINDS.items() if isinstance(module, cls)), None)


def _intercepted(denoise: Denoise, visit: Callable) -> Callable:
    """`denoise` with every site call replaced by `visit(path, module, kind, call, args)`.

    `path` is the module path joined by "/", with "#1", "#2", ... on repeated calls of one module.
    `setup` and private methods are intercepted by Flax as well, hence the filter by method name.
    """

    def run(params, x_t, t, cond):
        calls: Counter[str] = Counter()
        visiting = False  # `visit` may apply modules of its own; those are not sites

        def interceptor(next_fun, args, kwargs, context):
            nonlocal visiting
            kind = kind_of(context.module)
            if kind is None or context.method_name != "__call__" or visiting:
                return next_fun(*args, **kwargs)
            base = "/".join(context.module.path)
            path = f"{base}#{calls[base]}" if calls[base] else base
            calls[base] += 1
            visiting = True
            try:
                return visit(path, context.module, kind, lambda: next_fun(*args, **kwargs), args)
            finally:
                visiting = False

        with nn.intercept_methods(interceptor):
            return denoise(params, x_t, t, cond)

    return run


def _check_hits(hit: Collection[str], expected: Collection[str] | None) -> None:
    if expected is None or set(hit) == set(expected):
        return
    missing, extra = sorted(set(expected) - set(hit)), sorted(set(hit) - set(expected))
    raise InputError(
        f"the sites hit while tracing differ from the site list: never called {missing or 'none'}, "
        f"not in the list {extra or 'none'}; list the sites again for this model and input"
    )


def observe(
    denoise: Denoise,
    reduce: Callable[[str, Any, str, tuple, Any], Any],
    *,
    paths: Collection[str] | None = None,
) -> Callable:
    """A function `(params, x_t, t, cond) -> (Prediction, {path: reduction})`.

    `reduce(path, module, kind, args, out)` sees each site's operands and output and returns a
    pytree; None is left out. Raises InputError when the sites hit are not exactly `paths`, or
    when the model wraps its sites in a transform that keeps reductions inside (scan, remat).
    """

    def observed(params, x_t, t, cond):
        taken, hit = {}, []

        def visit(path, module, kind, call, args):
            out = call()
            hit.append(path)
            reduction = reduce(path, module, kind, args, out)
            if reduction is not None:
                taken[path] = reduction
            return out

        prediction = _intercepted(denoise, visit)(params, x_t, t, cond)
        _check_hits(hit, paths)
        return prediction, taken

    def guarded(params, x_t, t, cond):
        try:
            return observed(params, x_t, t, cond)
        except jax.errors.UnexpectedTracerError as error:
            raise InputError(
                "a site lies inside nn.scan, nn.remat or nn.jit, where it cannot be observed: "
                "build the model unrolled (the parameters are the same up to stacking)"
            ) from error

    return guarded


def rewrite(denoise: Denoise, operations: Mapping[str, Callable]) -> Denoise:
    """`denoise` with the call at each path of `operations` replaced by `operations[path](module, *args)`.

    The original call is not made, so its parameters need not exist. Raises InputError at trace
    time when an operation's path is never called.
    """

    def rewritten(params, x_t, t, cond):
        hit = set()

        def visit(path, module, kind, call, args):
            del kind
            if path not in operations:
                return call()
            hit.add(path)
            with jax.named_scope(scope(path)):
                return operations[path](module, *args)

        prediction = _intercepted(denoise, visit)(params, x_t, t, cond)
        _check_hits(hit, set(operations))
        return prediction

    return rewritten


def scope(path: str) -> str:
    """The name scope of a rewritten site; `evaluate.verify` finds it in the compiled program."""
    return f"site[{path.replace('/', '.')}]"
