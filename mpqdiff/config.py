"""The base configuration: every key, its default and its unit. Files in `configs/` change a few.

`validate` is run before any device work: an unknown key, method name or count is an InputError
that lists what exists.
"""

import difflib
import math
import re
from typing import Any

from ml_collections import ConfigDict

from mpqdiff.errors import InputError

Config = Any  # a ConfigDict, whose keys no type checker knows


def base() -> Config:
    """A fresh ConfigDict with every default."""
    config: Config = ConfigDict()
    config.name = "experiment"  # title of the report
    config.system = "mpq_diff"  # the recipe's name, written into plan.json
    config.seed = 0

    config.weights = "fashion_dit"  # embedded name, path to .safetensors, or "random"
    # Only for weights="random" and for training; a weights file brings its own model.
    config.model = ConfigDict({"name": "dit", "kwargs": {}})
    config.model.kwargs = ConfigDict(
        dict(image_size=28, channels=1, patch=4, width=96, depth=6, num_heads=3, num_classes=10)
    )
    # Of latent models, whose samples are decoded: a path, or "random" with `kwargs`; "" for none.
    config.autoencoder = ConfigDict({"weights": "", "kwargs": {}})
    config.text = ""  # of text models: an .npz of cached `embeddings` [prompts, tokens, width]
    config.data = ConfigDict(
        dict(
            name="fashion_mnist",
            dir="",  # folder of the archives; "" lets TFDS download. Only training reads data
            cache="~/.cache/mpqdiff/data",
        )
    )
    config.diffusion = ConfigDict(
        dict(
            schedule="linear",  # linear, scaled_linear, cosine
            betas=(),  # (first, last) instead of the schedule's own
            num_timesteps=1000,  # F
            prediction_type="eps",  # what the network predicts: eps, x_0, v
            sampler="ddim",  # ddim, ddpm, ddpm_large, ddpm_learned, dpm_solver
            num_steps=20,  # S of arm 0
            eta=0.0,
            guidance_scale=1.0,
            clip=True,  # clip x_0 to [-1, 1] inside the sampler
        )
    )
    config.timesteps = ConfigDict(
        dict(
            # uniform, quadratic, log_snr, drift_edges, shortest_path; or drift, which prunes by the
            # student of a plan: float arms then run uniform ones.
            name="uniform",
            # drift_edges, shortest_path: by what a plan's own student adds to the edges, too
            by_student=False,
            samples=32,  # trajectories that the last three choose by
            tail=0.0,  # the last t < tail F are kept
            data_std=1.0,  # spread of the data: 1 is the error in x_t, large values that in x_0
            power=1,  # errors of steps add in norm (1) or in square (2)
            reach=1.0,  # quadratic: its first timestep over F
            drift="state",  # drift: of the state, or of eps at the teacher's or student's state
            every=0,  # drift: removals between two measurements of it; 0 measures once
        )
    )
    config.calibration = ConfigDict(
        dict(
            samples=64,  # N trajectories of the float model
            timesteps=20,  # T recorded of the S sampler steps, evenly spaced
            memory_gb=1.0,  # activations alive at once while recording
        )
    )
    config.score = ConfigDict(
        dict(
            name="orthogonality",
            estimator="centered",  # centered, uncentered, debiased
            include_pinned=False,  # do pinned sites count in the other sites' means
            temporal_policy="pooled",  # sites fed by (t, label) alone: pooled, or pin (at 8 bit)
            samples=16,  # images of a rollout (rollout_error)
            manifold=dict(
                pca="leak",  # leak, rotate, concentration
                normalisation="rank",  # of each signal over the sites: rank, min_max
                weights=(1.0, 1.0, 1.0, 1.0),  # of energy, pca, dimension, growth
                rows=8192,  # tokens or positions of a site that are read at a timestep, at most
                share=0.95,  # of the variance, held by the principal directions
            ),
        )
    )
    config.aggregate = ConfigDict(
        dict(
            name="exp_mean",
            beta=10.0,  # on the mean off-diagonal metric
            lam=0.0,  # w_t ~ exp(-lam t / F); 0 weighs all timesteps alike
        )
    )
    config.plan = ConfigDict(
        dict(
            w_bits=(4, 8),  # an unpinned site chooses a pair (weight bits, activation bits)
            a_bits=(8,),
            keep_float=False,  # a site may also stay in float
            # (regex, bits, or 32 for float), in every arm
            pins=(("patch_embed|final", 8), ("t_embed/.*", 8)),
            ties=(),  # regexes: sites matched with the same captured groups take one choice
            legality="any",  # any; or cpu, gpu, tpu: leave out what that device cannot do well
            solver="lp",
            exact=False,  # lp: branch and bound on what the relaxation leaves open
            node_limit=10_000,
            bits="",  # file of another tool's bit list: taken as it is, nothing is solved
            # What is bounded, 0 where nothing is. With no bound at all, `resource` is bounded by
            # `ratio` times what uniform `ratio_bits` with the same pins takes.
            budget=dict(
                bytes=0.0,  # on the device
                file_bytes=0.0,
                bitops=0.0,  # per image
                seconds=0.0,  # per image, from products measured on this device
                joules=0.0,  # per image, modelled
                mean_bits=0.0,  # of the weights of unpinned sites
            ),
            # The same as a share: the float32 model of arm 0 takes so many times more.
            reduction=dict(bytes=0.0, file_bytes=0.0, bitops=0.0, seconds=0.0, joules=0.0),
            resource="bytes",
            ratio=1.165,
            ratio_bits=4,
            # S of the plan: () as diffusion.num_steps, one, or several to choose from by the
            # measured error of `rollout` images.
            steps=(),
            rollout=64,
            tolerance=0.0,  # take the fewest steps of at most this relative error; 0 the least one
        )
    )
    config.quantize = ConfigDict(
        dict(
            backend="kernels",  # kernels (XLA's), pallas_tpu, pallas_gpu, measured, aqt
            mode="step_table",  # static, step_table, online, ema
            groups=0,  # rows of the table at most; 0: one for each recorded timestep
            beta=0.9,  # ema: the share of the range that is kept from one row to the next
            products=False,  # attention products in integers
            clip="mse",  # weight scale: mse or absmax
        )
    )
    config.sample = ConfigDict(
        dict(
            num_images=256,
            by_steps=(),  # pairs (S at most, images): arms of fewer steps can afford more images
            batch=64,
            seed=1234,
        )
    )
    config.evaluate = ConfigDict(
        dict(
            features="fashion_classifier",  # "": paired metrics only, which need no network
            weights="",  # of features="inception": the file that FID is defined by
            reference="fashion_reference",  # or an .npz with mu and sigma
            ceiling_steps=2,  # the float model whose FID is damage 1
            timing_rounds=5,  # every arm once per round, in turn
            batch_1=False,  # time single images too; one more program per arm
            predict_ms=False,  # what the latency model expects, too; minutes once per device; null
            # where this machine gives no usable fit
            drift_images=0,  # images whose trajectories are compared; one more program per arm
            health_images=0,  # images whose clipped and not finite activations are counted, by arm
            downstream=False,  # classifiers trained on each arm's samples; needs real test images
        )
    )
    # Further arms, each a name and the keys in which it differs from the plan above (ARM_KEYS).
    config.arms = ConfigDict(
        {  # the controls, at the plan's budget
            "uniform": {"solver": "uniform"},
            "random_0": {"solver": "random", "seed": 0},
            "size_only": {"solver": "size_only"},
        }
    )
    config.report = ConfigDict(dict(num_images=8))
    config.train = ConfigDict(
        dict(
            epochs=30,
            batch=128,
            learning_rate=1e-3,
            warmup_steps=500,
            weight_decay=0.0,
            ema_decay=0.999,
            label_dropout=0.1,
            loss_weight="uniform",  # uniform, min_snr
            dtype="float32",  # float32, bfloat16
            checkpoint_every=500,  # steps
            log_every=50,  # steps
        )
    )
    config.publish = True  # False: no metric is evaluated (random weights)
    return config


