import os
import time

import pytest
import torch
import torch.distributed as dist

from ringworld_workers.testing import DistributedError, run_distributed


def add_ranks(rank, world_size, offset):
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return rank, dist.get_world_size(), total, torch.get_num_threads()


def fail_on(rank, world_size, bad_ranks):
    if rank in bad_ranks:
        raise ValueError(f"broken on purpose {rank}")


def die_on_one(rank, world_size):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hang_on_one(rank, world_size):
    if rank == 0:
        time.sleep(120)


def large_result(rank, world_size):
    return torch.full((1_000_000,), float(rank))


def test_results_come_back_by_rank():
    results = run_distributed(add_ranks, 3, 10)
    assert [result[0] for result in results] == [0, 1, 2]
    assert all(result[1] == 3 and result[3] == 1 for result in results)
    assert all(result[2].item() == 33.0 for result in results)


def test_results_may_be_large():
    assert run_distributed(large_result, 2)[1].sum().item() == 1_000_000


def test_every_traceback_is_in_the_error():
    with pytest.raises(DistributedError) as caught:
        run_distributed(fail_on, 3, (0, 2))
    message = str(caught.value)
    assert "broken on purpose 0" in message and "broken on purpose 2" in message
    assert "rank 1 raised" not in message


def test_a_dead_rank_ends_the_others():
    started = time.monotonic()
    with pytest.raises(DistributedError, match="rank 1 ended with exit code 7"):
        run_distributed(die_on_one, 2, timeout=60.0)
    assert time.monotonic() - started < 50


def test_a_hung_rank_is_killed_at_the_timeout():
    started = time.monotonic()
    with pytest.raises(DistributedError, match="rank 0 was still running after 10 s") as caught:
        run_distributed(hang_on_one, 1, timeout=10.0)
    assert time.monotonic() - started < 30
    # The message shows where.
    assert "in hang_on_one" in str(caught.value)


def test_a_nested_function_is_refused():
    with pytest.raises(ValueError, match="module level"):
        run_distributed(lambda rank, world_size: None, 1)
