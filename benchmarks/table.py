"""Markdown tables of finished runs, as docs/results.md shows them.

    python benchmarks/table.py runs/mpq_diff_seed0/results.json [more results.json ...]

Better, worse or a tie (inside the noise at 95 %) is by the paired test on x0 errors of equal seeds.
"""

import json
import sys
from pathlib import Path

COLUMNS = (
    ("arm", lambda a, plan: a["arm"]),
    ("mean bits", lambda a, plan: f"{a['avg_w_bits']:.2f}"),
    ("bytes", lambda a, plan: f"{a['bytes']:,}"),
    ("smaller", lambda a, plan: f"{a['compression']:.2f}x"),
    ("x0 MSE (95 %)", lambda a, plan: interval(a, "x0_mse", ".2e")),
    ("PSNR dB (95 %)", lambda a, plan: interval(a, "psnr", ".2f")),
    ("KID (95 %)", lambda a, plan: interval(a, "kid", ".4f")),
    ("FID (95 %)", lambda a, plan: interval(a, "fid", ".2f")),
    ("damage", lambda a, plan: number(a["damage"], ".3f")),
    ("speed-up", lambda a, plan: f"{a['speedup']:.2f}x"),
    ("against plan", lambda a, plan: against(a, plan)),
)
# Of arms that differ in their steps: what a step saved and a bit saved are worth together.
STEPS = (
    ("arm", lambda a, plan: a["arm"]),
    ("mean bits", lambda a, plan: f"{a['avg_w_bits']:.2f}"),
    ("file bytes", lambda a, plan: f"{a['file_bytes']:,}"),
    ("smaller", lambda a, plan: f"{a['compression']:.2f}x"),
    ("steps", lambda a, plan: str(a["steps"])),
    ("images", lambda a, plan: str(a["n_images"])),
    ("ms/image", lambda a, plan: f"{a['ms_per_image']['median']:.1f}"),
    ("speed-up", lambda a, plan: f"{a['speedup']:.2f}x"),
    ("predicted", lambda a, plan: predicted(a)),
    ("at its steps", lambda a, plan: f"{a['speedup_same_steps']:.2f}x"),
    ("x0 MSE (95 %)", lambda a, plan: interval(a, "x0_mse", ".2e")),
    ("FID (95 %)", lambda a, plan: interval(a, "fid", ".2f")),
    ("delta FID (95 %)", lambda a, plan: interval(a, "delta_fid", ".2f")),
    ("damage", lambda a, plan: interval(a, "damage", ".3f")),
    ("against plan", lambda a, plan: a.get("against_plan", {}).get("x0_mse", "")),
)


def number(value, form: str) -> str:
    """A dash where there is no value."""
    return "-" if value is None else format(value, form)


def interval(arm: dict, key: str, form: str) -> str:
    """value (low to high)."""
    ends = arm.get(f"{key}_ci")
    text = number(arm[key], form)
    if not ends or arm[key] is None:
        return text
    return f"{text} ({ends[0]:{form}} to {ends[1]:{form}})"


def predicted(arm: dict) -> str:
    """The speed-up that the latency model expected, and how far it was off."""
    expected = arm.get("predicted_speedup")
    return f"{expected:.2f}x ({expected / arm['speedup'] - 1:+.0%})" if expected else "-"


def against(arm: dict, plan: dict) -> str:
    """better, worse or tie in x0 MSE, by the paired test; only within 3 % of its bytes."""
    found = arm.get("against_plan", {}).get("x0_mse", "")
    return "other size" if found and abs(arm["bytes"] / plan["bytes"] - 1) > 0.03 else found


def markdown(results: dict) -> str:
    """One table."""
    arms = results["arms"]
    plan = next(arm for arm in arms if arm["arm"] == "plan")
    columns = COLUMNS if len({arm["steps"] for arm in arms}) == 1 else STEPS
    return piped(
        [name for name, _ in columns],
        [[show(arm, plan) for _, show in columns] for arm in arms],
    )


def piped(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(paths: list[str]) -> int:
    """Print a table per file."""
    if not paths:
        print(__doc__)
        return 2
    for path in paths:
        results = json.loads(Path(path).read_text())
        protocol = results["protocol"]
        print(f"\n{protocol.get('name', path)}: {protocol.get('n_images', '-')} images per arm\n")
        print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
