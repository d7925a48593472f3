"""Which GPU each process gets, and the environment variables that each process starts with."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from launcher.devices import (
    NO_GPU,
    SLOW_FLOAT16,
    Devices,
    Gpu,
    allocator_conf,
    check_shared_use,
    child_environment,
    choose_devices,
    find_devices,
    list_gpus,
    mps_notes,
    order_notes,
    precision_notes,
    visible_gpus,
)
from shared.errors import SettingError

GPUS = [Gpu(0, "GPU-aa0", "H200"), Gpu(1, "GPU-bb1", "H200"), Gpu(2, "GPU-bc2", "L40, PCIe")]


def _fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_gpus_are_read_from_nvidia_smi_even_if_their_names_contain_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{gpu.index}, {gpu.uuid}, Default, {gpu.name}\\n" for gpu in GPUS)
    expected = "--query-gpu=index,uuid,compute_mode,name --format=csv,noheader"
    _fake_nvidia_smi(tmp_path, f'[ "$*" = "{expected}" ] && printf "{rows}"', monkeypatch)
    assert list_gpus() == (GPUS, ())


def test_a_machine_without_nvidia_smi_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == ([], ())


def test_an_nvidia_smi_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nvidia_smi(tmp_path, "echo driver mismatch; exit 18", monkeypatch)
    gpus, notes = list_gpus()
    assert gpus == [] and len(notes) == 1
    assert "exit code 18" in notes[0] and "driver mismatch" in notes[0]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("GPU-bb1", [1]),
        ("GPU-bc, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("NoDevFiles", []),
    ],
)
def test_the_users_mask_is_respected_in_its_order(mask: str | None, expected: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(GPUS, mask)] == expected


def test_a_mask_is_ignored_without_gpus_and_a_wrong_entry_is_an_error() -> None:
    assert visible_gpus([], "0,1") == []
    assert visible_gpus(GPUS, "MIG-1234")[0].uuid == "MIG-1234"
    for wrong in ("3", "GPU-zz", "bb1"):
        with pytest.raises(SettingError, match=f"CUDA_VISIBLE_DEVICES lists '{wrong}'"):
            visible_gpus(GPUS, wrong)


@pytest.mark.parametrize(
    ("count", "sim", "train", "expected"),
    [
        (1, None, None, (0, 0)),
        (2, None, None, (0, 1)),
        (3, None, None, (0, 1)),
        (3, 2, None, (2, 1)),
        (3, None, 2, (0, 2)),
        (3, 1, 1, (1, 1)),
    ],
)
def test_the_learner_gets_the_second_gpu_by_default(
    count: int, sim: int | None, train: int | None, expected: tuple[int, int]
) -> None:
    devices = choose_devices(GPUS[:count], sim=sim, train=train)
    assert devices.sim and devices.train and devices.kind == "cuda:0"
    assert (devices.sim.index, devices.train.index) == expected


@pytest.mark.parametrize(("sim", "train", "flag"), [(3, None, "--sim-gpu 3"), (None, -1, "--train-gpu -1")])
def test_a_gpu_that_does_not_exist_is_refused(sim: int | None, train: int | None, flag: str) -> None:
    with pytest.raises(SettingError, match=rf"{flag} is not .*; expected an index from 0 to 2; .*counts"):
        choose_devices(GPUS, sim=sim, train=train)


def test_without_a_gpu_both_processes_run_on_the_cpu() -> None:
    devices = choose_devices([], sim=None, train=None)
    assert (devices.kind, devices.notes, devices.names()) == ("cpu", (NO_GPU,), {"sim": "cpu", "train": "cpu"})


def test_float16_gives_a_warning_on_the_cpu_only() -> None:
    cpu, gpu = Devices(None, None), Devices(GPUS[0], GPUS[0])
    assert precision_notes(cpu, "float16") == (SLOW_FLOAT16,)
    assert not any(precision_notes(gpu, name) for name in ("bfloat16", "float16", "false"))
    assert not any(precision_notes(cpu, name) for name in ("bfloat16", "false"))


def test_each_process_sees_its_own_gpu_first() -> None:
    devices = Devices(GPUS[2], GPUS[0])
    outer = {"CUDA_VISIBLE_DEVICES": "0,1,2", "PYTHONPATH": "/mine"}
    collector = child_environment("collector", devices, outer)
    learner = child_environment("learner", devices, outer)
    assert collector["CUDA_VISIBLE_DEVICES"] == "GPU-bc2,GPU-aa0"
    assert learner["CUDA_VISIBLE_DEVICES"] == "GPU-aa0"
    assert collector["CUDA_DEVICE_ORDER"] == learner["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert collector["PYTHONPATH"] == "/mine"
    assert collector["TANDEM_LAUNCH_PID"] == str(os.getpid())
    assert "OMP_NUM_THREADS" not in learner
    one = child_environment("collector", Devices(GPUS[1], GPUS[1]), outer)
    assert one["CUDA_VISIBLE_DEVICES"] == "GPU-bb1"


@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        ({}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:False"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"},
            "max_split_size_mb:64,expandable_segments:False",
        ),
        (
            {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2]"},
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:False",
        ),
    ],
)
def test_expandable_segments_are_off_and_the_users_other_allocator_settings_stay(
    outer: dict[str, str], expected: str
) -> None:
    assert allocator_conf(outer) == expected
    env = child_environment("learner", Devices(GPUS[0], GPUS[0]), outer)
    assert env["PYTORCH_ALLOC_CONF"] == env["PYTORCH_CUDA_ALLOC_CONF"] == expected


def test_on_the_cpu_the_learner_gets_all_threads_but_the_collectors_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    cpu = Devices(None, None)
    threads = {role: child_environment(role, cpu, {})["OMP_NUM_THREADS"] for role in ("collector", "learner")}
    assert threads == {"collector": "1", "learner": "5"}
    assert child_environment("learner", cpu, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert child_environment("learner", cpu, {})["OMP_NUM_THREADS"] == "1"


def _find(**changes: object) -> Devices:
    arguments = {"sim": 0, "train": 0, "autocast": "bfloat16", "gpu_storage": True, "environ": {}, "device_files": ()}
    return find_devices(**{**arguments, **changes})  # type: ignore[arg-type]


def test_a_named_gpu_that_cannot_be_listed_is_an_error_if_the_machine_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    device = tmp_path / "nvidia0"
    with pytest.raises(SettingError, match=r"--sim-gpu 99 --train-gpu 0 asks for a GPU, but this machine has none"):
        _find(sim=99, device_files=(str(device),))
    assert _find(sim=None, train=None, device_files=(str(device),)).kind == "cpu"
    device.touch()
    with pytest.raises(SettingError, match=r"there is no nvidia-smi, but .*nvidia0 exists; expected .*leave out both"):
        _find(device_files=(str(device),))
    assert _find(sim=None, train=None, device_files=(str(device),)).kind == "cpu"


def test_a_named_gpu_is_an_error_if_nvidia_smi_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'cannot communicate with the NVIDIA driver'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match=r"exit code 9.*cannot communicate .* driver; expected .*repair"):
        _find()
    assert _find(sim=None, train=None).kind == "cpu"


def test_a_named_gpu_that_the_mask_hides_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nvidia_smi(tmp_path, "echo 0, GPU-a, Default, H100", monkeypatch)
    with pytest.raises(SettingError, match=r"CUDA_VISIBLE_DEVICES='' hides every GPU; expected .*; unset"):
        _find(environ={"CUDA_VISIBLE_DEVICES": ""})


def test_a_broken_gpu_is_left_out_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("0, GPU-a, Default, H100", "Unable to determine the device handle for gpu 0000:3B:00.0: Unknown Error")
    _fake_nvidia_smi(tmp_path, "; ".join(f"echo '{line}'" for line in (*lines, "2, [Unknown Error], , ")), monkeypatch)
    gpus, notes = list_gpus()
    assert gpus == [Gpu(0, "GPU-a", "H100")]
    assert len(notes) == 2 and "0000:3B:00.0" in notes[0]


EXCLUSIVE = [
    Gpu(0, "GPU-a", "H100"),
    Gpu(1, "GPU-b", "H100", "Exclusive_Process"),
    Gpu(2, "GPU-c", "H100", "Prohibited"),
]


@pytest.mark.parametrize(
    ("sim", "train", "gpu_storage", "message"),
    [
        (0, 1, True, r"GPU 1 .*Exclusive_Process; expected Default.*both processes.*-i 1 -c DEFAULT, or .*=false"),
        (1, 1, False, r"GPU 1 .*Exclusive_Process; expected Default.*-i 1 -c DEFAULT$"),
        (2, 0, False, r"GPU 2 .*Prohibited; expected Default.*no process"),
        (0, 1, False, None),
        (1, 0, True, None),
    ],
)
def test_a_gpu_that_accepts_too_few_processes_is_refused(
    sim: int, train: int, gpu_storage: bool, message: str | None
) -> None:
    devices = choose_devices(EXCLUSIVE, sim=sim, train=train)
    if message is None:
        check_shared_use(devices, gpu_storage=gpu_storage)
        return
    with pytest.raises(SettingError, match=message):
        check_shared_use(devices, gpu_storage=gpu_storage)


def test_two_slices_of_a_gpu_are_refused_and_one_slice_is_accepted() -> None:
    slices = visible_gpus(GPUS, "MIG-a,MIG-b")
    check_shared_use(choose_devices(slices, sim=1, train=1), gpu_storage=True)
    with pytest.raises(SettingError, match=r"two slices \(MIG\): MIG-a and MIG-b; expected one slice.*slice, .*=false"):
        check_shared_use(choose_devices(slices, sim=0, train=1), gpu_storage=True)


def test_two_slices_of_a_gpu_are_accepted_with_the_replay_in_host_memory_and_each_process_sees_only_its_own() -> None:
    devices = choose_devices(visible_gpus(GPUS, "MIG-a,MIG-b"), sim=0, train=1)
    check_shared_use(devices, gpu_storage=False)
    seen = {role: child_environment(role, devices, {})["CUDA_VISIBLE_DEVICES"] for role in ("collector", "learner")}
    assert seen == {"collector": "MIG-a", "learner": "MIG-b"}


def test_a_number_in_the_mask_gives_a_note_on_a_machine_with_different_gpus() -> None:
    chosen, mixed = Devices(GPUS[0], GPUS[0]), {"CUDA_VISIBLE_DEVICES": "0"}
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in order_notes(chosen, GPUS, mixed)[0]
    assert order_notes(chosen, GPUS[:2], mixed) == ()
    assert order_notes(chosen, GPUS, {"CUDA_VISIBLE_DEVICES": "GPU-aa0"}) == ()
    assert order_notes(chosen, GPUS, mixed | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == ()


def test_a_running_multi_process_service_gives_a_note(tmp_path: Path) -> None:
    chosen, environ = Devices(GPUS[0], GPUS[0]), {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert mps_notes(chosen, environ) == ()
    (tmp_path / "control").touch()
    assert "may end the learner" in mps_notes(chosen, environ)[0]
    assert mps_notes(Devices(None, None), environ) == ()
