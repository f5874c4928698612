"""What Slurm's variables mean: places in a group of processes, the first one's address, parts of an array."""

import pytest

from ctseg import slurm
from ctseg.errors import CtsegError

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "localhost,n[2-3]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
"""The fourth of five tasks on three nodes."""


def test_a_task_of_srun_joins_the_others() -> None:
    environ = dict(STEP)
    assert slurm.join(environ)
    added = {name: value for name, value in environ.items() if name not in STEP}
    port = added.pop("MASTER_PORT")
    assert added == {
        "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
    }  # fmt: skip
    assert 10_000 < int(port) < 32_768
    assert not slurm.join(environ), "it has joined already"


def test_every_task_of_a_step_gets_the_same_port_and_the_next_step_another() -> None:
    def port(**changes: str) -> str:
        environ = {**STEP, **changes}
        slurm.join(environ)
        return environ["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_NODEID="0")
    assert len({port(SLURM_STEP_ID=str(step)) for step in range(30)}) == 30
    assert port(SLURM_JOB_ID="1235") != port()
    assert port(MASTER_PORT="29500") == "29500"


def test_what_is_set_already_is_kept() -> None:
    environ = {**STEP, "MASTER_ADDR": "head", "RANK": "0", "WORLD_SIZE": "2"}
    assert not slurm.join(environ), "torchrun has told its processes apart"
    del environ["RANK"], environ["WORLD_SIZE"]
    assert slurm.join(environ)
    assert environ["MASTER_ADDR"] == "head"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # salloc's shell
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script itself
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["no Slurm", "salloc", "batch script", "one task"],
)
def test_one_process_joins_nothing(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert not slurm.join(environ)
    assert environ == before
    assert (slurm.num_processes(environ), slurm.process_index(environ), slurm.tasks_on_node(environ)) == (1, 0, 1)


def test_a_name_that_means_nothing_here_gives_way_to_an_address() -> None:
    environ = {**STEP, "SLURM_STEP_NODELIST": "no-such-host.invalid"}
    slurm.join(environ)
    assert environ["MASTER_ADDR"] == "10.0.0.1"
    del environ["MASTER_ADDR"], environ["RANK"], environ["SLURM_LAUNCH_NODE_IPADDR"]
    slurm.join(environ)
    assert environ["MASTER_ADDR"] == "no-such-host.invalid", "there is nothing better"


def test_without_a_list_of_nodes_the_user_is_asked() -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(CtsegError, match="SLURM_STEP_NODELIST is missing; set MASTER_ADDR"):
        slurm.join(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2,5],m3", "n1"),
        ("m3,n[1-2]", "m3"),
        ("gpu-node-[007-012]", "gpu-node-007"),
        ("r[1-2]n[7,9]", "r1n7"),
        ("c[3,7-9]-ib,d1", "c3-ib"),
        ("n[01-02].cluster.example", "n01.cluster.example"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodelist: str, host: str) -> None:
    assert slurm.first_host(nodelist) == host


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("2(x2),1", [2, 2, 1]), ("1,4(x3)", [1, 4, 4, 4]), ("", []), ("x", [])]
)
def test_counts(text: str, counts: list[int]) -> None:
    assert slurm.expand_counts(text) == counts


def test_processes_of_torchrun_and_of_srun() -> None:
    assert (slurm.num_processes(STEP), slurm.process_index(STEP)) == (5, 3)
    torchrun = {**STEP, "RANK": "6", "WORLD_SIZE": "8"}
    assert (slurm.num_processes(torchrun), slurm.process_index(torchrun)) == (8, 6)


def array(task: int, first: int, last: int, count: int, step: int = 1) -> dict[str, str]:
    values = {"ID": task, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def test_parts_of_an_array() -> None:
    assert slurm.array_part({}) is None
    assert [slurm.array_part(array(n, 1, 4, 4)) for n in (1, 2, 3, 4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [slurm.array_part(array(n, 0, 8, 3, 4)) for n in (0, 4, 8)] == [(0, 3), (1, 3), (2, 3)]
    assert slurm.array_part(array(7, 7, 7, 1)) == (0, 1)


def test_an_array_with_gaps_would_leave_parts_out() -> None:
    with pytest.raises(CtsegError, match=r"the job array has gaps \(3 tasks from 1 to 7\).*give --shard I/N"):
        slurm.array_part(array(3, 1, 7, 3))
