"""`make faults`: break runs in every way we know, and say what was lost. Prints tables; fails on any loss.

python -m tests.faults.kills --kills 200 --seed 0 --every 1 --parts 10000

- kills: SIGKILL at random instants in all stages on a tiny model (see killing.py);
- file faults: a crash or power cut at every `--every`-th file operation of a run of fake stages (see crashing.py);
- status: how long it takes on a finished run of `--parts` parts.
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
from tests.faults.crashing import ENDINGS, NAMES, break_everywhere
from tests.faults.killing import TARGETS, Harness, Reference, Report, refer
from tests.faults.many_parts import measure

_EACH = 2  # kills aimed at each stage in one run directory


def main() -> int:
    """Run the harness; 1 if anything was lost."""
    arguments = _arguments()
    console = Console(width=120, highlight=False)
    lost = _file_faults(console, arguments.every) if arguments.every else 0
    if arguments.parts:
        console.print(measure(arguments.parts))
    return max(lost, _kills(console, arguments.kills, arguments.seed, arguments.minutes) if arguments.kills else 0)


def _file_faults(console: Console, every: int) -> int:
    total = wrong = 0
    for ending in ENDINGS:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            tried = break_everywhere(Path(folder), (ending,), every)
        for line in tried.wrong:
            console.print(f"  {line}", style="red", markup=False)
        failed = len({line.partition(":")[0] for line in tried.wrong})
        console.print(f"file faults, {NAMES[ending]}: {tried.count} tried, {tried.count - failed} survived")
        total, wrong = total + tried.count, wrong + failed
    console.print(f"file faults: {total} tried, {total - wrong} survived", style="bold")
    return int(wrong > 0)


def _kills(console: Console, kills: int, seed: int, minutes: float) -> int:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        config = folder / "config.yaml"
        model = make_model(folder / "models" / "tiny", make_tokenizer())
        config.write_text(yaml.safe_dump(tiny_config(folder, model)), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(config), "--quiet"], check=True, stdout=-3)
        reference = refer(folder / "runs" / "t")
        harness = Harness(config, reference, seed)
        reports: list[Report] = []
        begun = time.monotonic()
        while (tried := sum(len(r.kills) for r in reports)) < kills and time.monotonic() - begun < 60 * minutes:
            targets = [t for t in TARGETS for _ in range(min(_EACH, -(-(kills - tried) // len(TARGETS))))]
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
    parser.add_argument("--kills", type=int, default=200, help="least number of kills (default 200; 0: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants (default 0)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run directory after so long")
    parser.add_argument("--every", type=int, default=1, help="file faults: at every so many operations (0: none)")
    parser.add_argument("--parts", type=int, default=10_000, help="status: parts of the finished run (0: not measured)")
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
