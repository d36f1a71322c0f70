"""Molecules to one batched neighbor graph with distance features; to and from PyTorch Geometric."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmprop.molecule import Molecule

if TYPE_CHECKING:
    from torch_geometric.data import Data

#: Up to this many atoms all pairs of a molecule are compared at once; larger ones go through a k-d tree.
_DENSE_ATOMS: Final = 64
_TENSORS: Final = ("numbers", "positions", "first", "second", "molecules")


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """M molecules of N atoms in all as one graph of P pairs of neighbors.

    Attributes:
        numbers: Atomic numbers, int64 [N].
        positions: In Å, float32 or float64 [N, 3].
        first: Atom i of each pair, ascending, int64 [P].
        second: Atom j > i of each pair, int64 [P].
        molecules: Index of each atom's molecule, ascending, int64 [N].
        molecule_count: M.
    """

    numbers: Tensor
    positions: Tensor
    first: Tensor
    second: Tensor
    molecules: Tensor
    molecule_count: int

    def to(self, device: torch.device | str) -> Graph:
        """Return the same graph on another device, which fetches it by itself where it is pinned."""
        positions = self.positions.float() if torch.device(device).type == "mps" else self.positions  # no float64
        return dataclasses.replace(self, positions=positions)._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Graph:
        """Return the same graph in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Graph:
        tensors: dict[str, Any] = {name: change(getattr(self, name)) for name in _TENSORS}
        return dataclasses.replace(self, **tensors)

    @property
    def edges(self) -> Tensor:
        """x_i - x_j in Å [P, 3]."""
        return self.positions[self.first] - self.positions[self.second]

    @property
    def distances(self) -> Tensor:
        """|x_i - x_j| in Å [P]."""
        norms: Tensor = torch.linalg.vector_norm(self.edges, dim=1)
        return norms

    @property
    def squared_distances(self) -> Tensor:
        """|x_i - x_j|^2 in Å^2 [P]."""
        return self.edges.square().sum(dim=1)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """Return what `EGNN.forward` takes."""
        return (self.numbers, self.positions, self.first, self.second, self.molecules, self.molecule_count)


def build_graph(
    numbers: NDArray[np.integer[Any]],
    positions: NDArray[np.floating[Any]],
    offsets: NDArray[np.int64],
    cutoff: float,
) -> Graph:
    """Connect all pairs of atoms of the same molecule that are closer than the cut-off.

    Cost and memory grow linearly with the number of atoms at a given density.

    Args:
        numbers: Atomic numbers [N].
        positions: In Å, finite, float64 or, each molecule centered, float32 [N, 3].
        offsets: Molecule k owns the atoms offsets[k]:offsets[k + 1] [M + 1].
        cutoff: In Å.
    """
    sizes = np.diff(offsets)
    small = sizes <= _DENSE_ATOMS
    found = [_dense_pairs(positions, offsets[:-1][small], sizes[small], cutoff)]
    found += [_tree_pairs(positions, int(offsets[k]), int(sizes[k]), cutoff) for k in np.flatnonzero(~small)]
    first, second = np.concatenate(found, axis=1) if len(found) > 1 else found[0]
    if len(found) > 1:
        order = np.argsort(first, kind="stable")
        first, second = first[order], second[order]
    return Graph(
        torch.from_numpy(np.asarray(numbers, dtype=np.int64)),
        torch.from_numpy(np.asarray(positions)),
        torch.from_numpy(first),
        torch.from_numpy(second),
        torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        len(sizes),
    )


def _dense_pairs(
    positions: NDArray[np.floating[Any]], starts: NDArray[np.int64], sizes: NDArray[np.int64], cutoff: float
) -> NDArray[np.int64]:
    """Pairs within molecules of few atoms, by one padded block of all distances: [2, P], the first ascending."""
    if len(sizes) == 0:
        return np.zeros((2, 0), dtype=np.int64)
    slots = np.arange(sizes.max())
    present = slots < sizes[:, None]
    atoms = np.where(present, starts[:, None] + slots, starts[:, None])
    block = positions[atoms]
    squares = np.zeros(block.shape[:2] + block.shape[1:2], dtype=block.dtype)
    for axis in range(3):
        squares += np.square(block[:, :, None, axis] - block[:, None, :, axis])
    close = (squares < cutoff * cutoff) & present[:, :, None] & present[:, None, :] & (slots[:, None] < slots)
    molecule, first, second = np.nonzero(close)
    return np.stack([starts[molecule] + first, starts[molecule] + second])


def _tree_pairs(positions: NDArray[np.floating[Any]], start: int, size: int, cutoff: float) -> NDArray[np.int64]:
    """Pairs within one large molecule: [2, P], the first ascending."""
    from scipy.spatial import cKDTree

    points = positions[start : start + size]
    pairs = cKDTree(points).query_pairs(cutoff, output_type="ndarray").astype(np.int64).T + start
    ordered: NDArray[np.int64] = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    return ordered


def concatenate(
    molecules: Sequence[Molecule],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Return atomic numbers [N], positions in Å [N, 3] and offsets [M + 1] of molecules laid end to end."""
    offsets = np.concatenate([[0], np.cumsum([len(molecule.numbers) for molecule in molecules])]).astype(np.int64)
    numbers = np.concatenate([molecule.numbers for molecule in molecules])
    return numbers, np.concatenate([molecule.positions for molecule in molecules]), offsets


def to_pyg(molecule: Molecule, cutoff: float, y: NDArray[np.float64] | None = None) -> Data:
    """Return a molecule as `torch_geometric.data.Data`.

    Args:
        molecule: The molecule.
        cutoff: In Å.
        y: Properties to attach [12].

    Returns:
        Data with z [n], pos in Å [n, 3], edge_index [2, E] (row 0 the sender, row 1 the receiver), edge_attr the
        distances in Å [E, 1] and, if given, y [1, 12].
    """
    from torch_geometric.data import Data

    offsets = np.array([0, len(molecule.numbers)], dtype=np.int64)
    graph = build_graph(molecule.numbers, molecule.positions, offsets, cutoff)
    receivers, senders = torch.cat([graph.first, graph.second]), torch.cat([graph.second, graph.first])
    order = torch.argsort(receivers * len(molecule.numbers) + senders)
    data = Data(
        z=graph.numbers,
        pos=torch.from_numpy(molecule.positions.copy()),
        edge_index=torch.stack([senders[order], receivers[order]]),
        edge_attr=graph.distances.repeat(2)[order, None].float(),
    )
    if y is not None:
        data.y = torch.as_tensor(y, dtype=torch.float64)[None]
    if molecule.name is not None:
        data.name = molecule.name
    return data


def from_pyg(data: Data, *, source: str = "-", index: int = 0) -> Molecule:
    """Return the molecule of a `torch_geometric.data.Data` with z and pos in Å.

    Raises:
        ValueError: z or pos is missing or of the wrong shape.
    """
    if getattr(data, "z", None) is None or getattr(data, "pos", None) is None:
        raise ValueError("a PyTorch Geometric molecule needs 'z' (atomic numbers, [n]) and 'pos' (Å, [n, 3])")
    name = getattr(data, "name", None)
    return Molecule(
        data.z.detach().cpu().numpy(),
        data.pos.detach().cpu().numpy(),
        name=name if isinstance(name, str) else None,
        source=source,
        index=index,
    )
