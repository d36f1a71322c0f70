"""Intervals hold what they promise, the verdict knows what is strange, and training molecules are recognized."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from samples import TINY, judge_distance, make_model, move, random_rotation, read_dataset

from qmprop.calibration import fit_trust
from qmprop.datasets import Dataset
from qmprop.errors import DataError, UsageError, WeightsError
from qmprop.figures import HIGHEST_LEVEL, LOWEST_LEVEL
from qmprop.inference import predict
from qmprop.model import Model, Outcome
from qmprop.molecule import Molecule
from qmprop.qm9 import split_other
from qmprop.records import Domain
from qmprop.targets import DEFAULT_KEYS
from qmprop.topology import Bonds, hash_graphs, hash_surroundings
from qmprop.trust import (
    FARTHEST_STEP,
    FEW,
    LEVEL,
    LEVELS,
    Trust,
    check_level,
    find_moves,
    find_nearest,
    find_sizes,
    from_bytes,
    load_trust,
    to_bytes,
)

COUNT = 4000
#: The network that the errors are laid around; what it predicts does not matter.
SHAPE = dataclasses.replace(TINY, angles=False)
#: Errors of the two halves of the molecules, by size, over the spread of a property.
SMALL_ERROR, LARGE_ERROR = 0.01, 0.05


@dataclass(frozen=True, eq=False)
class Known:
    """A model with a calibration on molecules whose errors are known to the test alone."""

    model: Model
    trust: Trust
    facts: dict
    data: Dataset
    outcome: Outcome
    splits: dict[str, NDArray[np.int64]]
    sizes: NDArray[np.float64]  # of the errors, by molecule [M, 12]

    def half_widths(self, rows: NDArray[np.int64], level: float = LEVEL) -> NDArray[np.float64]:
        """Return the half-widths of molecules, whose verdict is made here from the distance alone."""
        traits = self.outcome.traits[rows]
        return self.trust.half_widths(traits, judge_distance(self.trust, traits), level)


def run_all(model: Model, data: Dataset) -> Outcome:
    parts = list(model.run_arrays(data.numbers, data.positions, data.offsets))
    fields = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "refined", "moves")}
    traits = np.concatenate([part.traits for part in parts])
    return Outcome(composition=parts[0].composition, traits=traits, **fields)


@pytest.fixture(scope="module")
def known() -> Known:
    """Molecules in distorted geometries, whose references lie around the predictions: for large ones farther off."""
    rng = np.random.default_rng(4)
    data = read_dataset().select(rng.integers(0, 20, COUNT))
    data = dataclasses.replace(
        data,
        ids=np.arange(COUNT),
        positions=data.positions + 0.02 * rng.standard_normal(data.positions.shape).astype(np.float32),
    )
    model = make_model(SHAPE)
    outcome = run_all(model, data)
    large = np.diff(data.offsets) > np.median(np.diff(data.offsets))
    sizes = np.where(large, LARGE_ERROR, SMALL_ERROR)[:, None] * outcome.values.std(axis=0)
    data = dataclasses.replace(data, targets=outcome.values + sizes * rng.laplace(size=outcome.values.shape))
    splits = split_other(COUNT)
    trust, facts = fit_trust(model, data, splits)
    return Known(model, trust, facts, data, outcome, splits, sizes)


@pytest.mark.parametrize("level", [0.6, 0.9, 0.975])
def test_intervals_hold_the_share_they_promise(known: Known, level: float) -> None:
    rows = known.splits["test"]
    inside = np.abs(known.outcome.values - known.data.targets)[rows] <= known.half_widths(rows, level)
    tolerance = 4.0 * np.sqrt(level * (1.0 - level) * (1 / len(rows) + 1 / len(known.splits["calibrate"])))
    assert abs(inside.mean(axis=0) - level).max() < tolerance


def test_intervals_are_wide_where_errors_are_large(known: Known) -> None:
    rows = known.splits["test"]
    widths, sizes = known.half_widths(rows), known.sizes[rows]
    for width, size in zip(widths.T, sizes.T, strict=True):
        large = size == size.max()
        ratio = np.median(width[large]) / np.median(width[~large])
        assert 0.6 * LARGE_ERROR / SMALL_ERROR < ratio < 1.6 * LARGE_ERROR / SMALL_ERROR


def test_a_higher_level_is_never_narrower(known: Known) -> None:
    widths = np.stack([known.half_widths(np.arange(5), level) for level in np.linspace(0.5, 0.999, 60)])
    assert (np.diff(widths, axis=0) >= 0.0).all()
    assert (widths[0] > 0.0).all()


def test_levels_are_those_from_which_on_intervals_hold_the_reference(known: Known) -> None:
    rows = known.splits["test"]
    traits, errors = known.outcome.traits[rows], (known.outcome.values - known.data.targets)[rows]
    domains = [Domain("out" if row % 3 else "in", 0.4 * (row % 5)) for row in range(len(rows))]
    errors[0, 0], errors[1, 1], errors[2, 2] = np.nan, 0.0, 1e9
    levels = known.trust.find_levels(traits, errors, domains)
    assert np.isnan(levels[0, 0])
    assert levels[1, 1] == LEVELS[0]
    assert levels[2, 2] == 1.0
    for level in (0.6, 0.9, 0.975):
        inside = np.abs(errors) <= known.trust.half_widths(traits, domains, level)
        clear = np.abs(levels - level) > 1e-6
        assert np.array_equal(inside[clear], (levels <= level)[clear])
        assert clear.mean() > 0.9


def test_out_of_the_domain_no_interval_is_narrow(known: Known) -> None:
    """And with the distance from the training molecules intervals grow, but not before it is unusual."""
    traits = known.outcome.traits[known.splits["test"]]
    inside, outside, far = (
        known.trust.half_widths(traits, [Domain(verdict, score)] * len(traits))
        for verdict, score in (("in", 0.3), ("out", 0.9), ("out", 2.5))
    )
    assert (outside >= inside).all()
    np.testing.assert_allclose(far, 2.5 * outside)
    narrow = outside > inside
    assert 0.8 < narrow.mean() < 0.95, "all but a tenth"
    for column, width in enumerate(outside.T):
        assert len(np.unique(width[narrow[:, column]])) <= len(known.trust.least)


def test_molecules_of_rare_sizes_have_factors_of_their_own(known: Known) -> None:
    traits, features = known.outcome.traits[known.splits["test"]], len(known.trust.projection)
    heavy = find_sizes(traits, features)
    assert heavy.tolist() == known.data.heavy_atoms[known.splits["test"]].tolist()
    groups = np.arange(2 * len(known.trust.edges) + 2)  # of each move first the rare sizes, then the others
    tables = np.ones((12, len(LEVELS))) * (groups + 1.0)[:, None, None]
    trust = dataclasses.replace(known.trust, sizes=np.array([7]), quantiles=tables, least=np.zeros((len(groups), 12)))
    factors = trust.half_widths(traits, [Domain("in", 0.5)] * len(traits)) / trust.scales(traits)
    moves = np.searchsorted(known.trust.edges, find_moves(traits, features))
    np.testing.assert_allclose(factors, (2 * moves + np.where(heavy < 7, 1, 2))[:, None] * np.ones(12))
    assert 0.0 < (heavy < 7).mean() < 1.0


def test_few_molecules_like_those_of_the_training_are_called_strange(known: Known) -> None:
    scores = known.trust.scores(known.outcome.traits[known.splits["test"]])
    assert (scores > 1.0).mean() < 0.05
    assert 0.0 <= known.facts["false_alarms"]["dft"] <= 0.01


def test_distorted_molecules_are_called_strange_and_get_wider_intervals(known: Known) -> None:
    chosen = known.data.select(known.splits["test"])
    rng = np.random.default_rng(5)
    noise = rng.standard_normal(chosen.positions.shape).astype(np.float32)
    shares, widths = [], []
    for size in (0.0, 0.1, 0.4):
        traits = run_all(known.model, dataclasses.replace(chosen, positions=chosen.positions + size * noise)).traits
        shares.append((known.trust.scores(traits) > 1.0).mean())
        widths.append(np.median(known.trust.half_widths(traits, judge_distance(known.trust, traits)), axis=0))
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.5
    assert (widths[2] > widths[0]).all()


def test_the_nearest_training_molecules_are_told_with_their_distance(known: Known) -> None:
    rows = known.splits["train"][:7]
    found, distances = known.trust.nearest(known.outcome.traits[rows], 3)
    assert found[:, 0].tolist() == list(range(7))
    assert (distances[:, 0] < 0.3).all(), "itself, but for the rounding to steps"
    assert (distances[:, 0] < distances[:, 1]).all()
    assert (np.diff(distances, axis=1) >= 0.0).all()
    assert known.trust.nearest(known.outcome.traits[:2], 10_000)[0].shape == (2, len(known.splits["train"]))


def test_nearest_against_a_plain_search() -> None:
    rng = np.random.default_rng(1)
    known, places = (rng.standard_normal((count, 8)).astype(np.float32) for count in (500, 300))
    plain = np.square(places[:, None].astype(float) - known).sum(axis=2)
    rows, squares = find_nearest(places, known, 4)
    np.testing.assert_array_equal(rows, np.argsort(plain, axis=1)[:, :4])
    np.testing.assert_allclose(squares, np.sort(plain, axis=1)[:, :4], rtol=1e-4)


def test_places_keep_all_but_the_fraction_of_a_step_up_to_the_farthest() -> None:
    rng = np.random.default_rng(1)
    steps = np.linspace(0.03, 0.06, 8, dtype=np.float32)
    whole = rng.integers(-FARTHEST_STEP, FARTHEST_STEP, (500, 8), endpoint=True)
    latents = to_bytes(((whole + rng.uniform(-0.4, 0.4, whole.shape)) * steps).astype(np.float32), steps)
    assert latents.shape == (500, 6)
    assert latents.dtype == np.uint8
    np.testing.assert_allclose(from_bytes(latents, steps), whole * steps, rtol=1e-6)
    beyond = np.array([[40.0, -40.0, 1e9, -1e9, np.inf, -np.inf, 31.0, -32.0]], dtype=np.float32)
    kept = from_bytes(to_bytes(beyond, np.ones(8, dtype=np.float32)), np.ones(8, dtype=np.float32))
    assert kept.tolist() == [[31.0, -32.0, 31.0, -32.0, 31.0, -32.0, 31.0, -32.0]]


def test_a_training_molecule_is_recognized_in_any_order_and_orientation(known: Known) -> None:
    rng = np.random.default_rng(2)
    for row in known.splits["train"][:5]:
        molecule = known.data.molecule(int(row))
        order = rng.permutation(len(molecule.numbers))
        turned = move(molecule, by=(3.0, 0.0, 1.0), turn=random_rotation(3))
        shuffled = Molecule(turned.numbers[order], turned.positions[order])
        traits = known.model.run(shuffled.numbers, shuffled.positions, np.array([0, len(order)])).traits
        (judgment,) = known.trust.judge([shuffled], traits)
        assert str(row) in judgment.seen
        assert all(known.data.molecule(int(name)).formula == molecule.formula for name in judgment.seen)


def test_a_molecule_not_trained_on_is_not_recognized(known: Known) -> None:
    chain = Molecule(np.array([8, 6, 8]), np.array([[-1.16, 0, 0], [0, 0, 0], [1.16, 0, 0.0]]))
    traits = known.model.run(chain.numbers, chain.positions, np.array([0, 3])).traits
    (judgment,) = known.trust.judge([chain], traits)
    assert judgment.seen == ()
    assert judgment.domain.verdict == "out"
    assert judgment.domain.reasons == tuple(message.code for message in judgment.messages)
    assert known.trust.judge([], traits[:0]) == []


def test_a_flaw_puts_a_molecule_outside(known: Known) -> None:
    molecule = known.data.molecule(int(known.splits["train"][0]))
    traits = known.model.run(molecule.numbers, molecule.positions, np.array([0, len(molecule.numbers)])).traits
    (fine,), (charged,) = (
        known.trust.judge([dataclasses.replace(molecule, charge=charge)], traits) for charge in (0, 2)
    )
    assert fine.domain.verdict == "in"
    assert fine.messages == ()
    assert charged.domain.verdict == "out"
    assert charged.domain.reasons == ("charged",)


def test_a_seen_molecule_finds_itself_beyond_the_range_of_the_steps(known: Known) -> None:
    trust, row = known.trust, int(known.splits["train"][0])
    molecule, traits = known.data.molecule(row), known.outcome.traits[row : row + 1]
    narrow = dataclasses.replace(trust, steps=trust.steps / 50.0)
    places = trust.place(known.outcome.traits[known.splits["train"]])
    narrow = dataclasses.replace(narrow, latents=to_bytes(places, narrow.steps))
    assert (np.abs(trust.place(traits)) > FARTHEST_STEP * narrow.steps).any()
    assert narrow.scores(traits)[0] > 0.0
    (judgment,) = narrow.judge([molecule], traits)
    assert narrow.name(0) in judgment.seen
    assert judgment.domain.score == 0.0


def test_an_unseen_molecule_smaller_than_nearly_all_is_strange(known: Known) -> None:
    train = known.splits["train"]
    sizes = np.sort(known.data.heavy_atoms[train])
    assert known.trust.smallest == sizes[FEW - 1]
    trust = dataclasses.replace(known.trust, smallest=int(sizes[-1]))
    unseen = Molecule(np.array([8, 6, 8]), np.array([[-1.16, 0, 0], [0, 0, 0], [1.16, 0, 0.0]]))
    largest = known.data.molecule(int(train[known.data.heavy_atoms[train].argmax()]))
    smaller = known.data.molecule(int(train[known.data.heavy_atoms[train].argmin()]))
    zeros = np.zeros_like(known.outcome.traits[:3])  # whatever the network makes of them
    near = dataclasses.replace(trust, threshold=1e6, strange=2.0)
    found, large, seen = near.judge([unseen, largest, smaller], zeros)
    assert found.domain.reasons == ("far-from-training",)
    assert found.domain.score <= 1.0
    assert f"Fewer than {FEW}" in found.messages[-1].text
    assert large.domain.verdict == "in"
    assert seen.seen
    assert seen.domain.verdict == "in"


def test_a_molecule_of_atoms_with_new_surroundings_is_strange(known: Known) -> None:
    near = dataclasses.replace(known.trust, smallest=2, threshold=1e6)
    chain = Molecule(np.array([8, 6, 8]), np.array([[-1.16, 0, 0], [0, 0, 0], [1.16, 0, 0.0]]))
    zeros = np.zeros_like(known.outcome.traits[:1])
    (found,) = near.judge([chain], zeros)
    assert found.domain.reasons == ("far-from-training",)
    told = "No training molecule has atoms with such surroundings as 3 of its 3 heavy atoms: O1, C2, O3."
    assert told in found.messages[0].text
    ends = np.array([0, 1]), np.array([1, 2])
    own = hash_surroundings(chain.numbers, Bonds(*ends, np.full(2, 1.16)))
    learned = dataclasses.replace(near, surroundings=np.union1d(near.surroundings, own))
    assert learned.judge([chain], zeros)[0].domain.verdict == "in"
    for strange, verdict in ((1.0 / 3.0, "out"), (0.34, "in")):
        learned = dataclasses.replace(near, surroundings=np.union1d(near.surroundings, own[:1]), strange=strange)
        assert learned.judge([chain], zeros)[0].domain.verdict == verdict, "O1 and O3 are alike"
    rows = known.splits["train"][:50]
    judged = near.judge([known.data.molecule(int(row)) for row in rows], known.outcome.traits[rows])
    assert all(judgment.domain.verdict == "in" for judgment in judged)


def test_what_a_complete_data_set_does_not_list_is_strange(known: Known) -> None:
    chain = Molecule(np.array([8, 6, 8]), np.array([[-1.16, 0, 0], [0, 0, 0], [1.16, 0, 0.0]]))
    seen = known.data.molecule(int(known.splits["train"][0]))
    flawed = dataclasses.replace(chain, charge=1)
    own = hash_graphs(chain.numbers, np.array([0, 3]), Bonds(np.array([0, 1]), np.array([1, 2]), np.full(2, 1.16)))
    zeros = np.zeros_like(known.outcome.traits[:3])
    near = dataclasses.replace(known.trust, smallest=2, threshold=1e6, strange=2.0)
    for listed, verdicts in ((own[:0], "in out in"), (own + np.uint64(1), "out out in"), (own, "in out in")):
        judged = dataclasses.replace(near, listed=listed).judge([chain, flawed, seen], zeros)
        assert " ".join(judgment.domain.verdict for judgment in judged) == verdicts
        assert "far-from-training" not in judged[1].domain.reasons, "the charge says it all"
        if verdicts.startswith("out"):
            assert "QM9 has all molecules of up to 9 heavy atoms" in judged[0].messages[0].text


def test_arrays_keep_the_calibration(known: Known) -> None:
    arrays = known.trust.to_arrays()
    again = Trust.from_arrays(arrays, len(known.trust.low), len(known.trust.projection))
    traits = known.outcome.traits[:50]
    domains = judge_distance(known.trust, traits)
    np.testing.assert_array_equal(
        again.half_widths(traits, domains, 0.8), known.trust.half_widths(traits, domains, 0.8)
    )
    np.testing.assert_array_equal(again.nearest(traits, 3)[0], known.trust.nearest(traits, 3)[0])
    molecules = [known.data.molecule(k) for k in range(50)]
    assert again.judge(molecules, traits) == known.trust.judge(molecules, traits)


@pytest.mark.parametrize("damage", ["missing", "shape", "type", "nan", "empty", "anchors", "threshold"])
def test_a_damaged_calibration_is_refused(known: Known, damage: str) -> None:
    arrays = known.trust.to_arrays()
    if damage == "missing":
        del arrays["edges"]
    elif damage == "shape":
        arrays["weight1"] = arrays["weight1"][:, :-1]
    elif damage == "type":
        arrays["latents"] = arrays["latents"].astype(np.float32)
    elif damage == "nan":
        arrays["quantiles"] = arrays["quantiles"] * np.nan
    elif damage == "empty":
        arrays |= {name: arrays[name][:0] for name in ("latents", "ids", "keys")}
    elif damage == "anchors":
        arrays["anchors"] = arrays["anchors"] + len(arrays["ids"])
    else:
        arrays["threshold"] = np.zeros(1)
    model = Model(known.model.network, known.model.baseline, extras=arrays)
    with pytest.raises(WeightsError, match="calibration"):
        load_trust(model)
    assert load_trust(known.model) is None, "no calibration is no damage"


@pytest.mark.parametrize("level", [0.0, 0.49, 0.9995, 1.0, float("nan"), True])
def test_a_level_that_cannot_be_kept_is_refused(level: float) -> None:
    with pytest.raises(UsageError, match="interval"):
        check_level(level)


def test_levels_are_those_that_can_be_asked_for() -> None:
    assert (np.diff(LEVELS) > 0.0).all()
    assert LEVELS[0] == LOWEST_LEVEL
    assert LEVELS[-1] == HIGHEST_LEVEL
    assert 0.9 in LEVELS.round(12)


def test_too_few_molecules_are_refused(known: Known) -> None:
    splits = known.splits | {"calibrate": known.splits["calibrate"][:99]}
    with pytest.raises(DataError, match="99 molecules to calibrate on"):
        fit_trust(known.model, known.data, splits)


def test_records_carry_intervals_verdict_and_neighbors(known: Known) -> None:
    model = Model(known.model.network, known.model.baseline, extras=known.trust.to_arrays())
    molecules = [known.data.molecule(int(row)) for row in known.splits["test"][:3]]
    traits = [model.run(m.numbers, m.positions, np.array([0, len(m.numbers)])).traits for m in molecules]
    records = list(
        predict(molecules, weights=model, properties="mu,u0_atom", units=["kcal"], neighbors=2, interval=0.8)
    )
    for record, trait in zip(records, traits, strict=True):
        assert record.interval_level == 0.8
        assert record.domain is not None
        widths = known.trust.half_widths(trait, [record.domain], 0.8)[0]
        for key, column, factor in (("mu", 0, 1.0), ("u0_atom", DEFAULT_KEYS.index("u0"), 23.0605)):
            low, high = record.properties[key].interval
            assert high - low == pytest.approx(2.0 * widths[column] * factor, rel=1e-3), key
            assert (high + low) / 2 == pytest.approx(record.properties[key].value, rel=1e-6), key
        assert len(record.neighbors) == 2
        assert {neighbor.smiles for neighbor in record.neighbors} == {""}, "only QM9's are known"
    (plain,) = predict(molecules[0], weights=model, properties="mu", interval=None)
    assert plain.properties["mu"].interval is None
    assert plain.interval_level is None
    assert plain.domain.verdict == records[0].domain.verdict
    assert plain.domain.score == pytest.approx(records[0].domain.score, rel=1e-3)
    with pytest.raises(UsageError, match="know no training molecules"):
        predict(molecules, weights=known.model, neighbors=1)
    with pytest.raises(UsageError, match="neighbors"):
        predict(molecules, weights=model, neighbors=-1)
    assert model.config == SHAPE
