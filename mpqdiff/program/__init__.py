"""Any linen module as a denoiser of sites: its program is traced and run product by product.

Flax lets a module's calls be intercepted, but not its raw products, nor calls inside `nn.scan` and
`nn.remat`. `from_flax` therefore traces the module, inlines and unrolls it (`walk`), and gives
every product that has an integer form a module of its own (`forms`), which is intercepted as usual.
Parameters are laid out to match: a kernel per product, per layer where layers were stacked.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import traverse_util
from jax.core import Tracer

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise, Prediction
from mpqdiff.errors import InputError
from mpqdiff.program import expression, walk
from mpqdiff.program.expression import Expression
from mpqdiff.program.forms import Form, form
from mpqdiff.program.names import REST, product_name, weight_name


class Wrapped(NamedTuple):
    """A module as `denoise(params, x_t, t, cond)`, and its parameters as that takes them."""

    denoise: Denoise
    params: Any


class Entry(NamedTuple):
    """What is known of a product: its name, and the batch axis of its first activation."""

    name: str
    batch: int | None


class Survey(NamedTuple):
    """The products of one trace that have a form, by key in call order, and the leaves that what
    is left in float reads."""

    forms: dict[str, tuple[Form, walk.Place]]
    read: set[str]


def call_module(module, x_t, t, cond):
    """The usual call."""
    return module(x_t, t, cond)


def from_flax(
    module: nn.Module, variables, x_t, t, cond, *, call: Callable = call_module
) -> Wrapped:
    """`module` as a denoiser every product of which is a site, or is listed with the reason.

    `variables` are those of `module.apply`, or the parameters alone; arrays or shapes. x_t
    [B,H,W,C], t [] or [B] and cond (a pytree of arrays [B,...] or None) are an example of a call:
    only shapes are read; a module that takes one t per image is given t [B], and the denoiser takes
    [] as well. `call(module, x_t, t, cond)` calls the bound module in another way: by
    keywords, by a method of another name, with an output to be taken apart. It returns eps or a
    Prediction.

    Sites are named by their parameter: "block/attn/query" for ".../query/kernel", ":2" for the
    third of stacked layers, "~1" for a second way in which one parameter is multiplied, "#1" for a
    second call. Parameters that the call does not read are left out of `params`. Raises InputError
    when the module cannot be called so, or gives something else.
    """
    traced = _Traced(module, variables, t, call)
    traced.check(x_t, t, cond)
    surveys = [traced.survey(*_with_batch(size, x_t, t, cond)) for size in (2, 3)]
    read = set().union(*(survey.read for survey in surveys))
    table = _table(surveys, traced.shapes)
    kernels = {
        table[key].name: found.weight
        for key, (found, _) in surveys[0].forms.items()
        if key in table and found.weight is not None
    }
    return Wrapped(_denoise(traced, table, read), _laid_out(traced.leaves, kernels, read))


class _Traced:
    """A module, its variables by name ("fc/kernel", "batch_stats/..."), and how to call it."""

    def __init__(self, module, variables, t, call):
        variables = nn.meta.unbox(variables)
        if not isinstance(variables, Mapping):
            raise InputError(f"variables are {type(variables).__name__}: expected a dict")
        if "params" not in variables:
            variables = {"params": variables}
        self.module, self.call = module, call
        self.t_shape = jnp.shape(t)
        self.programs: dict[tuple, tuple] = {}
        self.places = {}
        self.leaves = {}
        for place, leaf in traverse_util.flatten_dict(dict(variables)).items():
            path = place[1:] if place[0] == "params" else place
            self.places["/".join(path)] = place
            self.leaves["/".join(path)] = leaf
        self.shapes = {
            name: jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf))
            for name, leaf in self.leaves.items()
        }

    def apply(self, leaves, x_t, t, cond) -> Prediction:
        variables = traverse_util.unflatten_dict(
            {self.places[name]: leaf for name, leaf in leaves.items()}
        )
        with intercept.untouched():
            out = nn.apply(self.call, self.module)(variables, x_t, t, cond)
        return out if isinstance(out, Prediction) else Prediction(out)

    def timestep(self, t, x_t):
        """t [] or [B] as the module takes it: [B] where the example was."""
        return jnp.broadcast_to(t, x_t.shape[:1]) if self.t_shape else t

    def check(self, x_t, t, cond) -> None:
        """InputError unless the call works and gives eps of the shape of x_t."""
        name = type(self.module).__name__
        x_t, t, cond = map(_shapes, (x_t, t, cond))
        try:
            out = jax.eval_shape(self.apply, self.shapes, x_t, t, cond)
        except (flax_errors.FlaxError, TypeError) as error:
            raise InputError(
                f"{name} could not be called: {error}\nPass the variables of module.init, and "
                "call=lambda module, x_t, t, cond: ... where the module is called otherwise "
                "(keywords, another method, evaluation mode)"
            ) from error
        try:
            each = jax.ShapeDtypeStruct(x_t.shape[:1], t.dtype)
            jax.eval_shape(self.apply, self.shapes, x_t, each, cond)
        except (flax_errors.FlaxError, TypeError, ValueError) as error:
            raise InputError(
                f"{name} takes t of shape [] and not [B], which calibration passes: {error}"
            ) from error
        got = getattr(out.eps, "shape", type(out.eps).__name__)
        if got != jnp.shape(x_t):
            raise InputError(
                f"{name} gives {got} for x_t {jnp.shape(x_t)}: expected eps of the same shape, or "
                "a Prediction; take the output apart in call=lambda module, x_t, t, cond: ..."
            )

    def trace(self, x_t, t, cond):
        """(closed jaxpr, structure of its outputs) of a call with such operands; traced once."""
        operands = tuple(map(_shapes, (x_t, t, cond)))
        leaves, structure = jax.tree.flatten(operands)
        key = (
            structure,
            tuple((leaf.shape, leaf.dtype) for leaf in leaves),
            jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        )
        if key not in self.programs:
            closed, out = jax.make_jaxpr(self.apply, return_shape=True)(self.shapes, *operands)
            found = closed, jax.tree.structure(out)
            # A constant of a trace around this one would outlive it.
            if any(isinstance(value, Tracer) for value in closed.consts):
                return found
            self.programs[key] = found
        return self.programs[key]

    def run(self, leaf, product, x_t, t, cond) -> Prediction:
        """The call, step by step: `leaf(name)` reads a parameter, `product` as in `walk`."""
        closed, structure = self.trace(x_t, t, cond)
        names = sorted(self.shapes)  # the order of a dict's leaves
        known = [expression.leaf(name, self.shapes[name]) for name in names]
        context = walk.Context(leaf, {}, product)
        operands = known + jax.tree.leaves((x_t, t, cond))
        outs = walk.run(closed, operands, context)
        return jax.tree.unflatten(structure, [context.value(out) for out in outs])

    def survey(self, x_t, t, cond) -> Survey:
        """The products of a call with operands of these shapes."""
        survey = Survey({}, set())

        def traced(leaves, x_t, t, cond):
            def read(name):
                survey.read.add(name)
                return leaves[name]

            quiet = walk.Context(leaves.__getitem__, {})

            def product(equation, operands, found, place):
                if isinstance(found, str):
                    return walk.execute(equation, operands, loud, place)[0]
                survey.forms.setdefault(found.key, (found, place))
                return walk.execute(equation, operands, quiet, place)[0]

            loud = walk.Context(read, {})
            return self.run(read, _counted(product), x_t, t, cond)

        jax.eval_shape(traced, self.shapes, x_t, t, cond)
        return survey


def _counted(product: Callable) -> Callable:
    """`product(equation, operands, form or why not, place)` as `walk` calls it."""
    counts: dict[tuple, int] = {}

    def visit(equation, operands, place, nonnegative):
        spot = place.stack, place.layers
        found = form(equation, operands, place, counts.get(spot, 0), nonnegative)
        if isinstance(found, Form) and found.weight is None:
            counts[spot] = counts.get(spot, 0) + 1
        return product(equation, operands, found, place)

    return visit


def _shapes(operand):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf)), operand
    )


def _with_batch(size: int, x_t, t, cond):
    """Shapes of the call for `size` images: what has the batch of x_t as its first axis changes."""
    batch = jnp.shape(x_t)[0]

    def resized(leaf):
        rest = leaf.shape[1:]
        follows = leaf.ndim and leaf.shape[0] == batch
        return jax.ShapeDtypeStruct((size, *rest), leaf.dtype) if follows else leaf

    return jax.tree.map(resized, tuple(map(_shapes, (x_t, t, cond))))


def _table(surveys: list[Survey], shapes) -> dict[str, Entry]:
    """Name and batch axis of every product that is the same product for any number of images."""
    table: dict[str, Entry] = {}
    one, other = (survey.forms for survey in surveys)
    taken: set[str] = set()
    for key, (found, place) in one.items():
        if key not in other:
            continue
        pairs = zip(found.shape, other[key][0].shape, strict=True)
        batch = next((axis for axis, (a, b) in enumerate(pairs) if a != b), None)
        if found.weight is None:
            name = product_name(place, taken)
        else:
            name = weight_name(found.weight, shapes, taken)
        taken.add(name)
        table[key] = Entry(name, batch)
    return table


def _laid_out(leaves, kernels: Mapping[str, Expression], read: set[str]):
    """The parameters that the denoiser takes: `read` as they are, and a kernel for each product."""
    flat = {f"{REST}/{name}": leaves[name] for name in leaves if name in read}
    for name, weight in kernels.items():
        flat[f"{name}/kernel"] = _kernel(leaves, weight)
    return traverse_util.unflatten_dict(flat, sep="/")


def _kernel(leaves, weight: Expression):
    """The value of a kernel in float32; its shape where the leaves are shapes."""

    def compute(given):
        value = expression.evaluate(weight, given.__getitem__, {})
        return value if value.dtype == jnp.float32 else value.astype(jnp.float32)

    given = {name: leaves[name] for name in sorted(weight.leaves)}
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in given.values()):
        return jax.eval_shape(compute, given)
    return compute(given)


class Program(nn.Module):
    """The holder of the products' modules while `body` runs."""

    body: Callable

    @nn.compact
    def __call__(self, x_t, t, cond):
        return self.body(x_t, t, cond)


