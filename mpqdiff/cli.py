"""The command line: `mpqdiff VERB --config=FILE[:args] --workdir=DIR [--config.a.b=v]`.

Exit code 0 only when what was asked was done; 1 when what ran is not what the plan says; 2 for
unusable input, with the value got, what was expected and what to do.
"""

import contextlib
import errno
import os
import runpy
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mpqdiff.config import Config, validate
from mpqdiff.errors import InputError, VerificationError

# What the system says of a workdir that cannot be written: not permitted, a file in the place of a
# folder or the reverse, disk full, over quota, read-only.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC,
            errno.EDQUOT, errno.EROFS)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("--help", "-h", "--helpfull", "help"):
            print(usage())
            return 0 if argv else 2
        verb, rest = argv[0], argv[1:]
        if verb not in (*VERBS, "bench"):
            raise InputError(f"unknown verb {verb!r}; known: {', '.join([*VERBS, 'bench'])}")
        if any(word in ("--help", "-h") for word in rest):
            print(usage())
            return 0
        if verb == "bench":
            bench(rest)
            return 0
        config, workdir, own = parse(verb, rest)
        prepare_jax()
        act = _dry_run if own.pop("dry_run") and config is not None else VERBS[verb]
        act(config, workdir, "mpqdiff " + " ".join(argv), **own)
    except InputError as error:
        print(f"mpqdiff: {error}", file=sys.stderr)
        return 2
    except VerificationError as error:
        print(f"mpqdiff: verification failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        print(
            f"mpqdiff: {error.filename or 'the workdir'}: {error.strerror}; choose another "
            "--workdir or free some space",
            file=sys.stderr,
        )
        return 2
    return 0


def parse(verb: str, arguments: list[str]) -> tuple[Config, Path | None, dict]:
    """(config, workdir, further flags) of a verb; a workdir's stored config where none is named.

    Config files run here, so whatever they raise is unusable input.
    """
    values = flags.FlagValues()  # of this call alone: a flag keeps what it was last set to
    flags.DEFINE_string("workdir", None, "where artifacts and results go", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print config, sites and cost", flag_values=values)
    for name, (define, default, text) in FLAGS.get(verb, {}).items():
        define(name, default, text, flag_values=values)
    workdir = _workdir(arguments)
    named = any(
        word.startswith(("--config=", "-config=")) or word == "--config" for word in arguments
    )
    try:
        if named:
            config_flags.DEFINE_config_file(
                "config", lock_config=False, flag_values=values, sys_argv=["mpqdiff", *arguments]
            )
        elif workdir and (workdir / "config.json").exists():
            config_flags.DEFINE_config_dict(
                "config",
                _stored(workdir),
                lock_config=True,
                flag_values=values,
                sys_argv=["mpqdiff", *arguments],
            )
        left = values(["mpqdiff", *arguments])[1:]
        config = values["config"].value if "config" in values else None
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"arguments of {verb!r}: {_plain(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the config file raised {type(error).__name__}: {_plain(error)}"
        ) from error
    if left:
        raise InputError(f"unexpected arguments {left}; see mpqdiff --help")
    failure = getattr(config, "__dict__", {}).get("_error")  # what ml_collections keeps back
    if isinstance(failure, OSError):
        raise InputError(f"the config file cannot be used: {_plain(failure)}")
    if named and not isinstance(config, ConfigDict):
        raise InputError(f"the config file returned {type(config).__name__}, not a ConfigDict")
    own = {name: values[name].value for name in ("dry_run", *FLAGS.get(verb, {}))}
    if config is None and verb not in ("doctor", "convert") and not own.get("images"):
        where = f"{workdir}/config.json does not exist" if workdir else "no --workdir either"
        raise InputError(f"{verb} needs --config=FILE ({where})")
    if config is not None:
        validate(config)
        if workdir is None and not values["dry_run"].value:
            raise InputError(f"{verb} needs --workdir=DIR")
    return config, workdir, own


def _plain(error: BaseException) -> str:
    """The message on one line; of a traceback that ml_collections put into it, the last line."""
    text = str(error).strip() or type(error).__name__
    lines = text.splitlines()
    return " ".join((lines[-1] if "Traceback" in text else text).split())


def _workdir(arguments: list[str]) -> Path | None:
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, has_value, value = word.lstrip("-").partition("=")
        if name == "workdir" and word.startswith("-"):
            return Path(value if has_value else following)
    return None


def _stored(workdir: Path) -> ConfigDict:
    from mpqdiff.artifacts import read_json

    stored = ConfigDict(_tuples(read_json(workdir / "config.json")))
    validate(stored)
    return stored


def _tuples(value):
    """JSON's lists as the tuples they were: flags can override only those."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def prepare_jax() -> None:
    """The persistent compilation cache is on unless the user has chosen otherwise."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mpqdiff" / "xla"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))


def _experiment(config: ConfigDict, workdir: Path | None):
    from mpqdiff.pipeline import Experiment

    assert workdir is not None
    return Experiment(config, workdir)


def _run(config, workdir, command):
    from mpqdiff import outcome, results

    print(results.table(outcome.run(_experiment(config, workdir), command=command)))
    print(f"\nreport: {workdir / 'report.html'}")


def _plan(config, workdir, command, *, pareto, explain, export):
    from mpqdiff import decisions

    if pareto is not None and pareto < 2:
        raise InputError(f"--pareto={pareto}: expected 2 budgets or more")
    experiment = _experiment(config, workdir)
    if explain is not None:
        print(decisions.explain_only(experiment, explain))
    elif pareto is not None:
        print(decisions.pareto_only(experiment, pareto))
    elif export is not None:
        print(decisions.export_only(experiment, export))
    else:
        print(decisions.plan_only(experiment))


