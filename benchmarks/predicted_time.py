"""How right the time left was that a run said after a tenth of every stage's work: read from its events.

python -m benchmarks.predicted_time runs/demo

Of every stage that took at least `--seconds`: what it was foreseen to take in all when a tenth of its work was done (time spent until
then, loading included, and the time left that was said), what it took, and how far the one is off the other. Exit code 1 when one is
off by more than `--within`. A stage that was interrupted counts from where it was begun last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TENTH = 0.1


@dataclass(frozen=True)
class Foreseen:
    """share: of the stage's work that was done when it was foreseen. foreseen: seconds in all; None: nothing was said."""

    stage: str
    round: int
    share: float
    foreseen: float | None
    took: float

    @property
    def off(self) -> float | None:
        """Share of the time it took; positive: foreseen too long."""
        return None if self.foreseen is None else self.foreseen / self.took - 1


def foreseen(events: Iterable[dict[str, Any]]) -> Iterator[Foreseen]:
    """The first word on the time left after a tenth of the work, of every stage that ended."""
    begun: dict[tuple[str, int], float] = {}
    first: dict[tuple[str, int], dict[str, Any]] = {}
    done_before: dict[tuple[str, int], int] = {}
    for event in events:
        key = event.get("stage", ""), event.get("round", 0)
        match event.get("event"):
            case "stage_started":
                begun[key] = event["time"]
                first.pop(key, None)
                done_before.pop(key, None)
            case "progress" if key in begun and event["total"]:
                before = done_before.setdefault(key, event["before"])
                share = (event["done"] - before) / max(event["total"] - before, 1)
                if share >= _TENTH and event["seconds_left"] is not None and key not in first:
                    first[key] = {**event, "share": share}
            case "stage_done" if key in begun:
                took, said = event["time"] - begun.pop(key), first.pop(key, None)
                if said is None:
                    yield Foreseen(*key, 1.0, None, took)
                else:
                    spent = said["time"] - (event["time"] - took)
                    yield Foreseen(*key, said["share"], spent + said["seconds_left"], took)


def main() -> int:
    """Print the table; 1 when a stage was foreseen wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--seconds", type=float, default=20.0, help="least that a stage took (%(default)s)")
    parser.add_argument("--within", type=float, default=0.3, help="share it may be off (%(default)s)")
    arguments = parser.parse_args()
    lines = (arguments.run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = 0
    print("| stage | done when foreseen | foreseen in all | took | off |\n| --- | ---: | ---: | ---: | ---: |")
    for found in foreseen(json.loads(line) for line in lines):
        if found.took < arguments.seconds:
            continue
        title = f"{found.stage} {found.round}" if found.round else found.stage
        if found.off is None or found.foreseen is None:
            print(f"| {title} | nothing was said | | {found.took:.0f} s | |")
            continue
        wrong += abs(found.off) > arguments.within
        print(f"| {title} | {found.share:.0%} | {found.foreseen:.0f} s | {found.took:.0f} s | {found.off:+.0%} |")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
