"""`python fake_main.py run CONFIG`: the command line on the fake stages, with real worker processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "pipeline")]

if __name__ == "__main__":
    import pipeline.loop
    import pipeline.summary
    import stages.schedule
    from pipeline.cli import app
    from tests.faults.inline import SPECS, light_report

    stages.schedule.STAGES = SPECS
    pipeline.loop.config_files = lambda spec, config: {}
    pipeline.loop.preflight = lambda config, specs: None
    pipeline.loop.refresh_report = light_report
    pipeline.summary.print_summary = lambda config: None
    app()
