"""Several processes on one run: `torchrun --standalone --nproc_per_node=2 -m distill train ...`.

Every process holds the whole model, takes its share of each batch and averages gradients with the
others. On two CPU cores, two processes of one thread each also train faster than one process of two
threads: there is no barrier after every small operation.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from worldmodel.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are."""

    rank: int
    count: int

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Processes":
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """Number of samples of a batch that this process takes. Raises UserError when the batch is
        not a multiple of the processes.
        """
        if batch % self.count:
            raise UserError(
                f"a batch of {batch} cannot be shared by {self.count} processes: change the batch "
                "or --nproc_per_node"
            )
        return batch // self.count

    def seed(self, seed: int, step: int) -> int:
        """Seed of the random draws of one step: a function of the step, so that a resumed run
        repeats them.
        """
        return hash((seed, step, self.rank)) % 2**63

    def average(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their mean over all processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag), device=device)
        dist.all_reduce(flags)
        return bool(flags)

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.count > 1:
            dist.barrier()
