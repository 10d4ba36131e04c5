"""Folders anywhere: one contract for a disk, S3, and a filesystem on which files grow under their names."""

import os
import threading
import time

import pyarrow.fs
import pytest
import s3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertune.errors import InputError
from hiertune.storage import (
    Folder,
    RemoteFolder,
    check_address,
    local_copy,
    open_storage,
    patiently,
    shown_address,
)

SECRET = "s3cr3tPass"


@pytest.fixture(params=["local", "s3", "grows"])
def folder(request, tmp_path):
    if request.param == "local":
        return Folder.at(tmp_path / "folder")
    if request.param == "s3":
        return Folder.at(request.getfixturevalue("s3_folder"))
    files = pyarrow.fs.LocalFileSystem()
    return RemoteFolder(files, str(tmp_path / "folder"), "hdfs://host/folder", grows=True)


# ------------------------------------------------------------------------------------- contract


def test_what_is_written_is_read(folder):
    assert folder.names() == []
    assert not folder.exists("a")
    folder.write_bytes("a", b"one")
    folder.write_bytes("a", b"three")
    folder.write_bytes("sub/b", b"")
    assert folder.read_bytes("a") == b"three"
    assert folder.read_bytes("a", 2) == b"th"
    assert folder.read_bytes("a", 99) == b"three"
    assert folder.child("sub").read_bytes("b") == b""
    assert folder.names() == ["a"]
    assert folder.sizes() == {"a": 5}
    assert folder.sizes(deep=True) == {"a": 5, "sub/b": 0}
    assert folder.exists("a")
    assert not folder.exists("sub"), "a folder is no file"


def test_what_is_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a")
    with pytest.raises(FileNotFoundError):
        folder.download("a", tmp_path / "never")
    folder.remove("a")
    folder.clear()
    assert folder.modified("a") is None
    assert folder.child("x").sizes(deep=True) == {}


def test_what_is_removed_is_gone(folder):
    for name in ("a", "b", "sub/c"):
        folder.write_bytes(name, b"1")
    folder.remove("a")
    assert folder.sizes(deep=True) == {"b": 1, "sub/c": 1}
    folder.child("sub").clear()
    assert folder.sizes(deep=True) == {"b": 1}
    folder.clear()
    assert folder.sizes(deep=True) == {}


def test_names_lead_nowhere_else(folder):
    for name in ("", ".", "..", "../a", "a/../b", "/etc/x", "a//b", "a/", "./a", "a\0"):
        with pytest.raises(ValueError, match="is no name"):
            folder.write_bytes(name, b"")


def test_an_address_leads_back(folder, tmp_path):
    if str(folder).startswith("hdfs"):
        pytest.skip("there is no such host")
    folder.write_bytes("sub/a b", b"1")
    child = folder.child("sub")
    assert Folder.at(str(child)).read_bytes("a b") == b"1"
    assert str(child.parent) == str(folder)
    assert child.name == "sub"
    of_file, name = Folder.of_file(str(folder.child("sub/a b")))
    assert (str(of_file), name) == (str(child), "a b")


def test_folders_of_any_size_come_and_go(folder, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    large = os.urandom(1 << 20) * 18
    (source / "large").write_bytes(large)
    (source / "deep" / "small").write_bytes(b"small")
    folder.upload(source, "copy")
    assert folder.sizes(deep=True) == {"copy/large": len(large), "copy/deep/small": 5}
    folder.download("copy/large", tmp_path / "back" / "large")
    assert (tmp_path / "back" / "large").read_bytes() == large
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["large"]
    folder.upload(source / "deep" / "small", "alone")
    assert folder.read_bytes("alone") == b"small"


def test_the_clock_is_that_of_the_store(folder):
    folder.write_bytes("a", b"1")
    assert folder.modified("a") == pytest.approx(time.time(), abs=30)


def test_readers_see_whole_files_only(folder):
    """While one writes, others read the old content or the new."""
    if str(folder).startswith("hdfs"):
        pytest.skip("there a reader may find none; what is there is whole")
    contents = [bytes([letter]) * 300_000 for letter in b"abc"]
    folder.write_bytes("a", contents[0])
    over = threading.Event()

    def write():
        for number in range(12):
            folder.write_bytes("a", contents[number % 3])
        over.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not over.is_set():
        assert folder.read_bytes("a") in contents
    thread.join()


NAMES = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
    .filter(lambda part: part not in (".", "..") and not part.endswith(".new"))
    .filter(lambda part: len(part.encode()) < 100),
    min_size=1,
    max_size=3,
).map("/".join)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, content=st.binary(max_size=2000))
def test_any_name_and_any_bytes(folder, name, content):
    folder.write_bytes(name, content)
    assert folder.read_bytes(name) == content
    assert folder.sizes(deep=True) == {name: len(content)}
    parts = name.split("/")
    inner = folder
    for part in parts[:-1]:
        inner = inner.child(part)
    assert inner.names() == [parts[-1]]
    if not str(folder).startswith("hdfs"):
        assert Folder.at(str(inner)).read_bytes(parts[-1]) == content
    folder.clear()


