"""Ways to damage the bytes of a file."""

from __future__ import annotations

import struct
from collections.abc import Callable

from hypothesis import strategies as st


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some ways to damage bytes, applied one after another."""
    steps = draw(st.lists(_STEPS, min_size=1, max_size=4))

    def apply(content: bytes) -> bytes:
        for kind, place, value in steps:
            content = _damaged(content, kind, place, value)
        return content

    return apply


_STEPS = st.tuples(
    st.sampled_from("flip flip flip cut drop insert number zeros".split()),
    st.floats(0, 1),
    st.integers(0, 255) | st.sampled_from([255, 127, 128, 0]),
)


def _damaged(content: bytes, kind: str, place: float, value: int) -> bytes:
    at = min(int(place * len(content)), max(0, len(content) - 1))
    before, after = content[:at], content[at:]
    if kind == "flip":
        return before + bytes([value]) + after[1:]
    if kind == "cut":
        return before
    if kind == "drop":
        return before + after[1 + value % 16 :]
    if kind == "insert":
        return before + bytes([value]) * (1 + value % 32) + after
    if kind == "number":  # a huge one in place of what was there
        huge = struct.pack("<q", (1 << (value % 63)) - 1)
        return before + huge + after[8:]
    return before + bytes(len(after[:64])) + after[64:]