def _denoise(traced: _Traced, table: Mapping[str, Entry], needed: set[str]) -> Denoise:
    names = {entry.name for entry in table.values()}

    def denoise(params, x_t, t, cond) -> Prediction:
        held = traverse_util.flatten_dict(params, sep="/")
        if missing := sorted(name for name in needed if f"{REST}/{name}" not in held):
            raise InputError(
                f"parameters {missing} are not under {REST!r}: pass the params that from_flax gave "
                "with this denoise, not the module's own"
            )
        kernels = {
            name: {"kernel": held[f"{name}/kernel"]} for name in names if f"{name}/kernel" in held
        }

        def read(name):
            return jnp.asarray(held[f"{REST}/{name}"], traced.shapes[name].dtype)

        def body(x_t, t, cond):
            modules: dict[str, nn.Module] = {}
            left = walk.Context(read, {})

            def product(equation, operands, found, place):
                entry = None if isinstance(found, str) else table.get(found.key)
                if isinstance(found, str) or entry is None:
                    why = found if isinstance(found, str) else "batch"
                    return walk.left(equation, operands, left, place, why)[0]
                if entry.name not in modules:
                    modules[entry.name] = found.build(entry.name, entry.batch)
                inputs = [x for x in operands if not isinstance(x, Expression)]
                y = modules[entry.name](*found.enter(inputs, entry.batch))
                return found.leave(y, entry.batch)

            return traced.run(read, _counted(product), x_t, t, cond)

        x_t, t, cond = jax.tree.map(jnp.asarray, (x_t, t, cond))
        operands = x_t, traced.timestep(t, x_t), cond
        return Program(body).apply({"params": kernels}, *operands)  # pyright: ignore[reportReturnType]

    return denoise
