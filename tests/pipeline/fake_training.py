"""What several processes of the fake train stage do together: steps, each of which all must take, with a checkpoint."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from stages.contract import Context
from stages.train.gang import run_together
from stages.train.processes import is_first


def steps(ctx: Context) -> int:
    """The processes that took the last step."""
    total = torch.tensor(0)
    for number in range(int(os.environ.get("FAKE_STEPS", "2"))):
        if is_first():
            (ctx.own_folder / "checkpoint").write_text(str(number))
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        total = torch.tensor(1)
        dist.all_reduce(total)
    return int(total)


def train(ctx: Context) -> int:
    """`steps` on this machine and the others."""
    return run_together(steps, ctx, 1)