def _sample(config, workdir, command):
    from mpqdiff import outcome

    print(outcome.sample_only(_experiment(config, workdir)))


def _evaluate(config, workdir, command, *, images, reference, features, out, fid_infinity, **own):
    if not images:
        _run(config, workdir, command)
        return
    from mpqdiff.evaluate import image_metrics

    row = image_metrics.evaluate_images(
        images,
        reference,
        features=features,
        weights=own["features.weights"],
        out=out or None,
        fid_infinity=fid_infinity,
    )
    print(image_metrics.table(row))


def _convert(config, workdir, command, *, source, out, kind, hub):
    if not source or not out:
        raise InputError(
            "convert needs --source=FILE or folder, and --out=FILE.safetensors or FOLDER/ (Orbax)"
        )
    from mpqdiff.weights import convert

    print(convert.convert(source, out, kind=kind, hub=hub))


def _verify(config, workdir, command):
    from mpqdiff import outcome

    print(outcome.verify_only(_experiment(config, workdir)))


def _train(config, workdir, command):
    from mpqdiff import training

    print(training.run(config, workdir, command=command))


def _report(config, workdir, command):
    _run(config, workdir, command)


def _doctor(config, workdir, command):
    from mpqdiff import doctor

    print(doctor.report())


def _dry_run(config, workdir, command, **_):
    from mpqdiff import preview

    print(preview.text(config))


# Flags of one verb alone: how absl defines them, their default, their help.
FLAGS = {
    "plan": {
        "pareto": (flags.DEFINE_integer, None, "solve this many budgets, write pareto.json"),
        "explain": (flags.DEFINE_string, None, "say why sites (a regex) got their widths"),
        "export": (flags.DEFINE_string, None, "write plan.json in another form: modelopt, qwix"),
    },
    "convert": {
        "source": (flags.DEFINE_string, "", "a checkpoint, or a diffusers folder"),
        "out": (flags.DEFINE_string, "", "the .safetensors to write, or FOLDER/ (Orbax)"),
        "kind": (flags.DEFINE_string, "", "the architecture, where it is not told by the source"),
        "hub": (flags.DEFINE_bool, False, "the source is a repository of the Hugging Face hub"),
    },
    "evaluate": {
        "images": (flags.DEFINE_string, "", "a folder, .npz or .npy of images: no model is needed"),
        "reference": (flags.DEFINE_string, "", "the same, an .npz with mu and sigma, or a name"),
        "features": (flags.DEFINE_string, "fashion_classifier", "the feature network"),
        "features.weights": (flags.DEFINE_string, "", "the file of its weights, for inception"),
        "out": (flags.DEFINE_string, "", "an .npz for the images' own mu and sigma"),
        "fid_infinity": (flags.DEFINE_bool, False, "FID extrapolated to infinitely many images"),
    },
}

VERBS = {
    "run": _run,
    "train": _train,
    "plan": _plan,
    "sample": _sample,
    "evaluate": _evaluate,
    "convert": _convert,
    "verify": _verify,
    "report": _report,
    "doctor": _doctor,
}


def bench(arguments: list[str]) -> None:
    """Run `benchmarks/NAME.py` of the source tree with the remaining arguments."""
    folder = Path(__file__).parent.parent / "benchmarks"
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not known:
        raise InputError(f"no benchmarks in {folder}: they come with the source, not the wheel")
    if not arguments or arguments[0] not in known:
        got = arguments[0] if arguments else "nothing"
        raise InputError(f"bench got {got!r}, expected a name: {', '.join(known)}")
    sys.argv = [str(folder / f"{arguments[0]}.py"), *arguments[1:]]
    sys.path.insert(0, str(folder))  # as `python benchmarks/NAME.py` has it
    runpy.run_path(sys.argv[0], run_name="__main__")


def usage() -> str:
    """What the command takes."""
    return f"""{str(__doc__).splitlines()[0]}

verbs:
  run       all stages: plan, quantise, sample, evaluate, report
  train     train the config's model on its data; continues where it stopped
  plan      stages up to plan.json
  sample    sample with workdir/plan.json
  evaluate  metrics of all arms (runs what is missing), or of --images, without a model
  convert   a checkpoint of another code base (--source) as --out=FILE.safetensors, or FOLDER/
            for Orbax, every key accounted for; --kind names its architecture, --hub reads the
            Hugging Face hub
  verify    prove from the compiled program that workdir/plan.json ran as planned
  report    write report.html again (runs what is missing)
  bench     bench NAME [options]: a benchmark of the source tree, its table of ratios
  doctor    devices, versions, back ends, self-tests

flags:
  --config=FILE[:arg]  a file of configs/, or one's own; --config.a.b=v changes a key.
                       On an existing workdir the config stored there is the default
  --workdir=DIR        artifacts, plan.json, results.json, report.html, samples/
  --dry_run            print the resolved config, the sites and the cost, and stop

of plan:
  --pareto=64          solve 64 budgets in one call: pareto.json and pareto.html
  --explain=REGEX      why the sites that match got their widths (prices of the budgets)
  --export=FORM        write the workdir's plan.json as modelopt or qwix

of evaluate, without a model:
  --images=PATH        a folder, .npz or .npy of images
  --reference=PATH     the same, an .npz with mu and sigma, or fashion_reference
  --features=NAME      fashion_classifier, inception, inception_pytorch_fid
  --features.weights=FILE
                       the public Inception weights
  --fid_infinity       FID extrapolated to infinitely many images too
  --out=FILE.npz       save mu and sigma of the images"""


if __name__ == "__main__":
    sys.exit(main())
