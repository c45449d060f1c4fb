"""From the device to the host: one copy per batch, waited for by whoever needs the numbers, not by the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from driftlens.store import SiteInfo, group_sites
from driftlens.store.schema import stats_shapes, value_shapes

__all__ = ["HostCopy", "batch_bytes"]


class HostCopy:
    """A copy of a tensor to the host that may still be on its way.

    On CUDA the copy goes to pinned memory on the current stream without blocking, and an event marks its end. On the
    CPU there is nothing to copy: the tensor itself is kept.

    Args:
        source: float32 tensor; on the CPU it must not be written to afterwards.
    """

    def __init__(self, source: Float[Tensor, " n"]) -> None:
        self.nbytes = source.numel() * source.element_size()
        self._event: torch.cuda.Event | None = None
        if not source.is_cuda:
            self._host = source.cpu()
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._event.record(torch.cuda.current_stream(source.device))
        # The device memory must not be given to anyone else before the copy has read it.
        self._source: Tensor | None = source

    def __reduce__(self) -> tuple[type[HostCopy], tuple[Tensor]]:
        # what another process is sent are the values
        return HostCopy, (torch.from_numpy(self.wait()),)

    def wait(self) -> NDArray[np.float32]:
        """Return the values on the host, after the copy has ended; may be called from another thread."""
        if self._event is not None:
            self._event.synchronize()
            self._event = self._source = None
        array: NDArray[np.float32] = self._host.numpy()
        return array


def batch_bytes(sites: Sequence[SiteInfo], rows: int, reference: bool = False) -> int:
    """Return the bytes of one batch between model and file: float32 values of stored rows, and the batch's sums.

    Args:
        sites: the sites.
        rows: stored tokens of the batch.
        reference: whether an anchor answers to the same inputs.
    """
    numbers = 0
    for members in group_sites(sites):
        first = sites[members[0]]
        values = value_shapes(len(members), rows, first.num_experts, first.rank)
        sums = stats_shapes(len(members), 1, first.num_experts, first.rank)
        own = sum(math.prod(shape) for shape in (*values.values(), *sums.values()))
        numbers += own + (own - math.prod(values["base_norm"]) if reference else 0)
    return 4 * numbers
