"""`make faults`: kill runs of all ten stages on a tiny model, and say what was lost. Prints a table; fails on any loss.

python -m tests.faults.kills --kills 200 --seed 0
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from tests.conftest import make_model, make_tokenizer
from tests.end_to_end.conftest import tiny_config
from tests.faults.killing import TARGETS, Harness, Reference, Report, refer

_EACH = 5


def main() -> int:
    """Run the harness; 1 if anything was lost."""
    arguments = _arguments()
    console = Console(width=110, highlight=False)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        config = folder / "config.yaml"
        model = make_model(folder / "models" / "tiny", make_tokenizer())
        config.write_text(yaml.safe_dump(tiny_config(folder, model)), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(config), "--quiet"], check=True, stdout=-3)
        reference = refer(folder / "runs" / "t")
        harness = Harness(config, reference, arguments.seed)
        reports: list[Report] = []
        begun = time.monotonic()
        while (tried := sum(len(r.kills) for r in reports)) < arguments.kills:
            targets = [t for t in TARGETS for _ in range(min(_EACH, -(-(arguments.kills - tried) // len(TARGETS))))]
            report = harness.disturb(folder / f"run-{len(reports)}", targets)
            reports.append(report)
            console.print(
                f"run {len(reports)}: {len(report.kills)} kills, {report.begun} parts begun of {reference.parts}, "
                f"{'same results' if not report.differences else 'DIFFERENT'} ({time.monotonic() - begun:.0f} s)"
            )
            for line in report.differences:
                console.print(f"  {line}", style="red", markup=False)
    _print(console, reports, reference)
    return int(any(r.differences or r.finished_twice for r in reports))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="least number of kills (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants (default 0)")
    return parser.parse_args()


def _print(console: Console, reports: list[Report], reference: Reference) -> None:
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for report in reports:
        for kill in report.kills:
            tried[kill.stage] += 1
            survived[kill.stage] += not report.differences
    table = Table("killed in", "kills", "survived", box=None)
    for stage in (*TARGETS, "between"):
        if tried[stage]:
            table.add_row(stage, str(tried[stage]), str(survived[stage]))
    kills = sum(tried.values())
    table.add_row("all", str(kills), str(sum(survived.values())), style="bold")
    console.print(table)
    for what in ("aim", "victim"):
        counts = Counter(getattr(k, what) for r in reports for k in r.kills)
        console.print(f"{what}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    needed, begun = reference.parts * len(reports), sum(r.begun for r in reports)
    console.print(
        f"{len(reports)} run directories, {needed} parts: {begun - needed} begun again after a kill "
        f"({(begun - needed) / needed:.1%}; {(begun - needed) / max(kills, 1):.2f} per kill), "
        f"{sum(r.finished_twice for r in reports)} finished ones made again"
    )


if __name__ == "__main__":
    sys.exit(main())
