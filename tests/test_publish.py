"""An output comes to be in one step: whatever stands there when a run is killed can be continued, or is complete."""

import errno
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import toy
from command import contents, ders, done

from ders_cli import output
from ders_cli.checkpoint.manifest import manifest_text
from ders_cli.errors import UsageError


class Killed(BaseException):
    """What a SIGKILL does to the code behind it, in a test."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("publish")
    toy.make("mixtral", root / "model", dtype=torch.bfloat16)
    done("compress", root / "model", "--delta", "int4", "-o", root / "int4", "-q")
    done("compress", root / "model", "--delta", "int8", "-o", root / "int8", "-q")
    return {path.name: path for path in root.iterdir()}


def _killed_at(patch: pytest.MonkeyPatch, place: object, name: str, number: int) -> None:
    """The call of that number of a function does nothing, and nothing comes after it."""
    calls, real = [0], getattr(place, name)

    def dying(*arguments: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            raise Killed
        return real(*arguments, **named)

    patch.setattr(place, name, dying)


def _counted(patch: pytest.MonkeyPatch, place: object, name: str) -> list[object]:
    """Gets an item at each call of a function."""
    calls, real = [], getattr(place, name)
    patch.setattr(place, name, lambda *given: calls.append(given) or real(*given))
    return calls


@pytest.mark.parametrize(
    ("place", "name", "number", "old"),
    [
        (Path, "rename", 1, False),
        (Path, "rename", 1, True),
        (Path, "rename", 2, True),
        (output, "_tidy", 1, False),
        (output, "_tidy", 1, True),
        (output.shutil, "rmtree", 1, True),
        (output.os, "unlink", 2, False),
    ],
)
def test_killed_while_publishing(
    made: dict[str, Path], tmp_path: Path, place, name: str, number: int, old: bool
) -> None:
    """Until the new output stands under its name, the old one is there or beside; afterwards --resume only tidies up."""
    out = tmp_path / "out"
    command = ("compress", made["model"], "--delta", "int4", "-o", out, "-q")
    if old:
        done("compress", made["model"], "--delta", "int8", "-o", out, "-q")
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(patch, place, name, number)
        with pytest.raises(Killed):
            ders(*command, *(["--overwrite"] if old else []))
    stand = [folder for folder in (out, output.replaced_of(out), output.partial_of(out)) if folder.exists()]
    whole = [{name: data for name, data in contents(folder).items() if name[0] != "."} for folder in stand]
    assert contents(made["int4"]) in whole
    done(*command, "--resume", *(["--overwrite"] if old else []))
    assert contents(out) == contents(made["int4"]) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_names_its_run(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compress", made["model"], "--delta", "int4", "-o", out, "-q")
    with output.locked(output.partial_of(out), output.LOCK):
        for more in ((), ("--resume",), ("--overwrite",), ("--dry-run",)):
            ran = ders(*command, *more)
            assert ran.code == 2 and f"process {os.getpid()} on " in ran.err and ran.err.count("\n") == 1, more
    assert ders(*command).code == 0 and contents(out) == contents(made["int4"])


def test_a_lock_is_not_taken_in_a_folder_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock file and locking it, its run may have ended and the folder got its final name."""
    from ders_cli.checkpoint import lock

    folder, real, gone = tmp_path / "out.partial", lock.take, []

    def renamed(handle: int) -> bool:
        if not gone:
            gone.append(folder.rename(tmp_path / "out"))
        return real(handle)

    monkeypatch.setattr(lock, "take", renamed)
    with lock.locked(folder, output.LOCK):
        assert (folder / output.LOCK).stat().st_size > 0 == (tmp_path / "out" / output.LOCK).stat().st_size


