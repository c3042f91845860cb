# SPDX-License-Identifier: Apache-2.0
"""Molecules as graphs: the files of the project, their splits, and files of one's own."""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from trainer.data import karate, sdf, smiles
from trainer.data.graphs import GraphSource
from trainer.data.molecules import FILE, KINDS, SPLITS, Molecules, read
from trainer.data.solubility import Solubility

# Ethanol, and nitromethane with and without charges.
TABLES = """ethanol
  of no program

  3  2  0  0  0  0            999 V2000
    0.0000    0.0000    0.0000 C   0  0
    1.0000    0.0000    0.0000 C   0  0
    2.0000    0.0000    0.0000 O   0  0
  1  2  1  0
  2  3  1  0
M  END
> <NAME>
ethanol

> <SOL>
1.10

$$$$
charged

 comment
  4  3  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    1.0000    0.0000    0.0000 N   0  0  0  0  0  0  0  0  0  0  0  0
    2.0000    1.0000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
    2.0000   -1.000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  2  3  2  0
  2  4  1  0
M  CHG  2   2   1   4  -1
M  END
>  <SOL>  (2)
0.26

$$$$
uncharged


  4  3  0  0  0  0            999 V2000
    0.0000    0.0000    0.0000 C   0  0
    1.0000    0.0000    0.0000 N   0  0
    2.0000    1.0000    0.0000 O   0  0
    2.0000   -1.000    0.0000 O   0  0
  1  2  1  0
  2  3  2  0
  2  4  2  0
M  END
>  <SOL>  (3)
0.26

$$$$
"""


def describe(graph: Any, module: Any) -> list[list[dict[str, Any]]]:
    """Returns the values of all features of atoms, and those of bonds."""
    return [
        [
            {name: values[i] for (name, values), i in zip(features.items(), row, strict=True)}
            for row in rows.tolist()
        ]
        for rows, features in (
            (graph.atoms, module.ATOM_FEATURES),
            (graph.bonds, module.BOND_FEATURES),
        )
    ]


def test_the_molecules_of_the_splits() -> None:
    """Fixed: the ids are those of the file."""
    file = read(FILE)
    assert len(file.smiles) == len(set(file.smiles)) == 7805
    assert (file.labels['bbb'] == 1).sum() == 4956 and (file.labels['bbb'] == 0).sum() == 2849
    assert np.isfinite(file.labels['logbb']).sum() == 1058
    for kind in KINDS:
        assert np.bincount(file.splits[kind]).tolist() == [6244, 780, 781]
    found = {}
    for kind in KINDS:
        names = [[each['smiles'] for each in Molecules(split, kind=kind)] for split in SPLITS]
        assert sorted(itertools.chain(*names)) == sorted(file.smiles)
        found[kind] = hashlib.sha256('\n'.join(names[2]).encode()).hexdigest()[:8]
    assert found == {'random': '77827d13', 'scaffold': 'a3bf104c'}


def test_an_example_has_each_bond_in_both_directions() -> None:
    example = Molecules('train', limit=1)[0]
    bonds = len(example['edges']) // 2
    np.testing.assert_array_equal(example['senders'][:bonds], example['receivers'][bonds:])
    np.testing.assert_array_equal(example['receivers'][:bonds], example['senders'][bonds:])
    np.testing.assert_array_equal(example['edges'][:bonds], example['edges'][bonds:])
    assert example['nodes'].dtype == example['edges'].dtype == example['senders'].dtype == np.int32
    assert example['bbb'].dtype == np.int32 and example['logbb'].dtype == np.float32


def test_a_few_molecules_have_all_decisions() -> None:
    for kind in KINDS:
        assert {int(each['bbb']) for each in Molecules('train', kind=kind, limit=20)} == {0, 1}


def test_features_have_an_index_in_their_table() -> None:
    for module, items in ((smiles, Molecules('test')), (sdf, Solubility('test'))):
        batch = GraphSource(items).collate([items[i] for i in range(len(items))], len(items) + 1)
        assert (batch['graph'].nodes.max(0) < module.ATOM_SIZES).all()
        assert (batch['graph'].edges.max(0) < module.BOND_SIZES).all()


