"""Weights & Biases, for those who ask for it: the rows of results.csv and the pictures of the run folder."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.log import LOGGER

PROJECT = "YOLOv5-QAT"


class WandbLog:
    """One run on Weights & Biases; a resumed run goes on where it was, by the name in wandb_id.txt in its folder.

    Args:
        folder: the run folder; its parent's name is the project unless that is ``train``.
        options: shown as the configuration.
        entity: account or team, or None for the user's own.
        resumed: whether the folder holds a run that goes on.

    Raises:
        UserError: the package is not installed, or it cannot begin a run (not logged in, no network).
    """

    def __init__(
        self, folder: Path, options: Mapping[str, Any], entity: str | None = None, resumed: bool = False
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("Weights & Biases is not installed: pip install wandb") from None
        self.wandb = wandb
        project = folder.parent.name if folder.parent.name not in ("", "train") else PROJECT
        known = folder / "wandb_id.txt"
        identifier = known.read_text(encoding="utf-8").strip() if resumed and known.exists() else secrets.token_hex(4)
        try:
            self.run = wandb.init(
                project=project, entity=entity, name=folder.name, id=identifier, resume="allow", dir=str(folder),
                config=dict(options),
            )  # fmt: skip
        except Exception as error:  # wandb raises its own, the network's and Python's
            raise UserError(
                f"Weights & Biases cannot begin a run: {' '.join(str(error).split())}. Log in with 'wandb login', set "
                "WANDB_MODE=offline, or leave --wandb out"
            ) from None
        known.write_text(identifier, encoding="utf-8")
        self.failed = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Sends one row."""
        self._send(lambda: self.run.log(dict(values), step=step))

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Sends picture files under their names."""
        self._send(lambda: self.run.log({file.stem: self.wandb.Image(str(file)) for file in files}, step=step))

    def finish(self) -> None:
        """Ends the run."""
        self._send(self.run.finish)

    def _send(self, action) -> None:
        """A network that fails must not end a training."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            LOGGER.warning(f"Weights & Biases failed, nothing more is sent to it: {' '.join(str(error).split())}")
