from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiertune.data.kmers import TRANSFORMS, count_kmers, kmer_features
from hiertune.errors import InputError

SEQUENCES = st.text(alphabet="ACGTUacgtuNRYn", max_size=60)


def naive_counts(sequence: str, k: int) -> list[int]:
    counts = {"".join(word): 0 for word in itertools.product("ACGT", repeat=k)}
    text = sequence.upper().replace("U", "T")
    for i in range(len(text) - k + 1):
        if text[i : i + k] in counts:
            counts[text[i : i + k]] += 1
    return list(counts.values())


@given(SEQUENCES, st.integers(1, 4))
def test_counts_are_those_of_a_dictionary(sequence, k):
    assert count_kmers(sequence.encode(), k).tolist() == naive_counts(sequence, k)


def test_longest_words():
    sequence = "TTTTTTTTGAAAAAAAA"
    counts = count_kmers(sequence.encode(), 8)
    assert counts.shape == (4**8,)
    assert counts[-1] == 1
    assert counts[0] == 1
    assert counts.sum() == 10
    assert counts.tolist() == naive_counts(sequence, 8)


@given(st.lists(SEQUENCES, max_size=5), st.sampled_from(sorted(TRANSFORMS)))
def test_features_of_a_row_do_not_depend_on_the_others(sequences, transform):
    encoded = [sequence.encode() for sequence in sequences]
    together = kmer_features(encoded, 2, transform)
    assert together.shape == (len(sequences), 16)
    assert together.dtype == np.float32
    for row, sequence in enumerate(encoded):
        assert np.array_equal(together[row], kmer_features([sequence], 2, transform)[0])


def test_transforms():
    counts = np.array(naive_counts("AACCAAG", 1))  # A 4, C 2, G 1, T 0
    features = {name: kmer_features([b"AACCAAG"], 1, name)[0] for name in TRANSFORMS}
    assert features["counts"].tolist() == counts.tolist() == [4, 2, 1, 0]
    np.testing.assert_allclose(features["frequency"], counts / 7, rtol=1e-7)
    np.testing.assert_allclose(features["sqrt"], np.sqrt(counts / 7), rtol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(features["sqrt"]), 1, rtol=1e-6)
    assert features["presence"].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_a_sequence_without_words_is_zero(transform):
    assert not kmer_features([b"NN", b"AC", b""], 3, transform).any()


def test_unknown_transform_and_length():
    with pytest.raises(InputError) as error:
        kmer_features([b"ACGT"], 2, "log")
    assert (
        str(error.value) == "there is no k-mer transform 'log'\n  allowed: counts, frequency, sqrt, presence"
    )
    with pytest.raises(InputError, match="k-mers cannot be 9 letters long"):
        kmer_features([b"ACGT"], 9, "counts")
