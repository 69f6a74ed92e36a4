"""Artefacts are whole or absent, whatever interrupts the write."""

import errno
import os
import signal

import pytest
import torch

from quantempo.errors import QuantempoError
from quantempo.run_folder import RunFolder, atomic_path, file_sha256, private_folder, read_tensors


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    run = RunFolder(tmp_path)
    run.write_json("a.json", {"x": 1})
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert run.read_json("a.json") == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_path(tmp_path / "packed") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [p.name for p in (tmp_path / "packed").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(QuantempoError, match="disk is full"), atomic_path(tmp_path / "a") as t:
        t.write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full (Linux)")
def test_a_really_full_device_is_a_sentence(tmp_path):
    with pytest.raises(QuantempoError, match="disk is full"), atomic_path(tmp_path / "a") as t:
        t.symlink_to("/dev/full")
        t.write_text("x" * 10_000)


def test_tensors_round_trip_and_damage_is_named(tmp_path):
    run = RunFolder(tmp_path / "run")
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([1], dtype=torch.int8)}
    run.write_safetensors("t.safetensors", tensors, {"k": "v"})
    back, metadata = read_tensors(run / "t.safetensors")
    assert metadata == {"k": "v"}
    assert all(torch.equal(back[k], v) for k, v in tensors.items())
    whole = (run / "t.safetensors").read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        (run / "t.safetensors").write_bytes(whole[:cut])
        with pytest.raises(QuantempoError, match="damaged"):
            run.read_safetensors("t.safetensors")
    with pytest.raises(QuantempoError, match="no file"):
        run.read_safetensors("other.safetensors")


def test_manifest_merges_and_broken_json_is_named(tmp_path):
    run = RunFolder(tmp_path)
    run.update_manifest(stages={"trace": 1}, version="1")
    assert run.update_manifest(stages={"pack": 2})["stages"] == {"trace": 1, "pack": 2}
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(QuantempoError, match="damaged"):
        run.read_json("manifest.json")


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "f") == expected


def test_files_have_the_mode_of_any_new_file(tmp_path):
    run, before = RunFolder(tmp_path), os.umask(0o022)
    try:
        run.write_safetensors("t.safetensors", {"a": torch.zeros(1)})
        with atomic_path(tmp_path / "packed") as temporary:
            RunFolder(temporary).write_safetensors("t.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    for name in ("t.safetensors", "packed/t.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


def killed(path, when):
    """Run a process that is killed while it makes a folder."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    with atomic_path(path) as temporary:
        temporary.mkdir()
        if when == "moved":
            path.rename(temporary.parent / "aside")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("when", ["made", "moved"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(tmp_path, when):
    path = tmp_path / "packed"
    path.mkdir()
    (path / "old").write_text("")
    with atomic_path(path) as living:
        living.mkdir()
        killed(path, when)
        assert len(list(tmp_path.glob(".packed.*.tmp"))) == 2
        assert (path / "old").exists() == (when == "made")
        with private_folder(path):
            assert (path / "old").exists()
            assert living.exists() and len(list(tmp_path.glob(".packed.*.tmp"))) == 2
        (living / "new").write_text("")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]
