"""The network: EGNN's equations, their symmetries, and the physics built into its outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.data import atomic_masses
from numpy.typing import NDArray
from samples import (
    SPREAD,
    TINY,
    alkane,
    find_formula,
    join,
    make_graph,
    make_model,
    make_network,
    move,
    random_rotation,
    read_molecules,
)
from torch import Tensor, nn
from torch_geometric.data import Batch
from torch_geometric.nn import MessagePassing

from qmprop.config import ModelConfig
from qmprop.egnn import EGNN, LATENTS, EGNNLayer, Encoding, Pairs, RadialBasis, envelope
from qmprop.graph import Graph, to_pyg
from qmprop.model import Model
from qmprop.molecule import Molecule

FAR = (60.0, 0.0, 0.0)  # Å
MIRROR = np.diag([1.0, 1.0, -1.0])
INVERSION = -np.eye(3)
WATER, METHANE, NITRILE = find_formula("H2O"), find_formula("CH4"), find_formula("C2H3N")
EGNN_192 = ModelConfig()
UNMOVED = replace(TINY, refine_layers=0)
PLAIN = replace(TINY, angles=False)
UNGATED = replace(TINY, gate=False)


class PlainEGNNLayer(MessagePassing):
    """EGNN's equations 3 to 8 as they stand in the paper, with phi_e evaluated for every directed edge.

    phi_e(h_i, h_j, d_ij, a_ij) is a perceptron of [h_i, h_j, d_ij, a_ij] times a map of h_j; a_ij is what the vectors
    of the two atoms are along each other and along the edge, and below 8 where there is no gate.
    """

    def __init__(self, layer: EGNNLayer, cutoff: float) -> None:
        super().__init__(aggr="sum", flow="source_to_target", node_dim=0)
        nodes, messages = layer.member.in_features, layer.member.out_features
        features = 2 * nodes + layer.distance.in_features + (layer.angle.in_features if layer.angles else 0)
        first = nn.Linear(features, messages, dtype=layer.member.weight.dtype)
        with torch.no_grad():
            stacked = [layer.member.weight, layer.member.weight, layer.distance.weight]
            stacked += [layer.angle.weight] if layer.angles else []
            first.weight.copy_(torch.cat(stacked, dim=1))
            first.bias.copy_(2.0 * layer.member.bias)
        self.phi_p = nn.Sequential(first, nn.SiLU(), layer.message, nn.SiLU())
        self.factor = layer.sender
        self.phi_inf = None if layer.gate is None else nn.Sequential(layer.gate, nn.Sigmoid())
        self.phi_x, self.phi_h, self.norm = layer.direction, layer.update, layer.norm
        self.phi_v = layer.carry if layer.angles else None
        self.left, self.right = layer.mix_left, layer.mix_right
        self.radial, self.cutoff = RadialBasis(layer.distance.in_features, cutoff), cutoff

    def forward(self, h: Tensor, v: Tensor, edge_index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(h)
        collected = self.propagate(edge_index, h=normed, x=x, v=v)
        width = self.phi_x.in_features
        m_i, push = collected[:, :width], collected[:, width:].reshape(len(h), -1, 3).transpose(1, 2)
        v = v + push
        invariants = torch.einsum("nci,nci->ni", v @ self.left.weight.T, v @ self.right.weight.T)
        return h + self.phi_h(torch.cat([normed, m_i, invariants], dim=1)), v

    def message(self, h_i: Tensor, h_j: Tensor, x_i: Tensor, x_j: Tensor, v_i: Tensor, v_j: Tensor) -> Tensor:
        difference = x_i - x_j
        distance = difference.norm(dim=1, keepdim=True)
        unit = difference / distance
        from_i, from_j = torch.einsum("ecv,ec->ev", v_i, unit), torch.einsum("ecv,ec->ev", v_j, -unit)
        a_ij = torch.cat([from_i + from_j, from_i * from_j, torch.einsum("ecv,ecv->ev", v_i, v_j)], dim=1)
        if self.phi_inf is None:
            a_ij = a_ij / (1.0 + (a_ij / 8.0) ** 2).sqrt()
        known = [h_i, h_j, self.radial(distance[:, 0])] + ([] if self.phi_v is None else [a_ij])
        p_ij = self.phi_p(torch.cat(known, dim=1))
        m_ij = envelope(distance, self.cutoff) * (p_ij * self.factor(h_j))
        if self.phi_inf is not None:
            m_ij = m_ij * self.phi_inf(p_ij)
        push = self.phi_x(m_ij)[:, :, None] * unit[:, None, :]
        if self.phi_v is not None:
            push = push + self.phi_v(m_ij)[:, :, None] * v_j.transpose(1, 2)
        return torch.cat([m_ij, push.flatten(1)], dim=1)


def encode(network: EGNN, *molecules: Molecule) -> Encoding:
    return network.encode(*make_graph(*molecules, cutoff=network.config.cutoff).arguments())


def run(network: EGNN, *molecules: Molecule, skin: float = 0.0) -> Tensor:
    """Return the outputs for molecules whose positions are taken as they are, with pairs of up to cut-off + skin."""
    dtype = network.embedding.weight.dtype
    return network(*make_graph(*molecules, cutoff=network.config.cutoff + skin, dtype=dtype).arguments())[0]


def find_centers(graph: Graph, positions: Tensor) -> NDArray[np.float64]:
    """Return the center of mass of every molecule in Å [M, 3]."""
    mass = atomic_masses[graph.numbers.numpy()][:, None]
    moments = np.concatenate([mass * positions.double().numpy(), mass], axis=1)
    sums = np.zeros((graph.molecule_count, 4))
    np.add.at(sums, graph.molecules.numpy(), moments)
    return sums[:, :3] / sums[:, 3:]


def assert_same_predictions(first: dict[str, NDArray], second: dict[str, NDArray], tolerance: float = 1e-5) -> None:
    """Compare properties in units of their spread over QM9."""
    for key, spread in SPREAD.items():
        difference = np.abs(first[key] - second[key]).max() / spread
        assert difference < tolerance, f"{key} differs by {difference:.1e} of its spread"


@pytest.fixture(scope="module")
def double() -> EGNN:
    return make_network(TINY, seed=3).double()


@pytest.mark.parametrize("config", [TINY, PLAIN, UNGATED, EGNN_192], ids=["tiny", "plain", "ungated", "shipped"])
def test_layers_agree_with_the_papers_equations(config: ModelConfig) -> None:
    network, molecules = make_network(config, seed=1).double(), read_molecules()
    data = Batch.from_data_list([to_pyg(molecule, config.cutoff) for molecule in molecules])
    graph = make_graph(*molecules, cutoff=config.cutoff, dtype=torch.float64)
    h, expected_h = network.embedding(graph.numbers), network.embedding(data.z)
    v = expected_v = torch.randn(len(h), 3, config.vectors, generator=torch.Generator().manual_seed(0)).double()
    units = graph.edges / graph.distances[:, None]
    smooth = envelope(graph.distances, config.cutoff)[:, None]
    pairs = Pairs(graph.first, graph.second, network.radial(graph.distances), units, smooth)
    for layer in (*network.refiner, *network.layers):
        h, v = layer(h, v, pairs)
        plain = PlainEGNNLayer(layer, config.cutoff).double()
        expected_h, expected_v = plain(expected_h, expected_v, data.edge_index, graph.positions)
        torch.testing.assert_close(h, expected_h, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(v, expected_v, rtol=1e-7, atol=1e-7)


def test_messages_know_the_angles_between_vectors_and_pairs() -> None:
    network = make_network(seed=2)
    layer = network.layers[0]
    with torch.no_grad():
        layer.direction.weight.zero_()  # so that the vectors stay, and with them the scalar products of the update
        layer.carry.weight.zero_()
    graph = make_graph(Molecule(np.array([6, 6, 6]), np.array([[0.0, 0.0, 0.0], [1.4, 0.0, 0.0], [0.0, 1.4, 0.0]])))
    pairs = network._pairs(graph.positions, graph.first, graph.second)
    h = torch.ones(3, TINY.node_width)
    axes = torch.eye(3)[:, None, :, None].expand(3, 3, 3, TINY.vectors)  # all vectors along x, y or z
    along_x, along_y, along_z = (layer(h, v, pairs)[0] for v in axes)
    assert (along_x - along_z).abs().max() > 1e-3
    torch.testing.assert_close(along_x[[0, 2, 1]], along_y, msg="x and y change places, and so do two atoms")


def test_without_a_gate_large_vectors_do_not_feed_themselves() -> None:
    """Messages are bounded in the vectors, which then grow with the number of layers and not like their cubes."""
    network = make_network(UNGATED, seed=2)
    graph = make_graph(METHANE)
    pairs = network._pairs(graph.positions, graph.first, graph.second)
    h = network.embedding(graph.numbers)
    direction = torch.randn(len(h), 3, TINY.vectors, generator=torch.Generator().manual_seed(0))
    growth = []
    for size in (1e3, 1e6):
        v = size * direction
        for layer in network.layers:
            v = layer(h, v, pairs)[1]
        growth.append(float(v.norm()) / size)
    assert growth[0] == pytest.approx(growth[1], rel=0.1)


@pytest.mark.parametrize("config", [TINY, PLAIN, UNGATED], ids=["tiny", "plain", "ungated"])
def test_encode_runs_the_papers_layers_in_turn(config: ModelConfig) -> None:
    network, molecules = make_network(config, seed=1), read_molecules()
    data = Batch.from_data_list([to_pyg(molecule, TINY.cutoff) for molecule in molecules])
    x = data.pos.float()
    h, v = network.embedding(data.z), torch.zeros(len(data.z), 3, TINY.vectors)
    for layer in network.refiner:
        h, v = PlainEGNNLayer(layer, TINY.cutoff)(h, v, data.edge_index, x)
    normed = network.refiner_norm(h)
    shifts = torch.einsum("nav,nv->na", v, network.shift(normed)) / (1.0 + torch.exp(-network.unrest(normed)))
    mass = torch.from_numpy(atomic_masses[data.z]).float()
    for k in range(len(molecules)):
        mine = data.batch == k
        shifts[mine] -= mass[mine] @ shifts[mine] / mass[mine].sum()
    assert 0.02 < shifts.norm(dim=1).mean() < 0.3
    x, v = x + shifts, network.entry(v) if config.angles else torch.zeros_like(v)
    for layer in network.layers:
        h, v = PlainEGNNLayer(layer, TINY.cutoff)(h, v, data.edge_index, x)
    found = encode(network, *molecules)
    torch.testing.assert_close(found.positions, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.h, network.norm(h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.v, v, rtol=1e-4, atol=1e-4)


def test_without_refining_layers_the_geometry_is_taken_as_it_is(molecules: list[Molecule]) -> None:
    network = make_network(UNMOVED, seed=1)
    for dtype in (torch.float32, torch.float64):
        graph = make_graph(*molecules, dtype=dtype)
        refined = network(*graph.arguments())[1]
        assert refined.dtype == dtype
        assert torch.equal(refined, graph.positions)


def test_the_refined_geometry_keeps_every_center_of_mass(random_model: Model, molecules: list[Molecule]) -> None:
    scattered = [move(molecule, by=(0.3 * k, -2.0, 0.1 * k)) for k, molecule in enumerate(molecules)]
    joined = join(WATER, move(NITRILE, by=FAR))
    graph = make_graph(*scattered, joined, dtype=torch.float64)
    refined = random_model.network(*graph.arguments())[1]
    assert refined.dtype == torch.float64
    assert (refined - graph.positions).norm(dim=1).mean() > 0.02, "atoms do move"
    np.testing.assert_allclose(find_centers(graph, refined), find_centers(graph, graph.positions), atol=1e-6)
    centered, offsets = find_centers(graph, graph.positions), graph.molecules.numpy()
    graph = replace(graph, positions=graph.positions - torch.from_numpy(centered[offsets]))
    assert np.abs(find_centers(graph, random_model.network(*graph.arguments())[1])).max() < 1e-6


def test_properties_do_not_pull_on_the_shifts(molecules: list[Molecule]) -> None:
    """Only the distance to the right geometry teaches the shifts; what is read from the result is not."""
    network = make_network().requires_grad_()
    outputs, refined = network(*make_graph(*molecules).arguments())

    def reach(values: Tensor) -> set[str]:
        names, parameters = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(values.sum(), parameters, allow_unused=True, retain_graph=True)
        found = [name for name, g in zip(names, gradients, strict=True) if g is not None and g.abs().max() > 0.0]
        return {name.split(".")[0] for name in found}

    refining = {"embedding", "refiner", "refiner_norm", "shift", "unrest"}
    everything = {name.split(".")[0] for name, _ in network.named_parameters()}
    assert reach(refined.square()) == refining
    assert reach(outputs.square()) == everything - {"refiner_norm", "shift", "unrest"}


def test_envelope_falls_from_one_to_zero_smoothly() -> None:
    d = torch.tensor([0.0, 5.0, 5.0 - 1e-9, 7.0], dtype=torch.float64, requires_grad=True)
    value = envelope(d, 5.0)
    (slope,) = torch.autograd.grad(value.sum(), d, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), d)
    assert value.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-12)
    assert slope.tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert curvature.tolist() == pytest.approx([0.0] * 4, abs=1e-8)
    inside = envelope(torch.linspace(0.0, 5.0, 501, dtype=torch.float64), 5.0)
    assert (inside.diff() < 0.0).all()
    assert inside[250] == 0.5


def test_radial_basis_peaks_at_its_centers() -> None:
    basis = RadialBasis(8, 5.0)
    assert basis.centers[[0, -1]].tolist() == pytest.approx([0.8, 5.0])
    torch.testing.assert_close(basis(basis.centers).diagonal(), torch.ones(8))
    torch.testing.assert_close(basis(basis.centers).diagonal(1), torch.full((7,), np.exp(-0.5)).float())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda molecule: move(molecule, turn=random_rotation(5)), id="rotation"),
        pytest.param(lambda molecule: move(molecule, by=(1.7, -0.4, 2.9)), id="translation"),
        pytest.param(lambda molecule: move(molecule, by=(1000.0, -1000.0, 500.0)), id="far translation"),
        pytest.param(lambda molecule: move(molecule, turn=MIRROR), id="reflection"),
        pytest.param(lambda molecule: move(molecule, turn=INVERSION), id="inversion"),
        pytest.param(
            lambda molecule: Molecule(molecule.numbers[::-1].copy(), molecule.positions[::-1].copy()), id="permutation"
        ),
    ],
)
def test_predictions_are_invariant(random_model: Model, molecules: list[Molecule], change) -> None:
    before = random_model.predict(molecules)
    assert all(np.ptp(before[key]) > 1e-2 * spread for key, spread in SPREAD.items()), "the network says something"
    assert_same_predictions(before, random_model.predict([change(molecule) for molecule in molecules]))


def test_stretching_molecules_changes_every_prediction(random_model: Model, molecules: list[Molecule]) -> None:
    before = random_model.predict(molecules)
    after = random_model.predict([replace(molecule, positions=molecule.positions * 1.1) for molecule in molecules])
    for key, spread in SPREAD.items():
        assert np.abs(after[key] - before[key]).max() > 1e-4 * spread, key


def test_vectors_and_the_refined_geometry_turn_with_the_molecule(molecules: list[Molecule]) -> None:
    network = make_network(seed=2)
    before = encode(network, *molecules)
    assert before.v.abs().max() > 0.1
    for turn in (random_rotation(7), MIRROR):
        after = encode(network, *(move(molecule, turn=turn) for molecule in molecules))
        matrix = torch.from_numpy(turn).float()
        torch.testing.assert_close(after.h, before.h, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.v, torch.einsum("ab,nbv->nav", matrix, before.v), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.positions, before.positions @ matrix.T, rtol=0.0, atol=1e-5)


def test_the_refined_geometry_follows_shifts_and_the_order_of_atoms(molecules: list[Molecule]) -> None:
    network = make_network(seed=2)
    before = encode(network, *molecules).positions
    shifted = encode(network, *(move(molecule, by=(1.5, -0.5, 2.0)) for molecule in molecules)).positions
    torch.testing.assert_close(shifted, before + torch.tensor([1.5, -0.5, 2.0]), rtol=0.0, atol=1e-5)
    backwards = [Molecule(molecule.numbers[::-1], molecule.positions[::-1]) for molecule in molecules[::-1]]
    torch.testing.assert_close(encode(network, *backwards).positions.flip(0), before, rtol=0.0, atol=1e-5)


def test_orientation_does_not_blur_the_refined_geometry(random_model: Model, molecules: list[Molecule]) -> None:
    """The layers compute in float32, but from distances and directions of float64 positions."""

    def refine(turn: NDArray) -> NDArray:
        graph = make_graph(*(move(molecule, turn=turn) for molecule in molecules), dtype=torch.float64)
        return random_model.network(*graph.arguments())[1].numpy()

    turn = random_rotation(9)
    np.testing.assert_allclose(refine(turn) @ turn, refine(np.eye(3)), rtol=0.0, atol=1e-6)


def test_batch_equals_single(random_model: Model, molecules: list[Molecule]) -> None:
    together = random_model.predict(molecules)
    alone = [random_model.predict([molecule]) for molecule in molecules]
    assert_same_predictions(together, {key: np.concatenate([one[key] for one in alone]) for key in together})


@pytest.mark.parametrize(("gap", "touches"), [(4.0, True), (5.1, False), (60.0, False)])
def test_only_neighbors_change_atomic_states(gap: float, touches: bool) -> None:
    network = make_network(seed=4)
    positions = NITRILE.positions - [NITRILE.positions[:, 0].min(), 0.0, 0.0]
    other = replace(NITRILE, positions=positions + [METHANE.positions[:, 0].max() + gap, 0.0, 0.0])
    positions, _, h, v = encode(network, METHANE)
    joint = encode(network, join(METHANE, other))
    joint_positions, joint_h, joint_v = (states[: len(h)] for states in (joint.positions, joint.h, joint.v))
    moved = joint_positions - positions
    if touches:
        assert (joint_h - h).abs().max() > 1e-4
        assert (joint_v - v).abs().max() > 1e-5
        assert (moved - moved[0]).abs().max() > 1e-5
    else:
        torch.testing.assert_close(joint_h, h, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(joint_v, v, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("formulas", [("CH4", "H2O"), ("C2H3N", "C6H6"), ("C7H9NO", "C4H6N2O")])
def test_far_apart_fragments_add_up(random_model: Model, formulas: tuple[str, str]) -> None:
    first, second = (find_formula(formula) for formula in formulas)
    pair = random_model.predict([join(first, move(second, by=FAR))])
    alone = random_model.predict([first, second])
    for key in ("u0_atom", "alpha", "zpve"):
        assert pair[key][0] == pytest.approx(alone[key].sum(), abs=1e-4 * SPREAD[key]), key
        assert min(abs(alone[key])) > 100 * 1e-4 * SPREAD[key], key
    assert pair["u0"][0] == pytest.approx(alone["u0"].sum(), abs=1e-4 * SPREAD["u0_atom"])


def test_two_far_apart_copies_have_the_orbital_energies_of_one(random_model: Model) -> None:
    for molecule in (WATER, NITRILE, find_formula("C7H9NO")):
        one, two = (random_model.predict([each]) for each in (molecule, join(molecule, move(molecule, by=FAR))))
        for key in ("homo", "lumo", "gap"):
            assert two[key][0] == pytest.approx(one[key][0], abs=1e-4 * SPREAD[key]), key


def test_orbital_energies_of_chains_converge(random_model: Model) -> None:
    """What the ends of a chain matter falls as 1 / length, so every doubling changes half as much as the one before."""
    y = random_model.predict([alkane(carbons) for carbons in (20, 40, 80, 160)])
    for key in ("homo", "lumo"):
        steps = np.abs(np.diff(y[key]))
        assert (steps[1:] < 0.6 * steps[:-1] + 1e-5).all(), key
        assert steps[-1] < 0.05 * SPREAD[key], key


def test_dipole_moments_of_far_apart_fragments_add_as_vectors(random_model: Model) -> None:
    polar, other = find_formula("C7H9NO"), find_formula("C4H6N2O")
    mu, mu_other = random_model.predict([polar, other])["mu"]
    assert min(mu, mu_other) > 0.05
    inverted = move(polar, turn=INVERSION)
    pairs = [(polar, polar), (polar, inverted), (other, polar), (other, inverted)]
    parallel, opposite, plus, minus = random_model.predict([join(a, move(b, by=FAR)) for a, b in pairs])["mu"]
    tolerance = 1e-3 * SPREAD["mu"]
    assert parallel == pytest.approx(2.0 * mu, abs=tolerance)
    assert opposite == pytest.approx(0.0, abs=tolerance)
    assert plus**2 + minus**2 == pytest.approx(2.0 * (mu**2 + mu_other**2), abs=tolerance)  # the parallelogram law


@pytest.mark.parametrize("formula", ["C2H6", "C6H6", "C2H2"])
def test_a_center_of_inversion_means_no_dipole_moment(random_model: Model, formula: str) -> None:
    symmetric = find_formula(formula)
    centered = symmetric.positions - symmetric.positions.mean(axis=0)
    pairs = np.linalg.norm(centered[:, None] + centered[None], axis=-1).argmin(axis=1)
    symmetric = replace(symmetric, positions=(centered - centered[pairs]) / 2.0)
    mu = find_formula("C7H9NO")
    assert random_model.predict([symmetric])["mu"][0] < 1e-4
    together = random_model.predict([mu, join(mu, move(symmetric, by=FAR))])["mu"]
    assert together[1] == pytest.approx(together[0], abs=1e-3)


def test_charges_are_neutral_in_every_fragment() -> None:
    network = make_network(ModelConfig(), seed=6)
    fragments = [WATER, move(NITRILE, by=(0.0, 60.0, 0.0)), move(METHANE, by=(-60.0, 0.0, 0.0))]
    encoding = encode(network, join(*fragments))
    charges = network._charges(network.atoms(encoding.h), encoding.pairs)
    owner = np.repeat(np.arange(3), [len(fragment.numbers) for fragment in fragments])
    for k in range(3):
        mine = charges[torch.from_numpy(owner == k)]
        assert mine.abs().max() > 1e-3, "atoms do carry charge"
        assert abs(float(mine.sum())) < 1e-6 * max(1.0, float(mine.abs().sum()))


def visit(network: EGNN, distance: float, step: float, *, skin: float = 0.0) -> Tensor:
    """Return the outputs along 81 steps of an oxygen atom away from the end of acetonitrile, about this distance."""
    host = NITRILE
    direction = host.positions[0] - host.positions.mean(axis=0)
    direction /= np.linalg.norm(direction)
    visitors = [host.positions[0] + direction * (distance + offset) for offset in np.arange(-40, 41) * step]
    molecules = [Molecule(np.append(host.numbers, 8), np.vstack([host.positions, spot])) for spot in visitors]
    return run(network, *molecules, skin=skin)


@pytest.mark.parametrize(("config", "skin"), [(UNMOVED, 0.0), (TINY, 1.0)], ids=["unmoved", "refined, with a skin"])
def test_predictions_are_smooth_where_an_atom_leaves_the_neighborhood(config: ModelConfig, skin: float) -> None:
    """Second differences stay small where an atom leaves the last neighbor's reach.

    A refining network needs the pairs that its shifts bring into reach, too.
    """
    network = make_network(config, seed=3).double()

    def bend(distance: float, step: float) -> Tensor:
        values = visit(network, distance, step, skin=skin)
        return (values[2:] - 2 * values[1:-1] + values[:-2]).abs().amax(dim=0) / step**2

    assert (bend(config.cutoff - 1.0, 1e-3) > 1e-4).all(), "the visitor is felt inside"
    coarse, fine = (bend(config.cutoff, step) for step in (1e-3, 2.5e-4))
    assert (fine < 1.1 * coarse + 1e-3).all(), "a jump of 1e-9 would bend by 0.02, and by four times what it did"


def test_pairs_that_refining_brings_into_reach_are_hardly_missed() -> None:
    """The pairs are those of the given geometry; the envelope makes the others' part small, in units of spreads."""
    network = make_model(EGNN_192, seed=3).network.double()
    crossing = visit(network, EGNN_192.cutoff, 1e-6)
    assert crossing.diff(dim=0).abs().max() < 2e-3
    assert (crossing - visit(network, EGNN_192.cutoff, 1e-6, skin=1.0)).abs().max() < 2e-3


