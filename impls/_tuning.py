"""The tiles that FPX_TUNE=1 (``fpxbench run --tune``) times for a layer and a number of tokens.

Each was the fastest for some product on an H200, or close to it. The result goes to the user's own table (`_tiles`),
and is used for every layer to which the tuned one is the nearest.
"""

from __future__ import annotations

from fpxbench.impls._tiles import AnyTile, StreamTile, Tile, TileDevice, m_class

FEW = (Tile(8, 1, 1, 4, 1), Tile(8, 1, 1, 4, 2), Tile(8, 1, 1, 8, 1), Tile(8, 1, 2, 4, 2), Tile(8, 2, 1, 2, 1),
       Tile(8, 2, 1, 2, 2), Tile(8, 2, 1, 4, 1), Tile(8, 2, 1, 4, 2), Tile(8, 2, 1, 8, 1), Tile(8, 2, 1, 8, 2),
       Tile(8, 2, 2, 2, 1), Tile(8, 2, 2, 4, 1), Tile(8, 2, 4, 2, 2), Tile(8, 4, 1, 4, 1), Tile(8, 4, 2, 4, 1))
UP_TO_16 = (Tile(16, 1, 1, 4, 2), Tile(16, 1, 1, 4, 1, True), Tile(16, 1, 1, 4, 2, True), Tile(16, 1, 2, 4, 1, True),
            Tile(16, 1, 2, 4, 2, True), Tile(16, 2, 1, 4, 1, True), Tile(16, 2, 1, 4, 2, True),
            Tile(16, 2, 1, 8, 2, True), Tile(16, 2, 2, 2, 1, True), Tile(16, 2, 2, 2, 2, True),
            Tile(16, 2, 2, 4, 1, True), Tile(16, 2, 4, 2, 1, True))
FRAGMENTS = {
    32: (Tile(32, 1, 1, 8, 1, True), Tile(32, 1, 2, 4, 1, True), Tile(32, 2, 2, 4, 1, True)),
    64: (Tile(64, 1, 2, 4, 1, True), Tile(64, 1, 1, 8, 1, True), Tile(64, 2, 2, 4, 1, True)),
    128: (Tile(64, 2, 4, 2, 1, True), Tile(64, 2, 2, 4, 1, True)),
}
# block_m, block_n, warps, chunk, programs at once, split, and group, teams and slices where they are not 8, 1 and 1
STREAMS = {
    16: ((16, 128, 4, 2, 2, True), (16, 256, 8, 2, 1, True), (16, 64, 4, 2, 2, True)),
    32: ((32, 64, 4, 2, 2, True), (32, 64, 4, 2, 2, False), (32, 128, 4, 2, 2, True), (32, 128, 8, 2, 1, True),
         (32, 64, 4, 4, 2, True), (32, 256, 8, 2, 1, True), (32, 64, 4, 2, 1, False, 8, 2)),
    64: ((64, 64, 4, 2, 2, True), (64, 64, 4, 2, 2, False), (64, 128, 4, 2, 2, True), (64, 128, 8, 2, 1, True),
         (64, 128, 8, 2, 1, False), (64, 256, 8, 2, 1, True), (64, 256, 8, 2, 1, False), (32, 64, 4, 2, 2, False),
         (64, 64, 4, 2, 1, False, 8, 2), (32, 64, 4, 2, 1, False, 8, 2)),
    128: ((64, 64, 4, 2, 2, True), (64, 64, 4, 2, 2, False), (64, 128, 4, 1, 2, False), (128, 128, 8, 2, 1, True),
          (128, 256, 8, 1, 1, True), (128, 64, 4, 1, 2, False), (64, 64, 4, 2, 1, False, 8, 2),
          (128, 64, 4, 1, 1, False, 8, 2), (128, 128, 4, 1, 1, True, 8, 1, 2)),
    256: ((64, 128, 4, 1, 2, False), (128, 128, 8, 2, 1, True), (128, 128, 8, 2, 1, False), (128, 256, 8, 1, 1, True),
          (128, 128, 4, 1, 2, True), (128, 128, 4, 1, 2, False), (128, 64, 4, 1, 1, False, 8, 2),
          (64, 128, 4, 2, 1, False, 8, 1, 2), (128, 128, 4, 1, 1, False, 8, 1, 2), (128, 128, 4, 1, 1, True, 8, 1, 2)),
    512: ((128, 128, 8, 2, 1, True), (128, 128, 8, 2, 1, False), (128, 128, 4, 1, 2, True), (128, 256, 8, 1, 1, True),
          (256, 128, 8, 1, 1, True), (256, 128, 8, 1, 1, True, 4), (128, 128, 4, 1, 2, False),
          (128, 128, 4, 1, 1, True, 8, 1, 2), (128, 192, 4, 1, 1, False, 8, 1, 3)),
}


def candidates(m: int, bits: int, scaling: str, device: TileDevice) -> list[AnyTile]:
    """Return the tiles worth trying for M rows of x and codes of `bits` bits."""
    most = m_class(m)
    if most is not None and most <= 8:
        tiles: tuple[Tile, ...] = FEW
    else:
        tiles = UP_TO_16 if most == 16 else FRAGMENTS.get(most or 0, FRAGMENTS[128])
    if not device.stream or scaling == "fp32" or (most is not None and most <= 8):
        return list(tiles)
    streams = [StreamTile.with_all_stages(bits, *options) for options in STREAMS.get(most or 0, STREAMS[512])]
    return [*(tiles if most is not None and most <= 64 else ()), *filter(None, streams)]
