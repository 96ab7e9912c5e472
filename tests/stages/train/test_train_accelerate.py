"""The accelerate config we ship is one accelerate reads, and asks for FSDP2."""

from __future__ import annotations

from pathlib import Path

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

import data

CONFIG = Path(data.__file__).parent / "accelerate" / "fsdp2.yaml"


def test_accelerate_launch_takes_the_shipped_config_for_fsdp2() -> None:
    config = load_config_from_file(str(CONFIG))  # refuses keys it does not know
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == DistributedType.FSDP and config.fsdp_config["fsdp_version"] == 2
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) <= set(known)
