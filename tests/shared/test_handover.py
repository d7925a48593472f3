"""Messages and the slab of the replay reach the other process, and its end is noticed."""

import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import structlog
import torch
from torch.multiprocessing import reductions

from shared.errors import HandoverError, TransportError
from shared.handover import (
    Channel,
    Disconnected,
    connect,
    create_memfd_slab,
    import_cuda_slab,
    listen,
    map_memfd_slab,
)
from shared.messages import Grant, Refusal, Welcome, encode
from tests.processes import DEADLINE_S, mapped_shared_memory


def nothing() -> None:
    return None


def pair(folder) -> tuple[Channel, Channel, socket.socket]:
    listener = listen(folder)
    client = connect(folder, deadline_s=DEADLINE_S, alive=nothing)
    sock, _ = listener.accept()
    return client, Channel(sock), listener


def test_a_slab_sent_as_a_descriptor_is_one_memory_in_both_processes(tmp_path):
    client, server, _ = pair(tmp_path)
    slab, fd = create_memfd_slab(1 << 21)
    server.send(Welcome(bytes(32), "memfd", 1 << 21, 8, "", [], 0, 0, 0), (fd,))
    message, fds = client.receive_within(DEADLINE_S, waiting_for="the welcome", alive=nothing)
    assert isinstance(message, Welcome)
    other = map_memfd_slab(fds[0], message.num_bytes)
    other[12345] = 77
    assert slab[12345] == 77
    with pytest.raises(TransportError, match="expected 4194304, as in the Welcome"):
        map_memfd_slab(fds[0], message.num_bytes * 2)


def test_connecting_has_a_deadline_although_the_queue_of_the_learner_is_full(tmp_path):
    listener = listen(tmp_path)
    waiting = []
    with pytest.raises(TransportError, match="no learner listens"):
        for _ in range(50):  # the learner accepts none of them
            waiting.append(connect(tmp_path, deadline_s=0.2, alive=nothing))
    assert waiting
    listener.close()


def test_messages_sent_before_a_disconnect_are_received_first(tmp_path):
    client, server, _ = pair(tmp_path)
    client.send(Grant(1, 2, 0))
    client.close()
    assert server.receive() == (Grant(1, 2, 0), ())
    with pytest.raises(Disconnected):
        server.receive()


def test_messages_of_a_process_that_died_with_unread_ones_are_received_first(tmp_path):
    """A collector that dies with an unread grant resets the connection; its commits are still in the socket."""
    client, server, _ = pair(tmp_path)
    server.send(Grant(7, 8, 0))  # never read
    for number in range(3):
        client.send(Grant(number, 2, 0))
    client.close()
    assert [server.receive() for _ in range(3)] == [(Grant(number, 2, 0), ()) for number in range(3)]
    with pytest.raises(Disconnected):
        server.receive()


def test_malformed_packets_are_counted_and_dropped():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = Channel(theirs)
    ours.send(b"\xc1garbage")
    ours.send(encode(Grant(3, 4, 0)))
    assert server.receive() == (Grant(3, 4, 0), ())
    assert server.num_malformed == 1


def test_sending_to_a_process_that_never_reads_raises_after_the_deadline(tmp_path):
    client, _server, _ = pair(tmp_path)
    with pytest.raises(TransportError, match="has not read"):
        for _ in range(100_000):
            client.send(Refusal("x" * 2000), deadline_s=0.2)


def test_connecting_without_a_learner_raises_with_the_socket_and_the_setting_to_raise(tmp_path):
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"no learner listens at .*replay.sock.*deadlines.start_s"):
        connect(tmp_path, deadline_s=0.2, alive=nothing)
    assert time.monotonic() - began < DEADLINE_S


def test_waiting_for_a_message_has_a_deadline_and_reports_progress(tmp_path):
    client, _server, _ = pair(tmp_path)
    calls = []
    with pytest.raises(TransportError, match="for the learner's welcome"):
        client.receive_within(0.3, waiting_for="the learner's welcome", alive=lambda: calls.append(1))
    assert len(calls) >= 2


