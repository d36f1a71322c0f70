import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from qmprop.errors import OutputError, UsageError
from qmprop.outputs import ClosedPipeError, Output, is_same_file


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    with Output(str(path)) as output:
        output.write("néw\n")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "néw\n"
    assert os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_things_as_they_were(tmp_path, before, error):
    path = tmp_path / "out.csv"
    if before:
        path.write_text(before)

    def fail_halfway():
        with Output(str(path)) as output:
            output.write("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert [(name, (tmp_path / name).read_text()) for name in os.listdir(tmp_path)] == (
        [("out.csv", "old")] if before else []
    )


def test_a_new_file_obeys_the_umask_and_an_old_one_keeps_its_mode(tmp_path):
    umask = os.umask(0o027)
    try:
        for name, mode in (("new", None), ("old", 0o600)):
            path = tmp_path / name
            if mode is not None:
                path.touch()
                path.chmod(mode)
            with Output(str(path)) as output:
                output.write("text")
            assert stat.S_IMODE(path.stat().st_mode) == (0o640 if mode is None else mode)
    finally:
        os.umask(umask)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    link = tmp_path / "latest.csv"
    link.symlink_to("data/real.csv")
    with Output(str(link)) as output:
        output.write("text")
    assert link.is_symlink()
    assert (tmp_path / "data" / "real.csv").read_text() == "text"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "nowhere" / "out.csv", "No such file"),
        (lambda folder: folder, "directory"),
        (lambda folder: folder / "x\0y", "null byte"),
        (lambda folder: folder / ("x" * 300), "too long"),
    ],
)
def test_what_cannot_be_written_is_said_at_once(tmp_path, make, reason):
    path = str(make(tmp_path))
    with pytest.raises(OutputError, match=reason) as caught:
        Output(path)
    assert path in caught.value.message


def test_a_full_disk_is_an_output_error():
    with pytest.raises(OutputError, match=r"/dev/full.*No space left"), Output("/dev/full") as output:
        output.write("text\n")


def test_a_pipe_nobody_reads_is_not_an_error_message(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(ClosedPipeError), Output(f"/dev/fd/{write}") as output:
        output.write("text\n")
    os.close(write)


def test_an_interrupt_waits_until_the_line_is_out(tmp_path):
    """The signal comes while the write is blocked by a full pipe; what was begun still arrives whole."""
    read, write = os.pipe()
    size = 1 << 20
    received = []

    def interrupt_then_read():
        os.kill(os.getpid(), signal.SIGINT)
        while chunk := os.read(read, 1 << 16):
            received.append(chunk)

    reader = threading.Timer(0.2, interrupt_then_read)
    reader.daemon = True
    reader.start()
    output = Output(f"/dev/fd/{write}")
    os.close(write)
    with pytest.raises(KeyboardInterrupt), output:
        output.write("x" * size + "\n")
    reader.join(10)
    os.close(read)
    assert b"".join(received) == b"x" * size + b"\n"


def test_bytes_and_text_reach_the_file_in_order(tmp_path):
    path = tmp_path / "out.bin"
    with Output(str(path)) as output:
        for data in ("é\n", b"", b"\x00\xff", "", "b"):
            output.write(data)
    assert path.read_bytes() == "é\n".encode() + b"\x00\xffb"


#: Writes lines for ever until the test ends it, one way or another.
ENDLESS = """
import sys
from qmprop.outputs import Output
with Output(sys.argv[1], resumable=sys.argv[2] == "True") as output:
    while True:
        output.write("line\\n" * 1000)
"""


@pytest.mark.parametrize("resumable", [True, False])
def test_a_killed_run_leaves_the_old_file_whole(tmp_path, resumable):
    path = tmp_path / "out.csv"
    path.write_text("old")
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(path), str(resumable)])
    wait_for(lambda: any(file.stat().st_size > 100_000 for file in tmp_path.iterdir()))
    process.kill()
    process.wait(60)
    assert path.read_text() == "old"
    assert (tmp_path / "out.csv.partial").exists() is resumable


@pytest.mark.parametrize("resumable", [True, False])
def test_a_full_disk_is_told_and_leaves_the_old_file_whole(tmp_path, resumable):
    path = tmp_path / "out.csv"
    path.write_text("old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    command = [sys.executable, "-c", ENDLESS, str(path), str(resumable)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert f"cannot write '{path}': File too large" in result.stderr
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == (["out.csv", "out.csv.partial"] if resumable else ["out.csv"])


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_resumable_file_is_partial_until_the_end(tmp_path):
    path, partial = tmp_path / "out.csv", tmp_path / "out.csv.partial"
    path.write_text("old")
    for lines, expected in ((["1\n", "2"], "1\n2"), (["two\n"], "1\ntwo\n")):
        with pytest.raises(RuntimeError), Output(str(path), resumable=True) as output:  # noqa: PT012
            output.cut(2 if partial.stat().st_size else 0)
            for line in lines:
                output.write(line)
            assert partial.read_text() == expected
            raise RuntimeError
        assert (path.read_text(), partial.read_text()) == ("old", expected)
    with Output(str(path), resumable=True) as output:
        output.cut(6)
    assert path.read_text() == "1\ntwo\n"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_the_partial_file_of_a_link_is_beside_what_it_points_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    os.symlink("data/real.csv", "link.csv")
    for path, folder in (("link.csv", "data"), ("plain.csv", ".")):
        with Output(path, resumable=True) as output:
            output.write("text")
            assert os.path.samestat(os.stat(output.partial), os.stat(f"{folder}/{os.path.basename(output.partial)}"))
    assert sorted(os.listdir()) == ["data", "link.csv", "plain.csv"]
    assert os.listdir("data") == ["real.csv"]


def test_a_resumable_file_that_got_nothing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), Output(str(tmp_path / "out.csv"), resumable=True):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_only_one_run_at_a_time_writes_a_partial_file(tmp_path):
    path = str(tmp_path / "out.csv")
    with Output(path, resumable=True) as output:
        output.write("mine\n")
        with pytest.raises(OutputError, match="another run is writing") as caught:
            Output(path, resumable=True)
        assert caught.value.hint
    assert (tmp_path / "out.csv").read_text() == "mine\n"


@pytest.mark.parametrize("path", [None, "-", "/dev/null"])
def test_only_a_file_can_be_resumed(path):
    with pytest.raises(UsageError, match="cannot be resumed"):
        Output(path, resumable=True)


def test_letters_the_terminal_lacks_become_question_marks(capfd):
    with Output(encoding="ascii") as output:
        output.write("naïve\n")
    assert capfd.readouterr().out == "na?ve\n"


def test_names_of_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.xyz").touch()
    (tmp_path / "b.xyz").touch()
    os.link("a.xyz", "hard.csv")
    os.symlink("a.xyz", "soft.csv")
    for name in ("a.xyz", "./a.xyz", "hard.csv", "soft.csv"):
        assert is_same_file(name, "a.xyz")
    assert not is_same_file("b.xyz", "a.xyz")
    assert not is_same_file("new.csv", "a.xyz")
    assert not is_same_file("/dev/null", "/dev/null")
