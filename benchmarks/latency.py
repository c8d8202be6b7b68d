"""Does a table of single products predict a sampler? Measured on the embedded DiT, in one process.

    mpqdiff bench latency [--plans 20] [--held_out 10] [--batch 64] [--steps 4] [--rounds 15]
                          [--products] [--weights fashion_dit] [--fresh]

First the table: each unique operation of the denoiser in each execution, with the ratio of float32
to it (above 1: faster than float32). Then `--plans` random plans that mix float and integer sites
are compiled and run in turn, seconds = alpha + beta * sum is fitted, and the error is that of
`--held_out` further plans. `--fresh` measures the table again instead of reading the cache.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from mpqdiff import cli
from mpqdiff.config import base
from mpqdiff.costs import calibration, latency, legality
from mpqdiff.errors import InputError
from mpqdiff.pipeline import Experiment
from mpqdiff.plan import Plan
from mpqdiff.quantize import apply
from mpqdiff.records import FLOAT_BITS

CHOICES = ((2, 8), (4, 8), (8, 8), (FLOAT_BITS, FLOAT_BITS))


def experiment_config(options):
    """The embedded model, without pins, at the sampler and batch of the benchmark."""
    config = base()
    config.weights = options.weights
    config.plan.pins = ()
    config.quantize.products = options.products
    config.diffusion.num_steps = options.steps
    config.calibration.update(samples=8, timesteps=options.steps)
    config.sample.update(num_images=options.batch, batch=options.batch)
    return config


def operations(experiment: Experiment, batch: int) -> dict[str, legality.Operation]:
    """The operations of the planned sites as the sampler calls them."""
    x_T, labels, _ = experiment.inputs(1, 0, batch)
    return legality.operations(
        experiment.denoise,
        experiment.params,
        experiment.sites,
        x_T,
        jax.ShapeDtypeStruct((), "int32"),
        labels,
        asymmetric=experiment.asymmetric(experiment.config),
    )


def widths(experiment: Experiment, pairs) -> Plan:
    """A plan with one of CHOICES per planned site; everything else stays in float."""
    found = {s.path: (FLOAT_BITS, FLOAT_BITS) for s in experiment.all_sites}
    found |= dict(zip((s.path for s in experiment.sites), pairs, strict=True))
    w_bits, a_bits = {}, {}
    for site in experiment.all_sites:
        w, a = (None if bits == FLOAT_BITS else bits for bits in found[site.path])
        w_bits[site.path] = w if site.parameters else None
        a_bits[site.path] = {"lhs": a, "rhs": a} if site.kind == "product" else a
    steps = tuple(map(int, experiment.timesteps))
    return Plan({"hash": experiment.model_hash}, w_bits, a_bits, "step_table", (), steps, "bench")


def sampler_of(experiment: Experiment, batch: int):
    """`runner(choice [L])`: the compiled sampler of those choices, to be run without arguments."""
    config, table = experiment.config, experiment.table(experiment.config)
    arguments = table, experiment.asymmetric(config)
    integers = {
        w: apply.quantize(
            experiment.params,
            experiment.sites,
            widths(experiment, [(w, 8)] * len(experiment.sites)),
            *arguments,
            clip="absmax",
        )
        for w, _ in CHOICES
        if w != FLOAT_BITS
    }
    inputs = experiment.inputs(1, 0, batch)

    def runner(choice):
        plan = widths(experiment, [CHOICES[k] for k in choice])
        tensors = {
            site.path: integers[plan.width(site.path)][site.path]
            for site in plan.integer(experiment.sites)
            if site.parameters
        }
        model = apply.build(
            experiment.denoise, experiment.params, experiment.sites, plan, tensors, table
        )
        sample = experiment.sampler(model.denoise, experiment.timesteps)
        compiled = jax.jit(sample).lower(model.params, *inputs).compile()
        return lambda: compiled(model.params, *inputs).block_until_ready()

    return runner


def table_lines(found: dict, measured: latency.Latencies) -> list[str]:
    """A row per unique operation: microseconds in float32, then each execution's ratio to it."""
    names = [*legality.FLOATS, *legality.INTEGERS]
    lines = [f"{'operation':<34}{'sites':>6}{'us':>8}" + "".join(f"{name:>9}" for name in names)]
    for operation, count in Counter(found.values()).items():
        entry = measured.seconds[operation]
        size = f"{operation.rows} x {operation.contraction} -> {operation.outputs}"
        mark = "*" if operation.asymmetric else ""
        lines.append(
            f"{operation.kind + mark:<10}{size:<24}{count:>6}{1e6 * entry['float32'].median:>8.0f}"
            + "".join(
                f"{entry['float32'].median / entry[name].median:>8.2f}x"
                if name in entry
                else f"{'-':>9}"
                for name in names
            )
        )
    return lines


def fit_lines(found: calibration.Calibration) -> list[str]:
    """What was fitted, and how well it foretells the plans held out."""
    fit, errors = found.fit, found.errors
    span = np.concatenate([found.measured, found.held_measured])
    constant = np.abs(np.median(found.measured) / found.held_measured - 1)
    return [
        f"seconds per denoiser call = {fit.alpha:.4g} + {fit.beta:.4g} x sum, R2 {fit.r2:.3f}, "
        f"{len(found.measured)} plans",
        f"measured {1e3 * span.min():.2f} to {1e3 * span.max():.2f} ms per call",
        f"held out ({len(errors)}): median error {np.median(errors):.1%}, max {errors.max():.1%}; "
        f"of one number for all plans {np.median(constant):.1%}, max {constant.max():.1%}",
    ]


def main() -> None:
    """Print the table and the fit."""
    parser = argparse.ArgumentParser(description="Table of products against samplers")
    for name, default in (("plans", 20), ("held_out", 10), ("batch", 64), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--products", action="store_true", help="attention products too")
    parser.add_argument("--weights", default="fashion_dit")
    parser.add_argument("--fresh", action="store_true", help="do not read the cached table")
    options = parser.parse_args()
    if min(options.batch, options.steps, options.rounds, options.held_out) < 1 or options.plans < 3:
        raise InputError(f"{vars(options)}: expected at least 3 plans and positive counts")
    cli.prepare_jax()
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(experiment_config(options), Path(folder))
        found = operations(experiment, options.batch)
        begin = time.perf_counter()
        fresh = Path(folder) / "latency" if options.fresh else None
        measured = latency.measure(found.values(), folder=fresh)
        print(f"table {measured.digest}: {time.perf_counter() - begin:.1f} s, {measured.device}")
        print("\n".join(table_lines(found, measured)))
        legal, _ = legality.legal(found, CHOICES, legality.RULES["cpu"])
        fitted = calibration.calibrate(
            sampler_of(experiment, options.batch),
            latency.table(measured, found, CHOICES),
            calibration.random_plans(0, legal, CHOICES, options.plans),
            calibration.random_plans(1, legal, CHOICES, options.held_out),
            evaluations=options.steps * experiment.halves,
            rounds=options.rounds,
        )
    print("\n".join(fit_lines(fitted)))


if __name__ == "__main__":
    main()
