"""Blocks as a data set of Ray: one row each, read where the file is, explained in a pool of actors."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from captum_ssm.datasets.engines import Work
from captum_ssm.datasets.tables import to_bytes
from captum_ssm.errors import ModelStateError


def explained_blocks(work: Work, workers: int, resources: Mapping[str, float]) -> Dataset:
    """Return the blocks explained, as a data set that does nothing until it is read.

    Args:
        work: Which blocks, and how.
        workers: How many actors.
        resources: CPUs or GPUs of each.

    Returns:
        One row for each block: its number, its table in bytes, the digest of its input.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # each row, a block of ours, is a block of Ray's: none waits for its neighbours
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    blocks = ray.data.read_datasource(_Blocks(work), override_num_blocks=1, num_cpus=0, label_selector=here)
    return blocks.map_batches(
        _Worker,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(work,),
        **resources,
    )


class _Blocks(Datasource):
    """The blocks that are not done yet, read one after the other by one task.

    Args:
        work: Which blocks.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def estimate_inmemory_data_size(self) -> int | None:
        """Return nothing: the size is not known."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return the one task."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_packed, self._work), unknown)]


def _packed(work: Work) -> Iterator[pyarrow.Table]:
    """Yield each block as a table of one row."""
    for block in work.blocks():
        yield pyarrow.table(
            {"number": [block.number], "block": pyarrow.array([pickle.dumps(block)], pyarrow.large_binary())}
        )


class _Worker:
    """Explains blocks, with the model that was loaded once.

    Args:
        work: How, and the identity of the model.

    Raises:
        ModelStateError: If the model here is another one.
    """

    def __init__(self, work: Work) -> None:
        own = work.explain.ready().identity()
        if own != work.identity:
            raise ModelStateError(
                f"the model on {ray.util.get_node_ip_address()} is another one than that of the first worker: {own}, "
                f"not {work.identity}. Put the same model on each machine."
            )
        self._work = work

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Return blocks explained.

        Args:
            batch: The blocks, one in each row.
        """
        parts = [self._work.part(pickle.loads(block)) for block in batch["block"].to_pylist()]
        return pyarrow.table(
            {
                "number": [part.number for part in parts],
                "digest": [part.digest for part in parts],
                "table": pyarrow.array([to_bytes(part.table) for part in parts], pyarrow.large_binary()),
            }
        )
