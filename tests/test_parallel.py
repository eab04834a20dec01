"""Several processes on one run: shares, seeds, averaged gradients. A whole run with two is in
test_training.
"""

import pytest
import torch

from distill.parallel import Processes


def test_shares_and_seeds():
    first = Processes(0, 2)
    second = Processes(1, 2)
    assert first.share(6) == 3
    with pytest.raises(ValueError, match="cannot be shared by 2 processes"):
        first.share(5)
    assert first.seed(0, 7) == Processes(0, 2).seed(0, 7)
    assert len({first.seed(0, 7), second.seed(0, 7), first.seed(0, 8), first.seed(1, 7)}) == 4


def average_in_two(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    processes = Processes(rank, 2)
    gradients = [torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank])]
    processes.average(gradients)
    assert torch.equal(gradients[0], torch.full((2, 3), 0.5)) and gradients[1].item() == 5.0
    assert processes.any(rank == 1, torch.device("cpu")) and not processes.any(
        False, torch.device("cpu")
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_averaged(tmp_path):
    torch.multiprocessing.spawn(average_in_two, (tmp_path,), nprocs=2)
