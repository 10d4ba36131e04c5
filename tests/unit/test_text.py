"""Texts that files can keep, and texts that terminals can show."""

import json
import re

import h5py
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hiertune._text import check_storable, is_storable, visible, without_passwords
from hiertune.errors import InputError

ANY = st.text(st.characters(codec=None), max_size=8)  # halves of surrogate pairs, too


@given(ANY)
def test_what_is_storable_comes_back_from_hdf5_and_json(text):
    def there_and_back():
        with h5py.File.in_memory() as file:
            file["text"] = text
            return file["text"].asstr()[()], json.loads(json.dumps(text, ensure_ascii=False).encode())

    if is_storable(text):
        assert there_and_back() == (text, text)
    else:
        with pytest.raises(ValueError):  # noqa: PT011
            there_and_back()


def test_the_first_that_is_not_storable_is_named():
    check_storable(["a", "é", ""], key="ids")
    with pytest.raises(InputError) as error:
        check_storable(["a", "b\0", "\ud800"], key="ids", file="x.h5")
    assert str(error.value) == "x.h5: ids: 'b\\x00' holds NUL\n  allowed: text in UTF-8, without NUL"
    with pytest.raises(InputError) as error:
        check_storable(["\ud800"], key="ids")
    assert str(error.value).splitlines()[0] == r"ids: '\ud800' is not UTF-8"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Aves; [x] Müller é 鳥", "Aves; [x] Müller é 鳥"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nb\tc\rd\x7f\x9b", r"a\nb\tc\rd\x7f\x9b"),
        ("a\u202eb\u2028", r"a\u202eb\u2028"),
        ("caf\udce9", r"caf\udce9"),
        ("a\u00a0b", "a\u00a0b"),
    ],
)
def test_what_cannot_be_shown_is_written_out(text, shown):
    assert visible(text) == shown
    assert visible(text, keep="\n") == shown.replace(r"\n", "\n")


@given(ANY)
def test_anything_can_be_shown(text):
    assert not set(visible(text)) & {chr(i) for i in (*range(32), *range(127, 160))}
    visible(text).encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# postgresql://me:hush@host/db", "# postgresql://me:***@host/db"),
        ("uri: http://me:h@sh@host", "uri: http://me:***@host"),
        ("'postgresql://me@host/db?a=b&password=hush&c=d'", "'postgresql://me@host/db?a=b&password=***&c=d'"),
        ("postgresql://host/db?sslpassword=hush # mine", "postgresql://host/db?sslpassword=*** # mine"),
        ("http://host:5000/a:b@c and password=kept", "http://host:5000/a:b@c and password=kept"),
        ("http://me:hu/sh@host:1/x", "http://me:***@host:1/x"),
        ("http://me:hu/s@h/!@host", "http://me:***@host"),
        ("postgresql://me:12/34@host/db", "postgresql://me:***@host/db"),
        ("s3://KEY:a+b/c=@bucket", "s3://KEY:***@bucket"),
        ("redis://:hu/sh@host", "redis://:***@host"),
        ("{a: http://h:5000/x,b: mysql://me:hu/sh@host}", "{a: http://h:5000/x,b: mysql://me:***@host}"),
        ("http://h:5000/x,mysql://me:hu/sh@host", "http://h:5000/x,mysql://me:***@host"),
        ('"http://h:5000/a","mail":"b@c"', '"http://h:5000/a","mail":"b@c"'),
        ("hdfs://host:8020/a@b s3://bucket/a:b@c", "hdfs://host:8020/a@b s3://bucket/a:b@c"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
        ("db://h?password=hush&pwd=hush", "db://h?password=***&pwd=***"),
        ("db://me:***@host/a@b", "db://me:***@host/a@b"),
    ],
)
def test_passwords_of_addresses_are_left_out(text, shown):
    assert without_passwords(text) == shown
    assert without_passwords(shown) == shown


SIGNS = st.characters(exclude_categories=("C", "Z"), exclude_characters="\"'*")


@given(
    st.sampled_from(("http", "HTTPS", "postgresql+psycopg", "s3", "mlflow")),
    st.from_regex(r"[A-Za-z.%+-]{0,6}", fullmatch=True),
    st.text(SIGNS | st.sampled_from("/@:?&#="), min_size=1, max_size=12),
)
def test_no_sign_of_a_password_is_left(scheme, user, password):
    assume(not (scheme.startswith(("http", "HTTP")) and re.match(r"\d{1,5}[/?#]", password)))
    text = "# at {}://{}:{}@host/db\nnext: 'http://host:5000/x'\n"
    assert without_passwords(text.format(scheme, user, password)) == text.format(scheme, user, "***")
    same = without_passwords(text.format(scheme, user, password), same_length=True)
    assert same == text.format(scheme, user, "*" * len(password))


def test_a_hostile_text_takes_no_longer_than_another():
    ports = "http://h:5000/" * 60_000 + "@"
    for text in (
        "://:" * 250_000,
        "://a:b?password=" * 60_000,
        "password=" * 100_000,
        "@" * 1_000_000,
        ports,
    ):
        without_passwords(text)  # what grows with the square would not end here