def test_tables_of_atoms_and_bonds() -> None:
    ethanol, charged, uncharged = sdf.parse(TABLES)
    assert ethanol.fields == {'NAME': 'ethanol', 'SOL': '1.10'}
    atoms, bonds = describe(ethanol.graph, sdf)
    assert atoms == [
        {'element': 'C', 'degree': 1, 'charge': 0, 'valence': 1},
        {'element': 'C', 'degree': 2, 'charge': 0, 'valence': 2},
        {'element': 'O', 'degree': 1, 'charge': 0, 'valence': 1},
    ]
    assert bonds == [{'order': 1}, {'order': 1}]
    assert ethanol.graph.ends.tolist() == [[0, 1], [1, 2]]
    for one, other in zip(charged.graph, uncharged.graph, strict=True):
        np.testing.assert_array_equal(one, other)
    atoms, bonds = describe(charged.graph, sdf)
    assert atoms[1] == {'element': 'N', 'degree': 3, 'charge': 0, 'valence': 5}
    # Lines may end as on Windows.
    assert len(sdf.parse(TABLES.replace('\n', '\r\n'))) == 3
    with pytest.raises(ValueError, match='molecule 2 of the file cannot be read'):
        sdf.parse(TABLES.replace('  4  3  0  0  0  0  0', '  x  3  0  0  0  0  0'))


def test_solubility_of_a_file_of_one_s_own(tmp_path: pathlib.Path) -> None:
    for split, n in (('train', 1025), ('test', 257)):
        assert len(items := Solubility(split)) == n
    assert items[0]['name'] == '3-methylpentane'
    assert items[0]['solubility'] == np.float32(-3.68)
    (tmp_path / 'mine-test.sdf').write_text(TABLES)
    items = Solubility('test', path=str(tmp_path / 'mine-{split}.sdf'))
    assert [each['solubility'] for each in items] == [np.float32(x) for x in (1.1, 0.26, 0.26)]
    with pytest.raises(ValueError, match=r'mine-train\.sdf cannot be read'):
        Solubility('train', path=str(tmp_path / 'mine-{split}.sdf'))
    (tmp_path / 'mine-test.sdf').write_text(TABLES.replace('<SOL>  (2)', '<LOG>'))
    with pytest.raises(ValueError, match='molecule 2 has no field SOL'):
        Solubility('test', path=str(tmp_path / 'mine-{split}.sdf'))


def test_mistakes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'val', 'random'; expected one of train, dev, test"):
        Molecules('val')
    with pytest.raises(ValueError, match='is no file of molecules'):
        Molecules('train', path=str(tmp_path / 'none.npz'))
    (tmp_path / 'text.npz').write_text('text')
    with pytest.raises(ValueError, match='is no file of molecules'):
        Molecules('train', path=str(tmp_path / 'text.npz'))


def test_without_rdkit_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'rdkit', None)
    with pytest.raises(ValueError, match='install it with: pip install rdkit'):
        smiles.to_graph('CCO')


def test_graphs_of_smiles() -> None:
    """Features are those of rdkit: ethanol, and an amino acid with a stereocenter."""
    pytest.importorskip('rdkit', reason='needs the package rdkit')
    atoms, bonds = describe(smiles.to_graph('CCO'), smiles)
    chain = {'charge': 0, 'hybridization': 'SP3', 'is_aromatic': 0, 'ring_size': 0, 'chirality': ''}
    assert atoms == [
        {'element': 'C', 'degree': 1, 'hydrogens': 3, **chain},
        {'element': 'C', 'degree': 2, 'hydrogens': 2, **chain},
        {'element': 'O', 'degree': 1, 'hydrogens': 1, **chain},
    ]
    single = {'order': 'SINGLE', 'is_conjugated': 0, 'is_in_ring': 0, 'stereo': ''}
    assert bonds == [single, single]
    atoms, bonds = describe(smiles.to_graph('[NH3+][C@@H](Cc1ccccc1)C(=O)[O-]'), smiles)
    assert [atom['charge'] for atom in atoms] == [1, *[0] * 10, -1]
    assert [atom['chirality'] for atom in atoms][1] == 'S'
    assert sum(atom['is_aromatic'] for atom in atoms) == 6
    assert [atom['ring_size'] for atom in atoms].count(6) == 6
    assert [bond['order'] for bond in bonds].count('AROMATIC') == 6
    with pytest.raises(ValueError, match="'C1CC' is no molecule"):
        smiles.to_graph('C1CC')


