"""Steps and bits under one budget: what is offered, what is measured, and which point is taken."""

import json

import jax
import numpy as np
import pytest

from mpqdiff import (
    arms,
    decisions,
    fidelity,
    joint,
    pipeline,
    planning,
    student,
    timesteps,
    weights,
)
from mpqdiff import models as model_list
from mpqdiff.config import base, smoke, validate
from mpqdiff.errors import InputError

MODEL = {"image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "num_heads": 2,
         "num_classes": 3}  # fmt: skip


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    module = model_list.build("dit", **MODEL)
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape), shapes)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    weights.save(path, params, model={"name": "dit", "kwargs": MODEL})
    return str(path)


@pytest.fixture(scope="module")
def config(weights_file):
    config = smoke(base())
    config.weights = weights_file
    config.arms = {}
    config.diffusion.update(num_timesteps=40, num_steps=20)
    config.calibration.update(samples=4, timesteps=3)
    config.score.name = "weight_error"
    config.plan.update(w_bits=(2, 4, 8), rollout=8)
    return config


@pytest.fixture(scope="module")
def experiment(config, tmp_path_factory):
    return pipeline.Experiment(config, tmp_path_factory.mktemp("workdir"))


def _recipe(config, **changes):
    recipe = config.copy_and_resolve_references()
    for path, value in changes.items():
        *groups, leaf = path.split("__")
        into = recipe
        for group in groups:
            into = into[group]
        into[leaf] = value
    validate(recipe)
    return recipe


def _point(steps, error, values, relative=1.0, file_bytes=10):
    return {"steps": steps, "error": error, "values": values, "relative": relative,
            "status": "feasible", "predicted": {"file_bytes": file_bytes}}  # fmt: skip


LEAST = _point(20, 1.0, [1.0, 1.1, 0.9, 1.0], 0.1, 12)
TIED = _point(10, 1.01, [1.2, 0.9, 1.1, 0.84], 0.11, 11)
WORSE = _point(5, 2.0, [2.0, 2.1, 1.9, 2.0], 0.2, 11)
UNABLE = {"steps": 40, "error": None, "predicted": None, "status": "needs more joules"}


def test_the_least_error_wins_and_a_tie_goes_to_fewer_steps():
    assert joint.chosen([UNABLE, LEAST, TIED, WORSE]) is TIED
    assert joint.chosen([UNABLE, LEAST, WORSE]) is LEAST


def test_a_tolerance_takes_the_fewest_steps_within_it():
    assert joint.chosen([LEAST, TIED, WORSE], 0.2) is WORSE
    assert joint.chosen([LEAST, TIED, WORSE], 0.15) is TIED
    assert joint.chosen([LEAST, TIED, WORSE], 0.05) is LEAST  # nothing is within: the least error


def test_no_feasible_number_of_steps_is_told_with_every_reason():
    with pytest.raises(InputError, match=r"fits the budgets \(40 steps: needs more joules\)"):
        joint.chosen([UNABLE])


def test_the_front_is_what_no_other_point_beats():
    assert joint.front([UNABLE, LEAST, TIED, WORSE], ("file_bytes",)) == [False, True, True, False]


