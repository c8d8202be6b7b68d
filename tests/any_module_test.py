"""Modules as users write them: every product is a site or is listed with the reason, and plans run.

None is shaped to the package: styles, layouts and transforms differ on purpose.
"""

import re
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpqdiff
from mpqdiff import costs, models, record, sites, weights
from mpqdiff.costs import legality
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.errors import InputError
from mpqdiff.evaluate import verify
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply, simulate
from mpqdiff.records import Statistics

WIDTHS = (4, 8, 5)
STEPS = np.array([700, 20], np.int32)


@pytest.fixture(scope="module", autouse=True)
def little_effort():
    """Compiling is most of the work here, and nothing is timed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def sinusoid(t, dim):
    """t [B] -> [B, dim]."""
    angle = jnp.atleast_1d(t)[:, None] * jnp.exp(-jnp.arange(dim // 2))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


# 1. A transformer of scanned, rematerialised layers, modulated by time and label.


class Layer(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, c):
        shift, gate = jnp.split(nn.DenseGeneral((2, x.shape[-1]), name="ada")(nn.silu(c)), 2, 1)
        h = nn.LayerNorm(use_bias=False, use_scale=False)(x) + shift
        x = x + gate * nn.MultiHeadDotProductAttention(self.heads, name="attn")(h)
        h = nn.Dense(2 * x.shape[-1], name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(h)), None


class ScannedDiT(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, x_t, t, label):
        n, height, width, channels = x_t.shape
        c = sinusoid(t, 8) + nn.Embed(3, 8, name="label")(label)
        x = nn.Conv(8, (2, 2), strides=2, name="patch")(x_t)
        x = nn.Conv(8, (3, 3), feature_group_count=4, name="mix")(x).reshape(n, -1, 8)
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        x, _ = layers(2, name="layers")(x, c)
        x = nn.Einsum((8, 4 * channels), "bpd,df->bpf", name="out")(x)
        x = x.reshape(n, height // 2, width // 2, 2, 2, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(x_t.shape)


# 2. A U-Net in the setup style, called through a method of another name and by keywords.


class Block(nn.Module):
    features: int

    def setup(self):
        self.norm = nn.GroupNorm(2)
        self.conv = nn.Conv(self.features, (3, 3))
        self.skip = nn.Conv(self.features, (1, 1), use_bias=False)
        self.emb = nn.Dense(self.features)

    def _shift(self, emb):
        return self.emb(nn.swish(emb))[:, None, None]

    def __call__(self, x, emb):
        return self.skip(x) + self.conv(nn.swish(self.norm(x))) + self._shift(emb)


class UNet(nn.Module):
    channels: int

    def setup(self):
        self.stem = nn.Conv(4, kernel_size=[3, 3], padding="CIRCULAR")
        self.blocks = [Block(4), Block(6)]
        self.shrink = nn.Conv(6, (3, 3), strides=(2, 2), padding=((1, 1), (0, 2)))
        self.grow = nn.ConvTranspose(4, (2, 2), strides=(2, 2))
        self.head = nn.Conv(self.channels, (3, 3), kernel_dilation=2)

    def forward(self, images, *, time, train=True):
        assert not train
        emb = sinusoid(time, 6)
        first = self.blocks[0](self.stem(images), emb)
        deep = self.blocks[1](self.shrink(first), emb)
        x = jnp.concatenate([self.grow(deep), first], -1)
        return {"sample": self.head(x)}


def call_unet(module, x_t, t, cond):
    return module.forward(x_t, time=t, train=False)["sample"]


# 3. An MLP-mixer that keeps tokens first: [P,B,D].


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        n, height, width, channels = x_t.shape
        x = x_t.reshape(n, height * width, channels).transpose(1, 0, 2)
        x = nn.Dense(6)(x) + nn.Dense(6, name="time")(sinusoid(t, 4))
        y = nn.DenseGeneral(height * width, axis=0, name="tokens")(x)  # [B,D,P]
        x = x + jnp.moveaxis(nn.relu(y), -1, 0)
        x = x + nn.DenseGeneral(6, axis=(-1,), name="channels")(x)
        return nn.Dense(channels, name="out")(x).transpose(1, 0, 2).reshape(x_t.shape)


# 4. Everything from raw parameters: weights on the left, scaled, standardised, sliced.


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        channels = x_t.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel = self.param("stem", init, (3, 3, channels, 6))
        kernel = (kernel - kernel.mean((0, 1, 2))) / (kernel.std((0, 1, 2)) + 1e-5)
        x = jax.lax.conv_general_dilated(
            x_t, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        qkv = self.param("qkv", init, (6, 18))
        q, k = x @ qkv[:, :6] * 0.5, x @ qkv[:, 6:12]
        v = jnp.einsum("oi,bhwi->bhwo", qkv[:, 12:].T, x)
        tokens = [y.reshape(x.shape[0], -1, 6) for y in (q, k, v)]
        scores = jax.nn.softmax(jnp.einsum("bpd,bqd->bpq", *tokens[:2]))
        x = x + (scores @ tokens[2]).reshape(x.shape)
        low, high = self.param("low", init, (6, 2)), self.param("high", init, (2, channels))
        base = self.param("base", init, (6, channels))
        return (
            x @ (base + low @ high)
            + (sinusoid(t, 4) @ self.param("t", init, (4, channels)))[:, None, None]
        )


# 5. One layer repeated by a scan that broadcasts its parameters, and a tied way out.


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x, emb):
        return x + nn.Dense(6, name="b")(nn.tanh(nn.Dense(6, name="a")(x) + emb)), None


class Albert(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        n, *_, channels = x_t.shape
        table = self.param("table", nn.initializers.normal(0.5), (channels, 6))
        x = x_t.reshape(n, -1, channels) @ table
        loop = nn.scan(
            Shared,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = loop(name="loop")(x, sinusoid(t, 6)[:, None])
        return (x @ table.T).reshape(x_t.shape)


# 6. Experts by nn.vmap, a branch, a while loop and chunked attention: much that stays in float.


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="fc")(x)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        n, *_, channels = x_t.shape
        x = nn.Dense(6, name="in")(x_t).reshape(n, -1, 6) + sinusoid(t, 6)[:, None]
        many = nn.vmap(
            Expert,
            in_axes=0,
            out_axes=0,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        gate = nn.softmax(nn.Dense(2, name="gate")(x))
        x = jnp.einsum("ebpd,bpe->bpd", many(name="experts")(jnp.stack([x, -x])), gate)
        w = self.param("w", nn.initializers.orthogonal(), (6, 6))
        x = jax.lax.cond(x.mean() > 1e9, lambda y: y, lambda y: y @ w, x)
        x = jax.lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y @ w), x)
        rows = jnp.moveaxis(x.reshape(n, 2, -1, 6), 1, 0)
        x = jax.lax.map(lambda q: nn.softmax(q @ x.swapaxes(1, 2)) @ x, rows)
        fixed = np.linspace(-1, 1, 36, dtype=np.float32).reshape(6, 6)
        x = jnp.moveaxis(x, 0, 1).reshape(n, -1, 6) @ fixed
        return nn.Dense(channels, name="out")(x).reshape(x_t.shape)


# 7. A WaveNet over the flattened image: one axis, dilated and grouped, weights normalised.


class WaveNet(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        n, *_, channels = x_t.shape
        x = nn.Conv(6, (1,), name="in")(x_t.reshape(n, -1, channels))
        emb = nn.Dense(12, name="emb")(sinusoid(t, 4))[:, None]
        for index, dilation in enumerate((1, 2)):
            conv = nn.WeightNorm(nn.Conv(12, (3,), kernel_dilation=dilation, name=f"conv_{index}"))
            a, b = jnp.split(conv(x) + emb, 2, -1)
            x = x + nn.Conv(6, 3, feature_group_count=2, name=f"mix_{index}")(nn.tanh(a) * b)
        return nn.Conv(channels, (3,), padding="VALID", name="out")(
            jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        ).reshape(x_t.shape)


# 8. bfloat16, nn.jit, BatchNorm's averages, a dictionary as condition, a learned variance.


@nn.jit
class Normed(nn.Module):
    train: bool
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), dtype=self.dtype)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not self.train, dtype=self.dtype)(x))


class Half(nn.Module):
    @nn.compact
    def __call__(self, sample, timesteps, context, mask, train=False):
        channels = sample.shape[-1]
        x = Normed(train, name="first")(sample)
        pooled = jnp.sum(context * mask[..., None], 1)
        film = nn.Dense(16, dtype=jnp.bfloat16, name="film")(
            jnp.concatenate([pooled, sinusoid(timesteps, 4)], -1)
        )
        scale, shift = jnp.split(film[:, None, None], 2, -1)
        x = Normed(train, name="second")(x * (1 + scale) + shift)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Conv(2 * channels, (1, 1), dtype=jnp.float32, name="out")(x)


def call_half(module, x_t, t, cond):
    out = module(x_t, timesteps=t, context=cond["text"], mask=cond["mask"])
    return Prediction(*jnp.split(out, 2, axis=-1))


# 9. Window attention with adapters beside its Dense layers, every other block rematerialised.


class LowRank(nn.Module):
    base: nn.Module
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.normal(), (x.shape[-1], self.rank))
        b = self.param("b", nn.initializers.normal(), (self.rank, self.base.features))
        return self.base(x) + (x @ a) @ b


class Window(nn.Module):
    size: int = 2

    @nn.compact
    def __call__(self, x):
        n, height, width, d = x.shape
        s = self.size
        w = x.reshape(n, height // s, s, width // s, s, d).transpose(0, 1, 3, 2, 4, 5)
        w = w.reshape(-1, s * s, d)  # windows folded into the batch
        q = LowRank(nn.Dense(d, name="q"), name="lora_q")(w)
        k, v = (nn.Dense(d, name=name)(w) for name in "kv")
        w = nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
        w = w.reshape(n, height // s, width // s, s, s, d).transpose(0, 1, 3, 2, 4, 5)
        return x + w.reshape(x.shape)


class Swin(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        x = nn.Dense(4)(x_t) + nn.Dense(4)(sinusoid(t, 4))[:, None, None]
        for index in range(2):
            block = nn.checkpoint(Window) if index else Window
            x = block(name=f"window_{index}")(x)
        return nn.Sequential([nn.LayerNorm(), nn.Dense(6), nn.gelu, nn.Dense(x_t.shape[-1])])(x)


# 10. A recurrent net over rows, a hypernetwork, and weights stacked by hand in one parameter.


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        n, height, width, channels = x_t.shape
        rows = x_t.reshape(n, height, -1)
        x = nn.RNN(nn.SimpleCell(6), name="rnn")(rows)
        hyper = nn.Dense(36, name="hyper")(sinusoid(t, 4)).reshape(-1, 6, 6)
        x = jnp.einsum("bhd,bde->bhe", x, jnp.broadcast_to(hyper, (n, 6, 6)))
        stack = self.param("stack", nn.initializers.normal(0.4), (2, 6, 6))
        for index in range(2):
            x = x + jnp.sin(x @ stack[index])
        return nn.Dense(width * channels, name="out")(x).reshape(x_t.shape)


LABEL = np.array([0, 2, 1, 0], np.int32)
TEXT = {
    "text": np.random.default_rng(7).standard_normal((4, 3, 5)).astype(np.float32),
    "mask": np.ones((4, 3), np.float32),
}

# module, condition, how it is called, sites with weights, why products are left in float.
MODULES = {
    "scanned": (ScannedDiT(), LABEL, None, 2 + 2 * 7, {"grouped"}),
    "unet": (UNet(2), None, call_unet, 2 + 2 * 3, {"transposed", "dilated"}),
    "mixer": (Mixer(), None, None, 5, set()),
    "raw": (Raw(), None, None, 6, set()),
    "albert": (Albert(), None, None, 8, set()),
    "experts": (Experts(), None, None, 5, {"batched", "branch", "loop", "constant"}),
    "wavenet": (WaveNet(), None, None, 4, {"dilated", "grouped"}),
    "half": (Half(), TEXT, call_half, 4, set()),
    "swin": (Swin(), None, None, 4 + 2 * 5, set()),
    "recurrent": (Recurrent(), None, None, 4 + 3 + 4, {"parameters"}),
}


# One for each kind of form: dense and product, repeated calls, a convolution over one axis,
# bfloat16.
SIMULATED = {"scanned", "albert", "wavenet", "half"}


class Case:
    """A module with random variables, wrapped, and its sites."""

    def __init__(self, module, cond=None, call=None, *, batch=4):
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((batch, 4, 4, 2)).astype(np.float32)
        self.t, self.cond = np.full(batch, 20, np.int32), cond
        self.call = call or (lambda module, x_t, t, cond: module(x_t, t, cond))
        self.apply = nn.apply(self.call, module)
        shapes = jax.eval_shape(
            lambda key: nn.init(self.call, module)(key, self.x, self.t, cond), jax.random.key(0)
        )
        self.variables = jax.tree.map(
            lambda leaf: (rng.standard_normal(leaf.shape) * 0.4).astype(leaf.dtype), shapes
        )
        if "batch_stats" in self.variables:
            self.variables["batch_stats"] = jax.tree.map(np.abs, self.variables["batch_stats"])
        self.denoise, self.params = mpqdiff.from_flax(
            module, self.variables, self.x, self.t, cond, call=self.call
        )
        self.first = jax.tree.map(lambda leaf: leaf[:1], (self.x, self.t, cond))
        self.sites, self.remainder = sites.list_sites(self.denoise, self.params, *self.first)

    @cached_property
    def ran(self):
        """eps of the denoiser and of the module itself, and what is recorded, from one program."""
        one = record.one_timestep(self.denoise, self.chosen, grams=False)

        def run(params, variables):
            own = self.apply(variables, self.x, self.t, self.cond)
            eps = self.denoise(params, self.x, np.int32(20), self.cond).eps
            own = own.eps if isinstance(own, Prediction) else own
            return eps, own, one(params, self.x, self.t, self.cond)

        return jax.tree.map(np.asarray, jax.jit(run)(self.params, self.variables))

    @property
    def eps(self):
        return self.ran[0]

    @property
    def chosen(self):
        return sites.planned(self.sites, products=True)

    def run(self, denoise, params):
        return jax.jit(denoise)(params, self.x, np.int32(20), self.cond)


@cache
def case_of(name: str) -> Case:
    module, cond, call, count, reasons = MODULES[name]
    found = Case(module, cond, call)
    found.name, found.count, found.reasons = name, count, reasons
    return found


@pytest.fixture(scope="module", params=MODULES)
def case(request):
    return case_of(request.param)


def test_the_denoiser_is_the_module(case):
    eps, expected, _ = case.ran
    half = "first" in case.params  # bfloat16: a sum in another order is another number
    np.testing.assert_allclose(eps, expected, rtol=1e-4, atol=2e-2 if half else 1e-5)
    assert np.abs(expected).max() > 0.05


def test_every_product_is_a_site_or_listed_with_the_reason(case):
    traced = sites._products(jax.make_jaxpr(case.apply)(case.variables, *case.first).jaxpr)
    listed = sum(site.macs for site in case.sites) + sum(one.macs for one in case.remainder)
    assert listed == pytest.approx(sum(traced.values()), rel=0.01)
    assert len([site for site in case.sites if site.parameters]) == case.count
    reasons = {mpqdiff.intercept.LEFT[why] for why in case.reasons}
    assert {one.reason for one in case.remainder} == reasons
    assert all(one.macs > 0 for one in case.remainder)


def planned(case):
    """(plan, sites, table, asymmetric flags, tensors): widths in turn, ranges as recorded at the
    last step, twice as wide at the first."""
    chosen, taken = case.chosen, case.ran[2]
    low, high = (np.stack([2 * taken[end], taken[end]]) for end in ("input_min", "input_max"))
    stats = Statistics(STEPS, None, None, None, None, None, low, high)
    turns = {tie: i for i, tie in enumerate(dict.fromkeys(s.tie for s in chosen if s.parameters))}
    plan = Plan(
        model={"hash": "own"},
        w_bits={s.path: WIDTHS[turns[s.tie] % 3] if s.parameters else None for s in case.sites},
        a_bits={s.path: {"lhs": 8, "rhs": 8} if s.kind == "product" else 8 for s in case.sites},
        mode="step_table",
        groups=activations.groups(STEPS, STEPS, "step_table"),
        timesteps=tuple(STEPS.tolist()),
        system="test",
    )
    table = activations.table(stats, chosen, mode=plan.mode, a_bits=plan.a_bits)
    flags = activations.lopsided(stats, chosen)
    quantised = apply.quantize(case.params, chosen, plan, table, flags, clip="absmax")
    return plan, chosen, table, flags, quantised


def test_a_plan_of_mixed_widths_runs_in_integers_as_simulated(case):
    plan, chosen, table, flags, tensors = planned(case)
    model = apply.build(case.denoise, case.params, chosen, plan, tensors, table)
    operands = case.x, np.int32(20), case.cond
    compiled = jax.jit(model.denoise).lower(model.params, *operands).compile()
    integer = np.asarray(compiled(model.params, *operands).eps)
    error = np.linalg.norm(integer - case.eps) / np.linalg.norm(case.eps)
    assert 1e-3 < error < 0.6  # quantised, and a model of what it was

    fixed = apply.fixed_cost(case.params, chosen, rows=len(STEPS))["bytes"]
    promised = fixed + sum(
        costs.bytes.device_bytes(site, plan.w_bits[site.path] or 0, flag)
        for site, flag in zip(chosen, flags, strict=True)
    )
    execution = verify.read(compiled, images=[case.x.shape])
    assert len(plan.integer(chosen)) == len(chosen) >= case.count
    assert not verify.check(execution, chosen, promised_bytes=promised, passed_bytes=model.bytes)
    if case.name not in SIMULATED:
        return

    choices = [(bits, 8) for bits in sorted(WIDTHS)]
    net = simulate.supernet(case.params, chosen, choices, {8: table}, flags, clip="absmax")
    picked = [choices.index((plan.w_bits[s.path] or 8, 8)) for s in chosen]
    simulated = simulate.simulated_denoise(case.denoise, chosen, choices)
    given = {**net, "choice": np.array(picked, np.int32)}
    found = case.run(simulated, given).eps
    if (
        case.name == "half"
    ):  # bfloat16 between the sites: a near tie goes either way in two programs
        apart = np.linalg.norm(integer - found) / np.linalg.norm(integer)
        assert apart < 0.1 * error
        return
    np.testing.assert_allclose(integer, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["scanned", "raw", "swin"])
def test_a_softmax_is_the_left_operand_and_has_all_levels(name):
    """However attention was written: flax and einsums of it put the values first."""
    case = case_of(name)
    chosen, table = planned(case)[1:3]
    columns = activations.columns(chosen)
    zeros = np.array([table.zero_point[:, columns[s.path]] for s in chosen if s.kind == "product"])
    scores, mixed = zeros[::2], zeros[1::2]
    assert len(scores) == len(mixed) > 0
    np.testing.assert_array_equal(mixed, np.broadcast_to([-128, 0], mixed.shape))
    np.testing.assert_array_equal(scores[..., 1], 0)


def test_every_site_can_be_recorded_and_priced(case):
    chosen = sites.planned(case.sites, products=True)
    step = np.full(4, 20, np.int32)
    one = record.one_timestep(case.denoise, chosen)
    taken = jax.eval_shape(one, case.params, case.x, step, case.cond)
    assert taken["gram"].shape == (len(chosen), 4, 4)
    found = legality.operations(case.denoise, case.params, chosen, case.x, np.int32(20), case.cond)
    assert not any(legality.float_only(operation) for operation in found.values())
    for site in chosen:
        operation = found[site.path]
        macs = operation.rows * operation.contraction * operation.outputs
        assert macs in (site.macs, 4 * site.macs)  # once, or for each image


def test_the_guide_runs(monkeypatch):
    """The block of docs/extend.md, on the scanned model: from a module to a verified plan."""
    text = (Path(__file__).parents[1] / "docs" / "extend.md").read_text().split("### In Python")[1]
    block = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    case = case_of("scanned")
    one_layer = jax.tree.map(lambda leaf: leaf[:1], case.variables["params"]["layers"])
    rng = np.random.default_rng(1)
    names: dict[str, Any] = {
        "module": ScannedDiT(depth=1),
        "variables": {"params": {**case.variables["params"], "layers": one_layer}},
        "x_ts": rng.standard_normal((2, *case.x.shape)).astype(np.float32),
        "timesteps": STEPS,
        "cond": LABEL,
    }
    exec(compile(block, "extend.md", "exec"), names)
    plan, model = names["plan"], names["model"]
    assert len(set(plan.w_bits.values())) > 1
    assert names["answer"].status.feasible and model.bytes <= names["budget"]
    assert not names["complaints"]
    assert [one.reason for one in names["left_in_float"]] == [mpqdiff.intercept.LEFT["grouped"]]


def test_samples_are_the_first_axis_whatever_the_layout():
    case = case_of("mixer")
    chosen = {site.path for site in case.sites if not site.path.startswith("time")}
    observed = jax.jit(
        mpqdiff.observe(case.denoise, lambda path, m, k, args, out: out if path in chosen else None)
    )
    _, one = observed(case.params, case.x, np.int32(20), None)
    _, other = observed(case.params, case.x[::-1], np.int32(20), None)
    assert one.keys() == chosen
    for path, out in one.items():
        np.testing.assert_allclose(other[path], out[::-1], rtol=1e-4, atol=1e-5, err_msg=path)


def test_our_own_models_have_the_sites_that_interception_finds():
    module = models.build(
        "dit", image_size=8, channels=1, patch=4, width=16, depth=2, num_heads=2, num_classes=3
    )
    params = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    inputs = sites.example_inputs((8, 8, 1))
    expected, _ = sites.list_sites(from_linen(module), params, *inputs)
    found, remainder = sites.list_sites(*mpqdiff.from_flax(module, params, *inputs), *inputs)
    assert remainder == []
    wanted = [s for s in expected if s.kind != "embedding"]
    assert [(s.path, s.kind, s.macs) for s in found] == [(s.path, s.kind, s.macs) for s in wanted]


def test_a_parameter_is_held_once_per_way_of_reading_it():
    case = case_of("albert")
    held = jax.tree.map(np.shape, case.params)
    assert held["table"]["kernel"] == (2, 6) and held["table~1"]["kernel"] == (6, 2)
    ties = [site.tie for site in case.sites]
    assert ties.count("loop/a") == ties.count("loop/b") == 3
    total = sum(leaf.size for leaf in jax.tree.leaves(case.variables))
    assert sum(leaf.size for leaf in jax.tree.leaves(case.params)) == total + 12


def test_calls_that_do_not_work_say_what_to_do():
    module, x, t = UNet(2), np.zeros((2, 4, 4, 2), np.float32), np.zeros(2, np.int32)
    variables = jax.eval_shape(
        lambda key: nn.init(call_unet, module)(key, x, t, None), jax.random.key(0)
    )
    with pytest.raises(InputError, match=r"UNet could not be called(.|\n)*call=lambda"):
        mpqdiff.from_flax(module, variables, x, t, None)
    with pytest.raises(InputError, match=r"gives dict for x_t \(2, 4, 4, 2\)"):
        mpqdiff.from_flax(
            module, variables, x, t, None, call=lambda m, x, t, c: m.forward(x, time=t, train=False)
        )
    with pytest.raises(InputError, match=r"UNet could not be called(.|\n)*module.init"):
        mpqdiff.from_flax(module, {"params": {}}, x, t, None, call=call_unet)
    denoise, _ = mpqdiff.from_flax(module, variables, x, t, None, call=call_unet)
    with pytest.raises(InputError, match=r"'grow/bias'.*pass the params that from_flax gave"):
        denoise(variables["params"], x, t, None)
    with pytest.raises(InputError, match="variables are list"):
        mpqdiff.from_flax(module, [], x, t, None, call=call_unet)


class OnlyScalar(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        return nn.Dense(2)(x_t) + jnp.zeros((4,)).at[t].get() * t.reshape(())


def test_a_module_for_one_timestep_only_is_refused():
    x = np.zeros((2, 4, 4, 2), np.float32)
    variables = OnlyScalar().init(jax.random.key(0), x, jnp.int32(1), None)
    with pytest.raises(InputError, match=r"takes t of shape \[\] and not \[B\]"):
        mpqdiff.from_flax(OnlyScalar(), variables, x, np.int32(1), None)


class Long(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        w = self.param("w", nn.initializers.orthogonal(), (2, 2))
        x = jax.lax.fori_loop(0, 300, lambda i, x: x @ w, nn.Dense(2)(x_t))
        return jax.lax.while_loop(lambda x: x.sum() > 1e9, lambda x: x @ w, x)


def test_a_loop_too_long_to_unroll_is_listed():
    case = Case(Long())
    assert [site.path for site in case.sites] == ["Dense_0"]
    assert sorted((one.macs, one.reason) for one in case.remainder) == [
        (64, mpqdiff.intercept.LEFT["while"]),
        (300 * 64, mpqdiff.intercept.LEFT["loop"]),
    ]
