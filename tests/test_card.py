"""What `info` tells about the weights."""

from __future__ import annotations

from typing import Any

import pytest

from qmprop.card import facts_parts, known_errors, model_parts
from qmprop.tables import Style, draw
from qmprop.targets import DEFAULT_KEYS

MAE = dict.fromkeys(DEFAULT_KEYS, 16.159) | {"mu": 0.0512}
COVERAGE = dict.fromkeys(DEFAULT_KEYS, 0.9013)
CARD = {
    "data": "qm9",
    "data_sha256": "b0f1" * 16,
    "split_sha256": "7798" * 16,
    "training_molecules": 100_000,
    "version": "0.1.0",
    "architecture": {"node_width": 192, "layers": 3},
    "training": {"epochs": 20, "lr": 0.003, "model": {"node_width": 192}},
    "properties": {"mu": "D"},
    "calibration": {
        "molecules": 10_000,
        "geometries": ["dft", "mmff"],
        "levels": [0.5, 0.9],
        "false_alarms": {"dft": 0.008, "mmff": 0.009},
    },
    "accuracy": {
        "dft": {"molecules": 13_083, "mae": MAE, "coverage": COVERAGE},
        "mmff": {"molecules": 13_083, "mae": MAE | {"mu": 0.1507}, "coverage": COVERAGE | {"mu": 0.8951}},
        "xtb": {"molecules": 1_000, "mae": MAE},
    },
    "limits": {"heavy_atoms": 9, "elements": ["H", "C", "N", "O", "F"]},
}


def show(metadata: dict[str, Any], width: int = 80, **style: Any) -> str:
    return draw(model_parts("egnn-qm9@1f3a5c7e", metadata, Style(width, **style)), Style(width, **style))


def test_the_whole_card_reads_like_this() -> None:
    lines = show(CARD).splitlines()
    assert lines[:7] == [
        " Weights egnn-qm9@1f3a5c7e",
        "   trained on  qm9: 100,000 molecules, 20 epochs",
        "   made by     qmprop 0.1.0",
        "   data hash   " + "b0f1" * 16,
        "   split hash  " + "7798" * 16,
        "   network     node_width=192, layers=3",
        "   settings    lr=0.003",
    ]
    assert lines[8:13] == [
        " Accuracy on molecules never trained on",
        "                            MAE                    in ± 90 %",
        " property   unit            DFT  MMFF94  GFN2-xTB        DFT  MMFF94",
        "────────────────────────────────────────────────────────────────────",
        " mu         D            0.0512  0.1507    0.0512     90.1 %  89.5 %",
    ]
    assert lines[14].split() == ["homo", "meV", *["16.2"] * 3, "90.1", "%", "90.1", "%"]
    assert lines[24].split() == ["molecules", "13,083", "13,083", "1,000"]
    assert lines[26:] == [
        "   intervals     calibrated on 10,000 molecules that were never trained on, in",
        "                 DFT and MMFF94 geometries",
        "   false alarms  of molecules like these, 0.8 % (DFT) and 0.9 % (MMFF94) are",
        "                 called out of the domain",
        "   limits        molecules of H, C, N, O and F, up to 9 heavy atoms, neutral and",
        "                 closed-shell, alone in vacuum, at or near a minimum",
        "",
    ]


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_card_fits(width: int, unicode: bool) -> None:
    text = show(CARD, width, unicode=unicode)
    lines = [line for line in text.splitlines() if "hash" not in line]
    assert max(map(len, lines)) <= width
    assert text.isascii() != unicode
    assert text.count("MMFF94  GFN2-xTB") == 1
    assert text.count("89.5 %") == 1


def test_what_older_weights_lack_is_left_out() -> None:
    older = {key: CARD[key] for key in ("data", "training_molecules")}
    older |= {"validation_mae": {"mu": 0.049}, "test_mae": {"mu": 0.0512, "u0": 29.16, "new": 1}}
    lines = show(older).splitlines()
    assert lines[1:3] == ["   trained on  qm9: 100,000 molecules", ""]
    assert lines[5].split() == ["property", "unit", "test", "split", "validation"]
    assert [line.split() for line in lines[7:9]] == [["mu", "D", "0.0512", "0.0490"], ["u0", "meV", "29.2"]]
    for word in ("hash", "±", "calibrated", "false alarms", "limits", "molecules\n"):
        assert word not in "\n".join(lines[3:])
    assert show({}).splitlines() == [" Weights egnn-qm9@1f3a5c7e", ""]


