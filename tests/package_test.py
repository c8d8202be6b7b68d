"""What starting the package costs: light imports, a quick --help, neither TensorFlow nor torch."""

import subprocess
import sys
import time
from importlib import metadata

HEAVY = ("tensorflow", "torch")


def _run(code: str, *, count: int = 3):
    """(standard output, least wall-clock seconds of `count` runs) of a fresh interpreter."""
    seconds, text = [], ""
    for _ in range(count):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        text = done.stdout
    return text, min(seconds)


def _loaded(names) -> str:
    return f"import sys; print(sorted(set({names!r}) & set(sys.modules)))"


def test_help_is_quick_and_imports_no_framework():
    code = "from mpqdiff.cli import main; assert main(['--help']) == 0; "
    text, seconds = _run(code + _loaded((*HEAVY, "jax", "flax")))
    assert text.startswith("The command line: `mpqdiff VERB")
    assert text.splitlines()[-1] == "[]"
    assert seconds < 1


def test_the_package_imports_quickly_and_without_tensorflow_or_torch():
    text, seconds = _run("import mpqdiff; " + _loaded(HEAVY))
    assert text.strip() == "[]"
    assert seconds < 3


def test_no_verb_imports_tensorflow_or_torch():
    code = "import mpqdiff.outcome, mpqdiff.training, mpqdiff.preview, mpqdiff.quantize.aqt; "
    text, _ = _run(code + _loaded(HEAVY), count=1)
    assert text.strip() == "[]"


def test_the_console_script_is_installed():
    (script,) = metadata.entry_points(group="console_scripts", name="mpqdiff")
    assert script.value == "mpqdiff.cli:main"
