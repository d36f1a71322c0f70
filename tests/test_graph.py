"""The neighbor graph: the pairs within the cut-off, all of them and no others, at linear cost."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import alkane, join, make_graph, move
from torch_geometric.data import Batch, Data

from qmprop import graph as graph_module
from qmprop.graph import Graph, build_graph, concatenate, from_pyg, to_pyg
from qmprop.molecule import Molecule

WATER = Molecule(
    np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]]), name="water"
)


def find_pairs(*molecules: Molecule, cutoff: float) -> set[tuple[int, int]]:
    """Compare every atom with the later ones of its molecule."""
    pairs, start = set(), 0
    for molecule in molecules:
        positions = molecule.positions.astype(np.float32)
        close = np.square(positions[:, None] - positions).sum(axis=2) < cutoff * cutoff
        pairs |= {(start + i, start + j) for i, j in np.argwhere(np.triu(close, 1)).tolist()}
        start += len(positions)
    return pairs


def pair_list(graph: Graph) -> list[tuple[int, int]]:
    return list(zip(graph.first.tolist(), graph.second.tolist(), strict=True))


def random_molecule(atoms: int, seed: int, *, edge: float = 8.0) -> Molecule:
    random = np.random.default_rng(seed)
    return Molecule(random.choice([1, 6, 7, 8, 9], atoms), random.uniform(0.0, edge, (atoms, 3)))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    cutoff=st.floats(1.0, 12.0),
)
def test_pairs_are_those_of_a_brute_force_search(sizes: list[int], seed: int, cutoff: float) -> None:
    molecules = [random_molecule(size, seed + k) for k, size in enumerate(sizes)]
    graph = make_graph(*molecules, cutoff=cutoff)
    pairs = pair_list(graph)
    assert set(pairs) == find_pairs(*molecules, cutoff=cutoff)
    assert len(pairs) == len(set(pairs))
    assert all(i < j for i, j in pairs)
    assert pairs == sorted(pairs)
    assert graph.molecules.tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()


@pytest.mark.parametrize("cutoff", [2.0, 5.0, 100.0])
@pytest.mark.parametrize("atoms", [63, 64, 65, 200])
def test_dense_and_tree_search_agree(monkeypatch: pytest.MonkeyPatch, atoms: int, cutoff: float) -> None:
    molecule = random_molecule(atoms, atoms, edge=14.0)
    found = []
    for limit in (0, 1000):
        monkeypatch.setattr(graph_module, "_DENSE_ATOMS", limit)
        found.append(pair_list(make_graph(molecule, cutoff=cutoff)))
    assert found[0] == found[1]
    assert set(found[0]) == find_pairs(molecule, cutoff=cutoff)


def test_small_and_large_molecules_share_a_batch() -> None:
    molecules = [random_molecule(5, 0), random_molecule(80, 1), WATER, random_molecule(70, 2), random_molecule(9, 3)]
    graph = make_graph(*molecules, cutoff=4.0)
    assert pair_list(graph) == sorted(find_pairs(*molecules, cutoff=4.0))
    assert graph.molecule_count == 5


def test_single_atom_has_no_neighbors() -> None:
    graph = make_graph(Molecule(np.array([6]), np.zeros((1, 3))), WATER)
    assert pair_list(graph) == [(1, 2), (1, 3), (2, 3)]
    assert pair_list(make_graph(Molecule(np.array([6]), np.zeros((1, 3))))) == []


def test_far_apart_fragments_are_not_connected() -> None:
    near, far = join(WATER, move(WATER, by=(3.0, 0.0, 0.0))), join(WATER, move(WATER, by=(60.0, 0.0, 0.0)))
    assert len(pair_list(make_graph(near, cutoff=5.0))) == 15
    alone = pair_list(make_graph(WATER, cutoff=5.0))
    assert pair_list(make_graph(far, cutoff=5.0)) == alone + [(i + 3, j + 3) for i, j in alone]


def test_thousand_atoms() -> None:
    chain = alkane(333)
    assert len(chain.numbers) == 1001
    assert set(pair_list(make_graph(chain, cutoff=5.0))) == find_pairs(chain, cutoff=5.0)


def test_pairs_and_memory_grow_linearly() -> None:
    def measure(carbons: int) -> tuple[float, float]:
        numbers, positions, offsets = concatenate([alkane(carbons)])
        tracemalloc.start()
        pairs = len(build_graph(numbers, positions, offsets, 5.0).first)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return pairs / len(numbers), peak / len(numbers)

    measure(100)
    short_pairs, short_bytes = measure(1000)
    long_pairs, long_bytes = measure(8000)
    assert long_pairs == pytest.approx(short_pairs, rel=0.01)
    assert long_bytes < 1.5 * short_bytes


def test_distances_are_those_of_the_positions() -> None:
    graph = make_graph(WATER)
    expected = [np.linalg.norm(WATER.positions[i] - WATER.positions[j]) for i, j in pair_list(graph)]
    assert graph.distances.tolist() == pytest.approx(expected, rel=1e-6)
    assert graph.squared_distances.tolist() == pytest.approx(np.square(expected), rel=1e-6)
    torch.testing.assert_close(graph.edges, graph.positions[graph.first] - graph.positions[graph.second])


def test_pyg_round_trip(molecules: list[Molecule]) -> None:
    for molecule in molecules:
        back = from_pyg(to_pyg(molecule, 5.0))
        assert back.numbers.tolist() == molecule.numbers.tolist()
        assert np.array_equal(back.positions, molecule.positions)
    water = to_pyg(WATER, 5.0, y=np.arange(12.0))
    assert from_pyg(water, source="set.pt", index=7).name == "water"
    assert water.y.tolist() == [list(range(12))]
    assert water.z.tolist() == [8, 1, 1]
    assert water.is_undirected()
    assert water.edge_attr.flatten().tolist() == pytest.approx([0.9683, 0.9683, 0.9683, 1.52, 0.9683, 1.52], abs=1e-4)


def test_pyg_batch_is_the_same_graph_with_both_directions_of_a_pair(molecules: list[Molecule]) -> None:
    graph = make_graph(*molecules, cutoff=4.0)
    batch = Batch.from_data_list([to_pyg(molecule, 4.0) for molecule in molecules])
    assert torch.equal(batch.z, graph.numbers)
    assert torch.equal(batch.batch, graph.molecules)
    senders, receivers = batch.edge_index
    edges = list(zip(receivers.tolist(), senders.tolist(), strict=True))
    pairs = pair_list(graph)
    assert edges == sorted([*pairs, *((j, i) for i, j in pairs)])
    distances = dict(zip(pairs, graph.distances.tolist(), strict=True))
    expected = [distances[min(i, j), max(i, j)] for i, j in edges]
    assert batch.edge_attr[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("data", [Data(), Data(z=torch.tensor([1])), Data(pos=torch.zeros(1, 3))])
def test_pyg_data_without_atoms_is_refused(data: Data) -> None:
    with pytest.raises(ValueError, match=r"'z' .* and 'pos'"):
        from_pyg(data)


def test_pyg_data_of_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[n, 3\]"):
        from_pyg(Data(z=torch.tensor([1, 1]), pos=torch.zeros(2, 2)))