def test_what_nobody_foresaw_is_shown_as_it_is() -> None:
    text = show({"note": "by \x1b hand", "some_list": [1, 2], "long": list(range(9)), "nested": {"a": {"b": 1}}})
    assert "note       by ? hand" in text
    assert "some list  1, 2" in text
    assert "long       9 values" in text
    assert "nested     a=b=1" in text


HOSTILE = [
    None,
    3,
    -1,
    "x",
    True,
    [1],
    [[]],
    {"mu": "x"},
    {"mu": [1]},
    {"mu": -1.0},
    {"mu": 10**400},
    {"dft": {"mae": 3}},
]


@pytest.mark.parametrize("value", HOSTILE, ids=str)
@pytest.mark.parametrize("key", [*CARD, "test_mae"])
def test_metadata_of_any_type_does_no_harm(key: str, value: Any) -> None:
    assert show(CARD | {key: value}).startswith(" Weights")
    known_errors(CARD | {key: value})
    for section in ("calibration", "limits", "training"):
        assert show(CARD | {section: dict.fromkeys(CARD[section], value)})
    for part in ("molecules", "mae", "coverage"):
        assert show(CARD | {"accuracy": {"dft": CARD["accuracy"]["dft"] | {part: value}}})


@pytest.mark.parametrize("kinds", [["test_mae"], ["validation_mae"], ["validation_mae", "test_mae"], ["accuracy"]])
def test_the_errors_of_the_weights_come_in_default_units(kinds: list[str]) -> None:
    errors = {"test_mae": {"mu": 0.05, "u0": 29.0, "new": 1.0}, "validation_mae": {"mu": 0.05, "u0": 29.0}}
    metadata = {kind: errors.get(kind, {"dft": {"mae": errors["test_mae"]}}) for kind in kinds}
    assert known_errors(metadata) == {"mu": 0.05, "u0": pytest.approx(0.029)}


@pytest.mark.parametrize("errors", HOSTILE, ids=str)
def test_errors_that_are_no_numbers_are_not_shown(errors: Any) -> None:
    metadata = {"test_mae": errors, "validation_mae": {"mu": 0.5}}
    assert known_errors(metadata) == {"mu": 0.5}
    assert "0.500" in show(metadata)


def test_the_test_error_counts_more_than_the_validation_error() -> None:
    metadata = {"validation_mae": {"mu": 9.0}, "test_mae": {"mu": 0.05}}
    assert known_errors(metadata) == {"mu": 0.05}
    assert known_errors(metadata | {"accuracy": {"dft": {"mae": {"mu": 0.04}}}}) == {"mu": 0.04}
    assert known_errors({}) == {}


def test_a_long_value_goes_on_below_itself() -> None:
    text = draw(facts_parts("Facts", {"a": "word " * 30, "name": "x"}, Style(60)), Style(60))
    assert text.splitlines()[1:3] == ["   a     " + ("word " * 10).strip(), "         " + ("word " * 10).strip()]
    assert draw(facts_parts("Facts", {"a": "y" * 100}, Style(60)), Style(60)).splitlines()[1] == "   a  " + "y" * 100


def test_members_of_other_shapes_are_told() -> None:
    first = {"node_width": 192, "vectors": 16}
    shown = show(CARD | {"architecture": first, "others": [first]})
    assert "   others      1 more, averaged\n" in shown
    others = [{"node_width": 192, "vectors": 8, "angles": False}] * 2
    shown = show(CARD | {"architecture": first, "others": others})
    assert "   others      2 more, averaged; with vectors=8, angles=False\n" in shown
    shown = show(CARD | {"architecture": first, "others": others, "shares": [0.45, 0.3, 0.25]})
    assert "   others      2 more, averaged with shares of 0.45, 0.3 and 0.25; with\n" in shown
    for damaged in (
        {"others": others, "shares": 3},
        {"others": [3]},
        {"others": "two"},
        {"others": [{"vectors": []}], "architecture": None},
    ):
        assert show(CARD | damaged)
