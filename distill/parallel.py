"""Several processes on one run: `torchrun --standalone --nproc_per_node=2 -m distill train ...`.

Every process holds the whole model, takes its share of each batch and averages gradients with the
others. Two processes of one thread each also train faster on two CPU cores than one with two
threads: nothing waits at a barrier after every small operation.
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
        """Samples of a batch that this process takes; ValueError when they cannot be shared out
        evenly.
        """
        if batch % self.count:
            raise UserError(
                f"a batch of {batch} cannot be shared by {self.count} processes: change the batch "
                "or --nproc_per_node"
            )
        return batch // self.count

    def seed(self, seed: int, step: int) -> int:
        """Seed of the random draws of one step: a function of the step, so that a continued run
        draws what it would have drawn.
        """
        return hash((seed, step, self.rank)) % 2**63

    def average(self, gradients: list[Tensor]) -> None:
        """Replaces gradients by their mean over all processes, in one message."""
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
        """Waits for the others."""
        if self.count > 1:
            dist.barrier()
