"""Texts that files can keep, and texts that terminals can show."""

import json

import h5py
import pytest
from hypothesis import given
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
    ],
)
def test_passwords_of_addresses_are_left_out(text, shown):
    assert without_passwords(text) == shown
