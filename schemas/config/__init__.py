"""The config of a run as pydantic models; every field says whether it is semantic or execution."""

from schemas.config.run import RunConfig

__all__ = ["RunConfig"]
