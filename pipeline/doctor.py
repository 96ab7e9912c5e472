"""`doctor`: checks before a long run, cheap ones first; what needs torch lies in stages/checks."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.text import Text

from pipeline.console import Terminal, printable
from pipeline.doctor_machine import installation, run_directory
from pipeline.doctor_size import Sizes, needs, rows_of_sources, times
from pipeline.executors import EXECUTORS
from pipeline.models import Models
from pipeline.preflight import check_splits, preflight
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.catalog import BY_NAME
from stages.checks.finding import Finding, State
from stages.contract import ModelRef
from stages.schedule import schedule

_STYLES: dict[State, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_EXPECTED = (UserError, OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError)


@dataclass
class Doctor:
    """Runs the checks of a config in order. findings: so far. quick: no model weights, no measured sample."""

    config: RunConfig
    quick: bool = False
    findings: list[Finding] = field(default_factory=list)

    def run(self, busy: Callable[[str], None]) -> Iterator[Finding]:
        """Every finding as it is made; `busy` is told what is being checked."""
        with tempfile.TemporaryDirectory(prefix="congrad-doctor-") as folder:
            for name, check in self._checks(Path(folder)):
                busy(name)
                for finding in self._guarded(name, check):
                    self.findings.append(finding)
                    yield finding

    @property
    def problems(self) -> int:
        return sum(finding.state == "problem" for finding in self.findings)

    def value(self, check: str, name: str) -> float | None:
        """A figure that an earlier check measured."""
        for finding in self.findings:
            if finding.check == check and name in finding.values:
                return float(finding.values[name])
        return None

    def _checks(self, folder: Path) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
        config = self.config
        yield "installation", installation
        yield "packages", self._packages
        yield "run_directory", lambda: run_directory(config.folder)
        if (look := EXECUTORS[config.execution.on].findings) is not None:
            yield "cluster", partial(look, config)
        yield "sources", self._sources
        if find_spec("py3langid"):
            yield "languages", self._languages
        if not all(map(find_spec, ("torch", "transformers"))):
            return
        yield "device", self._device
        yield "model", self._model
        if self.value("model", "found") is None:
            return
        yield "architecture", self._architecture
        yield "tokenizer", self._text
        yield "context", self._lengths
        if not self.quick:
            yield "batch_invariance", self._invariance
            if not config.imported:
                yield "generate", lambda: self._sample(folder)
        yield "space", lambda: needs(config, self._sizes())
        yield "time", lambda: times(config, self._sizes(), self.value)

    def _guarded(self, name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        """A check's findings; what it raises is a finding too."""
        try:
            yield from check()
        except _EXPECTED as error:
            if isinstance(error, UserError):
                where = f" ({error.where})" if error.where else ""
                yield Finding(name, "problem", f"{error.what.rstrip('.')}{where}", error.fix)
            else:
                first = (str(error).strip().splitlines() or [""])[0]
                yield Finding(name, "problem", f"the check ended with {type(error).__name__}: {first}")

    def _packages(self) -> Iterator[Finding]:
        missing = False
        for name in dict.fromkeys(step.spec.name for step in schedule(self.config)):
            try:
                preflight(self.config, [BY_NAME[name]])
            except UserError as error:
                missing = True
                yield Finding(
                    "packages", "problem", f"{name}: {error.what} ({error.where})".replace(" ()", ""), error.fix
                )
        if not missing:
            yield Finding("packages", "ok", "every stage finds its packages and the files the config names")

    def _sources(self) -> Iterator[Finding]:
        check_splits(self.config)
        for key, source, rows, more in rows_of_sources(self.config):
            count = f"{'at least ' if more else ''}{rows:,} rows" if rows is not None else "a hub dataset: not fetched"
            values: dict[str, float | str] = {} if rows is None else {key: rows}
            yield Finding("sources", "ok", f"{key} {source}: {count}", values=values)

    def _languages(self) -> Iterator[Finding]:
        from stages.checks.languages import language_findings

        return language_findings(self.config.languages)

    def _device(self) -> Iterator[Finding]:
        from stages.checks.machine import device_findings

        return device_findings(self.config)

    def _model(self) -> Iterator[Finding]:
        roles = self._roles()
        for model in {model.digest: model for model in roles.values()}.values():
            role = " and ".join(name for name, other in roles.items() if other.digest == model.digest)
            size = sum(p.stat().st_size for p in model.path.glob("*.safetensors")) if model.path else 0
            found: dict[str, float | str] = {"found": 1, "bytes": size}
            yield Finding("model", "ok", f"{role}: {model.name}, {size / 2**30:.2f} GiB of weights", values=found)

    def _roles(self) -> dict[str, ModelRef]:
        models = Models(self.config, RunDir(self.config.folder))
        steps = schedule(self.config)
        step = next(
            s for s in steps if {"judge", "reference"} & set(s.spec.roles(self.config))
        )  # judged, or the first that needs both
        start = models.start()
        return {"policy": start, **({} if self.config.imported else {"judge": start}), **models.of(step)}

    def _architecture(self) -> Iterator[Finding]:
        from stages.checks.architecture import architecture_findings

        return architecture_findings(self._roles()["policy"], self.config)

    def _text(self) -> Iterator[Finding]:
        from stages.checks.text import text_findings

        return text_findings(self._roles()["policy"], self.config)

    def _lengths(self) -> Iterator[Finding]:
        from stages.checks.text import length_findings

        return length_findings(self._roles()["policy"], self.config)

    def _invariance(self) -> Iterator[Finding]:
        from stages.checks.invariance import invariance_findings

        return invariance_findings(self._roles()["policy"], self.config)

    def _sample(self, folder: Path) -> Iterator[Finding]:
        from stages.checks.sample import sample_findings

        return sample_findings(self._roles(), self.config, folder)

    def _sizes(self) -> Sizes:
        prompts = [f.values["prompts.sources"] for f in self.findings if "prompts.sources" in f.values]
        pairs = [f.values["pairs.sources"] for f in self.findings if "pairs.sources" in f.values]
        policy = self._roles()["policy"] if self.value("model", "found") else None
        return Sizes.of(
            self.config,
            rows=int(sum(map(float, pairs or prompts))),
            weights=self.value("architecture", "bytes") or self.value("model", "bytes") or 0,
            memory=self.value("device", "memory_bytes") or 0,
            gpus=sum("gpu" in finding.values for finding in self.findings),
            layers=self._layers(policy) if policy is not None and policy.path else (),
        )

    def _layers(self, policy: ModelRef) -> tuple[tuple[str, int, int], ...]:
        """(name, O, I) of what a sketch covers; none where that cannot be known without weights."""
        from stages.checks.architecture import look

        try:
            coverage = look(policy, self.config, sketched=True).coverage
        except UserError:  # a finding of its own
            return ()
        return tuple((s.name, s.out_width, s.in_width) for s in coverage.layers) if coverage else ()


