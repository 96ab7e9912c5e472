"""Training loggers that transformers knows (`report_to`), and what each needs to be installed."""

from __future__ import annotations

from importlib.util import find_spec

from pydantic import BaseModel


class Logger(BaseModel, frozen=True):
    """modules: what must be importable; install: the packages that bring them."""

    modules: tuple[str, ...]
    install: str

    @property
    def installed(self) -> bool:
        """Whether its modules are there; nothing is imported."""
        return all(find_spec(module) is not None for module in self.modules)


def _of_its_own(name: str, install: str = "") -> Logger:
    return Logger(modules=(name,), install=install or name)


LOGGERS = {
    "azure_ml": Logger(modules=("azureml",), install="azureml-core"),
    "clearml": _of_its_own("clearml"),
    "codecarbon": _of_its_own("codecarbon"),
    "comet_ml": _of_its_own("comet_ml", "comet-ml"),
    "dagshub": Logger(modules=("dagshub", "mlflow"), install="dagshub mlflow"),
    "dvclive": _of_its_own("dvclive"),
    "flyte": _of_its_own("flytekit"),
    "mlflow": _of_its_own("mlflow"),
    "neptune": _of_its_own("neptune"),
    "swanlab": _of_its_own("swanlab"),
    "tensorboard": _of_its_own("tensorboard"),
    "trackio": _of_its_own("trackio"),
    "wandb": _of_its_own("wandb"),
}