def test_a_kill_while_a_growing_file_is_written_leaves_the_old_one_or_none(tmp_path):
    class Killing:
        """A filesystem that dies while it writes."""

        def __init__(self, files):
            self._files = files

        def __getattr__(self, name):
            return getattr(self._files, name)

        def open_output_stream(self, path):
            stream = self._files.open_output_stream(path)
            stream.write(b"half")
            stream.close()
            raise KeyboardInterrupt

    files = pyarrow.fs.LocalFileSystem()
    RemoteFolder(files, str(tmp_path), "hdfs://h/f", grows=True).write_bytes("a", b"old")
    with pytest.raises(KeyboardInterrupt):
        RemoteFolder(Killing(files), str(tmp_path), "hdfs://h/f", grows=True).write_bytes("a", b"half of it")
    folder = RemoteFolder(files, str(tmp_path), "hdfs://h/f", grows=True)
    assert folder.read_bytes("a") == b"old"
    assert folder.names() == ["a"]


# ------------------------------------------------------------------------------------ addresses


def test_endpoint_and_region_become_part_of_the_address(s3_environment, s3_endpoint, monkeypatch):
    folder = Folder.at(f"s3://{s3.BUCKET}/x")
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    assert str(folder) == f"s3://{s3.BUCKET}/x?endpoint_override={s3_endpoint}&scheme=http&region=us-east-1"
    folder.write_bytes("a", b"1")
    assert Folder.at(str(folder)).read_bytes("a") == b"1", "workers elsewhere need credentials only"
    assert s3.SECRET_KEY not in str(folder)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(Folder.at("x")) == str(tmp_path / "x")
    assert str(Folder.at("~/x")) == str(tmp_path / "x")
    assert str(Folder.at("file:///a%20b/c")) == "/a b/c"