def print_doctor(config: RunConfig, quick: bool, as_json: bool) -> int:
    """Run the checks, print a line each on standard output; returns the number of problems."""
    doctor = Doctor(config, quick)
    with _silenced() as (out, err, log):
        status = err.status("")
        with status:
            for finding in doctor.run(lambda name: status.update(f"checking {name} ...")):
                if not as_json:
                    _print(out, finding)
        warnings = sum(finding.state == "warning" for finding in doctor.findings)
        if as_json:
            checks = [asdict(finding) for finding in doctor.findings]
            value = {"ok": not doctor.problems, "problems": doctor.problems, "warnings": warnings, "checks": checks}
            out.file.write(json.dumps(value, indent=1) + "\n")
            out.file.flush()
        else:
            out.print(f"\n{doctor.problems} problems, {warnings} warnings.")
            if doctor.problems:
                out.print(Text(printable(f"What engines and libraries said: {log}"), style="dim"))
    if not doctor.problems:
        log.unlink(missing_ok=True)
    return doctor.problems


def _print(out: Terminal, finding: Finding) -> None:
    line = Text(f"{finding.state:<8} ", style=_STYLES[finding.state])
    line.append(f"{finding.check:<16} ", style="bold").append(printable(finding.what), style="")
    if finding.fix:
        line.append(f"\n{'':<26}-> {printable(finding.fix)}", style="dim")
    out.print(line, soft_wrap=True)


@contextmanager
def _silenced() -> Iterator[tuple[Terminal, Terminal, Path]]:
    """Consoles on standard output and error, while everything else that prints there goes to a log: engines talk much."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    handle, name = tempfile.mkstemp(prefix="congrad-doctor-", suffix=".log")
    with os.fdopen(kept[0], "w", closefd=False) as out, os.fdopen(kept[1], "w", closefd=False) as err:
        try:
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            yield Terminal(file=out), Terminal(file=err), Path(name)
        finally:
            out.flush()
            err.flush()
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
    for descriptor in (*kept, handle):
        os.close(descriptor)
