import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiertune.errors import InputError
from hiertune.search.capacity import GroupShape, groups_that_fit


@pytest.mark.parametrize(
    ("shape", "nodes", "groups"),
    [
        (GroupShape(1, 1.0, 0.0), [{"CPU": 2.0}], 2),
        (GroupShape(2, 1.0, 0.0), [{"CPU": 2.0}], 1),
        (GroupShape(2, 1.0, 0.0), [{"CPU": 3.0}, {"CPU": 1.0}], 2),
        # A worker lives on one node: 3 CPUs each, of 4 + 4, are two workers and not 8 // 3.
        (GroupShape(1, 3.0, 0.0), [{"CPU": 4.0}, {"CPU": 4.0}], 2),
        (GroupShape(2, 1.0, 0.5), [{"CPU": 16.0, "GPU": 1.0}, {"CPU": 16.0}], 1),
        (GroupShape(1, 0.1, 0.0), [{"CPU": 0.3}], 3),
        # A share of a GPU is of one GPU: 2 x 0.4 on each, and not 5 x 0.4 on two.
        (GroupShape(1, 1.0, 0.4), [{"CPU": 16.0, "GPU": 2.0}], 4),
        (GroupShape(2, 1.0, 2.0), [{"CPU": 16.0, "GPU": 3.0}, {"CPU": 16.0, "GPU": 5.0}], 1),
        (GroupShape(1, 1 / 3, 0.0), [{"CPU": 1.0}], 3),
    ],
)
def test_groups_that_fit(shape, nodes, groups):
    assert groups_that_fit(shape, nodes) == groups


def test_a_group_that_never_fits_is_said_with_the_sum():
    with pytest.raises(InputError) as raised:
        groups_that_fit(GroupShape(4, 1.0, 1.0), [{"CPU": 8.0, "GPU": 2.0}], file="space.yaml")
    assert str(raised.value) == (
        "space.yaml: search.workers_per_trial: a trial needs 4 workers x 1 GPU = 4 GPU, but there are 2: "
        "it could never start\n  allowed: at most 2 such workers here, or fewer GPUs per worker"
    )


def test_a_worker_too_large_for_every_node_is_said():
    shape = GroupShape(1, 3.0, 0.0)
    assert shape.shortage([{"CPU": 2.0}, {"CPU": 2.0}]) == (
        "a trial needs 1 workers x 3 CPU = 3 CPU, but there are 4, of which one node has at most 2"
    )


def test_without_nodes_there_is_room_for_none():
    assert GroupShape(1, 1.0, 0.0).fit([]) == 0
    assert GroupShape(1, 1.0, 0.0).shortage([]).endswith("but there are 0")


def _placements(node, shape):
    """What is left of a node after one more worker there, for every GPU that could give a share."""
    cpu, gpus = node
    if cpu < shape.cpus_per_worker:
        return
    if shape.gpus_per_worker < 1:
        for index, free in enumerate(gpus):
            if free >= shape.gpus_per_worker:
                left = (*gpus[:index], free - shape.gpus_per_worker, *gpus[index + 1 :])
                yield cpu - shape.cpus_per_worker, left
    else:
        whole = [index for index, free in enumerate(gpus) if free == 1]
        for taken in itertools.combinations(whole, int(shape.gpus_per_worker)):
            left = tuple(0 if index in taken else free for index, free in enumerate(gpus))
            yield cpu - shape.cpus_per_worker, left


def _most_workers(nodes, shape):
    """By trying every way to place one worker after the other."""
    return max(
        (
            1 + _most_workers((*nodes[:index], left, *nodes[index + 1 :]), shape)
            for index, node in enumerate(nodes)
            for left in _placements(node, shape)
        ),
        default=0,
    )


@given(
    nodes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=2),
    workers=st.integers(1, 3),
    cpus=st.sampled_from([1.0, 1.5, 2.0]),
    gpus=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_what_fits_is_what_can_be_placed(nodes, workers, cpus, gpus):
    shape = GroupShape(workers, cpus, gpus)
    resources = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in nodes]
    places = tuple((cpu, (1,) * gpu) for cpu, gpu in nodes)
    assert shape.fit(resources) == _most_workers(places, shape) // workers


@pytest.mark.parametrize(("gpus", "backend"), [(0.0, "gloo"), (0.5, "gloo"), (1.0, "nccl"), (2.0, "nccl")])
def test_workers_that_share_a_gpu_do_without_nccl(gpus, backend):
    assert GroupShape(2, 1.0, gpus).backend == backend