# What an arm may change, and the key of the base configuration that it stands for.
ARM_KEYS = {
    "score": "score.name",
    "manifold": "score.manifold",
    "aggregate": "aggregate.name",
    "solver": "plan.solver",
    "w_bits": "plan.w_bits",
    "a_bits": "plan.a_bits",
    "keep_float": "plan.keep_float",
    "exact": "plan.exact",
    "bits": "plan.bits",
    "resource": "plan.resource",
    "budget": "plan.budget",
    "ratio": "plan.ratio",
    "ratio_bits": "plan.ratio_bits",
    "reduction": "plan.reduction",
    "steps": "plan.steps",
    "backend": "quantize.backend",
    "mode": "quantize.mode",
    "groups": "quantize.groups",
    "seed": "seed",
    "num_steps": "diffusion.num_steps",
    "timesteps": "timesteps.name",
    "by_student": "timesteps.by_student",
    "tail": "timesteps.tail",
    "float": "no plan: the float32 model (with num_steps)",
}

POSITIVE = (
    "diffusion.num_timesteps", "diffusion.num_steps", "calibration.samples",
    "calibration.timesteps", "calibration.memory_gb", "score.samples", "score.manifold.rows",
    "plan.ratio",
    "plan.ratio_bits", "plan.node_limit", "plan.rollout", "timesteps.samples", "timesteps.data_std",
    "sample.num_images", "sample.batch", "evaluate.ceiling_steps", "evaluate.timing_rounds",
    "report.num_images", "train.epochs", "train.batch", "train.learning_rate",
    "train.checkpoint_every", "train.log_every",
)  # fmt: skip