def test_a_killed_process_that_mapped_the_slab_leaves_nothing_in_dev_shm(tmp_path):
    listener = listen(tmp_path)
    script = textwrap.dedent("""
        import sys, time
        from shared.handover import connect, map_memfd_slab
        assert "torch" not in sys.modules
        channel = connect(sys.argv[1], deadline_s=120, alive=lambda: None)
        message, fds = channel.receive_within(120, waiting_for="welcome", alive=lambda: None)
        map_memfd_slab(fds[0], message.num_bytes)[0] = 9
        print("mapped", flush=True)
        time.sleep(600)
    """)
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            sock, _ = listener.accept()
            break
        except BlockingIOError:
            assert time.monotonic() < end
            time.sleep(0.01)
    slab, fd = create_memfd_slab(1 << 21)
    server = Channel(sock)
    server.send(Welcome(bytes(32), "memfd", 1 << 21, 8, "", [], 0, 0, 0), (fd,))
    assert child.stdout is not None and child.stdout.readline() == "mapped\n"
    assert not mapped_shared_memory(child.pid), "the slab has no name that a killed process could leave behind"
    child.kill()
    child.wait()
    with pytest.raises(Disconnected):
        server.receive_within(DEADLINE_S, waiting_for="the end", alive=nothing)
    assert int(slab[0]) == 9


HANDLE = [b"memory", 8, 0, b"counter", 3, b"event", True]


class FakeGpus:
    """Two GPUs, of which the slab is on the second one.

    opened: the GPU for which the slab was mapped and whether its stream waits, for each attempt. fails: the GPUs for
    which mapping fails. released: the arguments with which torch's reference counts were released.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, peer: bool = True, fails: tuple[int, ...] = ()) -> None:
        self.opened, self.released, self._fails = [], [], fails
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: peer)
        monkeypatch.setattr(reductions, "rebuild_cuda_tensor", self._rebuild)
        monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter_cuda", lambda *args: self.released.append(args))

    def _rebuild(self, *arguments) -> torch.Tensor:
        self.opened.append((arguments[6], arguments[-1]))
        if arguments[6] in self._fails:
            raise RuntimeError("CUDA error: invalid device context\nmore lines")
        return torch.zeros(8, dtype=torch.uint8)


def test_a_slab_that_cannot_be_mapped_is_released_so_that_the_learner_can_free_it(monkeypatch):
    """Torch counts the processes that were given a handle, and keeps the memory until all have released it."""
    gpus = FakeGpus(monkeypatch, fails=(0, 1))
    with pytest.raises(HandoverError, match=r"cannot map the replay on GPU GPU-1: CUDA error: invalid .*gpu_storage=f"):
        import_cuda_slab("GPU-1", HANDLE, 8, writer=torch.device("cuda:0"))
    assert gpus.released == [(b"counter", 3)] and len(gpus.opened) == 2


@pytest.mark.parametrize(
    ("peer", "fails", "writer", "opened"),
    [
        (True, (), "cuda:0", [(0, False)]),
        (True, (0,), "cuda:0", [(0, False), (1, True)]),
        (False, (), "cuda:0", [(1, True)]),
        (True, (), "cuda:1", [(1, True)]),
        (True, (), "cpu", [(1, True)]),
    ],
)
def test_a_slab_is_mapped_for_the_gpu_that_writes_if_it_has_peer_access(
    monkeypatch, capsys, peer, fails, writer, opened
):
    """Then a copy needs no stream on the learner's GPU. Otherwise the slab is mapped for the GPU that it is on."""
    structlog.reset_defaults()
    gpus = FakeGpus(monkeypatch, peer=peer, fails=fails)
    import_cuda_slab("GPU-1", HANDLE, 8, writer=torch.device(writer))
    assert gpus.opened == opened and not gpus.released
    warned = "cannot be mapped for the simulator's GPU" in capsys.readouterr().out
    assert warned == bool(fails), "the slower way is not taken silently"


@pytest.mark.gpu
def test_another_process_writes_into_a_cuda_slab(tmp_path):
    from shared.handover import export_cuda_slab

    slab = torch.zeros(1 << 21, dtype=torch.uint8, device="cuda")
    uuid, handle = export_cuda_slab(slab)
    listener = listen(tmp_path)
    script = textwrap.dedent("""
        import sys, torch
        from shared.handover import connect, import_cuda_slab
        channel = connect(sys.argv[1], deadline_s=120, alive=lambda: None)
        message, _ = channel.receive_within(120, waiting_for="welcome", alive=lambda: None)
        slab = import_cuda_slab(message.uuid, message.handle, message.num_bytes)
        slab[7:10].copy_(torch.tensor([1, 2, 3], dtype=torch.uint8, device=slab.device))
        torch.cuda.synchronize()
        print("written", flush=True)
        sys.stdin.read()
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            sock, _ = listener.accept()
            break
        except BlockingIOError:
            assert time.monotonic() < end
            time.sleep(0.01)
    Channel(sock).send(Welcome(bytes(32), "cuda_ipc", 1 << 21, 8, uuid, handle, 0, 0, 0))
    assert child.stdout is not None and child.stdout.readline() == "written\n"
    assert slab[7:10].tolist() == [1, 2, 3]
    child.kill()
    child.wait()
    assert slab[7:10].tolist() == [1, 2, 3]
