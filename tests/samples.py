"""Molecules and networks that several test files share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qmprop.baseline import Baseline, center, compose
from qmprop.config import ModelConfig
from qmprop.datasets import Dataset, load_labeled
from qmprop.egnn import EGNN
from qmprop.graph import Graph, build_graph, concatenate
from qmprop.model import Model
from qmprop.molecule import Molecule
from qmprop.records import Domain
from qmprop.trust import Trust

#: Twenty molecules of QM9 with their reference values.
QM9_20 = Path(__file__).parent / "data" / "qm9_20.extxyz"
#: A network that is quick to build and to run.
TINY = ModelConfig(
    **{"node_width": 32, "message_width": 16, "refine_layers": 1, "layers": 2, "cutoff": 5.0, "radial": 8},
    **{"vectors": 4, "invariants": 4, "flows": 4, "heads": 4},
)
#: Standard deviation of every property over QM9, default units; of an energy without its free atoms.
SPREAD = {
    **{"mu": 1.50, "alpha": 8.17, "homo": 0.598, "lumo": 1.27, "gap": 1.28, "r2": 280.0, "zpve": 0.902, "cv": 4.07},
    **{"u0_atom": 10.3, "u_atom": 10.4, "h_atom": 10.5, "g_atom": 9.50},
}


def read_dataset() -> Dataset:
    return load_labeled(QM9_20)


def read_molecules() -> list[Molecule]:
    dataset = read_dataset()
    return [dataset.molecule(k) for k in range(len(dataset))]


def find_formula(formula: str) -> Molecule:
    """Return the first of the twenty molecules with this formula."""
    return next(molecule for molecule in read_molecules() if molecule.formula == formula)


def make_network(config: ModelConfig = TINY, *, seed: int = 0) -> EGNN:
    """Return a network with random weights, none of which is small or zero; it moves atoms by about 0.1 Å."""
    torch.manual_seed(seed)
    network = EGNN(config).eval()
    with torch.no_grad():
        for parameter in (*network.refiner.parameters(), *network.layers.parameters()):
            parameter.mul_(1.3)  # so that distant neighbors are felt as they are after training
        for parameter in (network.potentials.weight, network.polarization.weight):
            parameter.mul_(5.0)  # dipole moments of a few debye
        if config.refine_layers:
            torch.nn.init.normal_(network.shift.weight, std=0.16 * config.node_width**-0.5)
            torch.nn.init.normal_(network.shift.bias, std=0.04)
            torch.nn.init.normal_(network.unrest.weight, std=config.node_width**-0.5)
        for head in (network.sums, network.orbitals[-1]):
            torch.nn.init.normal_(head.weight, std=config.node_width**-0.5)
            torch.nn.init.normal_(head.bias, std=0.1)
    return network.requires_grad_(False)


def make_model(config: ModelConfig = TINY, *, seed: int = 0) -> Model:
    """Return a model with random weights and the baseline of the twenty molecules."""
    network = make_network(config, seed=seed)
    dataset = read_dataset()
    centered = center(dataset.numbers, dataset.positions, dataset.offsets)
    baseline = Baseline.fit(dataset.targets, compose(dataset.numbers, centered, dataset.offsets))
    network.scales.copy_(torch.from_numpy(baseline.scales))
    return Model(network, baseline)


def make_graph(*molecules: Molecule, cutoff: float = TINY.cutoff, dtype: torch.dtype = torch.float32) -> Graph:
    """Return the graph of molecules whose positions are taken as they are."""
    numbers, positions, offsets = concatenate(molecules)
    graph = build_graph(numbers, positions, offsets, cutoff)
    return replace(graph, positions=torch.from_numpy(positions).to(dtype))


def pair_up(*molecules: Molecule) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """Return numbers, positions, offsets and all pairs of atoms of one molecule closer than 5 Å: first and second."""
    numbers, positions, offsets = concatenate(molecules)
    graph = build_graph(numbers, positions, offsets, 5.0)
    return numbers, positions, offsets, graph.first.numpy(), graph.second.numpy()


def embed(smiles: str) -> tuple[Molecule, set[frozenset[int]]]:
    """Return a molecule at an MMFF94 minimum, and its bonds."""
    from rdkit import Chem
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(mol, randomSeed=1) == 0
    assert rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=5000) == 0
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    bonds = {frozenset((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())) for bond in mol.GetBonds()}
    return Molecule(numbers, mol.GetConformer().GetPositions()), bonds


def move(
    molecule: Molecule, *, by: tuple[float, float, float] = (0.0, 0.0, 0.0), turn: NDArray | None = None
) -> Molecule:
    """Return the molecule turned by a 3 x 3 matrix about the origin, then shifted (Å)."""
    positions = molecule.positions if turn is None else molecule.positions @ turn.T
    return replace(molecule, positions=positions + by)


def join(*molecules: Molecule) -> Molecule:
    """Return all atoms as one molecule."""
    numbers, positions, _ = concatenate(molecules)
    return Molecule(numbers, positions)


def random_rotation(seed: int = 0) -> NDArray[np.float64]:
    """Return a proper rotation matrix."""
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def alkane(carbons: int) -> Molecule:
    """Return an all-trans alkane of 3 n + 2 atoms along x."""
    k = np.arange(carbons)
    side = np.where(k % 2, 1.0, -1.0)
    spine = np.stack([1.27 * k, 0.42 * side, np.zeros(carbons)], axis=1)
    out = np.stack([np.zeros(carbons), 0.63 * side, np.full(carbons, 0.89)], axis=1)
    ends = (
        spine[[0, -1]]
        + np.array([[-0.89, 0.0, 0.0], [0.89, 0.0, 0.0]])
        - 0.63 * np.array([[0, 1, 0]]) * side[[0, -1], None]
    )
    positions = np.concatenate([spine, spine + out, spine + out * [1, 1, -1], ends])
    return Molecule(np.repeat([6, 1], [carbons, 2 * carbons + 2]), positions)


def judge_distance(trust: Trust, traits: NDArray[np.float32]) -> list[Domain]:
    """Return verdicts made from the distance to the training molecules alone."""
    return [Domain("out" if score > 1.0 else "in", score) for score in trust.scores(traits).tolist()]
