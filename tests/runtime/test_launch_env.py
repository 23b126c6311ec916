"""What torchrun and srun tell, what contradicts itself, and where ranks meet."""

import pytest

from megabagel.errors import UserError
from megabagel.parallel.mesh import device_of
from megabagel.runtime.identity import Identity
from megabagel.runtime.launch_env import PORTS, first_host, read_launch_env, rendezvous_endpoint, several_hosts

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "9",
}
BATCH = {"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("env", "facts"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (1, 4, 0)),
        (SRUN, (5, 8, 1)),
        (SRUN | TORCHRUN, (1, 4, 0)),  # srun started torchrun, once per node
        (SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        (BATCH | {"SLURM_NTASKS": "1"}, (0, 1, 0)),
        (BATCH, (0, 1, 0)),
        (BATCH | {"SLURM_NTASKS": "4"} | TORCHRUN, (1, 4, 0)),  # --nproc in a batch script
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 8, 1)),  # srun --mpi=pmi2
        (SRUN | {"PMIX_RANK": "5"}, (5, 8, 1)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, (0, 1, 0)),
        (TORCHRUN | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, (1, 4, 0)),  # told in torchrun's words
    ],
)
def test_facts(env: dict[str, str], facts: tuple[int, int, int]) -> None:
    assert read_launch_env(env) == facts


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "1", "LOCAL_RANK": "0"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"RANK": "1"}, "WORLD_SIZE and LOCAL_RANK is not set"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4, WORLD_SIZE=4, LOCAL_RANK=0: expected both ranks below the world size"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1"),
        (TORCHRUN | {"RANK": "one"}, "RANK=one, WORLD_SIZE=4, LOCAL_RANK=0: expected whole numbers"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8, SLURM_STEP_NUM_TASKS=8"),
        (SRUN | {"SLURM_LOCALID": "8"}, "SLURM_LOCALID=8: expected both ranks below"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, "SLURM_PROCID is not set"),
        (BATCH | {"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4, but this process was not started by srun"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "started by Open MPI's mpirun, which is not und"),
        (SRUN | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "16"}, "RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_RANK=0: started by Hydra"),
        (SRUN | {"PMI_RANK": "0", "PMI_SIZE": "64"}, "PMI_RANK=0: started by Hydra"),  # mpiexec over two nodes of a job
        ({"PALS_RANKID": "3", "PMI_RANK": "3"}, "PALS_RANKID=3: started by PALS"),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "6"}, "started by jsrun"),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "6"}, "started by MVAPICH"),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"}, "started by Flux"),
        ({"PMIX_RANK": "1"}, "started by a PMIx launcher"),
    ],
)
def test_contradictions(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as error:
        read_launch_env(env)
    assert says in str(error.value)


def test_steps_of_one_job_meet_at_ports_of_their_own() -> None:
    env = {"SLURM_STEP_NODELIST": "n1"}
    places = {
        rendezvous_endpoint(env | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(100, 140)
        for step in range(5)
    }
    assert len(places) == 200
    identities = [Identity.of({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": step}) for step in "01"]
    assert len(set(identities)) == 2 and str(identities[1]) == "job 7, step 1, start 0"


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, False),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"SLURM_STEP_NUM_NODES": "1"}, False),
        ({"SLURM_STEP_NUM_NODES": "2"}, True),
    ],
)
def test_several_hosts(env: dict[str, str], several: bool) -> None:
    assert several_hosts(env) is several


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({"MASTER_ADDR": "a", "MASTER_PORT": "7"}, ("a", 7)),
        ({"SLURM_STEP_NODELIST": "n[3-5]", "SLURM_JOB_ID": "12"}, ("n3", PORTS[12])),
        ({"SLURM_STEP_NODELIST": "n[3-5]", "SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1"}, ("127.0.0.1", PORTS[1])),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": str(len(PORTS) + 2), "MASTER_PORT": ""}, ("n1", PORTS[2])),
    ],
)
def test_meeting_point(env: dict[str, str], place: tuple[str, int]) -> None:
    assert rendezvous_endpoint(env) == place


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"SLURM_JOB_ID": "3"}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT=99999: expected a port"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_no_meeting_point(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as error:
        rendezvous_endpoint(env)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n0", "n0"),
        ("n0,n1", "n0"),
        ("n[0-1]", "n0"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("gpu[3,7-9]", "gpu3"),
        ("rack3-n[1,4]-ib[0-1],x", "rack3-n1-ib0"),
        ("login1,gpu[0-3]", "login1"),
    ],
)
def test_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_device_of_a_rank() -> None:
    assert [device_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert device_of(3, 1) == 0  # each task was given a GPU of its own
    with pytest.raises(UserError, match="local rank 4, but this process sees 4 GPUs"):
        device_of(4, 4)
