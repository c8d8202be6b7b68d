"""A recipe is a config, or a config as one arm changes it: checked, and its model loaded."""

from typing import Any

import jax
import numpy as np

from mpqdiff import aggregate, models, sensitivity, solve, timesteps, weights
from mpqdiff import plan as plans
from mpqdiff.config import Config, for_arm
from mpqdiff.costs import RESOURCES, list_choices
from mpqdiff.costs.legality import RULES
from mpqdiff.diffusion.process import PREDICTION_TYPES
from mpqdiff.diffusion.samplers import SAMPLERS, uniform_timesteps
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.evaluate import features, statistics
from mpqdiff.quantize import activations
from mpqdiff.quantize.backends import MEASURED, check_backend
from mpqdiff.quantize.numerics import BITS, CLIPS, check_bits
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sensitivity import manifold_score, orthogonality, ranking
from mpqdiff.timesteps import candidates, drift, edges


def recipes(config: Config) -> list[Config]:
    """The config itself, then that of each of its arms."""
    return [config, *(for_arm(config, changes) for changes in config.arms.values())]


def count_images(config: Config, steps: int) -> int:
    """Images that an arm of so many steps samples: by `sample.by_steps` where that says so."""
    limits = sorted(tuple(pair) for pair in config.sample.by_steps)
    fitting = [images for most, images in limits if steps <= most]
    return fitting[0] if fitting else config.sample.num_images


def by_student(config: Config) -> bool:
    """Whether the recipe's steps are selected by the student of its plan, when that is known."""
    chosen = config.timesteps
    asks = chosen.by_student and "student" in timesteps.arguments(chosen.name)
    return asks or chosen.name == "drift"


def check_features(config: Config, image_shape: tuple[int, ...]) -> None:
    """InputError when the feature network or its reference does not fit, before any work."""
    if not (config.publish and config.evaluate.features):
        return
    network, _ = feature_space(config)
    if not network.accepts(image_shape):
        raise InputError(
            f"{network.name} takes images {network.image_shape}, the model makes {image_shape}: "
            "set config.evaluate.features='' for paired metrics, which need no network"
        )


def feature_space(config: Config) -> tuple[features.FeatureNetwork, Any]:
    """(feature network, reference statistics) that the config names.

    Raises InputError on weights or a reference that is missing, damaged or of another network.
    """
    network = features.load(config.evaluate.features, weights=config.evaluate.weights or None)
    if config.evaluate.reference.endswith(".npz"):
        return network, statistics.load(config.evaluate.reference, network=network)
    return network, features.load_reference(config.evaluate.reference, network=network)


def check_names(config: Config) -> None:
    """InputError on an unknown name or a width out of range in a recipe, before any work."""
    for kind, name, known in (
        ("score", config.score.name, sensitivity.SCORES),
        ("estimator", config.score.estimator, orthogonality.ESTIMATORS),
        ("temporal policy", config.score.temporal_policy, orthogonality.TEMPORAL_POLICIES),
        ("aggregation", config.aggregate.name, aggregate.AGGREGATIONS),
        ("solver", config.plan.solver, solve.SOLVERS),
        ("budget resource", config.plan.resource, RESOURCES),
        ("legality", config.plan.legality, ("any", *RULES)),
        ("activation mode", config.quantize.mode, plans.MODES),
        ("weight clip", config.quantize.clip, CLIPS),
        ("sampler", config.diffusion.sampler, SAMPLERS),
        ("prediction type", config.diffusion.prediction_type, PREDICTION_TYPES),
        ("selection of timesteps", config.timesteps.name, timesteps.SELECTORS),
        ("PCA sensitivity", config.score.manifold.pca, manifold_score.PCA),
        ("normalisation", config.score.manifold.normalisation, ranking.NORMALISATIONS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    if config.quantize.backend != MEASURED:
        check_backend(config.quantize.backend)
    activations.check_readings(config.quantize.groups, config.quantize.beta)
    list_choices(config.plan.w_bits, config.plan.a_bits)
    if config.plan.resource == "seconds" and not any(config.plan.budget.values()):
        raise InputError(
            "config.plan.resource='seconds' with a ratio: seconds are bounded as they are; set "
            "config.plan.budget.seconds, or resource to another"
        )
    check_bits(config.plan.ratio_bits)
    for pattern, bits in config.plan.pins:
        if bits not in (*BITS, FLOAT_BITS):
            raise InputError(
                f"config.plan.pins holds {pattern!r} at width {bits}: expected 2 to 8 bits, or "
                f"{FLOAT_BITS} for float"
            )
    d = config.diffusion
    abar = alphas_cumprod(d.schedule, d.num_timesteps, d.betas)
    for count in {d.num_steps, *config.plan.steps}:
        uniform_timesteps(d.num_timesteps, count)
        check_selection(config, abar, count)


def check_selection(config: Config, abar: np.ndarray, count: int) -> None:
    """InputError where `count` timesteps cannot be selected as asked, before a trajectory is
    recorded for it. abar [F]."""
    chosen = config.timesteps
    taken = timesteps.arguments(chosen.name)
    if chosen.drift not in drift.READINGS:
        raise unknown_name("reading of drift", chosen.drift, drift.READINGS)
    if not {"gram", "drift"} & taken.keys():
        timesteps.select(abar, count, chosen.name, **{k: chosen[k] for k in taken if k in chosen})
        return
    steps = candidates.candidates_of(abar)
    candidates.check_count(count, candidates.protected(steps, len(abar), chosen.tail), chosen.tail)
    if "gram" in taken:
        edges.check_reading(chosen.data_std, chosen.power)


def load_model(config: Config):
    """(module, params, description) of `config.weights`; "random" draws them for `config.model`.

    Random weights leave no parameter at zero, as the model's own initialisation would: a gate of
    zero hides every site behind it. Drawn on the host, so that nothing is compiled.
    """
    if config.weights != "random":
        module, params, model = weights.load(config.weights, own=config.model.name)
        if isinstance(module, models.FirstStage):
            raise InputError(
                f"config.weights={config.weights!r} is an autoencoder: name it in "
                "config.autoencoder.weights, and a denoiser here"
            )
        return module, params, model
    return random_model(config.model.name, config.model.kwargs.to_dict(), config.seed)


def random_model(name: str, kwargs: dict, seed: int):
    """(module, params, description) with every parameter drawn, none at zero."""
    module = models.build(name, **kwargs)
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        spread = 0.05 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return (spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return module, jax.tree.map(draw, shapes), {"name": name, "kwargs": kwargs}