def test_the_graphs_of_the_file_are_those_of_rdkit() -> None:
    pytest.importorskip('rdkit', reason='needs the package rdkit')
    file = read(FILE)
    for i in range(0, 7805, 400):
        for one, other in zip(smiles.to_graph(file.smiles[i]), file.graphs[i], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_no_scaffold_is_in_two_splits() -> None:
    pytest.importorskip('rdkit', reason='needs the package rdkit')
    scaffolds = [
        {smiles.find_scaffold(each['smiles']) for each in Molecules(split, kind='scaffold')}
        for split in SPLITS
    ]
    assert all(scaffolds) and not scaffolds[0] & scaffolds[1] and not scaffolds[1] & scaffolds[2]
    assert not scaffolds[0] & scaffolds[2]


@pytest.mark.slow
def test_a_table_of_one_s_own(tmp_path: pathlib.Path) -> None:
    """The command of the page. A label may be missing; decisions are 0 or 1."""
    pytest.importorskip('rdkit', reason='needs the package rdkit')
    rows = [f'{"C" * n}O\t{n % 2}\t{n / 2 if n % 3 else ""}' for n in range(1, 31)]
    (tmp_path / 'mine.tsv').write_text('\n'.join(['SMILES\tis_odd\tnumber', *rows]) + '\n')
    line = [sys.executable, '-m', 'trainer.data.smiles', 'mine.tsv', 'mine.npz']
    # rdkit may be anywhere that this process finds it.
    variables = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    options = {'cwd': tmp_path, 'env': variables, 'text': True}
    printed = subprocess.run(line, check=True, capture_output=True, **options).stdout
    assert printed == '30 molecules, labels: is_odd, number\n'
    parts = [Molecules(split, path=str(tmp_path / 'mine.npz')) for split in SPLITS]
    assert [len(part) for part in parts] == [24, 3, 3]
    for example in (part[i] for part in parts for i in range(len(part))):
        length = example['smiles'].count('C')
        assert example['is_odd'] == length % 2 and example['is_odd'].dtype == np.int32
        expected = np.float32(length / 2 if length % 3 else np.nan)
        np.testing.assert_equal(example['number'], expected)


def test_a_table_with_a_broken_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'mine.tsv').write_text('SMILES\tis_odd\nCCO\n')
    with pytest.raises(ValueError, match='line 2 is not SMILES and is_odd, with tabs'):
        smiles.read_table(str(tmp_path / 'mine.tsv'))


def test_the_karate_club_is_that_of_networkx() -> None:
    networkx = pytest.importorskip('networkx', reason='needs the package networkx')
    club = networkx.karate_club_graph()
    graph = karate.make_graph()
    ends = zip(graph['senders'].tolist(), graph['receivers'].tolist(), strict=True)
    assert sorted(ends) == sorted([*club.edges, *((b, a) for a, b in club.edges)])
    sides = [i for i, each in club.nodes.items() if each['club'] == 'Mr. Hi']
    assert list(karate.INSTRUCTORS) == sides


def test_labels_of_the_karate_club() -> None:
    [train] = karate.KarateClub('train').gather(np.array([0]))['side']
    [test] = karate.KarateClub('test').gather(np.array([0]))['side']
    assert train[[0, 33]].tolist() == [0, 1] and (train >= 0).sum() == 2
    assert (test >= 0).sum() == 32 and not ((train >= 0) & (test >= 0)).any()
    assert len(karate.make_graph()['senders']) == 2 * 78
    with pytest.raises(ValueError, match="'dev' is neither"):
        karate.KarateClub('dev')