def test_a_pair_at_the_cutoff_is_two_single_atoms(double: EGNN) -> None:
    def pair(distance: float) -> Tensor:
        return run(double, Molecule(np.array([6, 8]), np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])))[0]

    sums = [LATENTS.index(key) for key in ("alpha", "zpve", "u0", "thermal", "entropy", "cv")]
    single = run(double, Molecule(np.array([6]), np.zeros((1, 3))), Molecule(np.array([8]), np.zeros((1, 3)))).sum(
        dim=0
    )
    torch.testing.assert_close(pair(5.0001)[sums], single[sums], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(pair(4.9999)[sums], single[sums], rtol=0.0, atol=1e-9)
    assert (pair(2.0)[sums] - single[sums]).abs().max() > 1e-2


@pytest.mark.parametrize("part", [0, 1], ids=["outputs", "refined geometry"])
def test_gradient_is_the_slope(monkeypatch: pytest.MonkeyPatch, double: EGNN, part: int) -> None:
    """With nothing cut out of the gradient on purpose: the properties do not pull on the shifts."""
    graph = make_graph(find_formula("C3H3NO"), WATER, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).double() for size in ((2, len(LATENTS)), (len(graph.numbers), 3))]

    def total(positions: Tensor) -> Tensor:
        return (double(*replace(graph, positions=positions).arguments())[part] * weights[part]).sum()

    positions = graph.positions.clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "detach", lambda tensor: tensor)
        (gradient,) = torch.autograd.grad(total(positions), positions)
    step, slopes = 1e-5, torch.zeros_like(gradient)
    for atom in range(len(positions)):
        for axis in range(3):
            shift = torch.zeros_like(gradient)
            shift[atom, axis] = step
            slopes[atom, axis] = (total(graph.positions + shift) - total(graph.positions - shift)) / (2 * step)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "molecule",
    [
        Molecule(np.array([6]), np.array([[3.0, 1.0, -2.0]])),
        Molecule(np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.74, 0.0, 0.0]])),
        Molecule(np.array([7, 7]), np.array([[0.0, 0.0, 0.0], [70.0, 0.0, 0.0]])),
        find_formula("C2H2"),
        find_formula("CHN"),
        alkane(333),
    ],
    ids=["atom", "H2", "two atoms far apart", "acetylene", "HCN", "1,001 atoms"],
)
def test_unusual_shapes_have_finite_predictions(random_model: Model, molecule: Molecule) -> None:
    predictions = random_model.predict([molecule])
    assert all(np.isfinite(values).all() for values in predictions.values())
    if len(set(molecule.numbers.tolist())) == 1:
        assert predictions["mu"][0] < 1e-4, "equal atoms have no dipole moment"


def test_outputs_do_not_depend_on_training_mode(molecules: list[Molecule]) -> None:
    network = make_network()
    evaluated = run(network.eval(), *molecules)
    assert torch.equal(run(network.train(), *molecules), evaluated)


def test_scales_only_convert_the_moments(molecules: list[Molecule]) -> None:
    """mu is computed in debye and R2 in a0^2; dividing by their scales makes the outputs normalized."""
    network = make_network()
    once = run(network, *molecules)
    network.scales.fill_(2.0)
    twice = run(network, *molecules)
    for column, key in enumerate(LATENTS):
        if key == "mu":
            torch.testing.assert_close(twice[:, column], once[:, column] / 2)
        elif key != "r2":
            assert torch.equal(twice[:, column], once[:, column]), key


def test_seeds_make_different_networks_and_the_same_seed_the_same() -> None:
    first, again, other = (make_model(seed=seed).predict([WATER])["u0_atom"][0] for seed in (0, 0, 1))
    assert first == again != other
