"""Arms: the models that an experiment compares, built, compiled, sampled, timed and verified.

Arm 0 is the float32 model, then the plan, then what the config lists. Each arm has one compiled
sampler, which samples, is timed, and is the program that `evaluate.verify` reads.
"""

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mpqdiff import joint, seconds
from mpqdiff.artifacts import chunked, load_arrays, save_arrays
from mpqdiff.config import for_arm
from mpqdiff.diffusion.samplers import check_timesteps
from mpqdiff.errors import InputError, VerificationError
from mpqdiff.evaluate import verify
from mpqdiff.images import to_uint8
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.plan import Plan
from mpqdiff.quantize import store
from mpqdiff.quantize.apply import build, float_leaves, stream
from mpqdiff.recipe import count_images


class Arm:
    """One model of the comparison. `plan` is None for a float arm."""

    def __init__(self, experiment: Experiment, name: str, system: str, config, plan: Plan | None):
        self.experiment, self.name, self.system = experiment, name, system
        self.config, self.plan = config, plan
        if plan:
            check_timesteps(plan.timesteps, config.diffusion.num_timesteps)
            unable = plan.integer(
                [site for site in experiment.all_sites if site not in experiment.sites]
            )
            if unable:
                raise InputError(
                    f"the plan has widths for {[site.path for site in unable]}, which this config "
                    "leaves in float: set config.quantize.products=True for attention products"
                )
        self.timesteps = np.asarray(plan.timesteps, np.int32) if plan else experiment.steps(config)

    @property
    def backend(self) -> str:
        """What multiplies: xla for a float arm, else the integer back end."""
        return self.config.quantize.backend if self.plan else "xla"

    @property
    def batch(self) -> int:
        """Images per call of the compiled sampler."""
        return min(self.config.sample.batch, self.count)

    @property
    def count(self) -> int:
        """Images that the arm samples."""
        return count_images(self.config, len(self.timesteps))

    @cached_property
    def file(self) -> Path:
        """The saved model: bit-packed for a plan. `sample --workdir` and users load it."""
        assert self.plan is not None
        experiment, plan = self.experiment, self.plan
        steps = experiment.table(self.config, plan.a_bits)

        def compute(folder):
            tensors = stream(
                experiment.params,
                experiment.sites,
                plan,
                experiment.asymmetric(self.config),
                clip=self.config.quantize.clip,
            )
            left = float_leaves(experiment.params, plan.integer(experiment.sites))
            store.save(folder / "model.safetensors", plan, tensors, left, steps)

        key = {
            "plan": plan.hash,
            "record": experiment.statistics[0].name,
            "clip": self.config.quantize.clip,
            "table": [self.config.quantize.groups, self.config.quantize.beta],
        }
        folder = experiment.store.get("quantize", version=2, key=key, compute=compute)
        return folder / "model.safetensors"

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """(params on the device, denoise)."""
        if self.plan is None:
            return jax.tree.map(jnp.asarray, self.experiment.params), self.experiment.denoise
        _, tensors, steps = store.load(self.file)
        built = build(
            self.experiment.denoise,
            self.experiment.params,
            self.experiment.sites,
            self.plan,
            tensors,
            steps,
            backend=seconds.backends(self.experiment, self.config, self.plan),
        )
        return built.params, built.denoise

    @property
    def passed_bytes(self) -> int:
        """Bytes of the arrays passed to the denoiser besides x_t, t and cond."""
        # Not `nbytes`: that counts a byte for an int4 wherever it is held in half of one.
        return sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(self.model[0]))

    @property
    def file_bytes(self) -> int:
        """Size of the saved file; for float32 the payload of its weights."""
        if self.plan is None:
            return sum(leaf.size * 4 for leaf in jax.tree.leaves(self.experiment.params))
        return self.file.stat().st_size

    def compile(self, batch: int, *, trajectory: bool = False):
        """The ahead-of-time compiled sampler `(params, x_T, cond, keys) -> x_0` at `batch`, or
        `-> (x_0, x_ts)`."""
        params, denoise = self.model
        run = self.experiment.sampler(denoise, self.timesteps, trajectory=trajectory)
        inputs = jax.eval_shape(lambda: self.experiment.inputs(0, 0, batch))
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        return jax.jit(run).lower(shapes, *inputs).compile()

    @cached_property
    def compiled(self):
        """`compile` at the sampling batch: what samples, is timed, and is verified."""
        return self.compile(self.batch)

    @cached_property
    def execution(self) -> verify.Execution:
        """What the compiled sampler multiplies and keeps."""
        x_t, _, cond = self.experiment.input_shapes(self.batch)
        shapes = [leaf.shape for leaf in jax.tree.leaves((x_t, cond))]
        return verify.read(self.compiled, images=shapes)

    def verify(self, resident_bytes: int | None = None) -> None:
        """VerificationError, naming each site, unless the program does what the plan says."""
        if self.plan is None:
            return
        promised = int(self.plan.predicted.get("bytes", -1))
        if self.backend == "aqt":  # AQT's containers are larger: its bytes are its own
            promised = self.passed_bytes
        sites = self.plan.integer(self.experiment.sites)
        if self.file_bytes > self.plan.predicted.get("file_bytes", 0):
            raise VerificationError(
                f"arm {self.name!r}: the file has {self.file_bytes} bytes, the plan promises at "
                f"most {self.plan.predicted.get('file_bytes')}"
            )
        complaints = verify.check(
            self.execution,
            sites,
            promised_bytes=promised,
            passed_bytes=self.passed_bytes,
            resident_bytes=resident_bytes,
        )
        if complaints:
            raise VerificationError(f"arm {self.name!r}: " + "; ".join(complaints))

    def run_batch(self, index: int):
        """x_0 of batch `index`, on the device."""
        return self.compiled(self.model[0], *self.inputs(index))

    def inputs(self, index: int):
        """(x_T, cond, step keys) of batch `index`."""
        start = index * self.batch
        return self.experiment.inputs(self.config.sample.seed, start, self.batch)

    def trajectory(self, count: int) -> np.ndarray:
        """x_t before every step of the first `count` images, float32 [S,count,H,W,C]."""
        run = self.compile(count, trajectory=True)
        inputs = self.experiment.inputs(self.config.sample.seed, 0, count)
        return np.asarray(run(self.model[0], *inputs)[1])

    @cached_property
    def samples(self) -> tuple[str, np.ndarray]:
        """(artifact name, x_0 float32 [n,H,W,C]): image i comes from noise i in every arm."""
        count = self.count

        def compute(folder):
            chunked(folder, "sample")(
                -(-count // self.batch), lambda i: {"x_0": np.asarray(self.run_batch(i))}
            )

        key = {
            "model": self.experiment.model_hash,
            "conditions": self.experiment.conditions_hash,
            "diffusion": self.config.diffusion.to_dict(),
            "timesteps": self.timesteps.tolist(),
            "plan": self.plan.hash if self.plan else None,
            "record": self.experiment.statistics[0].name if self.plan else None,
            "backend": self.backend,
            "quantize": self.config.quantize.to_dict() if self.plan else None,
            "sample": {"num_images": count, "batch": self.batch, "seed": self.config.sample.seed},
        }
        folder = self.experiment.store.get(
            "sample", version=VERSIONS["sample"], key=key, compute=compute
        )
        parts = [np.load(path)["x_0"] for path in sorted(folder.glob("sample_*.npz"))]
        return folder.name, np.concatenate(parts)[:count]

    @cached_property
    def images(self) -> np.ndarray:
        """The samples as uint8 [n,H,W,C]. Latents are decoded first, once."""
        name, x_0 = self.samples
        autoencoder = self.experiment.autoencoder
        if autoencoder is None:
            return to_uint8(x_0)

        def compute(folder):
            decoded = autoencoder.decode(x_0, batch=self.batch)
            save_arrays(folder / "images.npz", {"images": to_uint8(decoded)})

        key = {"sample": name, "autoencoder": autoencoder.hash}
        folder = self.experiment.store.get(
            "decode", version=VERSIONS["decode"], key=key, compute=compute
        )
        return load_arrays(folder / "images.npz")["images"]


def list_arms(experiment: Experiment) -> list[Arm]:
    """Float, the plan, then the config's arms by name; plans are solved here."""
    config = experiment.config
    own = joint.plan(experiment, config, config.system)
    arms = [
        Arm(experiment, "float", "float32", config, None),
        Arm(experiment, "plan", config.system, config, own),
    ]
    for name, changes in config.arms.items():
        recipe = for_arm(config, changes)
        if changes.get("float", False):
            arms.append(Arm(experiment, name, "float32", recipe, None))
            continue
        system = changes.get("solver", config.system)
        if "score" in changes:
            system = f"{changes['score']}_{recipe.plan.solver}"
        if changes.get("bits"):
            system = "imported"
        arms.append(Arm(experiment, name, system, recipe, joint.plan(experiment, recipe, system)))
    return arms


def time_arms(arms: list[Arm], rounds: int, *, batch_1: bool = False) -> list[dict[str, Any]]:
    """Milliseconds per image and round of each arm, and of float at the same steps.

    Every round runs each arm once, in turn, so that a drift of the machine's speed falls on all
    of them; one warm-up round is not counted. Returns [{"own": [...], "float_same_steps": [...],
    "single": [...] with `batch_1`, of one image at a time}].
    """
    references = {len(arm.timesteps): arm for arm in arms if arm.plan is None}
    for arm in arms:
        if len(arm.timesteps) not in references:
            references[len(arm.timesteps)] = _float_at(arm)
    runners = {id(arm): arm for arm in [*arms, *references.values()]}
    calls: dict[Any, tuple] = {
        key: (arm.compiled, arm.model[0], arm.inputs(0), arm.batch) for key, arm in runners.items()
    }
    if batch_1:
        for arm in arms:
            one = arm.experiment.inputs(arm.config.sample.seed, 0, 1)
            calls["single", id(arm)] = arm.compile(1), arm.model[0], one, 1
    taken: dict[Any, list[float]] = {key: [] for key in calls}
    for count in tqdm(range(rounds + 1), desc="time"):
        for key, (run, params, inputs, batch) in calls.items():
            start = time.perf_counter()
            run(params, *inputs).block_until_ready()
            if count:
                taken[key].append(1e3 * (time.perf_counter() - start) / batch)
    return [
        {
            "own": taken[id(arm)],
            "float_same_steps": taken[id(references[len(arm.timesteps)])],
            "single": taken.get(("single", id(arm))),
        }
        for arm in arms
    ]


def _float_at(arm: Arm) -> Arm:
    same = arm.config.copy_and_resolve_references()
    same.diffusion.num_steps = len(arm.timesteps)
    return Arm(arm.experiment, f"float_{len(arm.timesteps)}", "float32", same, None)