def test_what_differs_is_said(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(patch, Path, "rename", 1)
        with pytest.raises(Killed):
            ders("compress", made["model"], "--delta", "int4", "-o", out, "-q")
    ran = ders("compress", made["model"], "--delta", "int8", "--seed", 3, "-o", out, "--resume")
    assert ran.code == 2 and "another recipe (delta: int4, now int8; seed: 0, now 3)" in ran.err
    rules = [{"layers": "0-1", "projections": ["down"], "experts": [k], "delta": "int8"} for k in (0, 1, 2)]
    (tmp_path / "r.json").write_text(json.dumps({"delta": "int2", "rules": rules}))
    ran = ders("compress", made["model"], "--recipe", tmp_path / "r.json", "-o", out, "--resume")
    assert ran.code == 2 and "another recipe (delta: int4, now int2; rules: [], now [{" in ran.err
    assert "...) and codecs; --overwrite starts again" in ran.err and len(ran.err) < 260 + len(str(out))
    os.utime(made["model"] / "model.safetensors")
    ran = ders("compress", made["model"], "--delta", "int4", "-o", out, "--resume")
    assert ran.code == 2 and "another source (model.safetensors: " in ran.err


@pytest.mark.parametrize("delta", ["int4", "exact"])
def test_a_journal_of_another_boot_is_none(made: dict[str, Path], tmp_path: Path, delta: str) -> None:
    """What was not synchronised may be lost: the shard begins anew. So it does where the unfinished file is gone or cut."""
    from ders_cli import convert

    done("compress", made["model"], "--delta", delta, "-o", tmp_path / "whole", "-q")
    read = []
    for harm in ("none", "boot", "gone", "cut", "torn"):
        out = tmp_path / harm
        command = ("compress", made["model"], "--delta", delta, "-o", out, "-q", "-j", 1)
        with pytest.MonkeyPatch.context() as patch:
            _killed_at(patch, convert, "write_file", 1)  # the shard's record
            with pytest.raises(Killed):
                ders(*command)
        (journal,) = output.partial_of(out).glob(".ders-*.journal")
        (file,) = output.partial_of(out).glob("model.safetensors.????????.partial")
        if harm == "boot":
            journal.write_bytes(b'{"boot": "another", ' + journal.read_bytes().split(b", ", 1)[1])
            file.write_bytes(bytes(file.stat().st_size))
        elif harm == "gone":
            file.unlink()
        elif harm == "cut":
            os.truncate(file, 1000)
        elif (
            harm == "torn" and delta == "int4"
        ):  # an exact shard's last line tells of a stream whose spool is gone by then
            os.truncate(journal, journal.read_bytes().rfind(b'"group ') + 7)
        with pytest.MonkeyPatch.context() as patch:
            groups = _counted(patch, convert, "convert_group")
            done(*command, "--resume")
        read.append(len(groups))
        assert contents(out) == contents(tmp_path / "whole"), harm
    assert read == [0, 6, 6, 6, 1 if delta == "int4" else 0]


@pytest.mark.parametrize("command", ["compress", "restore"])
@pytest.mark.parametrize("harm", ["written to", "gone", "new"])
def test_a_carried_file_changes(made: dict[str, Path], tmp_path: Path, monkeypatch, command: str, harm: str) -> None:
    """It is copied at the end, hours after the config was read."""
    from ders_cli import carried, plain

    model = Path(shutil.copytree(made["model"] if command == "compress" else made["int4"], tmp_path / "model"))
    file, real = model / "generation_config.json", carried.check_carried

    def harmed(source: object) -> None:
        real(source)
        if harm == "gone":
            file.unlink()
        else:
            (file if harm == "written to" else model / "new.txt").write_text("{}")

    assert plain.check_carried is real  # that of the plan
    monkeypatch.setattr(carried, "check_carried", harmed)  # that of the copying
    delta = ("--delta", "int4") if command == "compress" else ()
    ran = ders(command, model, *delta, "-o", tmp_path / "out", "-q")
    assert ran.code == 1 and "during the run" in ran.err and not (tmp_path / "out").exists()
    assert str(model / "new.txt" if harm == "new" else file) in ran.err


def test_what_could_not_be_synchronised_is_not_finished(made: dict[str, Path], tmp_path: Path) -> None:
    """After an fsync that fails the kernel takes the pages for clean, whether they are on the disk or lost."""
    out, real = tmp_path / "out", os.fsync
    command = ("compress", made["model"], "--delta", "int4", "-o", out, "-q")

    def failing(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}") if os.path.isdir("/proc/self/fd") else ""
        if "/model.safetensors." in name:
            os.pwrite(handle, bytes(4096), os.fstat(handle).st_size // 2)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        ran = ders(*command)
    assert ran.code == 1 and "--resume" in ran.err, ran
    done(*command, "--resume")
    assert contents(out) == contents(made["int4"])


def test_a_source_that_changes_before_the_run_begins(made: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """Else its mark would be of the new file, and a resumed run would go on with the old one's parts."""
    from ders_cli import convert

    model, real = Path(shutil.copytree(made["model"], tmp_path / "model")), convert.check_space

    def replaced(*given: object) -> None:
        shutil.copy(model / "model.safetensors", model / "new")
        os.replace(model / "new", model / "model.safetensors")
        real(*given)

    monkeypatch.setattr(convert, "check_space", replaced)
    ran = ders("compress", model, "--delta", "int4", "-o", tmp_path / "out", "-q")
    assert ran.code == 1 and str(model / "model.safetensors") in ran.err and [*tmp_path.iterdir()] == [model]


def test_an_input_in_the_output_by_a_link_is_not_lost(made: dict[str, Path], tmp_path: Path) -> None:
    out, model = Path(shutil.copytree(made["model"], tmp_path / "out")), tmp_path / "model"
    model.mkdir()
    for path in out.iterdir():
        (model / path.name).symlink_to(path)
    (out / "recipe.yaml").write_text("delta: int4\n")
    before = contents(out)
    ran = ders("compress", model, "--delta", "int4", "-o", out, "--overwrite")
    assert ran.code == 2 and f"-> {out}" in ran.err and contents(out) == before
    ran = ders("compress", made["model"], "--recipe", out / "recipe.yaml", "-o", out, "--overwrite")
    assert ran.code == 2 and "recipe.yaml stands there" in ran.err and contents(out) == before


def test_what_is_called_as_a_replaced_output_is_not_removed_unasked(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    replaced, command = output.replaced_of(out), ("compress", made["model"], "--delta", "int4", "-o", out, "-q")
    replaced.mkdir()
    (replaced / "thesis.txt").write_text("years")
    for more in ((), ("--overwrite",), ("--resume",)):
        assert ders(*command, *more).code == 2 and (replaced / "thesis.txt").exists()
    (replaced / "config.json").write_text(
        "{}"
    )  # an output whose run was killed between two renames, and its OUT.partial removed
    assert ders(*command).code == 2 and (replaced / "thesis.txt").exists()
    done(*command, "--overwrite")
    assert not replaced.exists() and contents(out) == contents(made["int4"])
    replaced.symlink_to(made["int8"])
    assert ders(*command, "--overwrite").code == 2 and replaced.is_symlink()


def test_killed_while_clearing(made: dict[str, Path], tmp_path: Path) -> None:
    """--overwrite of an unfinished run removes journals first: they speak of the other files."""
    from ders_cli import convert

    out = tmp_path / "out"
    command = ("compress", made["model"], "--delta", "exact", "-o", out, "-q", "-j", 1)
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(patch, convert.ShardWriter, "append_spool", 1)
        with pytest.raises(Killed):
            ders(*command)
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(patch, Path, "unlink", 3)
        with pytest.raises(Killed):
            ders(*command, "--overwrite")
    done(*command, "--resume")
    done("verify", out, "--against", made["model"], "-q")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_alone_replaces_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    """An output that only wants tidying up, and another run's unfinished one beside it."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(patch, output, "_tidy", 1)
        with pytest.raises(Killed):
            ders("compress", made["model"], "--delta", "int8", "-o", out, "-q")
    command = ("compress", made["model"], "--delta", "int4", "-o", out, "-q")
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(patch, output, "publish", 1)
        _killed_at(patch, output, "fsync_folder", 1)
        with pytest.raises(Killed):
            ders(*command, "--overwrite")
    ran = ders(*command, "--resume")
    assert ran.code == 2 and "--overwrite replaces it" in ran.err
    assert (out / "model.safetensors").read_bytes() == (made["int8"] / "model.safetensors").read_bytes()


def test_looking_at_a_lock_takes_it_from_nobody(tmp_path: Path) -> None:
    from ders_cli.checkpoint.lock import locked, refuse_locked

    (tmp_path / output.LOCK).touch()
    looking = os.open(tmp_path / output.LOCK, os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    refuse_locked(tmp_path, output.LOCK)  # two may look
    threading.Timer(0.05, os.close, [looking]).start()
    with locked(tmp_path, output.LOCK):
        pass


def test_a_journal_whose_writer_lives_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two who write one shard, which a lock that the file system does not have would allow, do not share a journal."""
    from ders_cli.checkpoint import journal

    (tmp_path / "boot").write_text("this one")
    monkeypatch.setattr(journal, "BOOT", tmp_path / "boot")
    first = journal.Journal(tmp_path / "journal", resume=False)
    first.add("a", 1)
    second = journal.Journal(tmp_path / "journal", resume=True)
    assert second.done == {} and second.token != first.token
    first.add("b", 2)  # into a file without a name
    first.close()
    second.add("c", 3)
    second.close()
    third = journal.Journal(tmp_path / "journal", resume=True)
    assert third.done == {"c": 3} and third.token == second.token
    third.close()


def test_an_output_that_came_to_be_meanwhile(tmp_path: Path) -> None:
    """Another run ended between the look at OUT and the lock: OUT is refused, and no OUT.partial stays."""
    out = tmp_path / "out"
    output.refuse_occupied(out, output.Options())
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not empty"), output.begin(out, output.Options(), {}):
        pass
    assert list(tmp_path.iterdir()) == [out] and contents(out) == {"config.json": b"{}"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_whose_run_tidies_up_meanwhile(made, tmp_path: Path, monkeypatch, overwrite: bool) -> None:
    """Its mark is there when it is looked for and gone when it is read: then it is a complete output as any other."""
    out = tmp_path / "out"
    shutil.copytree(made["int4"], out)
    (out / output.MARK).write_text("{}")
    monkeypatch.setattr(output, "_mark", lambda folder: (folder / output.MARK).unlink() or {})
    ran = ders("compress", made["model"], "--delta", "int4", "-o", out, "--resume", *["--overwrite"] * overwrite)
    assert (ran.code, "was made with another" in ran.err) == (0 if overwrite else 2, False), ran.err
    assert contents(out) == contents(made["int4"]) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_stays_behind_is_not_looked_into(made: dict[str, Path], tmp_path: Path) -> None:
    """A link that nobody would follow, listed in a stranger's ders.json: no hash of what it leads to is made."""
    model = Path(shutil.copytree(made["int4"], tmp_path / "model"))
    (tmp_path / "secret").write_text("hunter2")
    (model / "x.bin").symlink_to(tmp_path / "secret")
    manifest = json.loads((model / "ders.json").read_text())
    manifest["files"]["x.bin"] = "0" * 64
    (model / "ders.json").write_bytes(manifest_text(manifest))
    assert "x.bin" not in done("restore", model, "-o", tmp_path / "out", "-q").err