def test_a_reduction_is_a_share_of_the_float_model(experiment, config):
    recipe = _recipe(config, plan__reduction__file_bytes=2.5, plan__steps=(10,))
    plan = joint.plan(experiment, recipe, "test")
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(experiment.params))
    assert plan.budgets == {"file_bytes": float(total * 2 // 5)}
    assert plan.predicted["file_bytes"] <= total / 2.5
    assert len(plan.timesteps) == 10
    # The smaller of two bounds of one resource holds.
    tighter = _recipe(recipe, plan__budget__file_bytes=plan.budgets["file_bytes"] - 100.0)
    assert planning.budgets(experiment, tighter) == {"file_bytes": plan.budgets["file_bytes"] - 100}


def test_bitops_of_float_are_those_of_arm_0(experiment, config):
    from mpqdiff.costs.bitops import bitops

    expected = bitops(experiment.all_sites, experiment.remainder, {}, {}, 20)
    assert planning.float_total(experiment, "bitops") == pytest.approx(expected)


def test_a_step_saved_buys_bits(experiment, config, tmp_path):
    few, many = 8, 20
    wide = _recipe(config, plan__w_bits=(8,), plan__ratio=2.0)
    at = {steps: joint.at_steps(experiment, wide, "t", steps) for steps in (few, many)}
    # Enough for 8 bits everywhere at the few steps, and not at the many.
    limit = at[few].predicted["bitops"]
    assert limit < at[many].predicted["bitops"]
    times = planning.float_total(experiment, "bitops") / limit * 0.999
    recipe = _recipe(config, plan__reduction__bitops=times, plan__steps=(few, many))
    points = joint.search(experiment, recipe, "test")
    assert [point["steps"] for point in points] == [many, few]
    assert points[1]["w_bits"] == 8
    assert points[0]["error"] is None or points[0]["w_bits"] < points[1]["w_bits"]
    picked = joint.chosen(points)
    plan = joint.plan(experiment, recipe, "test")
    assert len(plan.timesteps) == picked["steps"]
    log = experiment.store.log
    before = [entry for entry in log if entry["stage"] == "joint"]
    joint.plan(experiment, recipe, "test")
    again = [entry for entry in log if entry["stage"] == "joint"][len(before) :]
    assert again and all(entry["cached"] for entry in again)
    assert "<- the plan" in joint.table(points, picked)


def test_the_error_is_that_of_the_integer_model(experiment, config):
    recipe = _recipe(config, plan__ratio=2.0, plan__w_bits=(8,), plan__steps=(20, 10))
    points = joint.search(experiment, recipe, "test")
    plan = joint.at_steps(experiment, recipe, "test", 20)
    arm = arms.Arm(experiment, "plan", "test", recipe, plan)
    inputs = experiment.inputs(config.seed, 0, 4)
    found = arm.compile(4)(arm.model[0], *inputs)
    truth = jax.jit(experiment.sampler(experiment.denoise, experiment.timesteps))(
        experiment.params, *inputs
    )
    expected = np.mean((np.asarray(found) - np.asarray(truth)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(points[0]["values"][:4], expected, rtol=1e-3)


@pytest.mark.parametrize("every", [0, 9])
def test_drift_prunes_by_the_student_of_the_plan(experiment, config, every):
    recipe = _recipe(config, timesteps__name="drift", timesteps__tail=0.1, timesteps__every=every,
                     plan__steps=(12,))  # fmt: skip
    plan = joint.plan(experiment, recipe, "test")
    assert len(plan.timesteps) == 12
    assert plan.timesteps[0] == 39
    assert plan.timesteps[-4:] == (3, 2, 1, 0)
    even = joint.plan(experiment, _recipe(config, plan__steps=(12,)), "test")
    assert plan.timesteps != even.timesteps
    assert plan.w_bits == even.w_bits
    assert plan.groups[0][0] == 39
    assert plan.groups[-1][1] == 0


@pytest.mark.parametrize("name", ["drift_edges", "shortest_path"])
def test_edges_of_the_plans_own_student_choose_its_steps(experiment, config, name):
    recipe = _recipe(config, timesteps__name=name, timesteps__by_student=True, plan__steps=(12,),
                     plan__w_bits=(2,), plan__pins=())  # fmt: skip
    recipe.plan.update(solver="uniform", ratio_bits=2, ratio=1.0)
    plan = joint.plan(experiment, recipe, "test")
    built = student.model(experiment, recipe, plan)
    noise, cond, _ = experiment.inputs(recipe.seed, 0, recipe.timesteps.samples)
    models = experiment.denoise, experiment.params, built.denoise, built.params
    common = dict(alphas_cumprod=experiment.abar)
    recorded = timesteps.gram.record_student(*models, noise, cond, **common)
    costs = timesteps.edges.edge_costs(
        timesteps.gram.record_gram(*models[:2], noise, cond, **common), student=recorded, **common
    )
    every = np.arange(40)[::-1]
    if name == "shortest_path":
        least = timesteps.shortest_path.front(costs, 12).cost[11]
        own = timesteps.edges.path_cost(costs, plan.timesteps, every)
        assert own == pytest.approx(least, rel=1e-4)  # near ties may fall either way
    alone = joint.plan(experiment, _recipe(recipe, timesteps__by_student=False), "test")
    assert alone.w_bits == plan.w_bits and alone.timesteps != plan.timesteps
    cost = [timesteps.edges.path_cost(costs, p.timesteps, every) for p in (plan, alone)]
    assert cost[0] < cost[1]
    # Another number of steps is read off the same record; a float arm has no student.
    before = len([entry for entry in experiment.store.log if entry["stage"] == "student"])
    fewer = joint.plan(experiment, _recipe(recipe, plan__steps=(6,)), "test")
    log = [entry["cached"] for entry in experiment.store.log if entry["stage"] == "student"]
    assert len(fewer.timesteps) == 6 and log[before:] == [True]
    at_12 = _recipe(recipe, diffusion__num_steps=12)
    assert experiment.steps(at_12).tolist() == list(alone.timesteps)


def test_a_students_steps_keep_the_tail_and_the_samples_of_the_gram(experiment, config):
    recipe = _recipe(config, timesteps__name="drift_edges", timesteps__by_student=True,
                     timesteps__tail=0.1, plan__steps=(12,))  # fmt: skip
    plan = joint.plan(experiment, recipe, "test")
    assert plan.timesteps[0] == 39 and plan.timesteps[-4:] == (3, 2, 1, 0)
    # An arm of another seed asks its student on the same noise as the teacher was.
    own = experiment.store.log
    other = joint.at_steps(experiment, _recipe(recipe, seed=5), "test", 12)
    asked = [entry for entry in own if entry["stage"] == "student"]
    assert asked[-1]["cached"] and other.timesteps == plan.timesteps
    whole = joint.at_steps(experiment, _recipe(recipe, plan__steps=()), "test", 40)
    assert whole.timesteps == tuple(range(39, -1, -1))


def test_an_interrupted_student_goes_on_where_it_was(config, tmp_path, monkeypatch):
    recipe = _recipe(config, timesteps__name="shortest_path", timesteps__by_student=True,
                     timesteps__samples=6, calibration__memory_gb=2 * 3 * 4 * 40 * 64 / 2**30,
                     plan__steps=(5,))  # fmt: skip
    whole = joint.plan(pipeline.Experiment(recipe, tmp_path / "whole"), recipe, "test")
    follow, asked = timesteps.gram._follow, []

    def dies(models, *args, **kwargs):
        asked.append(len(models))
        if asked.count(2) == 2:  # the second chunk of the student
            raise KeyboardInterrupt
        return follow(models, *args, **kwargs)

    monkeypatch.setattr(timesteps.gram, "_follow", dies)
    with pytest.raises(KeyboardInterrupt):
        joint.plan(pipeline.Experiment(recipe, tmp_path / "half"), recipe, "test")
    again = joint.plan(pipeline.Experiment(recipe, tmp_path / "half"), recipe, "test")
    assert again.timesteps == whole.timesteps
    assert asked.count(2) == 2 + 2  # of three chunks the first is kept


def test_points_of_the_joint_choice_are_kept_one_by_one(config, tmp_path):
    recipe = _recipe(config, plan__steps=(6, 3))
    first = joint.search(pipeline.Experiment(recipe, tmp_path), recipe, "test")
    more = _recipe(config, plan__steps=(6, 4, 3))
    later = pipeline.Experiment(more, tmp_path)
    points = joint.search(later, more, "test")
    assert [points[0], points[2]] == first
    kept = {stage: [entry["cached"] for entry in later.store.log if entry["stage"] == stage]
            for stage in ("joint", "rollout")}  # fmt: skip
    assert kept == {"joint": [True, False, True], "rollout": [True]}


def test_a_tail_longer_than_the_steps_is_refused_before_any_work(config, tmp_path):
    recipe = _recipe(config, timesteps__name="drift", timesteps__tail=0.5, plan__steps=(12,))
    with pytest.raises(InputError, match=r"tail=0.5 and the first step protect 21 steps"):
        pipeline.Experiment(recipe, tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


def test_more_images_for_fewer_steps(config, tmp_path):
    recipe = _recipe(config, sample__num_images=4, sample__by_steps=((5, 12), (10, 8)),
                     plan__steps=(5,))  # fmt: skip
    recipe.arms = {"half": {"steps": (10,)}}
    experiment = pipeline.Experiment(recipe, tmp_path)
    found = arms.list_arms(experiment)
    assert [arm.count for arm in found] == [4, 12, 8]
    assert [len(arm.samples[1]) for arm in found] == [4, 12, 8]
    rows = [fidelity.paired_metrics(arm, found[0]) for arm in found]
    alone = np.mean((found[1].samples[1][:4] - found[0].samples[1]) ** 2)
    assert rows[1]["x0_mse"] == pytest.approx(alone, rel=1e-5)
    assert len(rows[1]["values"]["x0_mse"]) == len(rows[2]["values"]["x0_mse"]) == 4


def test_the_command_prints_and_writes_the_points(config, tmp_path):
    recipe = _recipe(config, plan__steps=(8, 4))
    printed = decisions.plan_only(pipeline.Experiment(recipe, tmp_path))
    assert "<- the plan" in printed
    steps = len(json.loads((tmp_path / "plan.json").read_text())["timesteps"])
    points = json.loads((tmp_path / "joint.json").read_text())["points"]
    assert {point["steps"]: point["plan"] for point in points} == {8: steps == 8, 4: steps == 4}


def test_set_metrics_are_of_all_images_and_pairs_of_the_shared_ones(tmp_path):
    config = _recipe(base(), sample__num_images=70, sample__batch=70, sample__by_steps=((2, 140),),
                     diffusion__num_steps=4, evaluate__drift_images=4)  # fmt: skip
    experiment = pipeline.Experiment(config, tmp_path)
    fewer = config.copy_and_resolve_references()
    fewer.diffusion.num_steps = 2
    base_arm = arms.Arm(experiment, "float", "float32", config, None)
    arm = arms.Arm(experiment, "two", "float32", fewer, None)
    rows, described = fidelity.metrics([base_arm, arm])
    assert described["n_images"] == 70
    assert (rows[1]["n_images"], rows[1]["n_shared"], "n_shared" in rows[0]) == (140, 70, False)
    pair = np.mean((arm.samples[1][:70] - base_arm.samples[1]) ** 2)
    assert rows[1]["x0_mse"] == pytest.approx(pair, rel=1e-5)
    cut = config.copy_and_resolve_references()
    cut.sample.by_steps = ()
    equal, _ = fidelity.metrics(
        [
            arms.Arm(experiment, "float", "float32", cut, None),
            arms.Arm(experiment, "two", "float32", _recipe(cut, diffusion__num_steps=2), None),
        ]
    )
    # What stands beside float is as if both had the shared images; the arm's own FID is of all.
    assert rows[1]["delta_fid"] == pytest.approx(equal[1]["delta_fid"], rel=1e-6)
    assert rows[1]["psnr_ci"] == pytest.approx(equal[1]["psnr_ci"])
    assert rows[1]["fid"] != equal[1]["fid"]
    assert rows[0] | {"against": 0, "against_plan": 0} == equal[0] | {
        "against": 0,
        "against_plan": 0,
    }
    assert set(rows[1]["against"]) == {"x0_mse", "psnr", "ssim"} & set(rows[1]["against"])
    assert "fid" in equal[1]["against"]


def test_a_quantised_arm_says_what_its_scales_cut_off(config, tmp_path):
    from mpqdiff import results

    recipe = _recipe(config, evaluate__health_images=2, quantize__mode="ema", quantize__groups=2)
    found = arms.list_arms(pipeline.Experiment(recipe, tmp_path))
    for arm in found:
        arm.verify()
    rows = results.assemble(found, results.timed(found), [{}, {}], {})["arms"]
    assert rows[0]["health"] is None
    assert rows[1]["health"]["not_finite"] == 0
    assert 0 <= rows[1]["health"]["clip_rate"]["mean"] <= rows[1]["health"]["clip_rate"]["max"] < 1
    assert rows[1]["health"]["images"] == 2
    assert len(found[1].model[0]["steps"].timesteps) == 2


def test_a_measured_back_end_is_the_quickest_of_each_site(experiment, config, monkeypatch):
    from mpqdiff import seconds
    from mpqdiff.costs import latency, legality

    recipe = _recipe(config, quantize__backend="measured", plan__w_bits=(4, 8))
    plan = joint.plan(experiment, recipe, "test")
    assert seconds.backends(experiment, recipe, plan) == "kernels"  # a CPU has no other
    monkeypatch.setattr(latency, "ALTERNATIVES", {"cpu": ("pallas_interpret",)})

    def measure(operations):
        def entry(operation):
            quick = {"int4@pallas_interpret": 1.0, "int8@pallas_interpret": 9.0}
            named = dict.fromkeys(legality.executions(operation), 5.0) | quick
            return {name: latency.Timing(each, each, each) for name, each in named.items()}

        return latency.Latencies({}, {operation: entry(operation) for operation in operations})

    monkeypatch.setattr(latency, "measure", measure)
    found = seconds.backends(experiment, recipe, plan)
    expected = {4: "pallas_interpret", 8: "kernels"}
    assert found == {path: expected[bits] for path, bits in plan.w_bits.items() if bits}
    assert set(found.values()) == set(expected.values())
    model = student.model(experiment, recipe, plan)
    assert model.bytes == plan.predicted["bytes"]


def test_predicted_seconds_are_those_of_the_planner(experiment, config, monkeypatch):
    from mpqdiff import results, seconds
    from mpqdiff.costs import latency, legality

    def measure(operations):
        def entry(operation):
            rate = {name: 1e-6 * (i + 1) for i, name in enumerate(legality.executions(operation))}
            return {name: latency.Timing(each, each, each) for name, each in rate.items()}

        return latency.Latencies({}, {operation: entry(operation) for operation in operations})

    fitted = seconds.Model(1e-3, 2.0, 1.0, np.zeros(1))
    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(seconds, "model", lambda *_: ("fit", fitted))
    recipe = _recipe(config, plan__reduction__seconds=2.0, plan__steps=(8,), plan__keep_float=True)
    plan = joint.plan(experiment, recipe, "test")
    own = seconds.predicted(experiment, recipe, plan, 8)
    assert own == pytest.approx(plan.predicted["seconds"])
    whole = seconds.predicted(experiment, recipe, None, 20)
    assert whole == pytest.approx(planning.float_total(experiment, "seconds"))
    assert own < whole
    asked = _recipe(config, evaluate__predict_ms=True, plan__steps=(8,))
    other = pipeline.Experiment(asked, experiment.store.workdir)
    found = arms.list_arms(other)
    rows = results.assemble(found, results.timed(found), [{}, {}], {})["arms"]
    assert rows[0]["predicted_ms"] == pytest.approx(1e3 * whole)
    expected = seconds.predicted(other, asked, found[1].plan, 8)
    assert rows[1]["predicted_ms"] == pytest.approx(1e3 * expected) and expected < whole
    assert rows[1]["predicted_speedup"] == pytest.approx(whole / expected)
    foreign = _recipe(asked, quantize__backend="aqt")
    assert seconds.predicted(other, foreign, found[1].plan, 8) is None  # other products


def test_a_machine_without_a_usable_fit_ends_no_run(config, tmp_path, monkeypatch):
    from mpqdiff import results, seconds

    asked = []

    def unusable(*_):
        asked.append(1)
        raise InputError("latency fit: plans of longer products took less time")

    monkeypatch.setattr(seconds, "model", unusable)
    recipe = _recipe(config, evaluate__predict_ms=True)
    found = arms.list_arms(pipeline.Experiment(recipe, tmp_path))
    with pytest.warns(UserWarning, match="nothing is predicted, latency fit: plans of longer"):
        times = results.timed(found)
    rows = results.assemble(found, times, [{}, {}], {})["arms"]
    assert len(asked) == 1  # a fit takes minutes: not again for every arm
    assert [row["predicted_ms"] for row in rows] == [None, None]
    assert [row["predicted_speedup"] for row in rows] == [None, None]
    assert rows[1]["speedup"] > 0


def test_the_cost_preview_counts_the_steps_and_images_of_each_arm(config):
    from mpqdiff import preview

    recipe = _recipe(config, plan__steps=(8, 4), plan__rollout=16, sample__num_images=6,
                     sample__by_steps=((8, 10),), timesteps__samples=5)  # fmt: skip
    recipe.arms = {
        "fewer": {"float": True, "num_steps": 5, "timesteps": "shortest_path"},
        "drift": {"timesteps": "drift", "steps": (8,)},
        "pruned": {"timesteps": "drift_edges", "by_student": True, "steps": (8,)},
        "even": {"timesteps": "uniform", "by_student": True, "steps": (8,)},
    }
    assert preview.sampled(recipe) == [(20, 6), (8, 10), (8, 10), (8, 10), (5, 10), (8, 10)]
    counts = preview.step_calls(recipe)
    assert counts == {"teacher": 5 * 40, "student": 2 * 2 * 5 * 40, "steps": 16 * (20 + 8 + 4)}
    recipe.arms = {}
    recipe.plan.steps = ()
    assert preview.step_calls(recipe) == {}
