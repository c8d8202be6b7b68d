"""The one mechanism with which a model is observed or rewritten: `flax.linen.intercept_methods`.

`observe` and `rewrite` take a `denoise` function and return a *new* function. They never act on
an already jitted one: jax would reuse the trace made before the interceptor existed and skip it in
silence. Both count the sites they hit while tracing and raise when these differ from the list
they were given.

The model must be unrolled where its sites are: a reduction taken inside `nn.scan` or `nn.remat`
lives in an inner trace and cannot leave it. `observe` refuses such a model, naming the site;
`mpqdiff.from_flax` unrolls it.
"""

import contextlib
import contextvars
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import get_opaque_trace_state

from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.models.product import Product

KINDS = {"dense": nn.Dense, "conv": nn.Conv, "product": Product, "embedding": nn.Embed}

# Why a product is left in float, by the name in its `left_scope`.
LEFT = {
    "axes": "a convolution over more than two axes has no integer form",
    "batch": "the product is another one for this number of images",
    "batched": "it has a matrix for each of a group, with scales of its own",
    "branch": "it is inside lax.cond, which may not run it",
    "constant": "it multiplies by a constant of the program, not by a parameter",
    "cropped": "a convolution that crops its input has no integer form",
    "deep": "its contraction is so long that an int32 sum can overflow",
    "dilated": "a dilated convolution has no integer form",
    "dynamic": "the kernel of the convolution is computed from the input",
    "grouped": "a grouped convolution has no integer form",
    "loop": "it is inside a loop that is not over layers of parameters, or too long to unroll",
    "other": "it is inside a call that is run as it is",
    "parameters": "its operands do not depend on the input: parameters or constants both",
    "transposed": "a transposed convolution has no integer form",
    "type": "its operands are not real floats",
    "unseen": "no Dense, Conv or Product module makes it; mpqdiff.from_flax finds such sites",
    "while": "it is inside a loop whose length is not known",
}

_untouched = contextvars.ContextVar("untouched", default=False)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Module calls made in here are neither observed nor rewritten."""
    token = _untouched.set(True)
    try:
        yield
    finally:
        _untouched.reset(token)


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
            if kind is None or context.method_name != "__call__" or visiting or _untouched.get():
                return next_fun(*args, **kwargs)
            base = "/".join(context.module.path)
            path = f"{base}#{calls[base]}" if calls[base] else base
            calls[base] += 1
            visiting = True
            operands = _positional(context.module, args, kwargs)
            try:
                return visit(path, context.module, kind, lambda: next_fun(*operands), operands)
            finally:
                visiting = False

        with nn.intercept_methods(interceptor):
            return denoise(params, x_t, t, cond)

    return run


def _positional(module, args: tuple, kwargs: dict) -> tuple:
    """The operands of a call in the order of the module's `__call__`, also those given by name."""
    if not kwargs:
        return args
    return inspect.signature(type(module).__call__).bind(module, *args, **kwargs).args[1:]


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
    proceed: Callable[[Any, Any], Any] = lambda out, reduction: out,
) -> Callable:
    """A function `(params, x_t, t, cond) -> (Prediction, {path: reduction})`.

    `reduce(path, module, kind, args, out)` sees each site's operands and output and returns a
    pytree; None is left out. The model goes on with `proceed(out, reduction)`. Each call is traced
    under the name scope of its path. Raises InputError when the sites hit are not exactly `paths`,
    or when a site lies inside a transform that would keep its reduction (scan, remat, vmap, jit).
    """

    def observed(params, x_t, t, cond):
        taken, hit = {}, []
        outside = get_opaque_trace_state(convention="flax")

        def visit(path, module, kind, call, args):
            # A reduction of an inner trace would escape as a tracer and fail far from here.
            if get_opaque_trace_state(convention="flax") != outside:
                raise InputError(
                    f"site {path!r} lies inside nn.scan, nn.remat, nn.vmap or a jitted function, "
                    "where it cannot be observed: pass a denoise that is not jitted, and wrap the "
                    "module with mpqdiff.from_flax, which unrolls it"
                )
            with jax.named_scope(scope(path)):
                out = call()
            hit.append(path)
            reduction = reduce(path, module, kind, args, out)
            if reduction is None:
                return out
            taken[path] = reduction
            return proceed(out, reduction)

        prediction = _intercepted(denoise, visit)(params, x_t, t, cond)
        _check_hits(hit, paths)
        return prediction, taken

    return observed


def rewrite(denoise: Denoise, operations: Mapping[str, Callable]) -> Denoise:
    """`denoise` with the calls of `operations` replaced: path -> `operations[path](module, *args)`.

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
    """The name scope of a site, by which traced and compiled programs tell whose product it is."""
    return f"site[{path.replace('/', '.')}]"


def left_scope(why: str) -> str:
    """The name scope of a product left in float; `why` is a key of LEFT."""
    return f"left[{why}]"
