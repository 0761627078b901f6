"""The engine for many machines: Ray Data, with a pool of actors that each hold the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from captum_ssm.datasets.engines import Part, Work
from captum_ssm.datasets.explain import Explain
from captum_ssm.datasets.packages import needed
from captum_ssm.datasets.tables import from_bytes
from captum_ssm.errors import InvalidInputError, ModelStateError, is_own


@dataclass(frozen=True)
class Ray:
    """Explains blocks in a pool of actors of Ray Data, on one machine or many.

    The file is read, and the parts are written, on the machine where this runs; the others need no common disk, but
    this package, and the model under the same name. A block of a worker that died is explained by another one. Each
    part arrives once, under its number.

    Attributes:
        workers: How many actors; None: as many as the cluster has GPUs or CPUs for.
        address: The cluster, such as ``"auto"``; None: that of the environment variable ``RAY_ADDRESS``, else one that
            is started on this machine. Nothing is done if Ray is initialised already.
        gpus: GPUs of each actor. Without one an actor has as many CPUs as the explanation has threads.
    """

    workers: int | None = None
    address: str | None = None
    gpus: float = 0

    def identity(self, explain: Explain) -> dict[str, Any]:
        """Return the identity of the model, as a worker loads it.

        Args:
            explain: The explanation.

        Raises:
            InvalidInputError: If ray is not installed, or the model cannot be loaded there.
        """
        ray = needed("ray")
        with self.opened(), _told():
            return dict(ray.get(ray.remote(**self._resources(explain))(_identity).remote(explain)))

    def parts(self, work: Work, on_rows: Callable[[int], object]) -> Iterator[Part]:
        """Explain the blocks.

        Args:
            work: Which blocks, and how.
            on_rows: Called with the number of rows whenever some are done.

        Yields:
            Each part once, in any order.

        Raises:
            InvalidInputError: If ray is not installed, or the rows of a block that is done have changed.
            ModelStateError: If a worker fails, or has another model.
        """
        with self.opened(), _told():
            from captum_ssm.datasets.ray_blocks import explained_blocks

            source = replace(work.source, path=str(Path(work.source.path).resolve()))
            blocks = explained_blocks(
                replace(work, source=source), self._workers(work.explain), self._resources(work.explain)
            )
            for batch in blocks.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    part = Part(row["number"], from_bytes(row["table"]), row["digest"])
                    yield part
                    on_rows(part.table.num_rows)

    def _resources(self, explain: Explain) -> dict[str, float]:
        """Return the CPUs or GPUs of an actor."""
        return {"num_gpus": self.gpus} if self.gpus else {"num_cpus": explain.threads or 1}

    def _workers(self, explain: Explain) -> int:
        """Return how many actors there are.

        Raises:
            InvalidInputError: If the cluster has no room for one.
        """
        there: dict[str, float] = needed("ray").cluster_resources()
        room = int(there.get("GPU", 0) // self.gpus if self.gpus else there.get("CPU", 0) // (explain.threads or 1))
        workers = room if self.workers is None else self.workers
        if not 1 <= workers <= room:
            raise InvalidInputError(f"the cluster has room for {room} workers, but {workers} are asked for.")
        return workers

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Be connected to the cluster while the context is open; one that was connected before stays so.

        Yields:
            None.

        Raises:
            InvalidInputError: If ray is not installed, or there is no such cluster.
        """
        ray = needed("ray")
        if ray.is_initialized():
            yield
            return
        starts = self.address is None and not os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"include_dashboard": False} if starts else {"address": self.address}
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, ValueError) as error:
            raise InvalidInputError(f"cannot connect to a cluster of Ray at {self.address!r}: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def _identity(explain: Explain) -> dict[str, Any]:
    """Return the model's identity: class, digests of weights and vocabulary, layers."""
    return explain.ready().identity()


@contextmanager
def _told() -> Iterator[None]:
    """Raise the error of a worker as it was there.

    Yields:
        None.

    Raises:
        ModelStateError: For an error of Ray itself.
    """
    errors = needed("ray.exceptions")
    try:
        yield
    except errors.RayError as error:
        cause: BaseException | None = getattr(error, "cause", None)
        while cause is not None and not is_own(cause):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise cause from error
        raise ModelStateError(f"a worker of Ray failed: {error}") from error
