import pytest

from hiertune.data.importers.ranks import clean_rank


@pytest.mark.parametrize(
    "name",
    ["", "  ", "Incertae Sedis", "Incertae sedis 7", "Lachnospiraceae Incertae Sedis", "incertae_sedis",
     "Xaceae_INCERTAE-SEDIS_2", "NA", "n/a", "NaN", "none", "NULL", "unknown", "Unknown Family",
     "unclassified_Xaceae", "Unclassified", "unassigned", "uncultured bacterium", "unidentified", "g__",
     "-", "?"],
)  # fmt: skip
def test_placeholders(name):
    assert clean_rank(name) is None


@pytest.mark.parametrize(
    "name",
    ["Nautilia", "Nonea", "Unknownia", "Nanus", "g__Aus", "Sedis", "Incertae", "NA-17", "U", "0", "nulla"],
)
def test_names_that_are_names(name):
    assert clean_rank(f" {name} ") == name


def test_more_placeholders_can_be_given():
    assert clean_rank("Environmental", ["environmental", "misc"]) is None
    assert clean_rank("Environmental samples", ["environmental"]) == "Environmental samples"
