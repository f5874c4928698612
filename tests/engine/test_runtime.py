"""The machine under a run: what is refused and why, how many CPUs count, and how signals stop a run."""

import os
import signal
import threading
import weakref
from datetime import timedelta

import pytest
import torch

from ctseg.engine import process, runtime
from ctseg.engine.process import cpu_has_bfloat16, stop_on_signal
from ctseg.engine.runtime import Runtime, running, start_runtime
from ctseg.errors import DeviceError, PeerLost, Stopped


@pytest.fixture(autouse=True)
def keep_threads():
    """`start_runtime` sets torch's threads for the whole process."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture
def no_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def bfloat16(monkeypatch, present: bool) -> None:
    monkeypatch.setattr(process, "cpu_flags", lambda: frozenset({"avx2", "avx512_bf16"} if present else {"avx2"}))


def test_auto_is_float32_on_the_cpu_where_there_is_no_cuda(no_cuda) -> None:
    assert start_runtime(amp=True) == Runtime(torch.device("cpu"), "float32", 0, 1)


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.float16), (False, None)])
def test_auto_is_cuda_and_mixed_precision_if_the_recipe_wants_it(monkeypatch, amp: bool, dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = start_runtime(amp=amp)
    assert (chosen.device, chosen.amp_dtype) == (torch.device("cuda", 0), dtype)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start_runtime().device == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match=r"'cuda:2': 2 CUDA GPU\(s\) here"):
        start_runtime("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_missing_cuda_names_the_cpu(no_cuda, name: str) -> None:
    with pytest.raises(DeviceError, match=r"0 CUDA GPU\(s\) here; use --device cpu"):
        start_runtime(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "mps", "meta"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{name}': "):
        start_runtime(name)


def test_precisions_that_a_cpu_lacks_are_refused(monkeypatch) -> None:
    bfloat16(monkeypatch, present=False)
    with pytest.raises(DeviceError, match=r"this CPU lacks bfloat16 arithmetic.*use float32"):
        start_runtime("cpu", "bfloat16")
    with pytest.raises(DeviceError, match="'float16': not on a CPU"):
        start_runtime("cpu", "float16")
    with pytest.raises(DeviceError, match="expected one of auto, float32, bfloat16, float16"):
        start_runtime("cpu", "half")


def test_bfloat16_is_used_where_the_cpu_has_it(monkeypatch) -> None:
    bfloat16(monkeypatch, present=True)
    assert cpu_has_bfloat16()
    chosen = start_runtime("cpu", "bfloat16")
    assert chosen.amp_dtype is torch.bfloat16
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with start_runtime("cpu", "float32").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_processes_of_a_machine_share_its_cpus(monkeypatch) -> None:
    monkeypatch.setattr(process, "available_cpus", lambda: 12)
    for processes, threads in (("1", 12), ("4", 3), ("24", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        start_runtime("cpu")
        assert torch.get_num_threads() == threads


def test_tasks_of_slurm_have_cpus_of_their_own(monkeypatch) -> None:
    """`available_cpus` is one task's share already; torchrun started in a task shares it out."""
    monkeypatch.setattr(process, "available_cpus", lambda: 12)
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert process.threads_of_process() == 12
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert process.threads_of_process() == 3


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch) -> None:
    """Slurm may show each task its own GPU alone, whose number is 0 for all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(DeviceError, match="'cuda:3'"):
        start_runtime()
    for name, value in {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert start_runtime(alone=True).device == torch.device("cuda", 0)


def test_work_without_talk_joins_no_group(monkeypatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert start_runtime("cpu", alone=True) == Runtime(torch.device("cpu"), "float32", 0, 1)


def test_processes_that_do_not_meet_say_where(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "MEETING_TIMEOUT", timedelta(seconds=1))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerLost, match="process 2 of 2 did not meet the others at localhost:9; see their logs"):
        start_runtime("cpu")
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(PeerLost, match="MASTER_ADDR and MASTER_PORT do not say where the first one is"):
        start_runtime("cpu")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4398"), True),
        (torch.distributed.DistNetworkError("broken"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_the_end_of_another_process_is_one_line(monkeypatch, error: RuntimeError, told: bool) -> None:
    monkeypatch.setattr(runtime, "PEER_GRACE_SECONDS", 0)
    expected = pytest.raises(PeerLost if told else RuntimeError, match="another process" if told else "mat1")
    with expected, running("cpu"):
        raise error


def test_one_process_needs_no_peers() -> None:
    alone = Runtime(torch.device("cpu"))
    assert alone.is_main
    assert alone.gather({"a": 1}) == [{"a": 1}]
    assert (alone.any_process(True), alone.any_process(False)) == (True, False)
    alone.wait_for_all()
    alone.copy_from_main([torch.zeros(1)])
    assert not Runtime(torch.device("cpu"), "float32", rank=1, world_size=2).is_main


def test_description_names_device_precision_and_place() -> None:
    torch.set_num_threads(2)
    assert Runtime(torch.device("cpu")).describe() == "cpu (2 threads), float32"
    second = Runtime(torch.device("cpu"), "bfloat16", rank=1, world_size=4)
    assert second.describe() == "cpu (2 threads), bfloat16, process 2 of 4"


def test_running_leaves_the_process_group_when_all_do(monkeypatch) -> None:
    """At the end and after a stop; after an error the others may wait in it, and leaving would wait for them."""
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    with running("cpu"):
        pass
    assert len(left) == 1
    with pytest.raises(Stopped), running("cpu"):
        raise Stopped
    assert len(left) == 2
    with pytest.raises(KeyError), running("cpu"):
        raise KeyError
    assert len(left) == 2


def test_no_network_is_left_when_a_stopped_run_leaves_its_group(monkeypatch) -> None:
    """PyTorch's wrapper would keep the group's threads, and ending with them aborts the process: no exit code 75."""

    def train() -> None:
        network = torch.nn.Linear(1, 1)
        network.itself = [network]
        networks.append(weakref.ref(network))
        raise Stopped

    networks, alive = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: alive.append(networks[0]() is not None))
    with pytest.raises(Stopped), running("cpu"):
        train()
    assert alive == [False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_to_stop_and_the_old_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with stop_on_signal() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_interrupt_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop_requested:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_term_waits_for_the_first() -> None:
    with stop_on_signal() as stop_requested:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()


def test_once_stopped_a_further_signal_does_not_change_the_exit_code() -> None:
    """srun sends SIGTERM to all tasks as soon as the first one has ended."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in numbers]
    try:
        with pytest.raises(Stopped), stop_on_signal():
            raise Stopped
        for number in numbers:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    found = []

    def work() -> None:
        with stop_on_signal() as stop_requested:
            found.append((stop_requested(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]
