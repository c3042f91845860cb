# SPDX-License-Identifier: Apache-2.0
"""The friendships in a karate club, and on which side each member was when the club divided."""

from __future__ import annotations

import numpy as np

from .sources import ArraySource

# The friends of each of the 34 members, from 0 on, that have a larger number than the member: 78
# friendships. From: Wayne W. Zachary, "An Information Flow Model for Conflict and Fission in Small
# Groups", Journal of Anthropological Research 33 (1977), figure 3.
FRIENDS = {
    0: (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17, 19, 21, 31),
    1: (2, 3, 7, 13, 17, 19, 21, 30),
    2: (3, 7, 8, 9, 13, 27, 28, 32),
    3: (7, 12, 13),
    4: (6, 10),
    5: (6, 10, 16),
    6: (16,),
    8: (30, 32, 33),
    9: (33,),
    13: (33,),
    14: (32, 33),
    15: (32, 33),
    18: (32, 33),
    19: (33,),
    20: (32, 33),
    22: (32, 33),
    23: (25, 27, 29, 32, 33),
    24: (25, 27, 31),
    25: (31,),
    26: (29, 33),
    27: (33,),
    28: (31, 33),
    29: (32, 33),
    30: (32, 33),
    31: (32, 33),
    32: (33,),
}
# Who stayed with the instructor, who is member 0; the others followed the president, member 33.
INSTRUCTORS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 16, 17, 19, 21)
INSTRUCTOR, PRESIDENT, MEMBERS = 0, 33, 34


class KarateClub(ArraySource):
    """The whole club as one example: a single graph, of whose nodes some have a label.

    Fields: `graph`, a dict of `nodes`, int32 (34,), the number of each member, and `senders` and
    `receivers`, int32 (156,), each friendship in both directions; `side`, int32 (34,), 0 for the
    instructor's side, 1 for the president's, and -1 for a member whose label is not in the split.
    """

    def __init__(self, split: str):
        """Makes the graph.

        Args:
            split: 'train', in which only the instructor and the president have a label, or 'test',
                in which the 32 others have one.

        Raises:
            ValueError: if the split is unknown.
        """
        if split not in ('train', 'test'):
            raise ValueError(f"split: {split!r} is neither 'train' nor 'test'")
        is_leader = np.isin(np.arange(MEMBERS), (INSTRUCTOR, PRESIDENT))
        sides = np.where(np.isin(np.arange(MEMBERS), INSTRUCTORS), 0, 1)
        side = np.where(is_leader == (split == 'train'), sides, -1).astype(np.int32)
        graph = {name: x[None] for name, x in make_graph().items()}
        super().__init__({'graph': graph, 'side': side[None]})


def make_graph() -> dict[str, np.ndarray]:
    """Returns the fields of the graph: see `KarateClub`."""
    pairs = [(member, friend) for member, friends in FRIENDS.items() for friend in friends]
    one, other = np.array(pairs, np.int32).T
    return {
        'nodes': np.arange(MEMBERS, dtype=np.int32),
        'senders': np.concatenate([one, other]),
        'receivers': np.concatenate([other, one]),
    }