BAD = {
    "ftp://host/x": "'ftp' addresses are not known",
    "s4://bucket/x": "'s4' addresses are not known",
    "": "names no folder",
    "s3:///x": "names no bucket",
    "gs://": "names no bucket",
    "file://host/x": "names no folder of this machine",
    "s3://bucket/x#y": "has a '#'",
    "s3://bucket/x?regoin=eu": "unknown option 'regoin'",
    "file:///x?region=eu": "unknown option 'region'",
    "s3://bucket:99999/x": "is no address",
    f"s3://AKIA:{SECRET}@bucket/x": "credentials must not stand in an address",
    f"s3://{SECRET}@bucket/x": "credentials must not stand in an address",
    f"s3://bucket/x?access_key=AKIA&secret_key={SECRET}": "credentials must not stand in an address",
    f"s3://bucket/x?session_token={SECRET}": "credentials must not stand in an address",
    f"s3://bucket/x?endpoint_override=http://u:{SECRET}@host": "credentials must not stand in an address",
    f"gs://me:{SECRET}@bucket/x": "credentials must not stand in an address",
    f"abfs://account:{SECRET}@container/x": "credentials must not stand in an address",
    f"abfs://box@account/x?sas_token={SECRET}": "credentials must not stand in an address",
    f"hdfs://me:{SECRET}@host/x": "credentials must not stand in an address",
    f"s3://AKIA:12/{SECRET}@bucket/x": "credentials must not stand in an address",
    f"file://me:{SECRET}@host/x": "credentials must not stand in an address",
    f"s3://[AKIA:{SECRET}@bucket/x": "credentials must not stand in an address",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_address_is_refused_in_words(text):
    with pytest.raises(InputError) as caught:
        open_storage(text, file="space.yaml", line=3)
    message = str(caught.value)
    assert message.startswith("space.yaml:3: storage: ")
    assert BAD[text] in message
    assert "\n  allowed: " in message
    assert SECRET not in message
    if "credentials" in message and text.startswith("s3"):
        assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message


@pytest.mark.parametrize(
    "text",
    [
        *(
            "/x",
            "x y",
            "s3://b",
            "s3://b/x?region=eu&endpoint_override=h:9",
            "gs://anonymous@b/x",
            "gcs://b/x",
        ),
        *("abfs://box@a.dfs.core.windows.net/x", "abfss://box@a/x", "hdfs://me@host:9000/x", "file:///x"),
        *("hdfs://host:9000/me@home", "s3://bucket/a:b@c"),
    ],
)
def test_a_good_address_is_shown_as_it_is(text):
    check_address(text)
    assert shown_address(text) == text


SIGNS = "abcdefghij0123456789%+=-_"


@given(secret=st.text(SIGNS, min_size=8, max_size=20), form=st.integers(0, 4))
def test_no_credential_is_ever_shown(secret, form):
    text = [
        f"s3://AKIA:{secret}@bucket/x",
        f"s3://{secret}@bucket/x",
        f"s3://bucket/x?secret_key={secret}&region=eu",
        f"s3://bucket/x?anything={secret}",
        f"gs://u:{secret}@bucket/x?project_id=p",
    ][form]
    with pytest.raises(InputError) as caught:
        check_address(text)
    assert secret not in str(caught.value)


@given(
    secret=st.text(SIGNS + "/?#:@[", min_size=8, max_size=20), scheme=st.sampled_from(["s3", "gs", "file"])
)
def test_no_password_is_ever_shown_whatever_its_signs(secret, scheme):
    with pytest.raises(InputError, match="credentials must not stand in an address") as caught:
        check_address(f"{scheme}://AKIA:{secret}@bucket/x")
    assert str(caught.value).startswith(f"storage: '{scheme}://***@bucket/x': credentials")


# ----------------------------------------------------------------------------- places that fail


def test_a_folder_that_works_is_left_as_it_was(s3_folder, tmp_path):
    assert open_storage(s3_folder).sizes(deep=True) == {}
    open_storage(str(tmp_path / "new" / "and" / "below"))
    open_storage(f"file://{tmp_path}/new/and/below", writing=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    open_storage(str(tmp_path / "mine" / "below"))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_what_fails_half_way_leaves_no_folders(tmp_path, monkeypatch):
    def full(self, name, first=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hiertune.storage.LocalFolder.write_bytes", full)
    (tmp_path / "file").touch()
    for place in ("new/and/below", "file/below"):
        with pytest.raises(InputError):
            open_storage(str(tmp_path / place))
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_a_look_writes_nothing_and_finds_what_is_wrong(faulty_s3, s3_folder):
    open_storage(s3_folder, writing=False)
    assert {method for method, _ in faulty_s3.seen} <= {"GET", "HEAD"}
    faulty_s3.break_with(500)
    with pytest.raises(InputError, match="can't be used"):
        open_storage(s3_folder, writing=False)


def refusal(text):
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        open_storage(text)
    assert time.monotonic() - begun < 30  # about 2 s on a machine that does nothing else
    message = str(caught.value)
    assert message.startswith("storage: ")
    assert s3.SECRET_KEY not in message
    assert "AWS_ACCESS_KEY_ID" in message or not text.startswith("s3")
    return message


def test_there_is_no_such_bucket(s3_environment):
    assert "'s3://no-such-bucket/x' has no such bucket" in refusal("s3://no-such-bucket/x")


def test_nobody_answers(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "can't be reached" in refusal(f"s3://{s3.BUCKET}/x")


def test_somebody_never_answers(faulty_s3):
    faulty_s3.break_with("hang")
    assert "can't be reached" in refusal(f"s3://{s3.BUCKET}/x")


def test_writing_is_forbidden(faulty_s3):
    faulty_s3.fault = lambda method, path: 403 if method == "PUT" else None
    assert "can't be used" in refusal(f"s3://{s3.BUCKET}/x")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "can't be written: Not a directory" in refusal(str(tmp_path / "file" / "x"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    assert "can't be written: Permission denied" in refusal(str(tmp_path / "x"))


@pytest.mark.parametrize("fault", [500, 503, "cut", "lost"])
def test_a_passing_fault_is_not_noticed(faulty_s3, s3_folder, fault):
    folder = Folder.at(s3_folder)
    faults = iter([fault])
    faulty_s3.fault = lambda method, path: next(faults, None)
    folder.write_bytes("a", b"x" * 50_000)
    assert folder.read_bytes("a") == b"x" * 50_000


@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_a_lasting_fault_is_an_oserror_and_changes_nothing(faulty_s3, s3_folder, fault):
    folder = Folder.at(s3_folder)
    folder.write_bytes("a", b"old")
    faulty_s3.break_with(fault)
    with pytest.raises(OSError, match=r"."):
        folder.write_bytes("a", b"x" * 50_000)
    faulty_s3.heal()
    assert folder.read_bytes("a") == b"old"


def test_patience():
    answers = iter([OSError("down"), OSError("down"), 7])

    def call(plus):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer + plus

    assert patiently(call, 1) == 8
    answers = iter([FileNotFoundError("none"), 7])
    with pytest.raises(FileNotFoundError):
        patiently(call, 1)
    answers = iter([OSError("down")] * 3)
    with pytest.raises(OSError, match="down"):
        patiently(call, 1, seconds=0.1)


def test_a_local_copy_of_what_is_far_away(s3_folder, tmp_path):
    folder = Folder.at(s3_folder)
    for name in ("model/model.json", "model/deep/x", "summary.json", "ledger.log.parts/1"):
        folder.write_bytes(name, name.encode())
    with local_copy(s3_folder, "model/", "summary.json") as here:
        found = {
            path.relative_to(here).as_posix(): path.read_text() for path in here.rglob("*") if path.is_file()
        }
    assert found == {name: name for name in ("model/model.json", "model/deep/x", "summary.json")}
    assert not here.exists()
    with local_copy(f"{s3_folder}/model") as here:
        assert (here / "model.json").exists()
    with local_copy(str(tmp_path / "runs")) as here:
        assert here == tmp_path / "runs"
    with pytest.raises(InputError, match="there is nothing in s3://"), local_copy(f"{s3_folder}/none"):
        pass