NOT_NEGATIVE = (
    "diffusion.eta", "evaluate.drift_images", "evaluate.health_images", "plan.tolerance",
    "timesteps.every",
)  # fmt: skip


def validate(config: Config) -> None:
    """InputError on a key that `base` lacks or the reverse, a value of another type than the
    default's, or a count that is not positive."""
    _compare_keys(config, base(), "config")
    _check_values(config)
    if config.calibration.samples < 4:
        raise InputError(f"config.calibration.samples={config.calibration.samples}: at least 4")
    if min(config.seed, config.sample.seed) < 0 or config.seed == config.sample.seed:
        raise InputError(
            f"config.seed={config.seed}, config.sample.seed={config.sample.seed}: expected two "
            "different non-negative numbers, or the plan is calibrated on the noise it is judged by"
        )
    for name, changes in config.arms.items():
        if name in ("float", "plan", "ceiling"):
            raise InputError(f"config.arms.{name}: the name is taken; choose another")
        if not isinstance(changes, ConfigDict):
            raise InputError(f"config.arms.{name}={changes!r}: expected a group of keys")
        for key in changes:
            if key not in ARM_KEYS:
                raise _unknown_key(f"config.arms.{name}", key, ARM_KEYS)
            default: Any = False if key == "float" else _at(base(), ARM_KEYS[key])
            where = f"config.arms.{name}.{key}"
            if not isinstance(default, ConfigDict):
                _check_type(where, changes[key], default)
            elif not isinstance(changes[key], ConfigDict):
                raise InputError(f"{where}={changes[key]!r}: expected a group of keys")
            else:
                given: Any = changes[key]
                for part in given:
                    if part not in default:
                        raise _unknown_key(where, part, default)
                    _check_type(f"{where}.{part}", given[part], default[part])
    for changes in config.arms.values():  # what an arm changes is checked like the rest
        _check_values(for_arm(config, changes))


def _check_values(config: Config) -> None:
    """InputError on a value out of range, in the config itself or in what an arm makes of it."""
    for path in POSITIVE:
        value = _at(config, path)
        if not value > 0:
            raise InputError(f"config.{path}={value}: expected a positive number")
    for name, value in config.model.kwargs.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise InputError(f"config.model.kwargs.{name}={value}: expected at least 1")
    for path in NOT_NEGATIVE:
        if not _at(config, path) >= 0:
            raise InputError(f"config.{path}={_at(config, path)}: expected 0 or more")
    _check_manifold(config.score.manifold)
    _check_pins(config.plan.pins)
    _check_ties(config.plan.ties)
    for name, value in config.plan.budget.items():
        if not value >= 0:
            raise InputError(f"config.plan.budget.{name}={value}: expected a bound, or 0 for none")
    for name, value in config.plan.reduction.items():
        if not value >= 0:
            raise InputError(
                f"config.plan.reduction.{name}={value}: expected how many times less than float32, "
                "or 0 for no bound"
            )
    for steps in config.plan.steps:
        if type(steps) is not int or steps < 1:
            raise InputError(f"config.plan.steps={config.plan.steps}: expected counts of steps")
    for pair in config.sample.by_steps:
        counts = list(pair) if isinstance(pair, tuple | list) else [pair]
        if len(counts) != 2 or any(type(count) is not int or count < 1 for count in counts):
            raise InputError(
                f"config.sample.by_steps has {pair!r}: expected pairs (steps at most, images)"
            )


