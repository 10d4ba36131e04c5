import pytest

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
