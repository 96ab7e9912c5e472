"""Both crews, for tests of what a run makes of deaths, hangs and signals: workers of this machine, and hosted by actors as on a Ray cluster.

The second goes through all of our own side (the client's process, actors, hosts); Ray itself is the stand-in of `tests/light_ray`. What only a
real cluster can show is in `test_pipeline_ray.py` and `make faults-ray`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

LIGHT_RAY = Path(__file__).parent / "light_ray"
SETTINGS = {"local": (), "ray": ("execution.on=ray",)}
over_both_crews = pytest.mark.parametrize("crew", SETTINGS)