def _at(config, path: str):
    for part in path.split("."):
        config = config[part]
    return config


def _compare_keys(config, reference, where: str) -> None:
    for key in config:
        if key not in reference:
            raise _unknown_key(where, key, reference)
        if isinstance(reference[key], ConfigDict):
            if not isinstance(config[key], ConfigDict):
                raise InputError(f"{where}.{key}={config[key]!r}: expected a group of keys")
            if key not in ("kwargs", "arms"):
                _compare_keys(config[key], reference[key], f"{where}.{key}")
        else:
            _check_type(f"{where}.{key}", config[key], reference[key])
    for key in reference:
        if key not in config:
            raise InputError(f"{where}.{key} is missing: start from mpqdiff.config.base()")


def _check_type(where: str, value, default) -> None:
    """InputError unless `value` is of the default's type; JSON's lists pass for tuples."""
    kinds = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{where}={value!r}: expected a {type(default).__name__}")


def _check_manifold(readings) -> None:
    weights = list(readings.weights)
    numbers = all(type(weight) in (int, float) and math.isfinite(weight) for weight in weights)
    if len(weights) != 4 or not numbers or min(weights) < 0 or not any(weights):
        raise InputError(
            f"config.score.manifold.weights={readings.weights}: expected four numbers, at least 0 "
            "and not all 0: of energy, pca, dimension, growth"
        )
    if not 0 < readings.share <= 1:
        raise InputError(
            f"config.score.manifold.share={readings.share}: expected a share of the variance in "
            "(0,1]"
        )


def _check_pins(pins) -> None:
    for pin in pins:
        try:
            pattern, bits = pin
            re.compile(pattern)
            if type(bits) is not int:
                raise TypeError(f"{bits!r} bits")
        except (TypeError, ValueError, re.error) as error:
            raise InputError(
                f"config.plan.pins has {pin!r} ({error}): expected pairs (regex of paths, "
                "bits; 32 is float)"
            ) from error


def _check_ties(ties) -> None:
    for tie in ties:
        try:
            re.compile(tie)
        except (TypeError, re.error) as error:
            raise InputError(
                f"config.plan.ties has {tie!r} ({error}): expected regexes of site paths"
            ) from error


def _unknown_key(where: str, key: str, known) -> InputError:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown key {where}.{key}{hint} (known: {', '.join(sorted(known))})")


def for_arm(config: Config, changes) -> Config:
    """A copy of `config` with an arm's `changes` (keys of ARM_KEYS) put where they belong."""
    copy = config.copy_and_resolve_references()
    if {"ratio", "ratio_bits", "resource", "budget", "reduction"} & set(changes):
        copy.plan.budget = base().plan.budget  # the arm's own budget
        copy.plan.reduction = base().plan.reduction
    for key, value in changes.items():
        if key == "float":
            continue
        group, _, leaf = ARM_KEYS[key].rpartition(".")
        into = copy[group] if group else copy
        if isinstance(value, ConfigDict):
            into[leaf].update(value)
        else:
            into[leaf] = value
    return copy


def smoke(config: Config, **kwargs) -> Config:
    """Shrink `config` to seconds: random small weights, a few samples, no metric published.

    `kwargs` replace the model's; without any, those of a small transformer.
    """
    config.weights = "random"
    config.model.kwargs.update(kwargs or dict(width=16, depth=2, num_heads=2))
    if config.autoencoder.weights:
        config.autoencoder.weights = "random"
        config.autoencoder.kwargs = dict(widths=(8, 8), layers=1, groups=4)
    config.diffusion.num_steps = 4
    config.calibration.update(samples=8, timesteps=4)
    config.score.samples = 4
    config.sample.update(num_images=8, batch=4)
    config.evaluate.timing_rounds = 2
    config.report.num_images = 2
    config.train.update(epochs=1, batch=8, checkpoint_every=4, log_every=2)
    config.publish = False
    return config
